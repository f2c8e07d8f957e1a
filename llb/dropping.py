"""When does dropping pay? What a keep rule and the best threshold gain, over how good the ranking is.

    python -m llb.dropping                  PaDiM on the demo set, whose defects recur, and on one whose defects do not
    python -m llb.dropping --grid DIR,DIR   finished runs as points: what purified gains, over what clean would gain
    python -m llb.dropping --grid DIR,DIR --best         and what the best threshold on the same ranking would gain

The ranking is stage 1's. In the first figure it is made better or worse on purpose: the log scores of the defective
images are moved up or down by some standard deviations of the normal ones. The best threshold is chosen by the test
labels. So labels decide here; it is for the figures alone, and no rule can do so. The best of nine detectors also gains
by luck: so --best prints what the best threshold on a random order of the images gains, too. All thresholds are one
stack of final detectors.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llb.checkpoint import CheckpointFolder
from llb.compare import differing, markdown, read_groups
from llb.config import Evaluate, Stage1
from llb.console import progress, run_script, say
from llb.data import Dataset
from llb.demo import write_demo
from llb.device import start_jax
from llb.figures import COLOURS, INK, house, new_figure, save
from llb.files import UserError, check_writable_file, some
from llb.fit import learn
from llb.flags import flag, parse_flags, real, typed_flags, whole
from llb.keep import choose, deviations, keep_lowest
from llb.looks import runs_in
from llb.metrics import image_metrics
from llb.run import load_datasets, place_run, read_run, run_encoder
from llb.runfiles import final_name
from llb.score import score_all
from llb.stage import Stage, load_features, make_stage
from llb.tables import read_scores
from llb.train import Submodels, submodel_keys
from stage1_partition import run_stage1

MOVES = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)  # of the defective images' log scores, in deviations
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # kept; the best threshold is the best of them
SETS = {"recurring": 1.0, "singular": 0.0}  # share of defects that recur
VALUES = {
    "ranking": "ranking AUROC", "auto": "auto − all", "best": "best − all", "luck": "best, random order − all",
    "clean": "clean − all",
}  # fmt: skip
GAIN = "gain of image AUROC over all"


@dataclass
class Dropping:
    """Draw what dropping images gains, over the quality of the ranking, or for finished runs."""

    grid: str | None = flag(
        None, "folders of llb.ablate, of runs with purified, all and clean, with commas", shown="the two demo sets"
    )
    best: bool = flag(
        False,
        f"with --grid: the best threshold of each run, by {len(SHARES)} final detectors, and that of a random order",
    )
    cache: str = flag("runs/cache", "with --best: the cache of the runs' features")
    noise_ratio: float = flag(0.2, "share of defective training images of the demo sets", real(0, 1, open_below=True))
    seed: int = flag(0, "of the demo sets' runs", whole(0))
    plot: str = flag("runs/dropping", "draw PLOT.png and PLOT.svg")


def main() -> None:
    settings = parse_flags(Dropping)
    if not (settings.grid and settings.best) and (given := typed_flags(settings, ("best", "cache"))):
        raise UserError(f"{given[0]} belongs to {'--grid' if settings.best else '--best'}: give both")
    if settings.grid and (given := typed_flags(settings, ("noise_ratio", "seed"))):
        raise UserError(f"{given[0]} is of the demo sets, and --grid takes their place: leave one of them out")
    check_writable_file(f"{settings.plot}.png", "--plot")
    if settings.grid:
        points = points_of([run for each in settings.grid.split(",") for run in runs_in(Path(each))])
        if settings.best:
            start_jax(Evaluate())
            for point in progress(points, desc="best thresholds", unit="run"):
                detector = point["settings"]["final.detector"]
                point["best"], point["luck"] = best_threshold(point["run"], settings.cache, detector)
        say(points_table(points))
        draw_points(points, settings.plot)
        return
    device, curves = start_jax(Evaluate()), {}
    with tempfile.TemporaryDirectory() as folder, progress(total=len(SETS), desc="sets", unit="set") as bar:
        for name, recurring in SETS.items():
            data, run = Path(folder) / name, Path(folder) / f"run-{name}"
            write_demo(data, recurring=recurring)
            stage1 = Stage1(
                data=str(data), encoder="tiny", detector="padim", noise_ratio=settings.noise_ratio, seed=settings.seed,
                out=str(run), cache=str(Path(folder) / "cache"),
            )  # fmt: skip
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                run_stage1(place_run(stage1), stage1, device)
                curves[name] = gains(run, Evaluate(run=str(run), cache=stage1.cache))
            bar.update()
    titles = ["defects", "ranking AUROC", "auto − all", "best − all", "clean − all", "auto keeps"]
    rows = [[name, *(f"{x:z.3f}" for x in row)] for name, table in curves.items() for row in table]
    say(markdown(titles, rows))
    draw_curves(curves, settings.plot)


def stages_of(run: Path, settings: Evaluate, detector: str | None = None) -> list[tuple[Stage, Dataset, np.ndarray]]:
    """Of each category of a run: the final detector on all images, the images, and their scores of stage 1.

    detector: its name; None for stage 1's.
    """
    config = read_run(run)
    final = final_name("all", detector or config["detector"], config)
    stage = make_stage(run, settings, run_encoder(run, config), config | config.get("stage2", {}).get(final, {}), final)
    datasets = load_datasets(run, config, settings)
    return [(stage, dataset, read_scores(run / dataset.category, dataset)["score"]) for dataset in datasets]


def best_threshold(run: Path, cache: str, detector: str) -> tuple[float, float]:
    """Image AUROC of a final detector by the best of SHARES, less that of all images: by the scores of stage 1, and by
    the same scores dealt out to the images at random; the means of the categories."""
    gained, random = [], np.random.default_rng(read_run(run)["seed"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for stage, dataset, score in stages_of(run, Evaluate(run=str(run), cache=cache), detector):
            orders = (score, random.permutation(score))
            aurocs = [final_aurocs(stage, dataset, [keep_lowest(each, share) for share in SHARES]) for each in orders]
            gained.append([max(values) - values[0] for values in aurocs])
    return tuple(np.mean(gained, axis=0).tolist())


def gains(run: Path, settings: Evaluate) -> np.ndarray:
    """For each of MOVES: ranking AUROC; image AUROC by auto, the best threshold and clean, less that of all; the share
    that auto keeps. float (len(MOVES), 5)."""
    ((stage, dataset, score),) = stages_of(run, settings)
    labels = np.array([record.label for record in dataset.train])
    deviation = np.log(score).std() / deviations(score).std()
    rows = []
    for move in MOVES:
        moved = score * np.exp(move * deviation * labels)
        auto, _ = choose(moved, "auto")
        kept = [auto, labels == 0, *(keep_lowest(moved, share) for share in SHARES)]
        ours, clean, *others = final_aurocs(stage, dataset, kept)
        ranking = image_metrics(labels, moved)["image_auroc"]
        rows.append([ranking, ours - others[0], max(others) - others[0], clean - others[0], auto.mean()])
    return np.array(rows)


def final_aurocs(stage: Stage, dataset: Dataset, kept: list[np.ndarray]) -> list[float]:
    """Image AUROC of a final detector for each choice of training images, all at once. kept: K × bool (N,)."""
    keys = submodel_keys(jax.random.fold_in(jax.random.key(0), 2), 1)
    submodels = Submodels([np.flatnonzero(each) for each in kept], keys[np.zeros(len(kept), int)])
    with tempfile.TemporaryDirectory() as folder:
        at = CheckpointFolder(Path(folder) / "finals", "")
        params, _ = learn(stage.setup, load_features(stage, dataset, "train"), submodels, at, "thresholds")
    scores = score_all(params, stage.setup, load_features(stage, dataset, "test"), len(dataset.test), "thresholds")
    labels = [record.label for record in dataset.test]
    return [image_metrics(labels, column)["image_auroc"] for column in scores.T]


def draw_curves(curves: dict[str, np.ndarray], plot: str) -> None:
    """curves: of `gains`, by the name of the set."""
    with house():
        figure, axes = new_figure(1, len(curves), 3.6 * len(curves), 3.0, sharex=True, sharey=True)
        for axis, (name, table) in zip(axes[0], curves.items()):
            ranking, auto, best, clean, _ = table[np.argsort(table[:, 0])].T
            axis.plot(ranking, best, color=COLOURS[1], marker="o", markersize=4, label="best threshold, by labels")
            axis.plot(ranking, auto, color=COLOURS[0], marker="o", markersize=4, label="--keep auto")
            axis.axhline(clean[0], color=INK, linestyle=":", label="clean")
            axis.set(title=f"{name} defects", xlabel="ranking AUROC")
        axes[0, 0].set_ylabel(GAIN)
        axes[0, 1].legend(loc="upper left")
        save(figure, Path(f"{plot}.png"), Path(f"{plot}.svg"))


def points_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each run that is evaluated on purified, all and clean: its settings and folder; "ranking", its AUROC; image
    AUROC on purified ("auto") and "clean", less that on all; "best" and "luck" are None."""
    points, rows = [], {}
    for group in read_groups(runs):
        for seed, run in group.runs.items():
            names = ("ranking AUROC", *(f"image AUROC {on}" for on in ("all", "purified", "clean")))
            ranking, base, ours, clean = (group.figures[name].get(seed) for name in names)
            if None not in (base, ours, clean):
                values = {"ranking": ranking, "auto": ours - base, "best": None, "luck": None, "clean": clean - base}
                points.append({"settings": group.settings, "run": Path(run)} | values)
                rows.setdefault(row_of(group.settings), []).append(group)
    if others := sorted({name for own in rows.values() for name in differing(own)[0]} - {"sources"}):
        raise UserError(f"--grid: of one set, detector and noise ratio there are runs that differ in {some(others)}")
    if not points:
        raise UserError("--grid: no run there is evaluated on purified, all and clean")
    return points


