"""The report's pages of suspects, on which a person marks defects, and what became of the marks. No JAX.

The pages are worked on by llb/report.js, in the browser alone; `llb.review` takes the marks that it saves.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from llb.marks import UNSAID, VERDICTS, read_marks, read_review, training_set
from llb.metrics import ranks
from llb.pages import PAGE, Page, suspect_pages
from llb.review import findings
from llb.tables import read_table, read_threshold
from llb.threshold import judged
from llb.tiles import next_tiles_file, outcome, read_tiles, shown_suspects, tiles_file

LARGEST_HTML = 40_000_000  # bytes of the report, over all categories
WORDS = {mark: verdict for verdict, mark in VERDICTS.items()} | {UNSAID: None}
Scores = list[dict[str, Any]]  # rows of scores.csv


def suspect_facts(folder: Path, scores: Scores, finals: list[str], config: dict[str, Any], most: int) -> dict[str, Any]:
    """The tiles of training images: the suspects in pages, and the other groups of `shown_suspects`.

    The pages are all that stage 1 has made tiles for. Behind those that are marked comes the next page ("asked" is its
    place, "by" the detector of `finals` that asks), if there is one. Simulated marks are not shown to a person, who
    would save them as their own. most: tiles of a group.
    """
    seed, simulated = config.get("seed", 0), "review" in config
    tiles, labels = read_tiles(folder / tiles_file("suspects")), [row["label"] for row in scores]
    score, kept = (np.array([row[name] for row in scores]) for name in ("score", "kept"))
    if not scores or not tiles["tiles"]:
        return {"pages": [], "groups": {}, "scale": None, "asked": None, "by": None}
    rank, drawn = ranks(score), tiles["tiles"]
    marks = read_marks(folder, training_set(folder))
    frames = ["kept" if row["kept"] else "dropped" for row in scores]

    def tile(index: int, tiles: dict[str, Any] = tiles) -> dict[str, Any]:
        verdict = None if simulated else WORDS[int(marks[index])]
        return tile_facts(tiles, scores[index], int(rank[index]), frames[index], verdict)

    groups = {
        name: [tile(i) for i in indices if scores[i]["path"] in drawn]
        for name, indices in shown_suspects(rank, kept, labels).items()
    }
    counts = {
        "defects kept": sum(row["kept"] and row["label"] == 1 for row in scores),
        "normal dropped": sum(not row["kept"] and row["label"] == 0 for row in scores),
    }
    pages = pages_with_tiles(scores, rank, seed, drawn)
    done = next((number for number, page in enumerate(pages) if (marks[page] == UNSAID).any()), len(pages))
    place = {row["path"]: i for i, row in enumerate(scores)}
    asked, by = asked_again(folder, [] if simulated else finals)
    again = [place[path] for path in asked["tiles"] if path in place]
    before, behind = (
        [page for page in ([tile(i) for i in page if i not in again] for page in part) if page]
        for part in (pages[:done], pages[done:])
    )
    groups = {name: {"tiles": shown[:most], "count": counts.get(name, len(shown))} for name, shown in groups.items()}
    return {
        "pages": before + [[tile(i, asked) for i in again]] * bool(again) + behind,
        "groups": groups,
        "scale": scale_of(tiles),
        "asked": len(before) if again else None,
        "by": by if again else None,
    }


def asked_again(folder: Path, finals: list[str]) -> tuple[dict[str, Any], str | None]:
    """The tiles of the next page, as `read_tiles` gives them, and the final detector that asks; no tiles and None."""
    for final in finals:
        if final.startswith("reviewed") and (tiles := read_tiles(folder / next_tiles_file(final)))["tiles"]:
            return tiles, final
    return {"tiles": {}}, None


def pages_with_tiles(scores: Scores, rank: np.ndarray, seed: int, drawn: dict[str, Any]) -> list[np.ndarray]:
    """The pages up to the first that lacks a tile: indices of training images. rank: int (N,); drawn: tiles by path."""
    pages = []
    for page in suspect_pages(rank, seed, len(scores)):
        if not all(scores[i]["path"] in drawn for i in page.images):
            break
        pages.append(page.images)
    return pages


def whole_pages(rank: np.ndarray, seed: int, most: int) -> list[Page]:
    """The pages that stage 1 makes tiles for, `most` images rounded up to whole pages. rank: int (N,)."""
    return suspect_pages(rank, seed, PAGE * math.ceil(most / PAGE))


def lacks_tiles(folder: Path, seed: int, most: int) -> bool:
    """Whether stage 1 has to make tiles for more pages, so that `most` images can be marked."""
    scores = read_table(folder / "scores.csv", ("path", "score"))
    rank = ranks(np.array([row["score"] for row in scores]))
    drawn = read_tiles(folder / tiles_file("suspects"))["tiles"]
    return any(scores[i]["path"] not in drawn for page in whole_pages(rank, seed, most) for i in page.images)


def tile_facts(
    tiles: dict[str, Any], row: dict[str, Any], rank: int, frame: str | None, verdict: str | None = None
) -> dict[str, Any]:
    """One tile. frame: its colour and its word; verdict: a person's."""
    return row | tiles["tiles"][row["path"]] | {"rank": rank, "frame": frame, "verdict": verdict}


