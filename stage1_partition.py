"""Stage 1: find the hidden defects in an unchecked training set.

    python stage1_partition.py                                                the demo set
    python stage1_partition.py --data ROOT --category NAME --out runs/NAME    your images

Learning bias (LLBNAD, arXiv 2508.07441): normal images are many and alike, so every model learns them first. Defects
are few and unlike each other. So: split the training set into K subsets, train one sub-model on each, let every
sub-model score every image, and keep the images with the lowest scores. Labels, if there are any, are only reported.
"""

from pathlib import Path

import jax
import numpy as np

from llb.checkpoint import CheckpointFolder, Params, paths_digest
from llb.config import Stage1
from llb.console import run_script, say
from llb.data import Dataset, choose_categories, describe, load_category, reading_line
from llb.defaults import resolve, with_sizes
from llb.device import start_jax
from llb.encoders import load_encoder
from llb.features import Features
from llb.files import UserError, atomic, is_writer
from llb.fit import learn
from llb.flags import parse_flags
from llb.images import ImageError, white_line
from llb.keep import choose
from llb.layouts import read_root
from llb.learning import learning_line, write_learning
from llb.lock import hold
from llb.manifest import check_readable, copies_line, record_images
from llb.metrics import purification, ranks
from llb.pictures import contact_sheet
from llb.processes import agreed
from llb.purify import combine, partition
from llb.report import review_command, write_report
from llb.run import as_shown, command_line, demo_or_given_root, environment, open_run, place_run
from llb.runfiles import next_command, stage1_command, stage2_command, write_config
from llb.score import heat_maps, score_all
from llb.selection import change_selection, outdated_detectors, read_submodel_scores
from llb.sheet import lacks_tiles, whole_pages
from llb.stage import Stage, check_step, load_features, make_stage, tile_to_judge
from llb.tables import Stage1Result, purification_line, stage1_finished, write_purified, write_scores
from llb.tiles import LOOKED_AT, shown_suspects, tiles_file, united, write_tiles
from llb.times import timed
from llb.train import Submodels, seen_images, submodel_keys

SUSPECTS = 24  # images on the contact sheet


def main() -> None:
    settings = parse_flags(Stage1)
    device = start_jax(settings)
    say(device)
    run = place_run(settings)
    with hold(run, "stage1", against=("",)):  # any other
        run_stage1(run, settings, device)


def run_stage1(run: Path, settings: Stage1, device: str) -> None:
    """Stage 1 of every category. device: of `start_jax`."""
    # ---- data and encoder: errors in them end the script before the run begins ----
    command = command_line(settings)
    root = read_root(demo_or_given_root(Path(settings.cache), settings.data), settings.layout)
    given, settings = settings, resolve(settings, root.layout if settings.data else "demo")
    names = choose_categories(root, settings.category)
    noise = (settings.noise_ratio, settings.seed, settings.noise_pool)
    datasets = [load_category(root, name, *noise) for name in names]
    for dataset in datasets:
        check(dataset, settings)
    reading = describe(root, datasets)
    say(reading_line(reading))
    if settings.data and not given.encoder and device.startswith("device: CPU"):
        fast = "--encoder efficientnet_lite0 --detector padim"
        say(f"{settings.encoder} takes hours to days on a CPU; {fast} takes minutes")
    encoder = load_encoder(settings.encoder, settings.weights, settings.image_size, settings.precision)
    settings = with_sizes(settings, encoder.image_size)
    stage = make_stage(run, settings, encoder, vars(settings))
    check_step(stage.setup, settings.submodels)

    # ---- the run; images that have changed since it began end the script before any training ----
    facts = {"data_given": settings.data, "reading": reading, "command": command} | environment(device)
    config = open_run(run, settings, datasets, encoder, facts)
    datasets = as_shown(datasets, config)
    for line in filter(None, map(white_line, datasets)):
        say(line)
    record_images(run, datasets, settings.verify, stage1_command(run, config))
    change_selection(run, config, settings, datasets, command)
    write_config(run, config)  # not before: images of another place may be others

    # ---- all categories share the encoder and the compiled steps ----
    for dataset in datasets:
        folder = run / dataset.category
        if stage1_finished(folder) and not lacks_tiles(folder, settings.seed, settings.suspects):
            say(f"{dataset.category}: stage 1 is finished ({folder / 'purified.txt'}); --overwrite starts again")
        else:
            with timed(run, dataset.category, "stage 1"):
                stage1(stage, dataset)
        for final in outdated_detectors(run, dataset, config.get("stage2", {})):
            again = f"{stage2_command(run, final)} --overwrite"
            say(f"{dataset.category}: stage 2's detector was trained on another list; train it again: {again}")
    if is_writer():
        write_report(run)
        say(f"look at the suspects, and mark the defects: {run / 'report.html'}; then: {review_command(run)}")
    say(f"next: {next_command('stage2_train.py', run, settings)}")


