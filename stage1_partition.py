"""Stage 1: find the hidden defects in an unchecked training set.

    python stage1_partition.py                                                the embedded set
    python stage1_partition.py --data ROOT --category NAME --out runs/NAME    your images

Learning bias (LLBNAD, arXiv 2508.07441): normal images are many and alike, so every model learns them first; defects
are few and unlike each other. Split the training set into K parts, train one sub-model on each, let every sub-model
score every image, and keep the images with the lowest scores. Labels, where there are any, are only reported.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llb.checkpoint import digest_of
from llb.config import Stage1, parse, resolve
from llb.console import choose_device, run, say
from llb.data import Dataset, choose_categories, load_category, load_image, recognise
from llb.encoder import Encoder, load_encoder
from llb.features import Encode, Fetch, make_encode
from llb.files import UserError, atomic
from llb.metrics import purification
from llb.optimizer import RECIPES
from llb.processes import first
from llb.purify import aggregate, keep_auto, keep_lowest, partition, ranks
from llb.report import contact_sheet
from llb.run import data_root, finished_stage1, make_fetch, open_run, own_folder, write_purified, write_scores
from llb.train import Training, heat_maps, make_training, score_all, submodel_keys, train

SUSPECTS = 24  # images on the contact sheet


def main() -> None:
    # ---- settings, data, encoder: what is wrong with them is found before the run begins ----
    settings = parse(Stage1)
    out = Path(settings.out)
    say(device := choose_device(settings))
    own_folder(out)
    root = data_root(out, settings.data)
    settings = resolve(settings, recognise(root) if settings.data else "embedded")
    datasets = [
        load_category(root, name, settings.noise_ratio, settings.seed)
        for name in choose_categories(root, settings.category)
    ]
    for dataset in datasets:
        check(dataset, settings)
    encoder = load_encoder(settings.encoder, settings.weights, settings.image_size, settings.precision)
    settings.image_size = encoder.image_size
    open_run(out, settings, [dataset.category for dataset in datasets], encoder, device)

    # ---- the encoder and the compiled steps are shared by all categories ----
    encode = make_encode(encoder)
    recipe = RECIPES[settings.recipe]
    training = make_training(
        encoder, recipe, settings.learning_rate, settings.dropout, settings.steps, settings.batch_size
    )
    for dataset in datasets:
        folder = out / dataset.category
        if finished_stage1(folder):
            say(f"{dataset.category}: stage 1 is finished ({folder / 'purified.txt'}); --overwrite starts it anew")
        else:
            stage1(dataset, settings, out, encoder, encode, training)
    say(f"next: python stage2_train.py --run {out}")


def stage1(dataset: Dataset, settings: Stage1, out: Path, encoder: Encoder, encode: Encode, training: Training) -> None:
    """The method, for one category."""
    name, folder, images = dataset.category, out / dataset.category, len(dataset.train)
    root_key = jax.random.key(settings.seed)
    partition_key, submodels_key = jax.random.split(root_key)

    # ---- partition ----
    subset = partition(partition_key, images, settings.submodels)  # (N,), 0 … K−1
    subsets = [np.flatnonzero(subset == k) for k in range(settings.submodels)]
    sizes = sorted({len(s) for s in subsets})
    say(f"{name}: {images} images in {settings.submodels} subsets of {' or '.join(map(str, sizes))}")

    # ---- train the K sub-models together, on features that are computed once ----
    fetch = make_fetch(out, name, "train", dataset.train, dataset.root, encoder, encode, settings)
    params = train(
        training,
        fetch,
        subsets,
        submodel_keys(submodels_key, settings.submodels),
        folder / "stage1",
        digest_of([record.path for record in dataset.train]),
        f"{name}, {settings.submodels} sub-models",
    )

    # ---- score every image with every sub-model, and aggregate ----
    size = encoder.image_size
    scores = score_all(params, training.model, fetch, images, size, f"{name}, scoring")  # (N, K)
    aggregated = np.asarray(aggregate(jnp.asarray(scores), jnp.asarray(subset), settings.aggregate))  # (N,)

    # ---- select ----
    kept = keep_auto(aggregated) if settings.keep == "auto" else keep_lowest(aggregated, settings.keep)  # (N,) bool

    # ---- write; each score stands beside the path it belongs to ----
    if first():
        write_scores(folder, dataset, subset, scores, aggregated, kept)
        write_suspects(folder, dataset, aggregated, kept, params, training, fetch, size)
        write_purified(folder, dataset, kept)
    say(found(dataset, aggregated, kept))


def check(dataset: Dataset, settings: Stage1) -> None:
    """Too few images, or a combination of settings that cannot be, ends here."""
    name, images = dataset.category, len(dataset.train)
    if images < 2:
        raise UserError(f"{dataset.root}, category {name}: {images} training image is too few; give at least 2")
    if settings.submodels > images:
        raise UserError(
            f"--submodels {settings.submodels}: {name} has {images} training images; give at most that many"
        )
    if settings.aggregate == "out-of-fold" and settings.submodels == 1:
        raise UserError(
            "--aggregate out-of-fold needs a sub-model that has not seen the image: give --submodels 2 or more"
        )
    if settings.aggregate == "max-var" and settings.submodels == 1:
        raise UserError("--aggregate max-var: one sub-model's scores have no variance; give --submodels 2 or more")


def write_suspects(
    folder: Path, dataset: Dataset, aggregated, kept, params, training: Training, fetch: Fetch, size: int
) -> None:
    """suspects.png: the highest-scoring training images, each with its map (the mean over the sub-models)."""
    highest = np.argsort(ranks(aggregated))[:SUSPECTS]
    tiles = []
    heats = heat_maps(params, training.model, fetch, highest, size, "suspects")
    for place, (index, heat) in enumerate(heats, 1):
        path = dataset.train[index].path
        caption = (f"{place}. {aggregated[index]:.4f} {'kept' if kept[index] else 'dropped'}", path)
        tiles.append((load_image(dataset.root / path, size), heat, caption))
    atomic(folder / "suspects.png", contact_sheet(tiles).save)


def found(dataset: Dataset, aggregated: np.ndarray, kept: np.ndarray) -> str:
    """One line on what stage 1 found; labels, if known, enter here for the first time."""
    line = f"{dataset.category}: kept {kept.sum()} of {len(kept)} images"
    facts = purification([record.label for record in dataset.train], aggregated, kept)
    if facts["contamination_before"] is not None:
        line += f", contamination {facts['contamination_before']:.1%} → {facts['contamination_after']:.1%}"
    if facts["train_auroc"] is not None:
        line += f", AUROC of the ranking {facts['train_auroc']:.3f}"
    return line


if __name__ == "__main__":
    run(main)
