"""Score the test images with the final detectors, and write the report.

    python evaluate.py                              goes on with runs/demo
    python evaluate.py --run runs/NAME --save-maps

Evaluates every detector that stage 2 has trained (--train-on picks one) and compares them in one table. A plain folder
has no test set: all its images are scored, the dropped ones too.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llb.checkpoint import digest_of, finished, open_checkpoints, restore_params
from llb.config import Evaluate, parse
from llb.console import choose_device, run, say
from llb.data import Dataset, Record, load_image, load_masks
from llb.encoder import Encoder
from llb.features import Encode, Fetch, make_encode
from llb.files import atomic, write_csv, write_json
from llb.metrics import PixelCounts, accumulate, image_metrics, pixel_metrics_error, pixel_metrics_of, purification
from llb.optimizer import RECIPES
from llb.processes import launched
from llb.report import contact_sheet, mean_metrics, summary_table, write_metrics_csv, write_report
from llb.run import (
    METRICS,
    load_dataset,
    make_fetch,
    read_metrics,
    read_purified,
    read_run,
    read_scores,
    run_encoder,
    trained_on,
)
from llb.train import Training, heat_maps, make_training, score

EXAMPLES = 24  # images on the sheet of test examples
PIXEL_ERROR = 1e-5  # pixel metrics that may be further from exact are reported as such


def main() -> None:
    settings = parse(Evaluate)
    if launched()[1] > 0:
        return  # srun or mpirun started several: one is enough for a test set
    say(choose_device())
    out, config = read_run(settings.run)
    names = config["categories"]
    detectors = trained_on(out, config, settings.train_on)  # what stage 2 has finished for every category
    encoder = run_encoder(out, config)
    encode = make_encode(encoder)

    datasets = {name: load_dataset(out, config, name) for name in names}
    facts, notes = {}, {}
    for name, dataset in datasets.items():
        chosen, notes[name] = read_purified(out / name, dataset)
        if "purified" in detectors:
            check_trained_on(dataset, chosen, out / name / "stage2-purified", config["stage2"]["purified"]["steps"])
        facts[name] = purified_facts(dataset, chosen, out / name)

    for name, dataset in datasets.items():
        for train_on in detectors:
            if train_on in read_metrics(out).get(name, {}) and evaluated(out / name, train_on, settings):
                say(f"{name}: {train_on} is evaluated; --overwrite scores again")
                continue
            steps = config["stage2"][train_on]["steps"]
            training = make_training(
                encoder, RECIPES[config["recipe"]], 0.0, config["dropout"], steps, config["batch_size"]
            )
            found = evaluate(dataset, train_on, settings, out, encoder, encode, training)
            # written at once, into what is there by now: interrupted, the same command goes on with the next
            metrics = read_metrics(out)
            metrics.setdefault(name, {})[train_on] = found
            write_json(out / METRICS, metrics)

    metrics = read_metrics(out)
    metrics = {name: metrics[name] | {"purification": facts[name]} for name in names}
    metrics["mean"] = mean_metrics(metrics, names)
    write_json(out / METRICS, metrics)
    write_metrics_csv(out / "metrics.csv", metrics)
    write_report(out, {name: [note] if note else [] for name, note in notes.items()})
    say(summary_table(metrics))
    say(f"report: {out / 'report.html'}")


def evaluate(
    dataset: Dataset,
    train_on: str,
    settings: Evaluate,
    out: Path,
    encoder: Encoder,
    encode: Encode,
    training: Training,
) -> dict[str, float | None]:
    """Maps, scores and metrics of one final detector on one category; writes predictions, examples and maps."""
    name, folder, size = dataset.category, out / dataset.category, encoder.image_size
    # A plain folder has no test set: score what it was trained on, the dropped images too.
    part, records = ("test", dataset.test) if dataset.test else ("train", dataset.train)
    fetch = make_fetch(out, name, part, records, dataset.root, encoder, encode, settings)
    with open_checkpoints(folder / f"stage2-{train_on}") as checkpoints:
        params = restore_params(checkpoints)

    # ---- scores; the maps pass by, batch after batch, and are counted with their masks ----
    scores, counts = np.empty(len(records), np.float32), PixelCounts()
    maps_folder = folder / f"maps-{train_on}"
    unfinished = maps_folder.with_name(f".{maps_folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for positions, score_k, maps_k in score(
        params, training.model, fetch, np.arange(len(records)), size, f"{name}, test on {train_on}", with_maps=True
    ):
        batch, maps = [records[i] for i in positions], maps_k[:, 0]  # maps: float32 (b, S, S)
        scores[positions] = score_k[:, 0]
        counts = accumulate(counts, load_masks(dataset.root, batch, size), maps)
        if settings.save_maps:
            write_maps(unfinished, batch, maps)

    # ---- metrics ----
    labels = [record.label for record in records]
    found = image_metrics(labels, scores) | pixel_metrics_of(counts)
    error = max(pixel_metrics_error(counts).values())
    if error > PIXEL_ERROR:
        say(f"{name}: so many scores are nearly equal that pixel metrics on {train_on} may be off by {error:.1g}")

    # ---- write ----
    rows = [
        [record.path, float(scores[i]), "" if record.label is None else record.label]
        for i, record in enumerate(records)
    ]
    write_examples(folder / f"examples-{train_on}.png", dataset.root, records, scores, params, training, fetch, size)
    if settings.save_maps:
        shutil.rmtree(maps_folder, ignore_errors=True)
        unfinished.rename(maps_folder)
    write_csv(folder / f"predictions-{train_on}.csv", ["path", "score", "label"], rows)
    return found


def write_examples(
    file: Path, root: Path, records: list[Record], scores: np.ndarray, params, training: Training, fetch: Fetch, size
) -> None:
    """The images around every level of the ranking: EXAMPLES of them, from the highest score to the lowest."""
    order = np.argsort(-scores, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int))]
    tiles = []
    for index, heat in heat_maps(params, training.model, fetch, shown, size, "examples"):
        record = records[index]
        caption = (f"{scores[index]:.4f} {record.kind}", record.path)
        tiles.append((load_image(root / record.path, size), heat, caption))
    atomic(file, contact_sheet(tiles).save)


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


def check_trained_on(dataset: Dataset, chosen: np.ndarray, folder: Path, steps: int) -> None:
    """Refuse a purified.txt that has been edited since the detector in `folder` was trained on it."""
    finished(folder, digest_of([dataset.train[index].path for index in chosen]), steps)


def purified_facts(dataset: Dataset, chosen: np.ndarray, folder: Path) -> dict[str, Any]:
    """What purification did, by the list as it is now. chosen: int (n,), the training images that it names."""
    kept = np.isin(np.arange(len(dataset.train)), chosen)
    return purification([record.label for record in dataset.train], read_scores(folder, dataset)["score"], kept)


if __name__ == "__main__":
    run(main)
