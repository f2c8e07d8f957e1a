"""Keep rules: which images stay, judged by one score for each and neither by labels nor by the noise ratio. No JAX.

Every rule keeps the lowest scores, and says how many normal images it expects among those that it drops, if it can. A
wrongly dropped unusual normal image costs a detector about as much as a rightly dropped defect brings. So `auto` drops
only if there is a clear group of outliers. llb/RESULTS.md tells on which sets it was chosen and on which confirmed.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import brentq

from llb.files import UserError
from llb.metrics import ranks

# The flank: normal images above the centre whose scores fall off; the tail is fitted there. It begins at START
# deviations (25 % of a normal distribution lie above).
START = 0.6745
CUTS = (2.0, 2.5, 3.0, 3.5, 4.0)  # in deviations
FEW = 5  # images in the flank: from fewer no tail is fitted
GROUP = 3  # images: fewer are no group
ERRORS = (
    1.5  # standard errors of the tail, by which a group must be clear; with 1, one-sided tails are cut twice as often
)
Kept = tuple[np.ndarray, float | None]  # bool (N,); normal images that are expected among the dropped


def keep_lowest(scores: np.ndarray, share: float) -> np.ndarray:
    """bool (N,): the round(share · N) lowest scores (at least one); of equal scores the later image is kept."""
    return ranks(scores) > len(scores) - max(1, round(share * len(scores)))


def deviations(scores: np.ndarray) -> np.ndarray:
    """How far each log score lies above the normal images' centre, in their standard deviations: float64 (N,).

        c = mean of the shortest interval that holds half of log s    (robust while normal images are the majority)
        w = 1.4826 · median(c − log s) over the images with log s ≤ c    (half a median absolute deviation, as a σ)
        z = (log s − c) / w

    The lower half consists of normal images, and the logarithm makes their noise closer to symmetric. Scores that may
    be negative have no logarithm and are taken as they are. Without any spread z is 0 up to the centre, else infinite.
    """
    logs = np.asarray(scores, np.float64)
    if logs.min() >= 0:
        logs = np.log(np.maximum(logs, np.finfo(np.float32).tiny))
    ordered = np.sort(logs)
    half = (len(ordered) + 1) // 2
    start = np.argmin(ordered[half - 1 :] - ordered[: len(ordered) - half + 1])
    shortest = ordered[start : start + half]
    centre = np.clip(shortest.mean(), shortest[0], shortest[-1])  # the mean of equal numbers may round to below them
    spread = 1.4826 * np.median(centre - ordered[ordered <= centre])
    return (logs - centre) / spread if spread > 0 else np.where(logs > centre, np.inf, 0.0)


def expected_above(z: np.ndarray, cut: float, errors: float = 0.0) -> float:
    """How many normal images lie above a cut, if their tail falls exponentially, as it does in the flank below the cut.

    The flank is START < z ≤ cut; its rate is the maximum-likelihood one of an exponential distribution that is cut off
    there, `errors` standard errors of the flank's mean on the safe side. Tails that fall faster, such as a normal
    distribution's, hold less than that, and defects in the flank make it flatter: so it is mostly too much, but it is
    no bound. Infinite if the flank does not fall or holds few images. Efron, "Large-Scale Simultaneous Hypothesis
    Testing: The Choice of a Null Hypothesis" (JASA 2004), fits the null distribution to the scores likewise, but to
    their centre: the scores of normal images have a longer upper tail than that.
    """
    flank = (z[(z > START) & (z <= cut)] - START) / (cut - START)  # (n,), 0 … 1
    if len(flank) < FEW:
        return np.inf
    mean = max(flank.mean() + errors * flank.std() / np.sqrt(len(flank)), 0.01)
    if mean > 0.499:
        return np.inf
    # the mean of an exponential distribution of rate r that is cut off at 1 is 1 / r − 1 / (eʳ − 1)
    rate = brentq(lambda r: 1 / r - 1 / np.expm1(r) - mean, 1e-3, 200.0)
    return len(flank) / np.expm1(rate)


def keep_clear_group(scores: np.ndarray) -> Kept:
    """Drop what lies above the lowest of CUTS beyond which an image is more likely defective than normal: more than
    twice as many lie there as a tail of normal images explains (`expected_above`).

    Keep all, unless this holds of at least one cut with GROUP images by more than ERRORS standard errors of the tail:
    else there is no clear group. Among fewer than some hundred images a long tail on one side is still taken for a
    group now and then: s = 1 + 0.2 · exponential, without a defect, is cut in 24 / 13 / 9 / 2 % of sets of 40 / 100 /
    200 / 600 images, and then loses about two fifths of them.
    """
    z = deviations(scores)
    above = {cut: (z > cut).sum() for cut in CUTS}
    if not any(above[cut] >= GROUP and above[cut] > 2 * expected_above(z, cut, ERRORS) for cut in CUTS):
        return np.ones(len(z), bool), None
    expected = {cut: expected_above(z, cut) for cut in CUTS}
    first = min(cut for cut in CUTS if above[cut] > 2 * expected[cut])
    return z <= first, expected[first]


def keep_mirror(scores: np.ndarray, width: float = 2.5) -> Kept:
    """Drop what lies `width` deviations above the centre: normal scores are assumed to reach as far up as down.

    It finds more defects than `keep_clear_group`, and drops unusual normal images where the upper tail is long. It
    needs some dozens of images: of two, it always drops the higher.
    """
    return deviations(scores) <= width, None


KEEP: dict[str, Callable[[np.ndarray], Kept]] = {"auto": keep_clear_group, "mirror": keep_mirror}


def choose(scores: np.ndarray, keep: str | float) -> tuple[np.ndarray, str | None]:
    """The images that stay, bool (N,), by a rule's name or as a share, and what the rule says of it."""
    if not isinstance(keep, str):
        return keep_lowest(scores, keep), None
    try:
        kept, expected = KEEP[keep](scores)
        assert kept.shape == np.shape(scores) and kept.dtype == bool and kept.any()
    except (AssertionError, AttributeError, TypeError, ValueError):
        gives = "has to return which of the N scores stay, bool (N,), at least one; and a number, or None"
        raise UserError(f"--keep {keep}: the rule {gives} (llb/keep.py)") from None
    if kept.all():
        return kept, "no clear group of outliers: all kept; look at suspects.png"
    if expected is None:
        return kept, None
    return kept, f"{(~kept).sum()} dropped; by the rule's estimate about {expected:.0f} of them are normal"
