"""What people look at: heat maps, contact sheets, the summary table, metrics.csv and report.html.

The report is a pure function of the run's files, so it can be written anew at any time: one HTML file without scripts
or links, with the contact sheets inside it.
"""

import base64
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from llb.config import TRAIN_ON
from llb.files import UserError, read_json, write_csv, write_text
from llb.metrics import IMAGE_METRICS, PIXEL_METRICS, why_undefined
from llb.run import read_metrics, read_table

METRICS = IMAGE_METRICS + PIXEL_METRICS
FACTS = ("n", "kept", "contamination_before", "contamination_after", "train_auroc")
LISTED = 24  # paths that the report lists of each ranking
UNDEFINED = "–"

# ---- heat maps and contact sheets ----


def make_palette() -> np.ndarray:
    """uint8 (256, 3), sRGB: dark violet, red, orange, pale yellow, each step equally lighter to the eye.

    A half-turn of hue in OKLab (Ottosson, "A perceptual color space for image processing", 2020) with linear lightness.
    """
    t = np.linspace(0, 1, 256)
    lightness, hue = 0.28 + 0.67 * t, np.radians(290 + 175 * t)
    chroma = 0.10 + 0.11 * np.sin(np.pi * t**0.8)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    to_cones = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (to_rgb @ (to_cones @ lab) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb.T).astype(np.uint8)


PALETTE = make_palette()


def heat_overlay(image: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """The image in grey with the anomaly map over it: the hotter, the more colour.

    Args:
        image: uint8 (S, S, 3). heat: float32 (S, S). low, high: the map's values at both ends of the colour scale.

    Returns:
        uint8 (S, S, 3).
    """
    level = ((heat - low) / max(high - low, 1e-12)).clip(0, 1)  # (S, S)
    grey = image @ np.array([0.299, 0.587, 0.114])  # (S, S), ITU-R BT.601 luma
    opacity = (0.10 + 0.70 * np.sqrt(level))[..., None]
    blend = (1 - opacity) * grey[..., None] + opacity * PALETTE[np.rint(255 * level).astype(int)]
    return np.rint(blend).astype(np.uint8)


INK, FAINT, GROUND = (236, 238, 242), (150, 157, 170), (24, 26, 31)
MARGIN, LINE = 14, 18  # pixels between tiles, pixels per line of a caption


def contact_sheet(
    tiles: Sequence[tuple[np.ndarray, np.ndarray, tuple[str, str]]], columns: int = 3, side: int = 192
) -> Image.Image:
    """A grid of pairs, the image beside its heat map, in the given order, row by row.

    One colour scale serves the whole sheet, from the median of the shown maps to their highest thousandth, so tiles can
    be compared.

    Args:
        tiles: image, uint8 (S, S, 3); map, float32 (S, S); caption: a headline, and the image's path (shortened from
            the left to fit).
        columns: pairs in a row. side: of an image on the sheet, in pixels.
    """
    tiles = list(tiles)
    columns = max(1, min(columns, len(tiles)))
    width, height = 2 * side + 2, side + 2 * LINE + 4
    rows = math.ceil(len(tiles) / columns)
    size = (MARGIN + columns * (width + MARGIN), MARGIN + rows * (height + MARGIN))
    sheet = Image.new("RGB", size, GROUND)
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(12)
    if tiles:
        low, high = np.quantile(np.stack([heat for _, heat, _ in tiles]), [0.5, 0.999])
    for place, (image, heat, (headline, path)) in enumerate(tiles):
        x, y = MARGIN + place % columns * (width + MARGIN), MARGIN + place // columns * (height + MARGIN)
        for left, pixels in ((x, image), (x + side + 2, heat_overlay(image, heat, low, high))):
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (left, y))
        y += side + 4
        draw.text((x, y), first_fitting(starts(printable(headline)), font, width), INK, font)
        draw.text((x, y + LINE), first_fitting(last_parts(printable(path)), small, width), FAINT, small)
    return sheet


