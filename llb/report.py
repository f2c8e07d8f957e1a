"""report.html: the results of a run for people.

The report is a pure function of the run's files, so it can be written again at any time. It is one HTML file; pictures
and its one script, llb/report.js, are inside it, and it forbids all else (Content-Security-Policy).
"""

import base64
import hashlib
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from llb import charts, figures, tables
from llb.data import reading_line
from llb.files import UserError, read_json, typed, write_text
from llb.keep import KEEP, choose
from llb.marks import MARKS, threshold_is_old
from llb.metrics import purification, ranks, why_undefined
from llb.pictures import PALETTE
from llb.review import simulated_line
from llb.runfiles import commands, review_command, stage1_command, stage2_command
from llb.sheet import exact, fit_pages, marks_key, review_facts, scale_of, suspect_facts, tile_facts
from llb.threshold import judged, list_digest
from llb.tiles import LARGEST, LOOKED_AT, OUTLINE, outcome, read_tiles, shown_tests, tiles_file
from llb.times import read_times

LISTED = 24  # paths that the report lists of a ranking without tiles
FEW, MANY = 3, 8  # categories: with more, fewer tiles of each are shown, so that the file stays small
GAP = 0.005  # of image AUROC between all and clean, below which nothing can be said of a share of it


def write_report(run: Path, notes: dict[str, list[str]] | None = None) -> None:
    """Write RUN/report.html from the files of the run. It leaves out missing ones; a damaged one raises a UserError.

    notes: for a category, sentences to show beside it (such as that its list was edited by hand).
    """
    run = Path(run)
    config = read_json(run / "config.json", "run stage 1 with --overwrite")
    metrics = tables.read_metrics(run)
    names = config.get("categories") or tables.category_names(metrics)
    notes = dict.fromkeys(names, []) | (notes or {})
    most = LARGEST if len(names) <= FEW else LARGEST // 2 if len(names) <= MANY else LARGEST // 4
    scores = {name: read_scores(run / name) for name in names}
    seed = config.get("seed", 0)
    categories = []
    for name in names:
        said = rule_notes(scores[name], config.get("keep"))
        older = with_older_list(run / name, config)
        said += older.values()
        facts = category_facts(run / name, scores[name], metrics.get(name, {}), [*notes[name], *said], most, older)
        finals = [detector["name"] for detector in facts["detectors"]]
        facts["review"] = review_facts(run / name, scores[name], seed, finals)
        categories.append(facts | suspect_facts(run / name, scores[name], finals, config, most))
    fit_pages(categories)
    shown = tables.shown_metrics(tables.detector_entries(metrics))
    rows, reasons = metric_rows(categories, metrics.get("mean", {}), shown)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["exact"] = exact
    environment.globals |= {"number": tables.number, "percent": tables.percent, "undefined": tables.UNDEFINED}
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
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
        commands=commands(run, config, any(category["detectors"] for category in categories)),
        versions=config.get("versions") or {},
        origin=origin(config),
        times=time_rows(run),
        palette=", ".join(f"#{bytes(colour).hex()}" for colour in (*PALETTE[::32], PALETTE[-1])),
        marks_key=marks_key(run.name, seed, scores),
        next_command=review_command(run),
        more_command=f"{stage1_command(run, config)} --suspects N" if config.get("command") else "--suspects N",
        simulated=simulated_line(config["review"]) if config.get("review") else None,
        side=LOOKED_AT,
        needed=MARKS,
        root=Path(os.path.abspath(config["data"])).as_uri() if config.get("data") else "",
        listed=LISTED,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        outline=f"#{bytes(OUTLINE).hex()}",
        axes=(charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM),
    )
    write_text(run / "report.html", html)


def read_scores(folder: Path) -> list[dict[str, Any]]:
    return tables.read_table(folder / "scores.csv", ("path", "score", "kept", "label"))


