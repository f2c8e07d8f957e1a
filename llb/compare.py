"""What differs between runs, and what it does. No JAX.

    python -m llb.compare RUN…                             a table: mean ± standard deviation over the seeds
    python -m llb.compare runs/a* --csv a.csv --plot a     the figures of each run; a.png and a.svg

Runs that differ in the seed alone make one row; runs by other sources of llb make another one. Differences to the first
row are paired by seed: the same seed draws the same subsets and plants the same defects.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from llb.console import run_script, say
from llb.figures import house, save, spread_figure
from llb.files import UserError, check_writable_file, write_csv
from llb.flags import WORDS, flag, parse_flags, real
from llb.marks import threshold_is_old, training_set
from llb.metrics import lowest_contamination, purification
from llb.pictures import printable
from llb.runfiles import read_config, stage2_command
from llb.tables import TRAIN_ON, UNDEFINED, listed_images, mean_defined, read_metrics, read_submodels, read_table

# in config.json, but no setting; or it follows from the images; or it has a place of its own here
NO_SETTINGS = ("llb", "checksum", "command", "data_given", "reading", "versions", "device", "git_commit", "git_dirty")
NO_SETTINGS += ("white", "weights", "category_steps", "stage2", "seed", "train_on", "continued_on")
FIRST = ("detector", "final.detector", "encoder", "protocol", "recipe", "submodels")  # name rows rather than others
STAGE1 = ("ranking AUROC", "contamination", "kept", "lowest: each alone", "lowest: their mean")
JUDGED = {"image AUROC": "image_auroc", "pixel AUPRO": "pixel_aupro"}  # in metrics.json
FIGURES = STAGE1 + tuple(f"{title} {final}" for title in JUDGED for final in TRAIN_ON)
GAINS = {f"{final} − all": (f"image AUROC {final}", "image AUROC all") for final in TRAIN_ON if final != "all"}
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
        None, "show the contamination of this share of lowest scores", real(0, 1, open_below=True), shown="–"
    )


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, with one setting of their final detectors."""

    settings: dict[str, Any]  # by name; "final.…" is the final detectors'
    runs: dict[int, str] = field(default_factory=dict)  # by seed
    figures: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in FIGURES})  # by seed


def main() -> None:
    settings = parse_flags(Compare)
    publish(read_groups(settings.run, settings.lowest), settings.csv, settings.plot)


def publish(groups: Sequence[Group], table: str | None, plot: str | None, first: Sequence[str] = ()) -> None:
    """Write the files that are wanted, and print the report. first: of `differing`."""
    if table:
        check_writable_file(table, "--csv")
        write_runs(Path(table), groups)
    if plot:
        check_writable_file(f"{plot}.png", "--plot")
        draw(plot, groups, first)
    say(report(groups, first))


def read_groups(runs: Iterable[Path | str], lowest: float | None = None) -> list[Group]:
    """Groups in the order in which the runs are given. lowest: of `lowest_contamination`.

    A UserError is raised for two runs with the same settings and seed, and for a folder without a finished stage 1.
    """
    groups: dict[str, Group] = {}
    for run, (seed, settings, figures) in ((each, result) for each in runs for result in read_run(Path(each), lowest)):
        group = groups.setdefault(frozen(settings), Group(settings))
        if seed in group.runs:
            both = f"{group.runs[seed]} and {run}"
            raise UserError(f"{both} have the same settings and the same seed: leave one of them out")
        group.runs[seed] = str(run)
        for name, value in figures.items():
            group.figures[name] |= {} if value is None else {seed: value}
    return list(groups.values())


def read_run(run: Path, lowest: float | None) -> list[tuple[int, dict[str, Any], dict[str, float | None]]]:
    """Seed, settings and figures, once for each setting of the final detectors; --train-on is no such setting."""
    config, metrics = read_config(run, str(run), "give the folder of a run"), read_metrics(run).get("mean", {})
    categories = config["categories"]
    stage1 = mean_defined([stage1_figures(run / name, lowest) for name in categories])
    finals, judged = {}, {final: own for final, own in config.get("stage2", {}).items() if final in metrics}
    reviewed = [own for own in judged.values() if own["train_on"] == "reviewed"]
    heads = {frozen(flat(own | {"head": None})): own.get("head") for own in reviewed}
    for final, own in judged.items():  # what is not `reviewed` has no head, and stands beside what is
        own = own | {"head": heads.get(frozen(flat(own | {"head": None})), own.get("head"))}
        _, figures = finals.setdefault(frozen(flat(own)), (flat(own, "final."), {}))
        # the row says what an edited list holds, and not how a detector on an older one does
        lists = categories if own["train_on"] == "purified" else []
        if old := any(threshold_is_old(run / name, final, "purified", also_none=True) for name in lists):
            again = f"train it again: {stage2_command(run, final)} --overwrite"
            say(f"{run}: the figures of {final} are left out: purified.txt has changed since it was trained; {again}")
        known = {} if old else metrics[final]
        figures |= {f"{title} {own['train_on']}": known.get(name) for title, name in JUDGED.items()}
    finals = list(finals.values()) or [({}, {})]
    return [(config["seed"], flat(config) | settings, stage1 | figures) for settings, figures in finals]