def printable(text: str) -> str:
    """The text in one line: file names may hold line breaks, and bytes that are no characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def starts(text: str) -> list[str]:
    """The text and its ever shorter beginnings."""
    return [text, *(text[:end] + "…" for end in range(len(text) - 1, 0, -1))]


def last_parts(path: str) -> list[str]:
    """The path, ever fewer of its last parts, and ever shorter ends of its name."""
    parts = path.split("/")
    fewer = ["…/" + "/".join(parts[start:]) for start in range(1, len(parts))]
    return [path, *fewer, *("…" + parts[-1][start:] for start in range(1, len(parts[-1])))]


def first_fitting(candidates: list[str], font: ImageFont.FreeTypeFont, room: float) -> str:
    """The first text that is at most `room` pixels wide."""
    return next((text for text in candidates if font.getlength(text) <= room), "…")


# ---- tables ----


def categories_of(metrics: dict[str, Any]) -> list[str]:
    return [name for name in metrics if name != "mean"]


def detectors_of(entry: dict[str, Any]) -> list[str]:
    """The --train-on values that an entry of metrics.json has, in the order of tables."""
    return [name for name in TRAIN_ON if name in entry]


def mean_metrics(metrics: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """For each --train-on and metric the mean over those categories where it is defined; None if there is none."""
    means = {}
    for train_on in TRAIN_ON:
        entries = [metrics[name][train_on] for name in names if train_on in metrics.get(name, {})]
        if entries:
            means[train_on] = mean_defined([{m: entry.get(m) for m in METRICS} for entry in entries])
    return means


def mean_defined(entries: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Name by name the mean over the entries that have it, None where none has. The first has all the names."""
    defined = {name: [entry[name] for entry in entries if entry.get(name) is not None] for name in entries[0]}
    return {name: float(np.mean(values)) if values else None for name, values in defined.items()}


def write_metrics_csv(file: Path, metrics: dict[str, Any]) -> None:
    """metrics.json as a table, a row for each category and --train-on; undefined is empty.

    The columns purification_… belong to the category and stand in each of its rows.
    """
    rows = []
    for name, entry in metrics.items():
        facts = entry.get("purification") or {}
        for train_on in detectors_of(entry):
            values = [entry[train_on].get(m) for m in METRICS] + [facts.get(fact) for fact in FACTS]
            rows.append([name, train_on, *("" if value is None else value for value in values)])
    write_csv(file, ["category", "train_on", *METRICS, *(f"purification_{fact}" for fact in FACTS)], rows)


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.1%}"


def summary_table(metrics: dict[str, Any]) -> str:
    """metrics.json as plain text, at most 100 characters wide; a mean only where there are several categories."""
    names = categories_of(metrics)
    shown = names + (["mean"] if len(names) > 1 else [])
    width = min(30, max([8, *map(len, shown)]))
    blank = " " * (width + 11)
    lines = [
        f"{blank}{'image':<21}pixel".rstrip(),
        f"{'category':<{width}} {'train on':<10}"
        + "".join(f"{title:<7}" for title in ("AUROC", "AP", "F1", "AUROC", "AP", "F1", "AUPRO")).rstrip(),
    ]
    for name in shown:
        entry = metrics.get(name) or {}
        for train_on in detectors_of(entry):
            values = "".join(f"{number(entry[train_on].get(m)):<7}" for m in METRICS)
            lines.append(f"{clip(name, width):<{width}} {train_on:<10}{values}".rstrip())
    facts = [(name, metrics[name].get("purification")) for name in names]
    if any(fact for _, fact in facts):
        lines += ["", f"{'category':<{width}} purification"]
    for name, fact in facts:
        if fact:
            line = f"kept {fact['kept']} of {fact['n']}"
            if fact["contamination_before"] is not None:
                line += f", contamination {percent(fact['contamination_before'])}"
                line += f" → {percent(fact['contamination_after'])}, train AUROC {number(fact['train_auroc'])}"
            lines.append(f"{clip(name, width):<{width}} {line}")
    return "\n".join(lines)


def clip(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


# ---- the report ----


def write_report(run: Path, notes: dict[str, list[str]] | None = None) -> None:
    """Write RUN/report.html from the run's files; what is not there is left out.

    Args:
        run: the run's folder, with config.json.
        notes: for a category, sentences to show beside it (such as that its list was edited by hand).

    Raises:
        UserError: a file of the run is damaged; it is named.
    """
    run = Path(run)
    config = read_json(run / "config.json", "run stage 1 with --overwrite")
    metrics = read_metrics(run)
    names = config.get("categories") or categories_of(metrics)
    categories = [
        category_facts(run / name, name, metrics.get(name, {}), (notes or {}).get(name, [])) for name in names
    ]
    rows, reasons = metric_rows(categories, metrics.get("mean", {}))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        title=run.name or "run",
        overview=overview(config),
        categories=categories,
        rows=rows,
        reasons=reasons,
        measured=any(value != UNDEFINED for row in rows for value, _ in row["cells"]),
        settings=shown_settings(config),
        commands=commands(run, config),
        versions=config.get("versions") or {},
        origin=[(title, config.get(name)) for title, name in (("Device", "device"), ("Git commit", "git_commit"))],
        number=number,
        percent=percent,
        undefined=UNDEFINED,
    )
    write_text(run / "report.html", html)


