"""The tables of a run, for programs and people. No JAX.

RUN/<category>/scores.csv                      what stage 1 found out about each training image
RUN/<category>/purified.txt                    the paths that stage 1 kept, one a line
RUN/<category>/predictions-<train-on>.csv      the scores of the test images
RUN/<category>/threshold-<train-on>.json       the score above which an image is called defective
RUN/<category>/kinds-<train-on>.csv            how well each kind of defect is found
RUN/metrics.json, metrics.csv                  how well each final detector finds defects
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llb.data import Dataset, Record
from llb.files import UserError, read_cell, read_json, some, write_csv, write_json, write_text
from llb.metrics import IMAGE_METRICS, PIXEL_METRICS, SAMPLE_METRICS, ranks
from llb.pictures import printable

TRAIN_ON = ("purified", "reviewed", "all", "clean")  # what a final detector may be trained on, in the order of tables
METRICS = IMAGE_METRICS + PIXEL_METRICS  # the samples' are shown where they are defined (`shown_metrics`)
TITLES = {"auroc": "AUROC", "ap": "AP", "f1_max": "F1-max", "aupro": "AUPRO"}
PURIFICATION = ("n", "kept", "contamination_before", "contamination_after", "train_auroc")  # the last: ranking AUROC
KINDS = ("kind", "images", "image_auroc", "found")
METRICS_FILE, UNDEFINED = "metrics.json", "–"
OF_THRESHOLD = {"threshold", "quantile", "images", "false_alarm_rate", "missed_rate"}
REPEAT = "delete it and run the stage that wrote it again"
SHARE = lambda text: float(text) if text else None  # noqa: E731 (of a table)
COLUMN_TYPES = {
    "score": lambda text: float(text) if math.isfinite(float(text)) else COLUMN_TYPES[text],
    "kept": {"0": False, "1": True}.__getitem__,
    "label": {"0": 0, "1": 1, "": None}.__getitem__,
}
COLUMN_TYPES |= {"verdict": {"fine": 0, "defect": 1}.__getitem__, "sha256": str}
COLUMN_TYPES |= {column: partial(read_cell, column) for column in ("path", "kind", "category", "from", "to")}
COLUMN_TYPES |= dict.fromkeys(("subset", "images", "bytes", "modified_ns", "step", "submodel"), int)
COLUMN_TYPES |= dict.fromkeys(("distance", "loss"), float) | dict.fromkeys(("image_auroc", "found"), SHARE)


@dataclass(frozen=True)
class Stage1Result:
    """What stage 1 decides about the N training images of a category."""

    subset: np.ndarray  # int32 (N,), 0 … K−1
    scores: np.ndarray  # float32 (N, K)
    aggregated: np.ndarray  # float32 (N,)
    kept: np.ndarray  # bool (N,)
    said: str | None = None  # by the rule that chose them


@dataclass(frozen=True)
class Choice:
    """The images that a final detector is trained on."""

    indices: np.ndarray  # int (n,), into dataset.train
    note: str | None = None  # for the user, such as that the list was edited by hand
    fine: tuple[str, ...] = ()  # paths that a person called fine, where that matters


def write_scores(folder: Path, records: Sequence[Record], result: Stage1Result) -> None:
    """scores.csv, in the order of the data set; rank 1 is the first suspect (the highest score)."""
    models = [f"model_{k}" for k in range(result.scores.shape[1])]
    rank = ranks(result.aggregated)
    rows = [
        [record.path, int(result.subset[i]), *map(float, result.scores[i]), float(result.aggregated[i]), int(rank[i])]
        + [int(result.kept[i]), "" if record.label is None else record.label]
        for i, record in enumerate(records)
    ]
    write_csv(folder / "scores.csv", ["path", "subset", *models, "score", "rank", "kept", "label"], rows)


def purified_text(records: Sequence[Record], kept: np.ndarray) -> str:
    return "".join(f"{record.path}\n" for record, keep in zip(records, kept) if keep)


def write_purified(folder: Path, records: Sequence[Record], kept: np.ndarray) -> None:
    """purified.txt. Stage 1 writes it last: if it is there, stage 1 is finished. kept: bool (N,)."""
    write_text(folder / "purified.txt", purified_text(records, kept))


def stage1_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("scores.csv", "suspects.png", "purified.txt"))


def read_table(
    file: Path, columns: Sequence[str], numbered: str | None = None, advice: str = REPEAT
) -> list[dict[str, Any]]:
    """Rows of a scores or predictions table, typed; [] without the file. A damaged table raises a UserError.

    numbered: the beginning of the names of more columns, which hold numbers; advice: ends the message.
    """
    if not file.is_file():  # a pipe would be waited for
        return []
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            rows = csv.DictReader(opened)
            more = [name for name in rows.fieldnames or () if numbered and name.startswith(numbered)]
            types = {name: COLUMN_TYPES[name] for name in columns} | dict.fromkeys(more, COLUMN_TYPES["score"])
            return [{name: parse(row[name]) for name, parse in types.items()} for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error}): {advice}") from None


def read_scores(folder: Path, dataset: Dataset) -> dict[str, np.ndarray]:
    """scores.csv by column: score float (N,), kept bool (N,). A UserError is raised if it lacks an image."""
    file = folder / "scores.csv"
    rows = read_table(file, ("path", "score", "kept"))
    if [row["path"] for row in rows] != [record.path for record in dataset.train]:
        raise UserError(f"{file} is damaged (its rows are not the training images): delete it and run stage 1 again")
    return {name: np.array([row[name] for row in rows]) for name in ("score", "kept")}


def read_submodels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What scores.csv says of the sub-models: each image's subset, int32 (N,), and the scores, float32 (N, K)."""
    rows = read_table(folder / "scores.csv", ["subset"], "model_")
    scores = np.array([list(row.values()) for row in rows], np.float64).reshape(len(rows), -1 if rows else 1)
    return scores[:, 0].astype(np.int32), scores[:, 1:].astype(np.float32)


