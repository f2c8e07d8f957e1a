"""What a look at the suspects is worth: AUROC against the images that were looked at. No JAX.

    python -m llb.ablate --preset review
    python -m llb.looks --grid runs/review            draws runs/review/looks.png and .svg

A panel for each detector and noise ratio. The points are means over the seeds that have all of the panel; "use": what
was called defective teaches a head, too (`--head auto`); "drop": it is only left out (`--head none`). The level lines
are of detectors on all images, as after no look, and on the clean ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llb.compare import Group, differing, read_groups
from llb.console import run_script, say
from llb.figures import COLOURS, INK, house, new_figure, save
from llb.files import UserError
from llb.flags import flag, parse_flags

WAYS = {"auto": ("use", "-"), "none": ("drop", "--")}
LEVELS = {"clean": ":", "all": "-."}
SHOWN = ("detector", "noise_ratio", "review.simulate", "review.errors", "final.head")


@dataclass
class Looks:
    """Draw AUROC against the images that were looked at."""

    grid: str = flag("runs/review", "folder of a finished grid with review.simulate")


def main() -> None:
    grid = Path(parse_flags(Looks).grid)
    looked = [each for each in read_groups(runs_in(grid)) if each.settings.get("review.simulate")]
    groups = [each for each in looked if each.figures["image AUROC reviewed"]]  # a grid may have been interrupted
    if not groups:
        raise UserError(f"--grid {grid} holds no scores after a simulated look: python -m llb.ablate --preset review")
    if others := [name for name in differing(groups, SHOWN)[0] if name not in (*SHOWN, "sources")]:
        raise UserError(f"--grid {grid}: its runs differ in {', '.join(others)}, too; make a grid for each")
    with house():
        save(looks_figure(groups), grid / "looks.png", grid / "looks.svg")
    say(f"{grid / 'looks.png'}, {grid / 'looks.svg'}")


def runs_in(grid: Path) -> list[Path]:
    """The runs of a grid, those that are not evaluated left out."""
    return sorted(file.parent for file in grid.glob("*/metrics.json"))


def looks_figure(groups: Sequence[Group]):
    """The figure; call it in `house`. groups: of runs with simulated looks."""
    detectors, ratios = (
        sorted({each.settings[name] for each in groups}, key=lambda value: (str(type(value)), value))
        for name in ("detector", "noise_ratio")
    )
    shape = {"width": max(5.5, 2.6 * len(ratios)), "height": 1 + 1.9 * len(detectors)}
    figure, panels = new_figure(len(detectors), len(ratios), **shape, sharex=True, sharey="row")
    known = {}
    for group in groups:
        settings, figures = group.settings, group.figures
        axis = panels[detectors.index(settings["detector"]), ratios.index(settings["noise_ratio"])]
        axis.set_title(f"{settings['detector']}, {settings['noise_ratio']:.0%} defects")
        word, line = WAYS[settings["final.head"]]
        curve = (f"{word}, {settings['review.errors']:.0%} errors", line, settings["review.errors"])
        points = known.setdefault(axis, {}).setdefault(curve, {})
        points.setdefault(settings["review.simulate"], {}).update(figures["image AUROC reviewed"])
        for final in LEVELS:
            known[axis].setdefault(final, {}).update(figures[f"image AUROC {final}"])
    errors = sorted({curve[2] for curves in known.values() for curve in curves if curve not in LEVELS})
    for axis, curves in known.items():
        levels = {final: values for final in LEVELS if (values := curves.pop(final))}
        owns = [*levels.values(), *(own for points in curves.values() for own in points.values())]
        seeds = set.intersection(*map(set, owns))  # a grid may have been interrupted
        if not seeds:
            raise UserError(f"--grid: {axis.get_title('left')}: no seed has all of its runs; finish the grid")
        for final, values in levels.items():
            mean = np.mean([values[seed] for seed in seeds])
            axis.axhline(mean, color=INK, linestyle=LEVELS[final], linewidth=1, label=final)
        for (name, kind, wrong), points in sorted(curves.items()):
            means = [np.mean([points[each][seed] for seed in seeds]) for each in sorted(points)]
            axis.plot(
                sorted(points), means, kind, color=COLOURS[errors.index(wrong)], marker="o", markersize=3, label=name
            )
        axis.set_xticks(sorted({each.settings["review.simulate"] for each in groups}))
    for axis in panels[-1]:
        axis.set_xlabel("images looked at")
    for axis in panels[:, 0]:
        axis.set_ylabel("image AUROC")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    run_script(main, resumable=False)
