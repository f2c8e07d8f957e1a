"""Stage 2: train the final detector from scratch on what stage 1 kept.

    python stage2_train.py                                      continues runs/demo
    python stage2_train.py --run runs/NAME --train-on all       for comparison: without purification

The training is stage 1's with K = 1. `--train-on clean` uses the labels, an upper bound. Before this script you may
edit RUN/<category>/purified.txt by hand: stage 2 trains on the images that it lists.
"""

import dataclasses
from pathlib import Path

import jax

from llb.checkpoint import check_finished
from llb.config import DEMO_FINAL_STEPS, FINAL_STEPS, Stage2, parse_flags
from llb.console import run_script, say
from llb.data import Dataset
from llb.device import start_jax
from llb.features import make_encode
from llb.files import UserError, typed
from llb.lock import hold
from llb.manifest import stage1_command
from llb.run import (
    Stage,
    begin_stage2,
    fetch_features,
    final_checkpoints,
    find_run,
    load_datasets,
    read_run,
    run_encoder,
    stage_training,
)
from llb.tables import Choice, choose_images, stage1_finished
from llb.train import Submodels, check_memory, submodel_keys, train


def main() -> None:
    settings = parse_flags(Stage2)
    say(start_jax(settings))
    run = find_run(settings.run)
    readers = ("evaluate",) if settings.overwrite else ()  # of what it deletes
    with hold(run, f"stage2-{settings.train_on}", against=("stage1", *readers)):
        run_stage2(run, settings)


def run_stage2(run: Path, settings: Stage2) -> None:
    """Train the final detector of every category."""
    config = read_run(run)
    # ---- settings that are not given are stage 1's ----
    settings = dataclasses.replace(
        settings,
        steps=settings.steps or (DEMO_FINAL_STEPS if config["data"] is None else FINAL_STEPS),
        batch_size=settings.batch_size or config["batch_size"],
        learning_rate=settings.learning_rate or config["learning_rate"],
    )

    # ---- choose the images of every category, so that errors end the script before any training ----
    datasets = load_datasets(run, config, settings.verify)
    choices = []
    for dataset in datasets:
        folder = run / dataset.category
        if not stage1_finished(folder):
            problem = f"stage 1 is not finished for {dataset.category}"
            raise UserError(f"--run {run}: {problem}; continue with: {stage1_command(run, config)}")
        choices.append(choose_images(settings.train_on, folder, dataset))
    encoder = run_encoder(run, config)
    training = stage_training(encoder, config | vars(settings))
    check_memory(training, encoder, 1)
    begin_stage2(run, settings, config["categories"])

    stage = Stage(run, settings, encoder, make_encode(encoder), training)
    for dataset, choice in zip(datasets, choices):
        stage2(stage, dataset, choice, config["seed"])
    say(f"next: python evaluate.py --run {typed(run)}")


def stage2(stage: Stage, dataset: Dataset, choice: Choice, seed: int) -> None:
    """Train one final detector on the chosen images of one category."""
    name, train_on = dataset.category, stage.settings.train_on
    at = final_checkpoints(stage.run, dataset, train_on, choice.indices)
    if check_finished(at, stage.training.steps):
        say(f"{name}: stage 2 on {train_on} is finished ({at.folder}); --overwrite trains again")
        return
    say(f"{name}: training on {len(choice.indices)} of {len(dataset.train)} images ({train_on})")
    if choice.note:
        say(f"{name}: {choice.note}")

    fetch = fetch_features(stage, dataset, "train")
    # "from scratch" means new weights and a new order as well: 2, since stage 1's split uses branches 0 and 1
    key = jax.random.fold_in(jax.random.key(seed), 2)
    submodel = Submodels([choice.indices], submodel_keys(key, 1))
    train(stage.training, fetch, submodel, at, f"{name}, {train_on}")


if __name__ == "__main__":
    run_script(main)