def category_facts(
    folder: Path,
    scores: list[dict[str, Any]],
    entry: dict[str, Any],
    notes: list[str],
    most: int,
    older: Collection[str],
) -> dict[str, Any]:
    """What the report shows of one category. entry: what metrics.json says of it; most: tiles of a group; older: of
    `with_older_list`."""
    finals = tables.detector_names(entry | dict.fromkeys(predicted(folder)))
    first = [most] + [most if most == LARGEST else 0] * len(finals)  # of many categories only the first's tiles
    detectors = [detector_facts(folder, final, entry.get(final), n, final in older) for final, n in zip(finals, first)]
    if entry.get("missing_masks") and detectors:
        notes = [*notes, tables.missing_masks_line(entry["missing_masks"], detectors[0]["labels"].count(1))]
    labels, score, kept = (([row[name] for row in scores]) for name in ("label", "score", "kept"))
    return {
        "name": folder.name,
        "notes": notes,
        "facts": entry.get("purification") or purification(labels, np.array(score), np.array(kept, bool)),
        "why_no_auroc": why_undefined("train_auroc", labels),
        "comparison": comparison(entry),
        "histogram": score_histogram(scores) if scores else None,
        "agreement": agreement_facts(folder, scores),
        "learning": Markup(figures.learning_svg(folder) or ""),
        "losses": Markup(figures.loss_svg(folder, finals) or ""),
        "ranked": sorted(scores, key=lambda row: -row["score"])[:LISTED],
        "detectors": detectors,
        "kinds": kind_rows(folder, finals),
    }


def rule_notes(scores: list[dict[str, Any]], keep: str | float | None) -> list[str]:
    """What the keep rule said of its choice. keep: as config.json has it."""
    if not scores or keep not in KEEP:
        return []
    kept, said = choose(np.array([row["score"] for row in scores]), keep)
    made_so = kept.tolist() == [row["kept"] for row in scores]  # not by a rule of another version
    return [f"--keep {keep}: {said}"] if said and made_so else []


