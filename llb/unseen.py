"""How many defects are left where nobody looked, by what was seen on the pages (llb.pages). No JAX.

On each page a few images are drawn from all that the page does not show for their rank. Those that lie below the
highest-ranked images of the last page are a uniform sample of what lies there: the unseen images and themselves,
however bad the ranking is. So the number of defects among them is hypergeometric. The interval is Blaker's ("Confidence
curves and improved exact confidence intervals for discrete distributions", Canadian Journal of Statistics, 2000): it
holds the truth at least 90 times in 100, and lies within Clopper and Pearson's (Biometrika, 1934).

A dozen draws say little, though. A ranking is there to have more defects above than below. So for the upper end the
highest-ranked images of the last page count as drawn: their share of defects is at least that of the unseen images.
Unless the draws hold the larger share: then the ranking is not trusted. So the 90 in 100 hold for any ranking by the
draws alone; the upper end that is printed relies on a last page with no smaller share of defects than what lies below
it. (High scores and a few random images together also teach more than either: Li et al., "Deep batch active anomaly
detection with diverse queries", ICLR 2023.)

The estimate itself adds two images to the draws, with half of the last page's share of defects, since the share falls
from there on. So its mean error was smaller than that of the draws alone at each noise ratio, from the first page on.
The draws speak for all that lies there, so the defects that were found there otherwise, such as on a next page
(llb.next_page), are taken off.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import hypergeom

from llb.marks import DEFECT, UNSAID
from llb.pages import Page

MISSED = 0.08  # how often the interval may miss the truth; on the rankings of RESULTS the worst missed .09
POOLED = 0.025  # of that, by the upper end with the last page: it is used where the draws held few, so it misses more


class Unseen(NamedTuple):
    images: int  # how many were not looked at
    defects: int  # about so many of them
    low: int
    high: int
    last: int  # defects on the last page that was seen to its end


def unseen_defects(pages: Sequence[Page], rank: np.ndarray, marks: np.ndarray) -> Unseen | None:
    """None before the first page is seen to its end.

    Args:
        pages: all pages of a category, in order.
        rank: int (N,), by which the pages were made.
        marks: int8 (N,), see llb.marks.
    """
    unseen = int((marks == UNSAID).sum())
    full = next((i for i, page in enumerate(pages) if (marks[page.images] == UNSAID).any()), len(pages))
    if not full:
        return None
    drawn = np.concatenate([page.images[page.drawn] for page in pages[:full]])
    last = pages[full - 1].images[~pages[full - 1].drawn]
    below = rank > rank[last].max(initial=0)
    drawn = drawn[below[drawn]]
    known = below & (marks != UNSAID)  # the drawn ones, and those of a page that is not seen to its end
    known[drawn] = False
    n, k, seen, found = len(drawn), _defects(marks[drawn]), int(known.sum()), _defects(marks[known])
    m, extra = len(last), _defects(marks[last])
    on_last = _defects(marks[pages[full - 1].images])
    if not unseen:
        return Unseen(0, 0, 0, 0, on_last)

    left = np.arange(unseen + 1)  # how many defects there may be
    possible = np.flatnonzero(_acceptable(n + seen + unseen, k + found + left, n, k))
    low, high = int(possible[0]), int(possible[-1])
    if k * m <= extra * n:
        likely = _chance(n + seen + unseen + m, k + found + extra + left, n + m)[:, : k + extra + 1].sum(1)
        high = min(high, int(np.flatnonzero(likely > POOLED).max(initial=0)))
    share = (k + extra / max(m, 1)) / (n + 2)
    high = max(low, high)
    return Unseen(unseen, int(np.clip(round(share * (seen + unseen) - found), low, high)), low, high, on_last)


def _defects(marks: np.ndarray) -> int:
    return int((marks == DEFECT).sum())


def _chance(images: int, defects: np.ndarray, n: int) -> np.ndarray:
    """How likely 0 … n defects among n drawn images are, for each number of defects among all: (defects, n + 1)."""
    return np.exp(hypergeom.logpmf(np.arange(n + 1), images, defects[:, None], n))  # pmf's time is quadratic in images


def _acceptable(images: int, defects: np.ndarray, n: int, k: int) -> np.ndarray:
    """Whether k defects among n drawn images are no surprise, for each number of defects among all: bool, as `defects`.

    Blaker: so many, or any number that is as far out in its tail, must have a chance above MISSED. If the other marks
    contradict the draws, so that there is no such number of defects, it is the one that makes k most likely.
    """
    chance = _chance(images, defects, n)
    tail = np.minimum(chance.cumsum(1), chance[:, ::-1].cumsum(1)[:, ::-1])
    agree = (chance * (tail <= tail[:, [k]] * (1 + 1e-9))).sum(1) > MISSED
    return agree if agree.any() else chance[:, k] == chance[:, k].max()
