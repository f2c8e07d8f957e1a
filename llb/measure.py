"""What is `tiny` worth? The three scripts, and nearest neighbours, on up to four sets and over several seeds.

    python -m llb.measure                                      the embedded set and the held-out materials
    python -m llb.measure --data ROOT --category NAME          a set with labels beside them, clean and at 20 %

For each set and seed it runs stage1_partition.py, stage2_train.py on the purified, on all and on the clean images, and
evaluate.py, as a user would, in OUT/<set>-<seed>. What is there already is not run again, so an interrupted command
goes on. It ends with the table that the README shows, mean ± standard deviation over the seeds, and what was wanted.
"""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llb.config import EMBEDDED_BATCH, EMBEDDED_FINAL_STEPS, EMBEDDED_STEPS, TRAIN_ON, flag, parse, whole
from llb.console import choose_device, run, say
from llb.data import choose_categories
from llb.files import UserError, read_json, writable, write_json
from llb.heldout import write_heldout
from llb.probe import apply, features, load_images, load_labelled, one_category, probe
from llb.report import mean_defined
from llb.run import METRICS, data_root, read_purified

SCRIPTS = Path(__file__).parent.parent
NOISE = 0.2
SHOWN = ("image_auroc", "pixel_auroc", "pixel_aupro")

Values = dict[str, float | None]


@dataclass
class Measure:
    """Measure `tiny` on the embedded set, on the held-out materials, and on a set of your own with labels."""

    data: str | None = flag(None, "a set with labels, as for stage 1", shown="none")
    category: str | None = flag(None, "its category", shown="the only one there is")
    seeds: int = flag(3, "how many, from 0 on", whole(1))
    steps: int = flag(EMBEDDED_STEPS, "stage 1's on sets other than the embedded one", whole(1))
    final_steps: int = flag(EMBEDDED_FINAL_STEPS, "stage 2's, likewise", whole(1))
    weights: str | None = flag(None, "weights of tiny to measure", shown="those of this repository")
    only: str | None = flag(None, "one set alone: embedded, held-out, NAME, or 'NAME, clean'", shown="all of them")
    out: str = flag("runs/measure", "folder of the runs")


@dataclass(frozen=True)
class Set:
    """A set and the flags that the scripts read it by."""

    name: str
    root: Path
    categories: Sequence[str]
    noise_ratio: float
    stage1: Sequence[str] = ()
    stage2: Sequence[str] = ()


def main() -> None:
    settings = parse(Measure)
    say(choose_device())
    writable(Path(settings.out))
    sets = list_sets(settings)
    measured = {a_set.name: [measure(a_set, seed, settings) for seed in range(settings.seeds)] for a_set in sets}
    write_json(Path(settings.out) / "measured.json", measured)
    for name, seeds in measured.items():
        say(f"\n{table(name, seeds)}")
    say(f"\n{verdicts(measured)}")


def list_sets(settings: Measure) -> list[Set]:
    """The sets to measure; those that code draws are drawn into OUT.

    Raises:
        UserError: --only or --category names none; --data has no labels, or no such share of defects.
    """
    out, sets = Path(settings.out), []

    def flags(root: Path, category: str, noise_ratio: float) -> list[str]:
        where = ["--data", str(root), "--category", category, "--noise-ratio", str(noise_ratio)]
        return [*where, "--encoder", "tiny", "--steps", str(settings.steps), "--batch-size", str(EMBEDDED_BATCH)]

    final = ("--steps", str(settings.final_steps))
    if settings.only in (None, "embedded"):
        sets.append(Set("embedded", data_root(out, None), ["part"], NOISE))
    if settings.only in (None, "held-out"):
        heldout = out / "heldout"
        write_heldout(heldout)
        sets.append(
            Set("held-out", heldout, choose_categories(heldout, "all"), NOISE, flags(heldout, "all", NOISE), final)
        )
    if settings.data:
        root = Path(settings.data)
        category = one_category(root, settings.category)
        for name, noise_ratio in ((category, NOISE), (f"{category}, clean", 0.0)):
            if settings.only in (None, name):
                load_labelled(root, category, noise_ratio, 0)  # what is wrong with it is said before hours of work
                sets.append(Set(name, root, [category], noise_ratio, flags(root, category, noise_ratio), final))
    if not sets:
        known = "embedded, held-out" + (f", {category}, '{category}, clean'" if settings.data else "; more with --data")
        raise UserError(f"--only {settings.only}: no such set; give one of {known}")
    return sets


