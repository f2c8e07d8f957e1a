"""Stage 2: train the final detector from scratch on what stage 1 kept.

    python stage2_train.py                                      goes on with runs/demo
    python stage2_train.py --run runs/NAME --train-on all       for comparison: without purification

The training is stage 1's with K = 1. `--train-on clean` goes by the labels, an upper bound. RUN/<category>/purified.txt
may be edited by hand before: what it lists is what is trained on.
"""

from pathlib import Path
from typing import Any

import jax

from llb.checkpoint import digest_of, finished
from llb.config import EMBEDDED_FINAL_STEPS, FINAL_STEPS, Stage2, parse
from llb.console import choose_device, run, say
from llb.data import Dataset
from llb.encoder import Encoder
from llb.features import Encode, make_encode
from llb.files import UserError
from llb.optimizer import RECIPES
from llb.processes import first, first_ahead
from llb.run import (
    clear_stage2,
    finished_stage1,
    load_dataset,
    make_fetch,
    read_run,
    record_stage2,
    run_encoder,
    training_choice,
)
from llb.train import Training, make_training, submodel_keys, train


def main() -> None:
    settings = parse(Stage2)
    say(choose_device(settings))
    out, config = read_run(settings.run)
    # ---- what is not given is stage 1's ----
    default_steps = EMBEDDED_FINAL_STEPS if config["data"] is None else FINAL_STEPS
    settings.steps = settings.steps or default_steps
    settings.batch_size = settings.batch_size or config["batch_size"]
    settings.learning_rate = settings.learning_rate or config["learning_rate"]

    # ---- which images: found out, and checked, for every category before any training begins ----
    datasets = [load_dataset(out, config, name) for name in config["categories"]]
    choices = []
    for dataset in datasets:
        if not finished_stage1(out / dataset.category):
            raise UserError(
                f"--run {out}: stage 1 is not finished for {dataset.category}; go on with: {config['command']}"
            )
        choices.append(training_choice(settings.train_on, out / dataset.category, dataset))
    encoder = run_encoder(out, config)
    with first_ahead("record"):
        if settings.overwrite and first():
            for dataset in datasets:
                clear_stage2(out, dataset.category, settings.train_on)
        record_stage2(out, settings)

    recipe = RECIPES[config["recipe"]]
    training = make_training(
        encoder, recipe, settings.learning_rate, config["dropout"], settings.steps, settings.batch_size
    )
    encode = make_encode(encoder)
    for dataset, (chosen, note) in zip(datasets, choices):
        stage2(dataset, chosen, note, settings, config, out, encoder, encode, training)
    say(f"next: python evaluate.py --run {out}")


def stage2(
    dataset: Dataset,
    chosen,
    note: str | None,
    settings: Stage2,
    config: dict[str, Any],
    out: Path,
    encoder: Encoder,
    encode: Encode,
    training: Training,
) -> None:
    """One final detector, trained on the images `chosen`: int (n,), indices into dataset.train."""
    name, folder = dataset.category, out / dataset.category / f"stage2-{settings.train_on}"
    digest = digest_of([dataset.train[index].path for index in chosen])
    if finished(folder, digest, training.steps):
        say(f"{name}: stage 2 on {settings.train_on} is finished ({folder}); --overwrite trains anew")
        return
    say(f"{name}: training on {len(chosen)} of {len(dataset.train)} images ({settings.train_on})")
    if note:
        say(f"{name}: {note}")

    fetch = make_fetch(out, name, "train", dataset.train, dataset.root, encoder, encode, settings)
    # another branch of the seed than stage 1's: "from scratch" means new weights and a new order, too
    final_key = jax.random.fold_in(jax.random.key(config["seed"]), 2)
    train(
        training,
        fetch,
        [chosen],
        submodel_keys(final_key, 1),
        folder,
        digest,
        f"{name}, {settings.train_on}",
    )


if __name__ == "__main__":
    run(main)