def stage1_figures(folder: Path, lowest: float | None) -> dict[str, float | None]:
    """What stage 1 has reached on a category, by its scores.csv, and purified.txt, which a person may have edited."""
    rows = read_table(folder / "scores.csv", ("score", "label"))
    if not rows:
        raise UserError(f"{folder / 'scores.csv'} is not there: finish stage 1 of this run first")
    score, labels = ([row[name] for row in rows] for name in ("score", "label"))
    listed = [index for _, index in listed_images(folder, training_set(folder))]
    facts = purification(labels, np.array(score), np.isin(np.arange(len(rows)), listed))
    values = [facts["train_auroc"], facts["contamination_after"], facts["kept"] / facts["n"]]
    values += lowest_contamination(read_submodels(folder)[1], labels, lowest) if lowest else ()
    return dict(zip(STAGE1, values))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings in a part of config.json by name; one of a detector's own is set.NAME, of a look review.NAME."""
    settings = {name: value for name, value in config.items() if name not in NO_SETTINGS}
    for part in ("set", "review"):
        settings |= {f"{part}.{name}": value for name, value in (settings.pop(part, None) or {}).items()}
    return {prefix + name: value for name, value in settings.items()}


def frozen(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def differing(groups: Sequence[Group], first: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The settings that tell the groups apart, as few as do it, and those that differ together with them.

    first: these come before the others if they differ.
    """
    known = dict.fromkeys(itertools.chain(*(group.settings for group in groups)))
    values = {name: [frozen(group.settings.get(name)) for group in groups] for name in known}
    order = [*first, *FIRST, *(name for name in values if name != "sources"), "sources"]
    names = sorted((name for name in values if len(set(values[name])) > 1), key=order.index)
    chosen, apart = [], 1
    for name in names:
        kinds = len(set(zip(*(values[each] for each in (*chosen, name)))))
        chosen, apart = ([*chosen, name], kinds) if kinds > apart else (chosen, apart)
    return chosen, [name for name in names if name not in chosen]


def report(groups: Sequence[Group], first: Sequence[str] = ()) -> str:
    """Markdown: a table of the groups, and one of their differences. first: of `differing`."""
    (chosen, others), base = differing(groups, first), groups[0]
    figures = [name for name in FIGURES if any(group.figures[name] for group in groups)]
    gains = {title: pair for title, pair in GAINS.items() if {*pair} <= {*figures}}
    values, differences = [], []
    for group in groups:
        start = [*(shown(group, name) for name in chosen), str(len(group.runs))]
        owns = {name: group.figures[name].values() for name in figures}
        values.append(start + [written(name, own) + fewer(len(own), group) for name, own in owns.items()])
        pairs = [(name, base.figures[name] if group is not base else {}) for name in figures]
        pairs += [(one, group.figures[other]) for one, other in gains.values()]
        gaps = [[value - of[seed] for seed, value in group.figures[name].items() if seed in of] for name, of in pairs]
        cells = [written(name, gap, "+") + fewer(len(gap), group) for (name, _), gap in zip(pairs, gaps)]
        differences.append(start + cells)
    parts = [markdown([*chosen, "n", *figures], values)]
    parts += [f"Together with these differ: {', '.join(others)}."] if others else []
    if len(groups) > 1 or gains:
        parts += [markdown([*chosen, "n", *figures, *gains], differences), TESTED]
    return "\n\n".join(parts)


def written(figure: str, values: Iterable[float], sign: str = "") -> str:
    """Mean ± standard deviation. sign: "+" for differences; these are tested if there are enough."""
    values, percent = list(values), figure in STAGE1[1:]
    if not values:
        return UNDEFINED
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * np.mean(values):{sign}z.{digits}f}"  # z: no negative zero
    text += f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    unequal = [value for value in values if value]
    tested = f" (p {wilcoxon(unequal).pvalue:.3f})" if sign and len(unequal) >= FEWEST else ""
    return text + " %" + tested if percent else re.sub(r"\b0\.", ".", text + tested)


def fewer(n: int, group: Group) -> str:
    """What a cell of n values says if not all runs of the row have one."""
    return f" (n {n})" * (0 < n < len(group.runs))


def shown(group: Group, name: str) -> str:
    """A setting in a table."""
    value = group.settings.get(name)
    if value is None:
        return "demo set" if name == "data" else UNDEFINED
    words = [str(each)[: 8 if name == "sources" else None] for each in (value if isinstance(value, list) else [value])]
    return printable(" ".join(words)).replace("|", "\\|")


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (titles, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_runs(file: Path, groups: Sequence[Group]) -> None:
    """A row for each run and group: what differs, and the figures."""
    names, rows = list(itertools.chain(*differing(groups))), []
    for group, (seed, run) in ((each, of) for each in groups for of in each.runs.items()):
        figures = [group.figures[name].get(seed, "") for name in FIGURES]
        rows.append([run, seed, *(shown(group, name) for name in names), *figures])
    write_csv(file, ["run", "seed", *names, *FIGURES], rows)


def draw(prefix: str, groups: Sequence[Group], first: Sequence[str] = ()) -> None:
    """Draw PREFIX.png and .svg: a panel for each kind of figure, over the setting with the most values; the others name
    the curves, together with --train-on. first: of `differing`."""
    chosen, panels = differing(groups, first)[0] or ["data"], {}
    along = max(chosen, key=lambda name: len({shown(group, name) for group in groups}))
    for name, group in itertools.product([*STAGE1[:3], *FIGURES[len(STAGE1) :]], groups):
        final = "" if name in STAGE1 else name.rpartition(" ")[2]
        others = ", ".join(f"{each} {shown(group, each)}" for each in chosen if each != along)
        if group.figures[name]:
            curve = panels.setdefault(name.removesuffix(f" {final}"), {}).setdefault((others, final), {})
            curve[shown(group, along)] = list(group.figures[name].values())
    with house():
        save(spread_figure(panels, along), Path(f"{prefix}.png"), Path(f"{prefix}.svg"))


if __name__ == "__main__":
    run_script(main, resumable=False)
