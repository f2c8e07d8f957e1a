"""What differs between runs, and what it does. No JAX.

    python -m llb.compare RUN…                             a table: mean ± standard deviation over the seeds
    python -m llb.compare runs/a* --csv a.csv --plot a     the figures of each run; a.png and a.svg

Runs that differ in the seed alone make one row; runs by other sources of llb make another one. Differences to the first
row are paired by seed: the same seed draws the same subsets and plants the same defects.
"""

import csv
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from llb.console import run_script, say
from llb.figures import house, save, spread_figure
from llb.files import UserError, check_writable_file, write_csv
from llb.flags import WORDS, flag, parse_flags, real
from llb.metrics import lowest_contamination, purification
from llb.pictures import printable
from llb.runfiles import read_config
from llb.tables import TRAIN_ON, UNDEFINED, mean_defined, read_metrics, read_table

# in config.json, but no setting; or it follows from the images; or it has a place of its own here
NO_SETTINGS = ("llb", "checksum", "command", "data_given", "reading", "versions", "device", "git_commit", "git_dirty")
NO_SETTINGS += ("white", "weights", "category_steps", "stage2", "seed", "train_on")
# of settings that differ together, these name the rows
FIRST = ("detector", "final.detector", "data", "encoder", "protocol", "noise_ratio", "submodels", "steps")
FIRST += ("final.steps", "recipe", "aggregate", "keep")
STAGE1 = ("ranking AUROC", "contamination", "kept", "lowest: each alone", "lowest: their mean")
JUDGED = {"image AUROC": "image_auroc", "pixel AUPRO": "pixel_aupro"}  # in metrics.json
FIGURES = STAGE1 + tuple(f"{title} {final}" for title in JUDGED for final in TRAIN_ON)
GAINS = {f"{final} − all": (f"image AUROC {final}", "image AUROC all") for final in ("purified", "clean")}
FEWEST = 6  # seeds; of fewer differences, a signed-rank test gives no p < .05
TESTED = f"""Differences to the first row, paired by seed; "− all": of image AUROC, within a row. p: by the two-sided
signed-rank test, from {FEWEST} seeds on, since fewer cannot give p < .05; not corrected for the number of tests."""


@dataclass
class Compare:
    """Compare runs: a table of what differs, and what it does."""

    run: Any = flag(WORDS, "folders of runs")
    csv: str | None = flag(None, "write the figures of each run to this file", shown="none")
    plot: str | None = flag(None, "draw PLOT.png and PLOT.svg", shown="none")
    lowest: float | None = flag(
        None, "show the contamination of this share of lowest scores", real(0, 1, True), None, "–"
    )


@dataclass(frozen=True)
class Result:
    """What a run has reached with one setting of its final detectors."""

    run: str
    seed: int
    settings: dict[str, Any]  # by name; "final.…" is the final detector's
    figures: dict[str, float | None]  # by the names in FIGURES


Group = dict[int, Result]  # by seed; all else is equal


def main() -> None:
    settings = parse_flags(Compare)
    for file in filter(None, (settings.csv, settings.plot and f"{settings.plot}.png")):
        check_writable_file(file, "--csv" if file == settings.csv else "--plot")
    groups = grouped([result for run in settings.run for result in read_results(Path(run), settings.lowest)])
    if settings.csv:
        write_results(Path(settings.csv), groups)
    if settings.plot:
        draw(settings.plot, groups)
    say(report(groups))


# ---- what the runs say ----


def read_results(run: Path, lowest: float | None = None) -> list[Result]:
    """A run's results, one for each setting of its final detectors; --train-on is no such setting.

    lowest: of `lowest_contamination`. A UserError is raised if there is no run, or no finished stage 1.
    """
    config = read_config(run, str(run), "give the folder of a run")
    stage1 = mean_defined([stage1_figures(run / name, lowest) for name in config["categories"]])
    metrics, finals = read_metrics(run).get("mean", {}), {}
    for final in config.get("stage2", {}).keys() & metrics.keys():
        own = config["stage2"][final]
        _, figures = finals.setdefault(frozen(flat(own)), (flat(own, "final."), {}))
        figures |= {f"{title} {own['train_on']}": metrics[final].get(name) for title, name in JUDGED.items()}
    finals = [finals[each] for each in sorted(finals)] or [({}, {})]
    return [Result(str(run), config["seed"], flat(config) | own, stage1 | figures) for own, figures in finals]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings in a part of config.json by name; one of a detector's own is called set.NAME."""
    settings = {name: value for name, value in config.items() if name not in NO_SETTINGS}
    settings |= {f"set.{name}": value for name, value in (settings.pop("set", None) or {}).items()}
    return {prefix + name: value for name, value in settings.items()}


def frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def stage1_figures(folder: Path, lowest: float | None) -> dict[str, float | None]:
    """What stage 1 has reached on a category, by its scores.csv."""
    rows = read_table(folder / "scores.csv", ("score", "kept", "label"))
    if not rows:
        raise UserError(f"{folder / 'scores.csv'} is not there: finish stage 1 of this run first")
    score, kept, labels = ([row[name] for row in rows] for name in ("score", "kept", "label"))
    facts = purification(labels, np.array(score), np.array(kept))
    values = [facts["train_auroc"], facts["contamination_after"], facts["kept"] / facts["n"]]
    if lowest:
        with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
            scores = [[float(row[name]) for name in row if name.startswith("model_")] for row in csv.DictReader(file)]
        values += lowest_contamination(np.array(scores), labels, lowest)
    return dict(zip(STAGE1, values))


# ---- groups, and what differs between them ----