def read_purified(folder: Path, dataset: Dataset) -> Choice:
    """The images that purified.txt lists, and a note if the list was edited by hand.

    A UserError is raised if the list is missing, empty or no UTF-8 text, or a listed path is not among the training
    images or not on the disk.
    """
    file, listed = folder / "purified.txt", listed_images(folder, dataset)
    for number, path in ((number, dataset.train[index].path) for number, index in listed):
        if not (dataset.root / path).is_file():
            raise UserError(f"{file}, line {number}: {path} is not in {dataset.root}; fix or delete the line")
    chosen = np.unique([index for _, index in listed])
    kept = np.flatnonzero(read_scores(folder, dataset)["kept"])
    added, removed = len(np.setdiff1d(chosen, kept)), len(np.setdiff1d(kept, chosen))
    note = f"purified.txt was edited by hand: {added} added, {removed} removed" if added or removed else None
    return Choice(chosen, note)


def listed_images(folder: Path, dataset: Dataset) -> list[tuple[int, int]]:
    """As `read_purified`, of images that need not be on the disk: for each line its number, and the image's index."""
    file = folder / "purified.txt"
    position = {record.path: index for index, record in enumerate(dataset.train)}
    if not file.is_file():
        raise UserError(f"{file} is not there: run stage 1 again, which writes it")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors write a byte-order mark
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8 again") from None
    listed = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    # written on Windows, or a remark
    listed = [(number, path if path in position else path.replace("\\", "/")) for number, path in listed]
    listed = [(number, path) for number, path in listed if path in position or not path.startswith("#")]
    for number, path in listed:
        if path not in position:
            raise UserError(f"{file}, line {number}: {path} is not among the training images; fix or delete the line")
    if not listed:
        raise UserError(f"{file} lists no image: list at least one, or delete the file and run stage 1 again")
    return [(number, position[path]) for number, path in listed]


def write_predictions(folder: Path, train_on: str, records: Sequence[Record], scores: np.ndarray) -> None:
    """predictions-<train-on>.csv. scores: float32 (N,)."""
    rows = [[r.path, float(score), "" if r.label is None else r.label] for r, score in zip(records, scores)]
    write_csv(folder / f"predictions-{train_on}.csv", ["path", "score", "label"], rows)


def write_threshold(folder: Path, final: str, facts: dict[str, float | int | None]) -> None:
    """threshold-<final>.json. facts: of `llb.threshold.threshold_facts`."""
    write_json(folder / threshold_file(final), facts)


