"""Score the test images with the final detectors, and write the report.

    python evaluate.py                              continues runs/demo
    python evaluate.py --run runs/NAME --save-maps

Evaluates every detector that stage 2 has finished for all categories (--train-on picks one) and compares them in one
table. A plain folder has no test set: all its images are scored, the dropped ones too.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llb import tables
from llb.checkpoint import Params, check_finished, open_checkpoints, restore_params
from llb.config import Evaluate, parse_flags
from llb.console import run_script, say
from llb.data import Dataset, Record
from llb.device import start_jax
from llb.features import Fetch, make_encode
from llb.files import atomic, write_json
from llb.images import load_image, load_masks
from llb.metrics import PixelCounts, accumulate, image_metrics, pixel_metrics_error, pixel_metrics_of, purification
from llb.pictures import contact_sheet
from llb.report import write_report
from llb.run import (
    Stage,
    fetch_features,
    final_checkpoints,
    finished_detectors,
    load_dataset,
    read_run,
    run_encoder,
    stage_training,
)
from llb.score import heat_maps, score

EXAMPLES = 24  # images on the sheet of test examples
PIXEL_ERROR = 1e-5  # a larger error of the pixel metrics is reported


def main() -> None:
    settings = parse_flags(Evaluate)
    say(start_jax(settings))
    run, config = read_run(settings.run)
    names = config["categories"]
    detectors = finished_detectors(run, config, settings.train_on)
    encoder = run_encoder(run, config)
    encode = make_encode(encoder)
    stages = {}
    for train_on in detectors:
        training = stage_training(encoder, config | config["stage2"][train_on])
        stages[train_on] = Stage(run, dataclasses.replace(settings, train_on=train_on), encoder, encode, training)

    datasets = {name: load_dataset(run, config, name) for name in names}
    facts, notes = {}, {}
    for name, dataset in datasets.items():
        purified = tables.read_purified(run / name, dataset)
        if "purified" in detectors:
            # a purified.txt that was edited after the detector was trained ends the script
            at = final_checkpoints(run, dataset, "purified", purified.indices)
            check_finished(at, stages["purified"].training.steps)
        facts[name] = purification_facts(dataset, purified, run / name)
        notes[name] = [purified.note] if purified.note else []

    for name, dataset in datasets.items():
        for train_on, stage in stages.items():
            if train_on in tables.read_metrics(run).get(name, {}) and evaluated(run / name, train_on, settings):
                say(f"{name}: {train_on} is evaluated; --overwrite scores again")
                continue
            values = evaluate(stage, dataset)
            # written after each detector: an interrupted evaluation continues with the next one
            metrics = tables.read_metrics(run)
            metrics.setdefault(name, {})[train_on] = values
            write_json(run / tables.METRICS_FILE, metrics)

    metrics = tables.read_metrics(run)
    metrics = {name: metrics[name] | {"purification": facts[name]} for name in names}
    metrics["mean"] = tables.mean_metrics(metrics, names)
    write_json(run / tables.METRICS_FILE, metrics)
    tables.write_metrics_csv(run / "metrics.csv", metrics)
    write_report(run, notes)
    say(tables.summary_table(metrics))
    say(f"report: {run / 'report.html'}")


def evaluate(stage: Stage, dataset: Dataset) -> dict[str, float | None]:
    """Maps, scores and metrics of one final detector on one category. Writes predictions, examples and maps."""
    name, train_on = dataset.category, stage.settings.train_on
    folder, size = stage.run / name, stage.encoder.image_size
    # a plain folder has no test set: score the images it was trained on, and the dropped ones too
    part = "test" if dataset.test else "train"
    records = getattr(dataset, part)
    fetch = fetch_features(stage, dataset, part)
    with open_checkpoints(folder / f"stage2-{train_on}") as checkpoints:
        params = restore_params(checkpoints)

    # ---- scores; only one batch of maps is in memory: it is counted together with its masks ----
    scores, counts = np.empty(len(records), np.float32), PixelCounts()
    maps_folder = folder / f"maps-{train_on}"
    unfinished = maps_folder.with_name(f".{maps_folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    everything, title = np.arange(len(records)), f"{name}, test on {train_on}"
    for positions, score_k, maps_k in score(params, stage.training, fetch, everything, title, with_maps=True):
        batch, maps = [records[i] for i in positions], maps_k[:, 0]  # maps: float32 (b, S, S)
        scores[positions] = score_k[:, 0]
        counts = accumulate(counts, load_masks(dataset.root, batch, size), maps)
        if stage.settings.save_maps:
            write_maps(unfinished, batch, maps)

    # ---- metrics ----
    metrics = image_metrics([record.label for record in records], scores) | pixel_metrics_of(counts)
    error = max(pixel_metrics_error(counts).values())
    if error > PIXEL_ERROR:
        say(f"{name}: so many scores are nearly equal that pixel metrics on {train_on} may be off by {error:.1g}")

    # ---- write ----
    write_examples(stage, dataset, part, scores, params, fetch)
    if stage.settings.save_maps:
        shutil.rmtree(maps_folder, ignore_errors=True)
        unfinished.rename(maps_folder)
    tables.write_predictions(folder, train_on, records, scores)
    return metrics


def write_examples(stage: Stage, dataset: Dataset, part: str, scores: np.ndarray, params: Params, fetch: Fetch) -> None:
    """examples-<train-on>.png: EXAMPLES images at equal distances in the ranking, from the highest score down."""
    records = getattr(dataset, part)
    order = np.argsort(-scores, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int))]
    tiles = []
    for index, heat in heat_maps(params, stage.training, fetch, shown, "examples"):
        record = records[index]
        caption = (f"{scores[index]:.4f} {record.kind}", record.path)
        tiles.append((load_image(dataset.root / record.path, stage.encoder.image_size), heat, caption))
    folder, train_on = stage.run / dataset.category, stage.settings.train_on
    atomic(folder / f"examples-{train_on}.png", contact_sheet(tiles).save)


def write_maps(folder: Path, records: list[Record], maps: np.ndarray) -> None:
    """One 16-bit PNG for each image, at its path below `folder`; the text chunk "scale" times the pixel is the map."""
    for record, heat in zip(records, maps):
        file = folder / f"{record.path}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        scale = max(float(heat.max()), 1e-12) / 65535
        text = PngInfo()
        text.add_text("scale", repr(scale))
        Image.fromarray(np.rint(heat.clip(0) / scale).astype(np.uint16)).save(file, pnginfo=text)


def evaluated(folder: Path, train_on: str, settings: Evaluate) -> bool:
    """Whether nothing is left to do for this detector."""
    done = (folder / f"predictions-{train_on}.csv").exists()
    return done and not settings.overwrite and (not settings.save_maps or (folder / f"maps-{train_on}").exists())


def purification_facts(dataset: Dataset, purified: tables.Choice, folder: Path) -> dict[str, Any]:
    """What purification did, by the list as it is now."""
    kept = np.isin(np.arange(len(dataset.train)), purified.indices)
    return purification([record.label for record in dataset.train], tables.read_scores(folder, dataset)["score"], kept)


if __name__ == "__main__":
    run_script(main)