def category_facts(folder: Path, name: str, entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What the report shows of one category; `entry` is what metrics.json says of it."""
    scores = read_table(folder / "scores.csv", ("path", "score", "kept", "label"))
    return {
        "name": name,
        "notes": notes,
        "facts": dict.fromkeys(FACTS)
        | (entry.get("purification") or {"n": len(scores), "kept": sum(row["kept"] for row in scores)}),
        "why_no_auroc": why_undefined("train_auroc", [row["label"] for row in scores]),
        "histogram": histogram(scores) if scores else None,
        "ranked": highest(scores),
        "suspects": inlined(folder / "suspects.png"),
        "detectors": [
            detector_facts(folder, train_on, entry.get(train_on))
            for train_on in TRAIN_ON
            if train_on in entry or (folder / f"predictions-{train_on}.csv").exists()
        ],
    }


def detector_facts(folder: Path, train_on: str, metrics: dict[str, float | None] | None) -> dict[str, Any]:
    """What the report shows of one final detector on one category."""
    predictions = read_table(folder / f"predictions-{train_on}.csv", ("path", "score", "label"))
    labels = [row["label"] for row in predictions]
    if metrics is None and None in labels:
        metrics = {}  # nothing to look for: all undefined, and it is known why
    return {
        "name": train_on,
        "metrics": metrics,
        "labels": labels,
        "ranked": highest(predictions),
        "examples": inlined(folder / f"examples-{train_on}.png"),
    }


def highest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["score"])[:LISTED]


def metric_rows(categories: list[dict[str, Any]], mean: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the metrics table, each value with the number of its footnote (0: none), and the footnotes."""
    groups = [
        (
            category["name"],
            [(d["name"], d["metrics"], d["labels"]) for d in category["detectors"] if d["metrics"] is not None],
        )
        for category in categories
    ]
    if len(categories) > 1:
        groups.append(("mean", [(train_on, mean[train_on], None) for train_on in detectors_of(mean)]))
    rows, reasons = [], []
    for name, detectors in groups:
        for place, (train_on, metrics, labels) in enumerate(detectors):
            cells = []
            for metric in METRICS:
                value, note = metrics.get(metric), 0
                if value is None:
                    reason = "in no category is it defined" if labels is None else why_undefined(metric, labels)
                    if reason not in reasons:
                        reasons.append(reason)
                    note = reasons.index(reason) + 1
                cells.append((number(value), note))
            rows.append(
                {"category": name, "train_on": train_on, "cells": cells, "first": place == 0, "mean": labels is None}
            )
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

    Kept and dropped images are stacked; an outline counts the anomalous ones where every label is known. The threshold
    lies between the highest kept and the lowest dropped score. The axis is logarithmic where the scores span a factor
    of three or more, so that a few extreme ones do not press the others into one bar.
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
                bars.append(
                    {
                        "kind": kind,
                        "x": x0,
                        "width": width,
                        "y": y(base + size),
                        "height": round(y(base) - y(base + size), 2),
                    }
                )
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


def overview(config: dict[str, Any]) -> str:
    data = config.get("data") or "the embedded image set"
    return f"{data}, encoder {config.get('encoder')}, {config.get('submodels')} sub-models, seed {config.get('seed')}"


def shown_settings(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that results depend on, named as people say them."""
    names = {
        "data": "Data",
        "noise_ratio": "Noise ratio",
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
    defaults = {"data": "embedded", "weights": "the named ones", "image_size": "the encoder's"}
    rows = [
        (title, defaults.get(name, UNDEFINED) if config[name] is None else config[name])
        for name, title in names.items()
        if name in config
    ]
    for train_on, stage2 in (config.get("stage2") or {}).items():
        listed = (f"{name.replace('_', ' ')} {value}" for name, value in stage2.items())
        rows.append((f"Final detector on {train_on}", ", ".join(listed)))
    return rows


def commands(run: Path, config: dict[str, Any]) -> list[str]:
    """What to type to get this run again; stage 2's settings are spelt out."""
    place = shlex.quote(run.as_posix())
    lines = [config["command"]] if config.get("command") else []
    for train_on, stage2 in (config.get("stage2") or {}).items():
        flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in stage2.items())
        lines.append(f"python stage2_train.py --run {place} --train-on {train_on}{flags}")
    return lines + [f"python evaluate.py --run {place}"]
