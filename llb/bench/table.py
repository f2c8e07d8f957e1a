"""The table of detectors: each one's ranking, and its final detector on purified, all and clean images.

    python -m llb.bench.table --detectors padim,subspace --noise-ratios 0,0.2 --seeds 0,1,2 --out table.csv
    python -m llb.bench.table --data ROOT --category NAME --encoder efficientnet_lite0 --out table.csv

It runs the functions of the three scripts in one process, at each detector's defaults, and encodes an image once. A row
is written when it is finished; the same command continues with the next one. `--show` prints the means of a table.
"""

import csv
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import jax
import numpy as np

from llb.checkpoint import CheckpointFolder
from llb.config import Stage1, Stage2
from llb.console import run_script, say
from llb.data import Dataset, choose_categories, load_category
from llb.defaults import resolve, resolve_final, with_sizes
from llb.demo import write_demo
from llb.device import start_jax
from llb.encoders import Encoder, load_encoder
from llb.features import Features, feature_kind, streamed_features
from llb.fit import learn
from llb.flags import flag, parse_flags
from llb.images import ImageFiles
from llb.layouts import read_root
from llb.masks import load_masks
from llb.metrics import PixelCounts, accumulate, image_metrics, pixel_metrics_of, purification
from llb.purify import combine, keep_auto, partition
from llb.score import score, score_all
from llb.stage import Stage, make_stage
from llb.tables import TRAIN_ON
from llb.train import Submodels, submodel_keys

KEYS = ("set", "detector", "noise_ratio", "seed")
FACTS = ("ranking_auroc", "kept", "contamination", "stage1_seconds")
FINAL = ("image_auroc", "pixel_aupro", "seconds")
COLUMNS = [*KEYS, *FACTS, *(f"{train_on}_{name}" for train_on in TRAIN_ON for name in FINAL)]


@dataclass
class Table:
    """What the table holds, and where."""

    data: str | None = flag(None, "root of an image set with labels", shown="the demo set")
    category: str | None = flag(None, "one category", shown="the only one")
    encoder: str | None = flag(None, "encoder", shown="tiny for the demo set, else stage 1's default")
    detectors: str = flag("padim,subspace,patchcore,softpatch", "names with commas")
    set: str | None = flag(None, "their settings, as of stage 1's --set", shown="as published")
    noise_ratios: str = flag("0.0,0.1,0.2,0.4", "shares of defective training images, with commas")
    seeds: str = flag("0,1,2", "with commas")
    short: bool = flag(False, "train as many steps as on the demo set")
    out: str = flag("table.csv", "the table; finished rows are not repeated")
    show: bool = flag(False, "print the means of the table, and measure nothing")


def main() -> None:
    settings = parse_flags(Table)
    if not settings.show:
        say(start_jax(settings))
        with TemporaryDirectory() as scratch:
            measure(settings, Path(scratch))
    print(summary(read_rows(Path(settings.out))))


def measure(settings: Table, scratch: Path) -> None:
    """Measure every row that is missing, and append it."""
    out = Path(settings.out)
    if settings.data is None:
        write_demo(scratch / "demo")
    root = read_root(Path(settings.data or scratch / "demo"))
    (name,) = choose_categories(root, settings.category)
    done = {tuple(row[key] for key in KEYS) for row in read_rows(out)}
    label = settings.data or "demo"
    known = {}  # features by file and kind, over all rows
    for noise_ratio in settings.noise_ratios.split(","):
        for seed in settings.seeds.split(","):
            dataset = load_category(root, name, float(noise_ratio), int(seed))
            for detector in settings.detectors.split(","):
                shown = " ".join(filter(None, (detector, settings.set)))
                if (label, shown, noise_ratio, seed) in done:
                    continue
                own = {"detector": detector, "set": settings.set}
                asked = Stage1(data=settings.data, encoder=settings.encoder, seed=int(seed), **own)
                asked = resolve(asked, "demo" if settings.data is None or settings.short else root.layout)
                if settings.short:
                    asked = dataclasses.replace(asked, data=None)  # so the final detector's steps are the demo set's
                row = measure_one(asked, dataset, known, scratch)
                row = dict(zip(KEYS, (label, shown, noise_ratio, seed))) | row
                append_row(out, row)
                say(" ".join(f"{key} {value}" for key, value in row.items()))