def measure(a_set: Set, seed: int, settings: Measure) -> dict[str, Values]:
    """One set, one seed: "purified", "all", "clean", "purification", "nearest, …", each the mean of its categories.

    Nearest neighbours are taken among all training images, and for `tiny` among those that stage 1 has kept, too: does
    purification serve another detector as well?
    """
    folder = Path(settings.out) / f"{a_set.name.replace(', ', '-')}-{seed}"
    weights = ["--weights", settings.weights] if settings.weights else []
    script("stage1_partition.py", "--out", folder, "--seed", seed, *a_set.stage1, *weights)
    # without a defect all images are the clean ones
    trained = TRAIN_ON if a_set.noise_ratio else ("purified", "clean")
    for train_on in trained:
        script("stage2_train.py", "--run", folder, "--train-on", train_on, *a_set.stage2)
    script("evaluate.py", "--run", folder)
    metrics = read_json(folder / METRICS, "delete it")
    found = {train_on: {name: metrics["mean"][train_on][name] for name in SHOWN} for train_on in trained}
    found["purification"] = mean_defined([metrics[name]["purification"] for name in a_set.categories])

    nearest = folder / "nearest.json"
    if not nearest.exists():
        described = features(seed, settings.weights)
        each = defaultdict(list)
        for category in a_set.categories:
            images = load_images(a_set.root, category, a_set.noise_ratio, seed)
            for name, describe in described.items():
                known, seen = (apply(describe, part, name) for part in (images.train, images.test))
                each[name].append(probe(known, seen, images, seed))
                if name == "tiny" and a_set.noise_ratio:
                    kept = read_purified(folder / category, images.dataset)[0]
                    each["tiny, purified"].append(probe(known, seen, images, seed, kept))
        write_json(nearest, {name: mean_defined(categories) for name, categories in each.items()})
    return found | {f"nearest, {name}": values for name, values in read_json(nearest, "delete it").items()}


def script(name: str, *flags) -> None:
    """One of the three scripts, as a user runs it. Its own words go to this program's output.

    Raises:
        UserError: it failed; it has said why.
    """
    command = [sys.executable, str(SCRIPTS / name), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed")


# ---- what is printed ----

COLUMNS = {
    "image AUROC": "image_auroc",
    "pixel AUROC": "pixel_auroc",
    "AUPRO": "pixel_aupro",
    "ranking in train": "train_auroc",
    "contamination": "contamination_after",
}


def table(name: str, seeds: list[dict[str, Values]]) -> str:
    """Markdown: a row for each way of detecting, mean ± standard deviation over the seeds."""
    lines = [f"| {name} | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for row in seeds[0]:
        cells = [[seed[row].get(key) for seed in seeds] for key in COLUMNS.values()]
        lines.append(f"| {row} | " + " | ".join(map(spread, cells)) + " |")
    return "\n".join(lines)


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation of the seeds; empty where it is undefined."""
    if any(value is None for value in values):
        return ""
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def verdicts(measured: dict[str, list[dict[str, Values]]]) -> str:
    """What the project wants of `tiny`, and whether it is so; each bound is for the mean over the seeds."""

    def values(name: str, row: str, key: str) -> np.ndarray:
        return np.array([seed[row][key] for seed in measured[name]], float)

    lines = []

    def judge(what: str, value: float, bound: float) -> None:
        lines.append(f"{what}: {value:.3f} of {bound:.2f}, {'met' if value >= bound else 'not met'}")

    for name, seeds in measured.items():
        detectors = [row for row in ("purified", "clean", "nearest, tiny") if row in seeds[0]]
        if name == "embedded":
            judge("embedded, AUROC of the ranking", values(name, "purification", "train_auroc").mean(), 0.95)
            before, after = (values(name, "purification", f"contamination_{t}").mean() for t in ("before", "after"))
            judge("embedded, share of the contamination that is removed", 1 - after / before, 0.75)
            judge("embedded, purified, image AUROC", values(name, "purified", "image_auroc").mean(), 0.97)
            judge("embedded, purified, pixel AUROC", values(name, "purified", "pixel_auroc").mean(), 0.95)
        elif name.endswith(", clean"):
            for key, bound in (("image_auroc", 0.93), ("pixel_auroc", 0.88)):
                judge(f"{name}, best detector, {key}", max(values(name, row, key).mean() for row in detectors), bound)
        elif name != "held-out":
            detectors = [row for row in ("purified", "nearest, tiny, purified") if row in seeds[0]]
            best = max(values(name, row, "image_auroc").mean() for row in detectors)
            judge(f"{name}, purified, best detector, image AUROC", best, 0.90)
        if "all" in seeds[0]:
            ahead = values(name, "purified", "image_auroc") - values(name, "all", "image_auroc")
            judge(f"{name}, seeds in which purified is above all in image AUROC", (ahead > 0).mean(), 1.0)
        own = ("nearest, tiny", "nearest, tiny, purified")
        others = [row for row in seeds[0] if row.startswith("nearest") and row not in own]
        if others:
            leads = [
                values(name, "nearest, tiny", key).mean() - values(name, row, key).mean()
                for row in others
                for key in ("image_auroc", "pixel_auroc")
            ]
            judge(f"{name}, nearest neighbours: least lead over random and hand-made features", min(leads), 0.02)
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