def stage1(stage: Stage, dataset: Dataset) -> None:
    """The method, for one category."""
    settings, name, images = stage.settings, dataset.category, len(dataset.train)
    folder = stage.run / name
    partition_key, models_key = jax.random.split(jax.random.key(settings.seed))

    # ---- partition ----
    subset = partition(partition_key, images, settings.submodels)  # (N,), 0 … K−1
    subsets = [np.flatnonzero(subset == k) for k in range(settings.submodels)]
    sizes = sorted({len(s) for s in subsets})
    count, plural = settings.submodels, "s" * (settings.submodels > 1)
    say(f"{name}: {images} images in {count} subset{plural} of {' or '.join(map(str, sizes))}")
    if copies := copies_line(folder, dataset):
        say(f"{name}: copies: {copies}")

    # ---- train the K sub-models together, on features that are computed once ----
    try:
        features = load_features(stage, dataset, "train")
    except ImageError:
        check_readable(dataset, dataset.train)  # names all that cannot be read
        raise
    others = settings.folds == "others"  # each learns from all subsets but its own
    submodels = Submodels(subsets, submodel_keys(models_key, settings.submodels), others)
    at = CheckpointFolder(folder / "stage1", paths_digest([record.path for record in dataset.train]))
    params, losses = learn(stage.setup, features, submodels, at, f"{name}, {count} sub-model{plural}")
    seen = [] if losses is None else seen_images(submodels, stage.setup, losses)
    if seen:  # learning bias, while it happened
        write_learning(folder, dataset.train, seen)

    # ---- score every image with every sub-model: (N, K); another selection has them already ----
    if agreed((folder / "scores.csv").is_file()):
        scores = read_submodel_scores(folder, dataset, settings.submodels)
    else:
        scores = score_all(params, stage.setup, features, images, f"{name}, scoring")

    # ---- aggregate and select ----
    result = select(settings, subset, scores)

    # ---- write; each score stands beside the path of its image ----
    write_scores(folder, dataset.train, result)
    write_suspects(stage, dataset, result, params, features)
    # keep a list that a person has edited: perhaps only scores.csv or suspects.png was lost
    if not (folder / "purified.txt").exists():
        write_purified(folder, dataset.train, result.kept)
    facts = purification([record.label for record in dataset.train], result.aggregated, result.kept)
    say(f"{name}: {purification_line(facts)}")
    if result.said:
        say(f"{name}: {result.said}")
    if seen:
        say(f"{name}: {learning_line(seen, result.kept)}")


def select(settings: Stage1, subset: np.ndarray, scores: np.ndarray) -> Stage1Result:
    """From N × K scores to a decision on each image: from here on nothing is trained. subset: int32 (N,)."""
    others, standardise = settings.folds == "others", settings.standardise == "yes"
    aggregated = combine(scores, subset, others, standardise, settings.aggregate)  # (N,)
    kept, said = choose(aggregated, settings.keep)  # (N,) bool
    return Stage1Result(subset, scores, aggregated, kept, said)


def check(dataset: Dataset, settings: Stage1) -> None:
    """Raise a UserError for too few images, or for settings that contradict each other."""
    name, images = dataset.category, len(dataset.train)
    if images < 2:
        raise UserError(f"{dataset.root}, category {name}: {images} training image is too few; give at least 2")
    if settings.submodels > images:
        few = f"{images} training images are too few for {settings.submodels} sub-models"
        raise UserError(f"{dataset.root}, category {name}: {few}; give more images, or --submodels {images} or less")
    if settings.aggregate == "out-of-fold" and settings.submodels == 1:
        need = "a sub-model that was not trained on the image"
        raise UserError(f"--aggregate out-of-fold needs {need}: give --submodels 2 or more")
    if settings.folds == "others" and settings.submodels == 1:
        raise UserError("--folds others: one sub-model has no others to learn from; give --submodels 2 or more")
    if settings.aggregate == "max-var" and settings.submodels == 1:
        raise UserError("--aggregate max-var: one sub-model's scores have no variance; give --submodels 2 or more")


def write_suspects(stage: Stage, dataset: Dataset, result: Stage1Result, params: Params, features: Features) -> None:
    """suspects.png: the highest-scoring training images, each with its map (the mean over the sub-models).

    Also the tiles of the report, of these and of the other images that it shows.
    """
    settings = stage.settings
    folder, rank = stage.run / dataset.category, ranks(result.aggregated)
    groups = shown_suspects(rank, result.kept, [record.label for record in dataset.train])
    pages = {number: page.images for number, page in enumerate(whole_pages(rank, settings.seed, settings.suspects))}
    shown = united(groups | pages | {"sheet": np.flatnonzero(rank <= SUSPECTS)})
    shown = shown[np.argsort(rank[shown])]
    sheet, tiles = [], []
    for index, heat in heat_maps(params, stage.setup, features, shown, "suspects"):
        tiles.append(tile_to_judge(stage, dataset, index, heat))
        if rank[index] <= SUSPECTS:
            verdict = "kept" if result.kept[index] else "dropped"
            path, image, *_ = tiles[-1]
            sheet.append((image, heat, (f"{rank[index]}. {result.aggregated[index]:.4f} {verdict}", path)))
    write_tiles(folder / tiles_file("suspects"), tiles, LOOKED_AT)
    atomic(folder / "suspects.png", contact_sheet(sheet).save)


if __name__ == "__main__":
    run_script(main)