def read_threshold(folder: Path, final: str, also_none: bool = False) -> dict[str, float | int | None] | None:
    """What `write_threshold` has written; None if the detector is not evaluated, or, unless `also_none`, has no
    threshold. A damaged file raises a UserError."""
    file, advice = folder / threshold_file(final), "delete it and run evaluate.py again"
    if not file.is_file():
        return None
    facts = read_json(file, advice)
    if not _are_facts(final, facts) or not OF_THRESHOLD <= facts.keys() or None in (facts["quantile"], facts["images"]):
        raise UserError(f"{file} is damaged; {advice}")
    return facts if also_none or facts["threshold"] is not None else None


def threshold_file(final: str) -> str:
    return f"threshold-{final}.json"


def write_kinds(folder: Path, final: str, rows: Sequence[Sequence[Any]]) -> None:
    """kinds-<final>.csv. rows: of `llb.threshold.by_kind`."""
    cells = [["" if value is None else value for value in row] for row in rows]
    write_csv(folder / kinds_file(final), list(KINDS), cells)


def kinds_file(final: str) -> str:
    return f"kinds-{final}.csv"


def threshold_line(facts: dict[str, float | int | None], images: str = "purified images") -> str:
    """In words. facts: of `llb.threshold.threshold_facts`, with a threshold; images: those that it is taken from."""
    taken = f"{facts['quantile']:.0%} quantile of the scores of the {facts['images']} {images}"
    line = f"threshold {facts['threshold']:.4g} ({taken})"
    rates = {
        "of the normal test images are false alarms": "false_alarm_rate",
        "of the defective ones are missed": "missed_rate",
    }
    known = [f"{percent(facts[rate])} {words}" for words, rate in rates.items() if facts[rate] is not None]
    return ": ".join(filter(None, (line, ", ".join(known))))


def read_metrics(run: Path) -> dict[str, Any]:
    """The metrics so far, as metrics.json holds them; {} before the first evaluation. A damaged one: UserError."""
    file, advice = run / METRICS_FILE, "delete it and run evaluate.py again"
    if not file.is_file():
        return {}
    metrics = read_json(file, advice)
    entries = list(metrics.values()) if isinstance(metrics, dict) else [None]
    if not all(isinstance(entry, dict) and all(map(_are_facts, entry, entry.values())) for entry in entries):
        raise UserError(f"{file} is damaged; {advice}")
    return metrics


def forget_metrics(run: Path, categories: Iterable[str], names: Sequence[str]) -> None:
    """Take names, such as final detectors, out of the entries of categories, or "mean", in metrics.json and .csv."""
    metrics = read_metrics(run)
    if any([metrics.get(category, {}).pop(name, None) is not None for category in categories for name in names]):
        write_json(run / METRICS_FILE, metrics)
        write_metrics_csv(run / "metrics.csv", metrics)


def _are_facts(name: str, facts: Any) -> bool:
    """Whether this may stand in an entry of metrics.json: numbers by name, or the paths of images without masks."""
    if name == "missing_masks":
        return isinstance(facts, list) and all(isinstance(path, str) for path in facts)
    known = isinstance(facts, dict) and (name != "purification" or facts.keys() == set(PURIFICATION))
    return known and all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in facts.values())


def write_missing_masks(run: Path, category: str, paths: Sequence[str]) -> None:
    """Keep in metrics.json, as "missing_masks", the defective images of a category without a mask, if there are any."""
    metrics = read_metrics(run)
    entry = {name: value for name, value in metrics.get(category, {}).items() if name != "missing_masks"}
    entry |= {"missing_masks": list(paths)} if paths else {}
    if entry != metrics.get(category, {}):
        write_json(run / METRICS_FILE, metrics | {category: entry})


def missing_masks_line(paths: Sequence[str], defective: int) -> str:
    """What missing masks cost. defective: the number of defective images."""
    first, have = some([*map(printable, paths)]), "has" if len(paths) == 1 else "have"
    return f"{len(paths)} of {defective} defective test images {have} no mask ({first}): their pixels are not counted"


def category_names(metrics: dict[str, Any]) -> list[str]:
    return [name for name in metrics if name != "mean"]


