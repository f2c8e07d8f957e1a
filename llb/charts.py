"""The charts of the report that show every image: geometry in units of a drawing of 360 × 222 for the template.

Curves over training steps are Matplotlib's (llb.figures). These are simple enough to cost nothing, for any number of
categories.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 44, 354, 10, 184  # of the area in the axes
MOST_POINTS = 3000  # of a scatter
NOTHING = {"bars": (), "dots": {}, "outline": None, "threshold": None}


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers between two bounds, equal steps apart."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def numbered(values: Sequence[float]) -> list[str]:
    """The labels of ticks, with as many digits as tell them apart, at least 4."""
    for digits in range(4, 18):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(values):
            break
    return texts


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, apart on a logarithmic axis: the more decades, the fewer from each."""
    decades = math.log10(high / low)
    if decades < 0.5:
        return ticks(low, high, 5)
    factors = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return found[:: max(1, math.ceil(len(found) / 8))]


def histogram(
    score: np.ndarray,
    stacked: Mapping[str, np.ndarray],
    outline: np.ndarray | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Geometry of a histogram of scores. Every image is drawn once.

    The axis is logarithmic if the scores span a factor of three or more, so that a few extreme scores do not press the
    others into one bar.

    score: float (N,), N ≥ 1; stacked: which images a colour counts, name → bool (N,), from the bottom up; outline:
        bool (N,), counted by a line; threshold: a vertical line.
    """
    score = np.asarray(score, np.float64)
    shown = score if threshold is None else np.append(score, threshold)
    logarithmic = bool(0 < 3 * shown.min() <= shown.max())
    scale = np.log if logarithmic else np.asarray
    score = scale(score)
    bins = int(np.clip(3 * np.sqrt(len(score)), 8, 60))
    edges = np.histogram_bin_edges(scale(shown), bins=bins)
    counts = {name: np.histogram(score[which], edges)[0] for name, which in stacked.items()}
    most = int(sum(counts.values()).max())

    def x(value: float) -> float:
        return round(float(LEFT + (RIGHT - LEFT) * (value - edges[0]) / (edges[-1] - edges[0])), 2)

    def y(count: float) -> float:
        return round(float(BOTTOM - (BOTTOM - TOP) * count / (most * 1.05)), 2)

    bars = []
    for bin_ in range(bins):
        x0, width, base = x(edges[bin_]), round(x(edges[bin_ + 1]) - x(edges[bin_]), 2), 0
        for name, count in counts.items():
            if size := int(count[bin_]):
                upper, height = y(base + size), round(y(base) - y(base + size), 2)
                bars.append({"kind": name, "x": x0, "width": width, "y": upper, "height": height})
                base += size
    line = None
    if outline is not None:
        steps = zip(np.histogram(score[outline], edges)[0], edges[1:])
        line = f"M{x(edges[0])} {y(0)}" + "".join(f"V{y(count)}H{x(edge)}" for count, edge in steps) + f"V{y(0)}"
    x_ticks = log_ticks(*np.exp(edges[[0, -1]])) if logarithmic else ticks(edges[0], edges[-1], 5)
    return NOTHING | {
        "bars": bars,
        "outline": line,
        "threshold": None if threshold is None else {"x": x(scale(threshold)), "label": f"{threshold:.4g}"},
        "x_ticks": [(x(scale(value)), text) for value, text in zip(x_ticks, numbered(x_ticks))],
        "y_ticks": [(y(value), f"{value:g}") for value in ticks(0, most, 5) if value == int(value)],
        "x_title": "score (logarithmic)" if logarithmic else "score",
        "y_title": "images",
    }


def between(score: np.ndarray, kept: np.ndarray) -> float | None:
    """Stage 1's threshold: between the highest kept and the lowest dropped score; None if there is none between."""
    if kept.all() or not kept.any() or score[kept].max() > score[~kept].min():
        return None
    low, high = float(score[kept].max()), float(score[~kept].min())
    return math.sqrt(low * high) if low > 0 else (low + high) / 2


def scatter(x: np.ndarray, y: np.ndarray, groups: Mapping[str, np.ndarray], titles: Sequence[str]) -> dict[str, Any]:
    """Geometry of a scatter: of many images every second, third, … is drawn.

    x, y: float (N,); groups: name → bool (N,); titles: of both axes. Both are logarithmic, or none is.
    """
    both = np.stack([x, y]).astype(np.float64)
    logarithmic = bool(both.min() > 0)
    scale = np.log if logarithmic else np.asarray
    every, points = math.ceil(both.shape[1] / MOST_POINTS), scale(both)
    low, high = points.min(axis=1), points.max(axis=1)
    room = np.where(high > low, high - low, 1.0) * 0.03
    low, high = low - room, high + room
    begin, end = np.array([LEFT, BOTTOM]), np.array([RIGHT, TOP])

    def place(value: np.ndarray, axis: int) -> np.ndarray:
        span = (value - low[axis]) / (high[axis] - low[axis])
        return np.round(begin[axis] + (end[axis] - begin[axis]) * span, 1)

    dots, marks = {}, []
    for name, which in groups.items():
        chosen = np.flatnonzero(which)[::every]
        places = zip(place(points[0, chosen], 0), place(points[1, chosen], 1))
        dots[name] = "".join(f"M{left} {top}h0" for left, top in places)
    for axis in (0, 1):
        bounds = low[axis], high[axis]
        values = log_ticks(*np.exp(bounds)) if logarithmic else ticks(*bounds, 5)
        marks.append([(float(place(scale(value), axis)), text) for value, text in zip(values, numbered(values))])
    unit = " (logarithmic)" if logarithmic else ""
    return NOTHING | {
        "dots": dots,
        "every": every,
        "x_ticks": marks[0],
        "y_ticks": marks[1],
        "x_title": titles[0] + unit,
        "y_title": titles[1] + unit,
    }


def agreement(subset: np.ndarray, scores: np.ndarray) -> list[tuple[int, int, float]]:
    """How far every pair of sub-models agrees: (i, j, rho), i < j; Spearman's rank correlation within a subset, of
    which either sub-model has seen every image or none, and the mean over the subsets.

    subset: int (N,); scores: float (N, K). A pair is left out if in every subset one of both scores all images alike.
    """
    from scipy.stats import spearmanr

    groups = [scores[subset == number] for number in np.unique(subset)]
    pairs = []
    for i in range(scores.shape[1]):
        for j in range(i + 1, scores.shape[1]):
            apart = [group[:, (i, j)] for group in groups if len(group) > 2]
            rhos = [spearmanr(*both.T).statistic for both in apart if (np.ptp(both, axis=0) > 0).all()]
            if rhos:
                pairs.append((i, j, float(np.mean(rhos))))
    return pairs