def scale_of(tiles: dict[str, Any]) -> tuple[str, str]:
    """The ends of the colour bar."""
    return f"{tiles['low']:.3g}", f"{tiles['high']:.3g}"


def fit_pages(categories: list[dict[str, Any]], most: int = LARGEST_HTML) -> None:
    """Take pages away until the pictures of all categories need at most `most` bytes: those that are marked first, then
    the last ones. One page stays, which is the next page if there is one. "cut" says whether a category has lost some.
    """
    groups = [group for c in categories for part in (c, *c["detectors"]) for group in part["groups"].values()]
    size = bytes_of([tile for group in groups for tile in group["tiles"]])
    orders, fit = [by_need(category["pages"], category["asked"]) for category in categories], 0
    for number in range(max(map(len, orders), default=0)):
        size += sum(bytes_of(c["pages"][i]) for c, order in zip(categories, orders) for i in order[number : number + 1])
        fit += size <= most
    for category, order in zip(categories, orders):
        shown = sorted(order[: max(fit, 1)])
        category["asked"] = shown.index(category["asked"]) if category["asked"] in shown else None
        category["pages"], category["cut"] = [category["pages"][i] for i in shown], len(shown) < len(order)


def by_need(pages: list[list[dict[str, Any]]], asked: int | None) -> list[int]:
    """The numbers of pages: the next page, those that a person has not marked whole, the others."""
    marked = [all(tile["verdict"] for tile in page) for page in pages]
    return sorted(range(len(pages)), key=lambda number: (number != asked, marked[number], number))


def bytes_of(tiles: list[dict[str, Any]]) -> int:
    """What tiles need in the report; 1000 bytes for a tile's words."""
    return sum(len(tile["image"]) + len(tile["heat"]) + 1000 for tile in tiles)


def marks_key(name: str, seed: int, scores: dict[str, Scores]) -> str:
    """The name under which a browser keeps the marks: another one for another run, or if it shows other pages.

    name: the run's; scores: by category. Paths and scores say which images they are, and in which order they rank.
    """
    shown = [[category, [[row["path"], row["score"]] for row in rows]] for category, rows in scores.items()]
    return f"llb marks {name} {hashlib.sha256(json.dumps([seed, shown]).encode()).hexdigest()}"


def exact(text: str) -> Markup:
    """An attribute's value that a browser reads back to the letter: it would take a carriage return for a line feed."""
    return escape(text).replace("\r", Markup("&#13;"))


# ---- what became of the marks ----


def review_facts(folder: Path, scores: Scores, seed: int, finals: list[str]) -> dict[str, Any] | None:
    """What was marked, and what the detectors trained on `reviewed` made of it; None without marks.

    finals: names of final detectors, see `llb.runfiles.final_name`.
    """
    dataset = training_set(folder)
    marks = read_marks(folder, dataset)
    if not (marks != UNSAID).any():
        return None
    labels = [row["label"] for row in scores]
    named = [labels[i] for i in np.flatnonzero(marks == VERDICTS["defect"])]
    heads, changed = {}, {}
    for final in (final for final in finals if final.startswith("reviewed")):
        heads[final] = read_review(folder, final)
        before = (final.replace("reviewed", other, 1) for other in ("purified", "all"))
        if other := next((name for name in before if name in finals), None):
            changed[final] = (other, changes(folder, other, final))
    return {
        "lines": findings(folder, dataset, seed),
        "defects": len(named),
        "labelled": None if None in labels else sum(named),
        "heads": {final: facts for final, facts in heads.items() if facts},
        "changed": {final: pair for final, pair in changed.items() if pair[1]},
    }


def changes(folder: Path, before: str, after: str) -> dict[str, list[str]] | None:
    """On which test images two final detectors differ, each by its threshold: what `after` does → paths.

    None if one has no threshold, or no label is known.
    """
    outcomes = []
    for final in (before, after):
        facts = read_threshold(folder, final)
        rows = read_table(folder / f"predictions-{final}.csv", ("path", "score", "label"))
        threshold = facts["threshold"] if facts else None
        labels = judged([row["label"] for row in rows], facts or {})
        outcomes.append({row["path"]: outcome(of, row["score"], threshold) for row, of in zip(rows, labels)})
    one, other = outcomes
    titles = {
        "found, which were missed": ("missed", "found"),
        "missed, which were found": ("found", "missed"),
        "no false alarms any more": ("false alarm", "passed"),
        "new false alarms": ("passed", "false alarm"),
    }
    if not set(one.values()) - {None} or not set(other.values()) - {None}:
        return None
    return {
        title: [path for path, now in other.items() if (one.get(path), now) == pair] for title, pair in titles.items()
    }