def with_older_list(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The final detectors of a category whose threshold may be of a list that has changed since, each with a note."""
    older, run = {}, folder.parent
    for final in config.get("stage2") or {}:
        train_on = final.partition("-")[0]
        with suppress(UserError):  # the list cannot be read: the next stage says so
            if threshold_is_old(folder, final, train_on):
                again = f"take it again: python evaluate.py --run {typed(run)} --train-on {train_on}"
                if train_on == "purified":  # its detector has learned from the older list
                    again = f"train it again: {stage2_command(run, final)} --overwrite"
                older[final] = f"{final}: its threshold may be of another list of images; {again}"
    return older


def predicted(folder: Path) -> list[str]:
    """The final detectors whose predictions are there."""
    return [file.stem.removeprefix("predictions-") for file in folder.glob("predictions-*.csv")]


def comparison(entry: dict[str, Any]) -> str | None:
    """The method beside what it is compared with, in a sentence; None unless both were evaluated."""
    values = {name: (entry.get(name) or {}).get("image_auroc") for name in tables.TRAIN_ON}
    purified, everything, clean = values["purified"], values["all"], values["clean"]
    if purified is None or everything is None:
        return None
    line = f"Image AUROC is {everything:.3f} without purification (all) and {purified:.3f} with it"
    if values["reviewed"] is not None:
        line += f", {values['reviewed']:.3f} with what a person marked (reviewed)"
    if clean is None:
        return f"{line}. Training on clean would show how much there is to gain."
    line += f"; with the labels (clean) it would be {clean:.3f}"
    if clean - everything < GAP:
        return f"{line}: the hidden defects cost this detector next to nothing."
    return f"{line}: purification makes good {(purified - everything) / (clean - everything):z.0%} of the loss."


def score_histogram(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The chart of the training scores; an outline counts the defective images if every label is known."""
    score, kept = (np.array([row[name] for row in scores]) for name in ("score", "kept"))
    labels = [row["label"] for row in scores]
    outline = None if None in labels else np.array(labels, bool)
    return charts.histogram(score, {"kept": kept, "dropped": ~kept}, outline, charts.between(score, kept))


def agreement_facts(folder: Path, scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How far the sub-models agree: the chart of the two that are farthest apart, and all pairs; None for one."""
    subset, models = tables.read_submodels(folder)
    pairs = charts.agreement(subset, models)
    if not pairs:
        return None
    i, j, lowest = min(pairs, key=lambda pair: pair[2])
    labels, kept = [row["label"] for row in scores], np.array([row["kept"] for row in scores])
    groups = by_label(labels) or ({"kept": kept} if kept.all() else {"kept": kept, "dropped": ~kept})
    plot = charts.scatter(models[:, i], models[:, j], groups, (f"score by sub-model {i}", f"by sub-model {j}"))
    return {"plot": plot, "pair": (i, j), "lowest": lowest, "pairs": pairs}


def by_label(labels: list[int | None]) -> dict[str, np.ndarray] | None:
    """Which images are normal and which defective, bool (N,) each; None if a label is unknown."""
    return None if None in labels else {"normal": ~np.array(labels, bool), "defective": np.array(labels, bool)}


def detector_facts(
    folder: Path, train_on: str, metrics: dict[str, Any] | None, most: int, older: bool = False
) -> dict[str, Any]:
    """What the report shows of one final detector on one category. older: its threshold is of an older list."""
    rows = tables.read_table(folder / f"predictions-{train_on}.csv", ("path", "score", "label"))
    labels, score = [row["label"] for row in rows], np.array([row["score"] for row in rows])
    if metrics is None and None in labels:
        metrics = {}  # all are undefined, and the reason is known
    facts = tables.read_threshold(folder, train_on, also_none=True) or {}
    threshold = None if older else facts.get("threshold")
    tiles, rank, judges = read_tiles(folder / tiles_file(train_on)), ranks(score), judged(labels, facts)
    outcomes = [outcome(label, value, threshold) for label, value in zip(judges, score)]
    groups = {
        name: [
            tile_facts(tiles, rows[i], int(rank[i]), outcomes[i])
            for i in indices[:most]
            if rows[i]["path"] in tiles["tiles"]
        ]
        for name, indices in shown_tests(score, judges, threshold).items()
    }
    groups = {name: shown for name, shown in groups.items() if shown}
    counts = {"missed": outcomes.count("missed"), "false alarms": outcomes.count("false alarm")}
    colours = by_label(labels) or {"image": np.ones(len(rows), bool)}
    return {
        "name": train_on,
        "metrics": metrics,
        "labels": labels,
        "ranked": sorted(rows, key=lambda row: -row["score"])[:LISTED],
        "threshold": None if threshold is None else facts,
        "rated": threshold is not None and None not in judges,
        "older": older,
        "none_normal": facts.get("list") == list_digest(np.empty(0)),
        "above": int((score > threshold).sum()) if threshold is not None else None,
        "histogram": charts.histogram(score, colours, threshold=threshold) if rows else None,
        "groups": {n: {"tiles": shown, "count": counts.get(n, len(rows))} for n, shown in groups.items()},
        "scale": scale_of(tiles) if groups else None,
    }


def kind_rows(folder: Path, finals: list[str]) -> dict[str, Any] | None:
    """Results by kind of defect, each beside those of the other detectors; None if there are not two kinds."""
    read = {final: tables.read_table(folder / tables.kinds_file(final), tables.KINDS) for final in finals}
    judged = [final for final in finals if len(read[final]) > 1]
    if not judged:
        return None
    by_name = {final: {row["kind"]: row for row in read[final]} for final in judged}
    rows = [
        {"kind": kind, "images": row["images"], "cells": [by_name[final].get(kind) for final in judged]}
        for kind, row in by_name[judged[0]].items()
    ]
    return {"finals": judged, "rows": rows}


def time_rows(run: Path) -> list[dict[str, Any]]:
    """How long each stage has worked, and its largest memory."""
    return [
        {"category": category, "stage": stage, "seconds": duration(values["seconds"])}
        | {name: f"{values[name] / 2**30:.1f} GiB" if values[name] else None for name in ("memory", "device_memory")}
        for category, stages in read_times(run).items()
        for stage, values in stages.items()
    ]


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


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
    if config.get("learning_rate") == 0:  # it is fitted, without steps
        shown = {name: value for name, value in shown.items() if name not in ("steps", "learning_rate")}
    rows = [(title, shown[name]) for name, title in names.items() if name in config and name in shown]
    for train_on, stage2 in (config.get("stage2") or {}).items():
        own = {name: value for name, value in stage2.items() if name != "set"} | stage2.get("set", {})
        listed = (f"{name.replace('_', ' ')} {value}" for name, value in own.items() if value is not None)
        rows.append((f"Final detector on {train_on}", ", ".join(listed)))
    return rows