def measure_one(settings: Stage1, dataset: Dataset, known: dict, scratch: Path) -> dict[str, float | int | None]:
    """One row: stage 1 of the scripts, then the final detectors."""
    encoder = load_encoder(settings.encoder, None, settings.image_size, settings.precision)
    settings = with_sizes(settings, encoder.image_size)
    dataset = dataclasses.replace(dataset, resize=settings.resize)
    stage = make_stage(scratch, settings, encoder, vars(settings))
    train, test = (shared_features(stage, dataset, part, known) for part in ("train", "test"))
    labels = [record.label for record in dataset.train]

    began = time.perf_counter()
    partition_key, models_key = jax.random.split(jax.random.key(settings.seed))
    subset = partition(partition_key, len(labels), settings.submodels)
    others = settings.folds == "others"
    subsets = [np.flatnonzero(subset == k) for k in range(settings.submodels)]
    submodels = Submodels(subsets, submodel_keys(models_key, settings.submodels), others)
    with TemporaryDirectory(dir=scratch) as folder:
        params, _ = learn(stage.setup, train, submodels, CheckpointFolder(Path(folder), ""), "stage 1")
    scores = score_all(params, stage.setup, train, len(labels), "scoring")
    aggregated = combine(scores, subset, others, settings.standardise == "yes", settings.aggregate)
    kept = keep_auto(aggregated)
    facts = purification(labels, aggregated, kept)
    row = {"ranking_auroc": facts["train_auroc"], "kept": facts["kept"], "contamination": facts["contamination_after"]}
    row["stage1_seconds"] = round(time.perf_counter() - began, 1)

    chosen = {"purified": kept, "all": np.ones(len(labels), bool), "clean": np.array(labels) == 0}
    for train_on, choice in chosen.items():
        began = time.perf_counter()
        metrics = final_metrics(settings, encoder, dataset, (train, test), np.flatnonzero(choice))
        metrics["seconds"] = round(time.perf_counter() - began, 1)
        row |= {f"{train_on}_{key}": metrics[key] for key in FINAL}
    return row


def final_metrics(
    stage1: Stage1, encoder: Encoder, dataset: Dataset, features: tuple[Features, Features], chosen: np.ndarray
) -> dict[str, float | None]:
    """Train the final detector on the chosen images (int (n,)), and judge it on the test images."""
    train, test = features
    settings = resolve_final(Stage2(), vars(stage1))
    stage = make_stage(Path(), settings, encoder, vars(stage1) | vars(settings))
    key = submodel_keys(jax.random.fold_in(jax.random.key(stage1.seed), 2), 1)
    with TemporaryDirectory() as folder:
        params, _ = learn(
            stage.setup, train, Submodels([chosen], key), CheckpointFolder(Path(folder), ""), "final detector"
        )
    scores, counts = np.empty(len(dataset.test), np.float32), PixelCounts()
    for positions, score_k, maps in score(params, stage.setup, test, np.arange(len(scores)), "test", with_maps=True):
        scores[positions] = score_k[:, 0]
        masks, judged = load_masks(dataset.root, [dataset.test[i] for i in positions], stage.setup.image_size)
        counts = accumulate(counts, masks[judged], maps[judged, 0])
    labels = [record.label for record in dataset.test]
    return image_metrics(labels, scores) | pixel_metrics_of(counts)


def shared_features(stage: Stage, dataset: Dataset, part: str, known: dict) -> Features:
    """Features of a part; what another row has needed is not encoded again."""
    source, records = stage.source, getattr(dataset, part)
    kind = feature_kind(source, ImageFiles((), dataset.white, dataset.resize))
    files = [dataset.root / record.path for record in records]
    missing = tuple(file for file in files if (file, kind) not in known)
    fresh = streamed_features(source, ImageFiles(missing, dataset.white, dataset.resize))
    for start in range(0, len(missing), 64):
        batch = fresh.fetch(np.arange(start, min(start + 64, len(missing))))
        known |= {(file, kind): row for file, row in zip(missing[start : start + 64], batch)}

    def fetch(indices: np.ndarray) -> np.ndarray:
        rows = [known[files[index], kind] for index in indices.ravel()]
        return np.stack(rows).reshape(*indices.shape, *source.shape)

    return source.features(fetch)


def read_rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def append_row(file: Path, row: dict) -> None:
    new = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def summary(rows: list[dict[str, str]]) -> str:
    """A Markdown table: the mean over the seeds of each set, detector and noise ratio, with ± of image AUROC."""
    lines = [
        "| set | detector | α | n | ranking | contamination | image AUROC purified / all / clean | pixel AUPRO | s |"
    ]
    lines.append("|" + "---|" * 9)
    for key, group in grouped(rows):
        values = {name: [float(row[name]) for row in group if row[name] not in ("", "None")] for name in COLUMNS[4:]}

        def shown(name: str, digits: int = 3, values=values) -> str:
            return f"{mean(values[name]):.{digits}f}".removeprefix("0") if values[name] else "–"

        def triple(name: str, values=values, shown=shown) -> str:
            return " / ".join(shown(f"{train_on}_{name}") for train_on in TRAIN_ON)

        spread = [stdev(values[f"{t}_image_auroc"]) for t in TRAIN_ON if len(values[f"{t}_image_auroc"]) > 1]
        auroc = triple("image_auroc") + (f" (± {max(spread):.3f})" if spread else "")
        seconds = shown("stage1_seconds", 0)
        cells = [*key, str(len(group)), shown("ranking_auroc"), shown("contamination"), auroc, triple("pixel_aupro")]
        lines.append("| " + " | ".join([*cells, seconds]) + " |")
    return "\n".join(lines)


def grouped(rows: list[dict[str, str]]) -> Iterator[tuple[tuple[str, ...], list[dict[str, str]]]]:
    keys = list(dict.fromkeys(tuple(row[name] for name in KEYS[:3]) for row in rows))
    for key in sorted(keys):
        yield key, [row for row in rows if tuple(row[name] for name in KEYS[:3]) == key]


if __name__ == "__main__":
    run_script(main)
