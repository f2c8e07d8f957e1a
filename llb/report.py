"""report.html: the results of a run for people.

The report is a pure function of the run's files, so it can be written again at any time. It is one HTML file without
scripts or links; the contact sheets are inside it.
"""

import base64
import io
import math
import shlex
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, features

from llb import tables
from llb.data import reading_line
from llb.files import UserError, read_json, write_text
from llb.metrics import why_undefined

LISTED = 24  # paths that the report lists of each ranking


def write_report(run: Path, notes: dict[str, list[str]] | None = None) -> None:
    """Write RUN/report.html from the files of the run. It leaves out missing ones; a damaged one raises a UserError.

    notes: for a category, sentences to show beside it (such as that its list was edited by hand).
    """
    run = Path(run)
    config = read_json(run / "config.json", "run stage 1 with --overwrite")
    metrics = tables.read_metrics(run)
    names = config.get("categories") or tables.category_names(metrics)
    notes = dict.fromkeys(names, []) | (notes or {})
    categories = [category_facts(run / name, name, metrics.get(name, {}), notes[name]) for name in names]
    shown = tables.shown_metrics(tables.detector_entries(metrics))
    rows, reasons = metric_rows(categories, metrics.get("mean", {}), shown)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"number": tables.number, "percent": tables.percent, "undefined": tables.UNDEFINED}
    html = environment.get_template("report.html.jinja").render(
        title=run.name or "run",
        overview=overview(config),
        reading=reading_line(config["reading"]) if config.get("reading") else None,
        categories=categories,
        rows=rows,
        titles=[tables.TITLES[name.partition("_")[2]] for name in shown],
        reasons=reasons,
        measured=any(value != tables.UNDEFINED for row in rows for value, _ in row["cells"]),
        settings=shown_settings(config),
        commands=commands(run, config),
        versions=config.get("versions") or {},
        origin=origin(config),
    )
    write_text(run / "report.html", html)


