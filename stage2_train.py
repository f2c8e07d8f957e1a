"""Stage 2: train the final detector from scratch on what stage 1 kept.

    python stage2_train.py                                      continues runs/demo: purified, all and clean
    python stage2_train.py --run runs/NAME --train-on all       for comparison: without purification
    python stage2_train.py --detector padim                     another detector on the same images
    python stage2_train.py --train-on reviewed                  with what a person said of the suspects (llb/marks.py)

The training is stage 1's with K = 1. Your images are trained on as purified, if nothing else is said; the demo set is
trained on three times, to compare: `all` skips the purification, `clean` uses the labels, an upper bound. Before this
script you may edit RUN/<category>/purified.txt by hand: `purified` is what it lists.
"""

import dataclasses
from pathlib import Path

import jax

from llb.checkpoint import (
    CheckpointFolder,
    Params,
    check_finished,
    open_checkpoints,
    restore_finished,
    save_finished,
)
from llb.config import Stage2
from llb.console import run_script, say
from llb.data import Dataset
from llb.defaults import resolve_final
from llb.detectors import is_trained
from llb.detectors.released import read_released
from llb.device import start_jax
from llb.encoders.weights import weights_digest
from llb.files import UserError
from llb.fit import learn
from llb.flags import parse_flags
from llb.learning import loss_file, write_losses
from llb.lock import CHANGERS, hold
from llb.marks import WITHOUT_MARKS, choose_images
from llb.processes import agreed
from llb.protocols import steps_of
from llb.run import begin_stage2, final_checkpoints, find_run, load_datasets, read_run, run_encoder
from llb.runfiles import final_name, next_command, own_config, stage1_command
from llb.stage import Stage, check_step, keep_head, load_features, make_stage
from llb.tables import Choice, stage1_finished
from llb.times import timed
from llb.train import Submodels, seen_steps, submodel_keys


def main() -> None:
    settings = parse_flags(Stage2)
    device = start_jax(settings)
    say(device)
    run = find_run(settings)
    readers = ("evaluate",) if settings.overwrite else ()  # of what it deletes
    for train_on in lists_to_train_on(run, settings):
        # two final detectors on the same images take turns
        with hold(run, f"stage2-{train_on}", against=(*CHANGERS, *readers)):
            run_stage2(run, dataclasses.replace(settings, train_on=train_on), device)
    say(f"next: {next_command('evaluate.py', run, settings)}")


def lists_to_train_on(run: Path, settings: Stage2) -> tuple[str, ...]:
    """--train-on if given. Else purified, all and clean on the demo set, which is there to compare; else purified."""
    if settings.train_on is not None:
        return (settings.train_on,)
    demo = own_config(run, f"--run {run}")["data"] is None
    return WITHOUT_MARKS if demo and not settings.released else ("purified",)


def run_stage2(run: Path, settings: Stage2, device: str) -> None:
    """Train the final detector of every category. settings: with a --train-on; device: of `start_jax`."""
    config = read_run(run, device)
    settings = resolve_final(settings, config)  # what is not given is stage 1's
    final = final_name(settings.train_on, settings.detector, config)

    # ---- choose the images of every category, so that errors end the script before any training ----
    datasets = load_datasets(run, config, settings)
    choices, steps = [], {}
    for dataset in datasets:
        folder = run / dataset.category
        if not stage1_finished(folder):
            problem = f"stage 1 is not finished for {dataset.category}"
            raise UserError(f"--run {run}: {problem}; continue with: {stage1_command(run, config)}")
        choices.append(choose_images(settings.train_on, folder, dataset))
        passes, images = settings.passes, len(choices[-1].indices)
        steps[dataset.category] = steps_of(passes, images, settings.batch_size) if passes else settings.steps
    encoder = run_encoder(run, config)
    stage = make_stage(run, settings, encoder, config | vars(settings), final)
    released = None
    if settings.released:
        released = read_released(settings.released, stage.setup)
        if not stage.setup.spec.release:
            say("note: the release interpolates the encoder's positions otherwise; with --protocol llb does so, too")
    else:
        check_step(stage.setup, 1)
    begin_stage2(run, settings, final, steps, released and weights_digest(released))

    for dataset, choice in zip(datasets, choices):
        own = dataclasses.replace(stage.setup, steps=steps[dataset.category])
        with timed(run, dataset.category, f"stage 2, {final}", anew=settings.overwrite):
            stage2(dataclasses.replace(stage, setup=own), dataset, choice, config["seed"], released)


def stage2(stage: Stage, dataset: Dataset, choice: Choice, seed: int, released: Params | None) -> None:
    """Train one final detector on the chosen images of one category. released: of `read_released`, in its place."""
    name, final = dataset.category, stage.final
    at = final_checkpoints(stage.run, dataset, final, choice)
    if check_finished(at, stage.setup.steps):
        say(f"{name}: stage 2 on {final} is finished ({at.folder}); --overwrite trains again")
        keep_losses(stage, name, at)
        keep_head(stage, dataset, at, seed)
        return
    if released:
        save_finished(at, stage.setup.steps, jax.tree.map(lambda leaf: leaf[None], released))  # K = 1
        say(f"{name}: the final detector is {stage.settings.released}")
        keep_head(stage, dataset, at, seed)
        return
    say(f"{name}: training on {len(choice.indices)} of {len(dataset.train)} images ({final})")
    if choice.note:
        say(f"{name}: {choice.note}")

    features = load_features(stage, dataset, "train")
    # "from scratch" means new weights and a new order as well: 2, since stage 1's split uses branches 0 and 1
    key = jax.random.fold_in(jax.random.key(seed), 2)
    submodel = Submodels([choice.indices], submodel_keys(key, 1))
    learn(stage.setup, features, submodel, at, f"{name}, {final}")
    keep_losses(stage, name, at)
    keep_head(stage, dataset, at, seed)


def keep_losses(stage: Stage, name: str, at: CheckpointFolder) -> None:
    """loss-<final>.csv, of what the finished checkpoint holds: so a command that was killed before it loses nothing."""
    folder, final = stage.run / name, stage.final
    if is_trained(stage.setup.detector) and not agreed((folder / loss_file(final)).exists()):
        with open_checkpoints(at.folder) as checkpoints:
            _, seen = restore_finished(checkpoints)
        if seen is not None:
            write_losses(folder, final, seen_steps(stage.setup, 1), seen[0, :, 0])


if __name__ == "__main__":
    run_script(main)