def row_of(settings: dict[str, Any]) -> tuple[str, str, str, str]:
    """The set, its categories, the final detector and the noise ratio of a run, which make a row of the table."""
    data, categories = settings["data"] or settings["layout"], ", ".join(sorted(settings["categories"]))
    return data, categories, settings["final.detector"], f"{settings['noise_ratio']:g}"


def points_table(points: Sequence[dict[str, Any]]) -> str:
    """The means over the seeds, and the lowest gain of a seed; a row for each set, detector and noise ratio."""
    titles, rows = ["set", "categories", "detector", "noise ratio", "n", *VALUES.values(), "lowest auto − all"], []
    groups = {}
    for point in points:
        groups.setdefault(row_of(point["settings"]), []).append(point)
    for (path, *names), own in [*sorted(groups.items()), (("all", "", "", ""), points)]:
        cells = []
        for name, sign in zip(VALUES, ("", *"++++")):
            values = [point[name] for point in own if point[name] is not None]
            cells.append(f"{np.mean(values):{sign}z.4f}" if values else "–")
        rows.append([Path(path).name, *names, str(len(own)), *cells, f"{min(point['auto'] for point in own):+z.4f}"])
    return markdown(titles, rows)


def draw_points(points: Sequence[dict[str, Any]], plot: str) -> None:
    """points: of `points_of`; the detector gives the colour, a ring is the best threshold."""
    kinds = list(dict.fromkeys(point["settings"]["final.detector"] for point in points))
    with house():
        figure, ((axis,),) = new_figure(1, 1, 4.6, 3.6)
        for colour, kind in zip(COLOURS, kinds):
            own = [point for point in points if point["settings"]["final.detector"] == kind]
            axis.plot([p["clean"] for p in own], [p["auto"] for p in own], "o", color=colour, markersize=4, label=kind)
            if rings := [point for point in own if point["best"] is not None]:
                style = {"markersize": 5, "fillstyle": "none", "markeredgewidth": 0.7}
                axis.plot([p["clean"] for p in rings], [p["best"] for p in rings], "o", color=colour, **style)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.axline((0, 0), slope=1, color=INK, linestyle=":", linewidth=0.8)
        axis.set(xlabel="clean − all, image AUROC", ylabel="purified − all")
        axis.legend()
        save(figure, Path(f"{plot}.png"), Path(f"{plot}.svg"))
    rings = ": rings are best thresholds" * any(point["best"] is not None for point in points)
    say(f"{plot}.png, {plot}.svg{rings}")


if __name__ == "__main__":
    run_script(main, resumable=False)