def category_facts(folder: Path, name: str, entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What the report shows of one category; `entry` is what metrics.json says of it."""
    scores = tables.read_table(folder / "scores.csv", ("path", "score", "kept", "label"))
    detectors = [
        detector_facts(folder, train_on, entry.get(train_on))
        for train_on in tables.detector_names(entry | dict.fromkeys(predicted(folder)))
    ]
    if entry.get("missing_masks") and detectors:
        notes = [*notes, tables.missing_masks_line(entry["missing_masks"], detectors[0]["labels"].count(1))]
    return {
        "name": name,
        "notes": notes,
        "facts": dict.fromkeys(tables.PURIFICATION)
        | (entry.get("purification") or {"n": len(scores), "kept": sum(row["kept"] for row in scores)}),
        "why_no_auroc": why_undefined("train_auroc", [row["label"] for row in scores]),
        "histogram": histogram(scores) if scores else None,
        "ranked": highest(scores),
        "suspects": inlined(folder / "suspects.png"),
        "detectors": detectors,
    }


def predicted(folder: Path) -> list[str]:
    """The final detectors whose predictions are there."""
    return [file.stem.removeprefix("predictions-") for file in folder.glob("predictions-*.csv")]


def detector_facts(folder: Path, train_on: str, metrics: dict[str, float | None] | None) -> dict[str, Any]:
    """What the report shows of one final detector on one category."""
    predictions = tables.read_table(folder / f"predictions-{train_on}.csv", ("path", "score", "label"))
    labels = [row["label"] for row in predictions]
    if metrics is None and None in labels:
        metrics = {}  # all are undefined, and the reason is known
    examples = inlined(folder / f"examples-{train_on}.png")
    ranked = highest(predictions)
    return {"name": train_on, "metrics": metrics, "labels": labels, "ranked": ranked, "examples": examples}


def highest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["score"])[:LISTED]


def metric_rows(
    categories: list[dict[str, Any]], mean: dict[str, Any], shown: tuple[str, ...]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the metrics table, each value with the number of its footnote (0: none), and the footnotes."""
    groups = []
    for category in categories:
        judged = [(d["name"], d["metrics"], d["labels"]) for d in category["detectors"] if d["metrics"] is not None]
        groups.append((category["name"], judged))
    if len(categories) > 1:
        groups.append(("mean", [(train_on, mean[train_on], None) for train_on in tables.detector_names(mean)]))
    rows, reasons = [], []
    for name, detectors in groups:
        for place, (train_on, metrics, labels) in enumerate(detectors):
            cells = []
            for metric in shown:
                value, note = metrics.get(metric), 0
                if value is None:
                    reason = "in no category is it defined" if labels is None else why_undefined(metric, labels)
                    if reason not in reasons:
                        reasons.append(reason)
                    note = reasons.index(reason) + 1
                cells.append((tables.number(value), note))
            row = {"category": name, "train_on": train_on, "cells": cells, "first": place == 0, "mean": labels is None}
            rows.append(row)
    return rows, reasons


def inlined(file: Path) -> dict[str, Any] | None:
    """A contact sheet, inlined at about a tenth of the PNG's size, and its width and height in pixels."""
    if not file.exists():
        return None
    buffer, kind = io.BytesIO(), "webp" if features.check("webp") else "jpeg"
    try:
        with Image.open(file) as image:
            image.convert("RGB").save(buffer, kind, quality=80)
            width, height = image.size
    except OSError as error:
        raise UserError(f"{file} is damaged ({error}): delete it and run the stage that wrote it again") from None
    uri = f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": uri, "width": width, "height": height}


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers between two bounds, equal steps apart."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, apart on a logarithmic axis: the more decades, the fewer from each."""
    decades = math.log10(high / low)
    factors = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def histogram(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometry of the histogram of training scores, in units of its 480 × 210 drawing.

    Kept and dropped images are stacked; an outline counts the defective ones if every label is known. The threshold is
    between the highest kept and the lowest dropped score. The axis is logarithmic if the scores span a factor of three
    or more, so that a few extreme scores do not press the others into one bar.
    """
    left, right, top, bottom = 34, 472, 10, 180
    score = np.array([row["score"] for row in scores])
    kept = np.array([row["kept"] for row in scores])
    logarithmic = 0 < 3 * score.min() <= score.max()
    scale = np.log if logarithmic else np.asarray
    score = scale(score)
    edges = np.histogram_bin_edges(score, bins=int(np.clip(3 * np.sqrt(len(score)), 8, 60)))
    low, high = np.histogram(score[kept], edges)[0], np.histogram(score[~kept], edges)[0]
    most = int((low + high).max())

    def x(value: float) -> float:
        return round(float(left + (right - left) * (value - edges[0]) / (edges[-1] - edges[0])), 2)

    def y(count: float) -> float:
        return round(float(bottom - (bottom - top) * count / (most * 1.05)), 2)

    bars = []
    for bin_, (count, above) in enumerate(zip(low, high)):
        x0, width = x(edges[bin_]), round(x(edges[bin_ + 1]) - x(edges[bin_]), 2)
        for kind, base, size in (("kept", 0, count), ("dropped", count, above)):
            if size:
                upper, height = y(base + size), round(y(base) - y(base + size), 2)
                bars.append({"kind": kind, "x": x0, "width": width, "y": upper, "height": height})
    labels = [row["label"] for row in scores]
    outline = None
    if None not in labels:
        counts = np.histogram(score[np.array(labels, bool)], edges)[0]
        steps = "".join(f"V{y(count)}H{x(edge)}" for count, edge in zip(counts, edges[1:]))
        outline = f"M{x(edges[0])} {y(0)}{steps}V{y(0)}"
    threshold = None
    if kept.any() and not kept.all() and score[kept].max() <= score[~kept].min():
        middle = (score[kept].max() + score[~kept].min()) / 2
        threshold = {"x": x(middle), "label": f"{np.exp(middle) if logarithmic else middle:.4g}"}
    x_ticks = log_ticks(*np.exp(edges[[0, -1]])) if logarithmic else ticks(edges[0], edges[-1], 6)
    return {
        "bars": bars,
        "outline": outline,
        "threshold": threshold,
        "x_ticks": [(x(scale(value)), f"{value:.4g}") for value in x_ticks],
        "y_ticks": [(y(value), f"{value:g}") for value in ticks(0, most, 5) if value == int(value)],
        "logarithmic": logarithmic,
        "box": (left, right, top, bottom),
    }


def origin(config: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Where the results come from: the device, and the sources of llb."""
    commit = config.get("git_commit")
    if commit and config.get("git_dirty"):
        commit += ", with uncommitted changes"
    sources = " → ".join(digest[:12] for digest in config.get("sources") or [])
    return [("Device", config.get("device")), ("Git commit", commit), ("Digest of the sources", sources)]


def overview(config: dict[str, Any]) -> str:
    data = config.get("data") or "the demo set"
    return f"{data}, encoder {config.get('encoder')}, {config.get('submodels')} sub-models, seed {config.get('seed')}"


def shown_settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that results depend on, with names for people."""
    names = {
        "data": "Data",
        "layout": "Layout of the data",
        "noise_ratio": "Noise ratio",
        "noise_pool": "Noise pool: defective test images set aside",
        "encoder": "Encoder",
        "weights": "Encoder weights",
        "image_size": "Image size, pixels",
        "detector": "Detector",
        "submodels": "Sub-models, K",
        "steps": "Steps of each sub-model",
        "batch_size": "Batch size",
        "recipe": "Recipe",
        "learning_rate": "Learning rate",
        "dropout": "Dropout",
        "aggregate": "Aggregate of the K scores",
        "keep": "Share kept",
        "seed": "Seed",
        "precision": "Precision of matrix products",
    }
    defaults = {"data": "the demo set", "weights": "the named ones", "image_size": "the encoder's"}
    shown = defaults | {name: value for name, value in config.items() if value is not None}
    rows = [(title, shown.get(name, tables.UNDEFINED)) for name, title in names.items() if name in config]
    for train_on, stage2 in (config.get("stage2") or {}).items():
        listed = (f"{name.replace('_', ' ')} {value}" for name, value in stage2.items())
        rows.append((f"Final detector on {train_on}", ", ".join(listed)))
    return rows


def commands(run: Path, config: dict[str, Any]) -> list[str]:
    """The commands that make this run again; the settings of stage 2 are written out."""
    place = shlex.quote(run.as_posix())
    lines = [config["command"]] if config.get("command") else []
    for train_on, stage2 in (config.get("stage2") or {}).items():
        flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in stage2.items())
        lines.append(f"python stage2_train.py --run {place} --train-on {train_on}{flags}")
    return lines + [f"python evaluate.py --run {place}"]
