"""Measure `tiny` with the three scripts and with nearest neighbours, on up to four sets and several seeds.

    python -m llb.tiny.measure                                      the demo set and the held-out materials
    python -m llb.tiny.measure --data ROOT --category NAME          also a set with labels, clean and with 20 % defects

For each set and seed it runs stage1_partition.py, stage2_train.py on the purified, on all and on the clean images, and
evaluate.py, as a user would, in OUT/<set>-<seed>. The same command continues an interrupted measurement. At the end it
prints a table for each set, mean ± standard deviation over the seeds, and the targets of the project, met or not met.
"""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llb.config import DEMO_BATCH, DEMO_FINAL_STEPS, DEMO_STEPS
from llb.console import run_script, say
from llb.data import choose_categories
from llb.device import start_jax
from llb.files import UserError, check_writable, read_json, write_json
from llb.flags import flag, parse_flags, whole
from llb.marks import WITHOUT_MARKS
from llb.run import PROJECT, demo_or_given_root
from llb.tables import METRICS_FILE, mean_defined, read_purified
from llb.tiny.heldout import write_heldout
from llb.tiny.probe import (
    compute_features,
    detector_metrics,
    feature_kinds,
    load_images,
    load_labelled,
    nearest_neighbours,
    one_category,
)

NOISE_RATIO = 0.2
DETECTOR_METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro")
COLUMNS = {
    "image AUROC": "image_auroc",
    "pixel AUROC": "pixel_auroc",
    "AUPRO": "pixel_aupro",
    "ranking AUROC": "train_auroc",
    "contamination after": "contamination_after",
}

Values = dict[str, float | None]  # a row of the table, by metric
SeedValues = dict[str, Values]  # the rows of one set and one seed


@dataclass
class Measure:
    """Measure `tiny` on the demo set, on the held-out materials, and on a set of your own with labels."""

    data: str | None = flag(None, "a set with labels, as for stage 1", shown="none")
    category: str | None = flag(None, "its category", shown="the only one")
    seeds: int = flag(3, "how many, from 0 on", whole(1))
    steps: int = flag(DEMO_STEPS, "stage 1's, on sets other than the demo set", whole(1))
    final_steps: int = flag(DEMO_FINAL_STEPS, "stage 2's, on sets other than the demo set", whole(1))
    weights: str | None = flag(None, "weights of tiny", shown="those of this repository")
    only: str | None = flag(None, "measure one set: demo, held-out, NAME, or 'NAME, clean'", shown="all of them")
    out: str = flag("runs/measure", "folder of the runs")


@dataclass(frozen=True)
class Set:
    """A set of images, and the flags with which the scripts read it."""

    name: str
    root: Path
    categories: Sequence[str]
    noise_ratio: float
    stage1_flags: Sequence[str] = ()
    stage2_flags: Sequence[str] = ()


def main() -> None:
    settings = parse_flags(Measure)
    say(start_jax())
    check_writable(Path(settings.out))
    sets = list_sets(settings)
    measured = {a_set.name: [measure(a_set, seed, settings) for seed in range(settings.seeds)] for a_set in sets}
    write_json(Path(settings.out) / "measured.json", measured)
    for name, seeds in measured.items():
        say(f"\n{table(name, seeds)}")
    say(f"\n{verdicts(measured)}")


def list_sets(settings: Measure) -> list[Set]:
    """The sets to measure. The demo set and the held-out materials are drawn into OUT.

    Raises:
        UserError: --only or --category names none of them; the set of --data has no labels, or too few defects.
    """
    out, sets = Path(settings.out), []
    stage2_flags = ("--steps", str(settings.final_steps))

    def stage1_flags(root: Path, category: str, noise_ratio: float) -> list[str]:
        noise = ["--noise-ratio", str(noise_ratio)] if noise_ratio else []
        data = ["--data", str(root), "--category", category]
        return [*data, *noise, "--encoder", "tiny", "--steps", str(settings.steps), "--batch-size", str(DEMO_BATCH)]

    if settings.only in (None, "demo"):
        root = demo_or_given_root(out / "cache", None)
        sets.append(Set("demo", root, choose_categories(root, None), NOISE_RATIO))
    if settings.only in (None, "held-out"):
        root = out / "heldout"
        write_heldout(root)
        flags = stage1_flags(root, "all", NOISE_RATIO)
        sets.append(Set("held-out", root, choose_categories(root, "all"), NOISE_RATIO, flags, stage2_flags))
    names = ["demo", "held-out"]
    if settings.data:
        root = Path(settings.data)
        category = one_category(root, settings.category)
        for name, noise_ratio in ((category, NOISE_RATIO), (f"{category}, clean", 0.0)):
            names.append(name)
            if settings.only in (None, name):
                load_labelled(root, category, noise_ratio, 0)  # finds errors in the set before hours of work
                flags = stage1_flags(root, category, noise_ratio)
                sets.append(Set(name, root, [category], noise_ratio, flags, stage2_flags))
    if not sets:
        advice = "" if settings.data else ", or --data for a set of your own"
        raise UserError(f"--only {settings.only}: there is no such set; give one of {'; '.join(names)}{advice}")
    return sets


# ---- one set, one seed ----