def grouped(results: Sequence[Result]) -> list[Group]:
    """Results that differ in the seed alone; groups in the order of their first, results by seed.

    A UserError is raised for two runs with the same settings and the same seed.
    """
    groups: dict[str, Group] = {}
    for result in results:
        group = groups.setdefault(frozen(result.settings), {})
        if result.seed in group:
            both = f"{group[result.seed].run} and {result.run}"
            raise UserError(f"{both} have the same settings and the same seed: leave one of them out")
        group[result.seed] = result
    return [dict(sorted(group.items())) for group in groups.values()]


def settings_of(group: Group) -> dict[str, Any]:
    return next(iter(group.values())).settings


def differing(groups: Sequence[Group], first: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The settings that tell the groups apart, as few as do it, and those that differ together with them.

    first: these come before the others if they differ.
    """
    settings = list(map(settings_of, groups))
    values = {name: [frozen(each.get(name)) for each in settings] for name in dict.fromkeys(itertools.chain(*settings))}
    order = [*first, *FIRST, *(name for name in values if name != "sources"), "sources"]
    names = sorted((name for name in values if len(set(values[name])) > 1), key=order.index)
    chosen, apart = [], 1
    for name in names:
        kinds = len(set(zip(*(values[each] for each in (*chosen, name)))))
        chosen, apart = ([*chosen, name], kinds) if kinds > apart else (chosen, apart)
    return chosen, [name for name in names if name not in chosen]


def values_of(group: Group, figure: str) -> dict[int, float]:
    """A figure by seed, where it is defined."""
    values = {seed: result.figures.get(figure) for seed, result in group.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """The differences of one figure to another, for each seed that both have."""
    return [value - other[seed] for seed, value in one.items() if seed in other]


# ---- for people ----


def report(groups: Sequence[Group], first: Sequence[str] = ()) -> str:
    """Markdown: a table of the groups, and one of their differences. first: of `differing`."""
    chosen, others = differing(groups, first)
    figures = [name for name in FIGURES if any(values_of(group, name) for group in groups)]
    gains = {title: pair for title, pair in GAINS.items() if {*pair} <= {*figures}}
    values, differences = [], []
    for group in groups:
        start = [*(shown(name, settings_of(group).get(name)) for name in chosen), str(len(group))]
        values.append(start + [written(name, [*values_of(group, name).values()]) for name in figures])
        base = groups[0] if group is not groups[0] else {}
        compared = {name: paired(values_of(group, name), values_of(base, name)) for name in figures}
        compared |= {title: paired(*(values_of(group, name) for name in pair)) for title, pair in gains.items()}
        differences.append(start + [written(name, each, "+") for name, each in compared.items()])
    parts = [markdown([*chosen, "n", *figures], values)]
    if others:
        parts.append(f"Together with these differ: {', '.join(others)}.")
    if len(groups) > 1 or gains:
        parts += [markdown([*chosen, "n", *figures, *gains], differences), TESTED]
    return "\n\n".join(parts)


def written(figure: str, values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation. sign: "+" for differences; these are tested if there are enough."""
    if not values:
        return UNDEFINED
    percent = figure in STAGE1[1:]
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * np.mean(values):{sign}.{digits}f}"
    text += f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    unequal = [value for value in values if value]
    tested = f" (p {wilcoxon(unequal).pvalue:.3f})" if sign and len(unequal) >= FEWEST else ""
    return text + " %" + tested if percent else re.sub(r"\b0\.", ".", text + tested)


def shown(name: str, value: Any) -> str:
    """A setting's value in a table."""
    if name == "sources":
        return " ".join(digest[:8] for digest in value)
    value = ("demo set" if name == "data" else UNDEFINED) if value is None else value
    return printable(" ".join(map(str, value)) if isinstance(value, list) else str(value)).replace("|", "\\|")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (titles, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_results(file: Path, groups: Sequence[Group]) -> None:
    """A row for each run and setting of its final detectors: what differs, and the figures."""
    names, rows = list(itertools.chain(*differing(groups))), []
    for result in itertools.chain(*(group.values() for group in groups)):
        figures = [result.figures.get(name) for name in FIGURES]
        settings = [shown(name, result.settings.get(name)) for name in names]
        rows.append([result.run, result.seed, *settings, *("" if value is None else value for value in figures)])
    write_csv(file, ["run", "seed", *names, *FIGURES], rows)


def draw(prefix: str, groups: Sequence[Group], first: Sequence[str] = ()) -> None:
    """Draw PREFIX.png and .svg: a panel for each kind of figure, over the setting with the most values; the others name
    the curves, together with --train-on. first: of `differing`."""
    chosen = differing(groups, first)[0] or ["data"]
    kinds = {name: {shown(name, settings_of(group).get(name)) for group in groups} for name in chosen}
    along = max(chosen, key=lambda name: len(kinds[name]))
    panels: dict[str, dict] = {}
    for name, group in itertools.product(FIGURES, groups):
        settings, final = settings_of(group), name.rpartition(" ")[2] if name not in STAGE1 else ""
        others = ", ".join(f"{each} {shown(each, settings.get(each))}" for each in chosen if each != along)
        values = list(values_of(group, name).values())
        if values and name not in STAGE1[2:]:
            curves = panels.setdefault(name.removesuffix(f" {final}"), {})
            curves.setdefault((others, final), {})[shown(along, settings.get(along))] = values
    with house():
        save(spread_figure(panels, along), Path(f"{prefix}.png"), Path(f"{prefix}.svg"))


if __name__ == "__main__":
    run_script(main, resumable=False)