def detector_names(entry: dict[str, Any]) -> list[str]:
    """The final detectors in an entry of metrics.json, in the order of tables (names: `llb.runfiles.final_name`)."""
    names = [name for name in entry if name.partition("-")[0] in TRAIN_ON]
    return sorted(names, key=lambda name: (name.partition("-")[2], TRAIN_ON.index(name.partition("-")[0])))


def shown_metrics(entries: Iterable[dict[str, float | None]]) -> tuple[str, ...]:
    """The names of the metrics for a table: METRICS, and the samples' in their midst if an entry defines them."""
    sample = SAMPLE_METRICS if any(entry.get(SAMPLE_METRICS[0]) is not None for entry in entries) else ()
    return IMAGE_METRICS + sample + PIXEL_METRICS


def detector_entries(metrics: dict[str, Any]) -> list[dict[str, float | None]]:
    """The metrics of all detectors in metrics.json."""
    return [entry[train_on] for entry in metrics.values() for train_on in detector_names(entry)]


def mean_metrics(metrics: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """For each final detector that all categories have, the mean of each metric where it is defined, else None."""
    means, owns = {}, [metrics.get(name, {}) for name in names]
    for final in detector_names({final: own for final, own in owns[0].items() if all(final in each for each in owns)}):
        entries = [own[final] for own in owns]
        means[final] = mean_defined([{m: entry.get(m) for m in shown_metrics(entries)} for entry in entries])
    return means


def mean_defined(entries: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """For each name the mean over the entries that define it, None if none does. The first entry has all names."""
    defined = {name: [entry[name] for entry in entries if entry.get(name) is not None] for name in entries[0]}
    return {name: float(np.mean(values)) if values else None for name, values in defined.items()}


def write_metrics_csv(file: Path, metrics: dict[str, Any]) -> None:
    """metrics.json as a table, a row for each category and --train-on; undefined values are empty."""
    rows, shown = [], shown_metrics(detector_entries(metrics))
    for name, entry in metrics.items():
        facts = entry.get("purification") or {}
        for train_on in detector_names(entry):
            values = [entry[train_on].get(m) for m in shown] + [facts.get(fact) for fact in PURIFICATION]
            rows.append([name, train_on, *("" if value is None else value for value in values)])
    write_csv(file, ["category", "train_on", *shown, *(f"purification_{fact}" for fact in PURIFICATION)], rows)


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.1%}"


def shorten(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def purification_line(facts: dict[str, Any]) -> str:
    """What stage 1 did, in words; facts: of `llb.metrics.purification`."""
    line = f"kept {facts['kept']} of {facts['n']} images"
    if facts["contamination_before"] is not None:
        line += f", contamination {percent(facts['contamination_before'])} → {percent(facts['contamination_after'])}"
        line += f", ranking AUROC {number(facts['train_auroc'])}"
    return line


def summary_table(metrics: dict[str, Any]) -> str:
    """metrics.json as plain text, at most 100 characters wide; with a mean if there are several categories."""
    names = category_names(metrics)
    shown = names + (["mean"] if len(names) > 1 else [])
    width = min(23, max([8, *map(len, shown)]))
    columns = shown_metrics(detector_entries(metrics))
    titles = "".join(f"{TITLES[m.partition('_')[2]].removesuffix('-max'):<7}" for m in columns).rstrip()
    sample = f"{'sample':<7}" if SAMPLE_METRICS[0] in columns else ""
    wide = 1 + max([9, *(len(final) for entry in metrics.values() for final in detector_names(entry))])
    lines = [
        f"{'':<{width + 1 + wide}}{'image':<21}{sample}pixel",
        f"{'category':<{width}} {'train on':<{wide}}{titles}",
    ]
    for name in shown:
        entry = metrics.get(name) or {}
        for final in detector_names(entry):
            values = "".join(f"{number(entry[final].get(m)):<7}" for m in columns)
            lines.append(f"{shorten(name, width):<{width}} {final:<{wide}}{values}".rstrip())
    if all(value is None for entry in detector_entries(metrics) for value in entry.values()):
        lines = ["no metric is defined: that takes test images that are known to be normal, and defective ones"]
    purified = {name: metrics[name]["purification"] for name in names if metrics[name].get("purification")}
    lines += ["", f"{'category':<{width}} purification"] * bool(purified)
    lines += [f"{shorten(name, width):<{width}} {purification_line(facts)}" for name, facts in purified.items()]
    return "\n".join(lines)