def measure(a_set: Set, seed: int, settings: Measure) -> SeedValues:
    """Measure one set with one seed; every value is the mean over its categories.

    Returns:
        the rows "purified", "all", "clean" (the final detectors), "purification" (stage 1) and those of
        `measure_neighbours`, with "nearest, " in front.
    """
    folder = Path(settings.out) / f"{a_set.name.replace(', ', '-')}-{seed}"
    weights = ["--weights", settings.weights] if settings.weights is not None else []
    run_stage("stage1_partition.py", "--out", folder, "--seed", seed, *a_set.stage1_flags, *weights)
    # without defects in train, "all" and "clean" are the same images
    trained = WITHOUT_MARKS if a_set.noise_ratio else ("purified", "clean")
    for train_on in trained:
        run_stage("stage2_train.py", "--run", folder, "--train-on", train_on, *a_set.stage2_flags)
    run_stage("evaluate.py", "--run", folder)
    metrics = read_json(folder / METRICS_FILE, "delete it")
    values = {train_on: {name: metrics["mean"][train_on][name] for name in DETECTOR_METRICS} for train_on in trained}
    values["purification"] = mean_defined([metrics[name]["purification"] for name in a_set.categories])

    file = folder / "nearest.json"
    if not file.exists():
        write_json(file, measure_neighbours(a_set, seed, settings.weights, folder))
    return values | {f"nearest, {name}": row for name, row in read_json(file, "delete it").items()}


def measure_neighbours(a_set: Set, seed: int, weights: str | None, folder: Path) -> SeedValues:
    """The nearest-neighbour detector on each kind of features, among all training images.

    "tiny, purified" uses only the training images that stage 1 has kept (in `folder`). It shows whether purification
    also helps another detector.
    """
    kinds = feature_kinds(seed, weights)
    values = defaultdict(list)
    for category in a_set.categories:
        images = load_images(a_set.root, category, a_set.noise_ratio, seed)
        for name, extract in kinds.items():
            train, test = (compute_features(extract, part, name) for part in (images.train, images.test))
            values[name].append(detector_metrics(*nearest_neighbours(train, test, seed), images))
            if name == "tiny" and a_set.noise_ratio:
                kept = read_purified(folder / category, images.dataset).indices
                own, distances = nearest_neighbours(train[kept], test, seed)
                values["tiny, purified"].append(detector_metrics(own, distances, images, kept))
    return {name: mean_defined(by_category) for name, by_category in values.items()}


def run_stage(script: str, *flags) -> None:
    """Run one of the three scripts as a user does; it prints to this program's output.

    Raises:
        UserError: it failed, and has printed the reason.
    """
    command = [sys.executable, str(PROJECT / script), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed")


# ---- the printed results ----


def table(name: str, seeds: list[SeedValues]) -> str:
    """A Markdown table with a row for each detector: mean ± standard deviation over the seeds."""
    lines = [f"| {name} | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for row in seeds[0]:
        cells = [spread([seed[row].get(metric) for seed in seeds]) for metric in COLUMNS.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation over the seeds; empty if a value is undefined."""
    if any(value is None for value in values):
        return ""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def verdicts(measured: dict[str, list[SeedValues]]) -> str:
    """The project's targets for `tiny`, one a line, met or not met."""
    return "\n".join(line for name, seeds in measured.items() for line in set_verdicts(name, seeds))


def set_verdicts(name: str, seeds: list[SeedValues]) -> list[str]:
    """The targets of one set. Except where a line counts seeds, a target holds for the mean over the seeds."""
    lines = []

    def judge(target: str, value: float, bound: float) -> None:
        lines.append(f"{name}, {target}: {value:.3f} of {bound:.2f}, {'met' if value >= bound else 'not met'}")

    def by_seed(row: str, metric: str) -> np.ndarray:
        return np.array([seed[row][metric] for seed in seeds], float)  # undefined: not a number

    def mean(row: str, metric: str) -> float:
        return by_seed(row, metric).mean()

    def best(detectors: Sequence[str], metric: str) -> float:
        return max(mean(row, metric) for row in detectors if row in seeds[0])

    if name == "demo":
        judge("ranking AUROC", mean("purification", "train_auroc"), 0.95)
        remaining = mean("purification", "contamination_after") / mean("purification", "contamination_before")
        judge("share of the contamination that is removed", 1 - remaining, 0.75)
        judge("purified, image AUROC", mean("purified", "image_auroc"), 0.97)
        judge("purified, pixel AUROC", mean("purified", "pixel_auroc"), 0.95)
    elif name.endswith(", clean"):
        detectors = ("purified", "clean", "nearest, tiny")
        judge("best detector, image AUROC", best(detectors, "image_auroc"), 0.93)
        judge("best detector, pixel AUROC", best(detectors, "pixel_auroc"), 0.88)
    elif name != "held-out":
        detectors = ("purified", "nearest, tiny, purified")
        judge("purified, best detector, image AUROC", best(detectors, "image_auroc"), 0.90)
    if "all" in seeds[0]:
        better = by_seed("purified", "image_auroc") > by_seed("all", "image_auroc")
        judge("share of seeds in which purified is above all in image AUROC", better.mean(), 1.0)
    own = ("nearest, tiny", "nearest, tiny, purified")
    others = [row for row in seeds[0] if row.startswith("nearest") and row not in own]
    if others:
        leads = [
            mean("nearest, tiny", metric) - mean(row, metric)
            for row in others
            for metric in ("image_auroc", "pixel_auroc")
        ]
        judge("nearest neighbours: least lead over random weights and hand-made features", min(leads), 0.02)
    return lines


if __name__ == "__main__":
    run_script(main)
