"""How well scores rank defects: AUROC, AP and F1-max of images and of pixels, AUPRO of pixels, AUROC of samples.

Each distinct score is a threshold, and equal scores pass it together. The curves bend only at the scores of *defective*
images or pixels, so only these are computed. Between two of them a falling threshold only adds false positives: the ROC
and the per-region-overlap curve run level, precision and F1 fall.

There are two ways to judge pixels. `pixel_metrics` is exact, but sorts all pixels, so all must fit into memory. A
PixelCounts is a histogram of the scores, whose size does not depend on the images: `accumulate` adds a batch of maps,
`pixel_metrics_of` treats scores in the same bin as equal, and `pixel_metrics_error` bounds the difference to the exact
value (about 1e-6 on smooth maps).

Sources: AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, and Real-IAD (CVPR 2024). AP and
F1-max: precision and recall at every threshold, AP without interpolation. S-AUROC: Real-IAD.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage

from llb.files import UserError

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
SAMPLE_METRICS = ("sample_auroc",)  # of Real-IAD alone
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro")
AUPRO_LIMIT = 0.3  # the false-positive rate up to which the per-region overlap is averaged
BINS = 2**22  # of a PixelCounts, at most: 100 MB (and at least 2**16, one for each page)


def ranks(scores: np.ndarray) -> np.ndarray:
    """int (N,): 1 for the highest score (the first suspect); of equal scores the earlier image ranks first."""
    order = np.argsort(-scores, kind="stable")
    return np.argsort(order) + 1  # argsort inverts a permutation


def image_metrics(labels: Sequence[int | None] | np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, AP and F1-max, 0..1; None if a label is unknown or a class is missing (`why_undefined`).

    labels: (N,), 0 normal, 1 defective, None unknown.
    scores: float (N,), higher is more defective. A UserError is raised if one is not finite.
    """
    scores = np.asarray(scores)
    _check_finite(scores, "image scores")
    if any(label is None for label in labels) or not 0 < sum(labels) < len(labels):
        return dict.fromkeys(IMAGE_METRICS)
    defective = np.array(labels, bool)
    positives, negatives = np.sort(scores[defective]), np.sort(scores[~defective])
    return dict(zip(IMAGE_METRICS, _ranking(*_counts(positives, negatives), len(positives), len(negatives))))


def sample_auroc(
    paths: Sequence[str], labels: Sequence[int | None], scores: np.ndarray, layout: str
) -> dict[str, float | None]:
    """Real-IAD's S-AUROC, 0..1: the image AUROC of samples in place of images.

    A sample is one object, photographed by five cameras: the images in one folder, OK/S0001 or NG/<code>/S0001. Its
    score is the maximum over its views, and so is its label: one view that shows the defect makes the sample defective.
    Views that are not among `paths` do not count. None if a label is unknown or a class is missing, for another layout,
    and for "real-iad-sv", whose samples have one view.

    paths: (N,), as in a Record; labels, scores: as for `image_metrics`; layout: of llb.layouts.LAYOUTS.
    """
    folders = [path.rpartition("/")[0] for path in paths]
    views = layout == "real-iad" and all(re.search(r"/S\d+$", folder) for folder in folders)
    if not views or any(label is None for label in labels):
        return dict.fromkeys(SAMPLE_METRICS)
    samples = {}
    for folder, label, score in zip(folders, labels, np.asarray(scores), strict=True):
        most = samples.get(folder, (0, -np.inf))
        samples[folder] = max(most[0], label), max(most[1], score)
    of_samples = image_metrics(*zip(*samples.values())) if samples else image_metrics((), np.empty(0))
    return {"sample_auroc": of_samples["image_auroc"]}


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float | None]:
    """Pixel AUROC, AP, F1-max and AUPRO over all pixels of all images, 0..1; None for all four without a defective or
    without a normal pixel (`why_undefined`).

    AUPRO: the share of a defect region that is found, averaged over all regions (8-connected components of each mask),
    as a function of the false-positive rate over all normal pixels; its mean over rates from 0 to 0.3, with linear
    interpolation between thresholds and at 0.3.

    masks: bool (M, H, W), True where defective, all False for a normal image.
    maps: float32 (M, H, W), higher is more defective. A UserError is raised if one is not finite.
    """
    maps = np.asarray(maps)
    _check_finite(maps, "anomaly maps")
    masks = np.asarray(masks, bool)
    if not masks.any() or masks.all():
        return dict.fromkeys(PIXEL_METRICS)
    weights, regions = _region_weights(masks)
    order, negatives = np.argsort(maps[masks]), np.sort(maps[~masks])
    positives, weights = maps[masks][order], weights[order]
    tp, fp, fp_above = _counts(positives, negatives)
    overlap = np.cumsum(weights[::-1])[tp - 1] / regions
    return _pixel_metrics(tp, fp, fp_above, overlap, len(positives), len(negatives))


@dataclass(frozen=True)
class PixelCounts:
    """A histogram of the scores of all pixels seen so far.

    The bits of a float32, read as an integer, have the order of the numbers (`_keys`). The integer's upper half names a
    page: 65,536 neighbouring floats. A page has bins once a score falls into it, and all pages have equally many. Up to
    BINS in total, each float has its own bin. Beyond that, bins are joined in pairs, on all pages, until they fit. So
    bins are narrow where the scores are, and they do not depend on the order of the maps or on the batches.

    In the table row 0 counts all pixels, row 1 the defective ones, row 2 sums 1 / size of the region that a defective
    pixel lies in.
    """

    pages: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (G,), ascending
    table: np.ndarray = field(default_factory=lambda: np.zeros((3, 0, 2**16)))  # float64 (3, G, bins of a page)
    regions: int = 0


def accumulate(counts: PixelCounts, masks: np.ndarray, maps: np.ndarray) -> PixelCounts:
    """Add a batch of maps to the counts. A UserError is raised if a map is not finite.

    masks: bool (m, H, W), True where defective; leave out images whose masks are unknown. m may be 0.
    maps: float32 (m, H, W); sizes may differ between batches.
    """
    maps = np.asarray(maps, np.float32)
    _check_finite(maps, "anomaly maps")
    masks = np.asarray(masks, bool)
    keys = _keys(maps)
    page = keys >> 16
    counts = _with_pages(counts, np.flatnonzero(np.bincount(page.ravel(), minlength=2**16)))
    pages, bins_of_page = counts.table.shape[1:]
    first_bin = np.zeros(2**16, np.int64)
    first_bin[counts.pages] = np.arange(pages) * bins_of_page
    joined = 17 - bins_of_page.bit_length()  # bits of a key that make no difference
    bins = first_bin[page] + ((keys & 0xFFFF) >> joined)  # (m, H, W)

    weights, regions = _region_weights(masks)
    table = counts.table.reshape(3, -1).copy()
    table[0] += np.bincount(bins.ravel(), minlength=pages * bins_of_page)
    np.add.at(table[1], bins[masks], 1)
    np.add.at(table[2], bins[masks], weights)
    return replace(counts, table=table.reshape(counts.table.shape), regions=counts.regions + regions)


def pixel_metrics_of(counts: PixelCounts) -> dict[str, float | None]:
    """`pixel_metrics` of everything that was accumulated."""
    tp, fp, fp_above, overlap, positives, negatives = _curves(counts)
    if not positives or not negatives:
        return dict.fromkeys(PIXEL_METRICS)
    return _pixel_metrics(tp, fp, fp_above, overlap, positives, negatives)


def pixel_metrics_error(counts: PixelCounts) -> dict[str, float]:
    """An upper bound of the absolute difference between `pixel_metrics_of` and `pixel_metrics`, for each metric.

    It holds for any order within the bins: the order matters most where all defective pixels of a bin outrank its
    normal ones, or none does. It is 0 while each bin is a single float, and where the metrics are undefined.
    """
    tp, fp, fp_above, overlap, positives, negatives = _curves(counts)
    if not positives or not negatives or counts.table.shape[2] == 2**16:
        return dict.fromkeys(PIXEL_METRICS, 0.0)
    here, normal_here = _steps(tp), fp - fp_above
    auroc = (here / positives * normal_here / negatives).sum() / 2

    precision = tp / (tp + fp)
    highest = tp / (tp + fp_above)  # all come first, and share one score
    # All come last, each with its own score: the mean of t / (t + fp) for t from tp − here + 1 to tp, which is
    # 1 − fp · mean of 1 / (t + fp); and 1 / x is less than its mean over x − ½ … x + ½.
    lowest = 1 - fp / here * np.log1p(here / (tp - here + fp + 0.5))
    ap = max((here * (highest - precision)).sum(), (here * (precision - lowest)).sum()) / positives

    f1_max = (2 * tp / (positives + tp + fp_above)).max() - (2 * tp / (positives + tp + fp)).max()

    # The curve rises somewhere within the bin's rectangle: half of it lies on either side of the diagonal, up to all of
    # it where the limit cuts the diagonal short.
    rate, rate_before = fp / negatives, fp_above / negatives
    rectangle = _steps(overlap) * (np.minimum(rate, AUPRO_LIMIT) - np.minimum(rate_before, AUPRO_LIMIT))
    aupro = np.where(rate > AUPRO_LIMIT, rectangle, rectangle / 2).sum() / AUPRO_LIMIT
    return dict(zip(PIXEL_METRICS, map(float, (auroc, ap, f1_max, aupro))))


def purification(labels: Sequence[int | None], scores: np.ndarray, kept: np.ndarray) -> dict[str, int | float | None]:
    """How purification changed the training set.

    n and kept: numbers of images; contamination_before and contamination_after: shares of defective images among all
    and among the kept ones; train_auroc: the ranking AUROC. Without labels all but n and kept are None.

    labels: (N,), 0 normal, 1 defective, None unknown; scores: float (N,), stage 1's aggregated scores; kept: bool (N,),
    the images that stage 2 trains on.
    """
    kept = np.asarray(kept, bool)
    facts = {"n": len(labels), "kept": int(kept.sum()), "contamination_before": None, "contamination_after": None}
    if len(labels) and not any(label is None for label in labels):
        defective = np.array(labels, bool)
        facts["contamination_before"] = float(defective.mean())
        facts["contamination_after"] = float(defective[kept].mean()) if kept.any() else None
    return facts | {"train_auroc": image_metrics(labels, scores)["image_auroc"]}


def lowest_contamination(scores: np.ndarray, labels: Sequence[int | None], share: float) -> tuple[float | None, ...]:
    """The statistic of LLBNAD's paper (there: share 0.4): how many of the lowest scores are of defective images, by
    each sub-model alone (the mean of the K shares) and by the sub-models' mean. None if labels are unknown.

    scores: float (N, K); labels: (N,).
    """
    if None in labels:
        return None, None
    count, columns = max(1, round(share * len(labels))), [*scores.T, scores.mean(axis=1)]
    *alone, mean = (float(np.array(labels)[ranks(column) > len(labels) - count].mean()) for column in columns)
    return float(np.mean(alone)), mean


def why_undefined(metric: str, labels: Sequence[int | None]) -> str:
    """Why a metric of these images is None; for a metric that starts with "pixel_", the masks may be to blame."""
    if not len(labels):
        return "there is no image to judge"
    if any(label is None for label in labels):
        return "it is not known which images are defective"
    if not any(labels):
        return "no image is defective"
    if metric in SAMPLE_METRICS and 0 in labels:
        return "no sample is normal, or the images do not lie in folders of samples"
    if metric.startswith("pixel_"):
        return "no defective image has a mask, or the masks leave no normal pixel"
    return "no image is normal"


def _check_finite(scores: np.ndarray, name: str) -> None:
    if not np.isfinite(scores).all():
        raise UserError(f"the {name} are not all finite: train the detector again with a lower --learning-rate")


def _region_weights(masks: np.ndarray) -> tuple[np.ndarray, int]:
    """1 / size of its region for each of the P defective pixels, float64 (P,) in the order of maps[masks]; and how many
    regions there are. The sum over the found pixels / the number of regions = the mean over regions of the found share.
    """
    weights, regions = [np.zeros(0)], 0
    for mask in masks:
        if mask.any():
            labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))  # 8-connected
            inside = labelled[mask]  # 1 … count
            weights.append(1.0 / np.bincount(inside)[inside])
            regions += count
    return np.concatenate(weights), regions


def _keys(maps: np.ndarray) -> np.ndarray:
    """uint32, ordered as the float32 are: a positive number's bits with the sign bit set, a negative one's inverted."""
    bits = (maps + np.float32(0)).view(np.uint32)  # −0 + 0 = 0: they are equal, and so must their keys be
    return bits ^ ((bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(2**31))


def _with_pages(counts: PixelCounts, seen: np.ndarray) -> PixelCounts:
    """The counts with bins for the pages `seen`, int (g,)."""
    pages = np.union1d(counts.pages, seen)
    if len(pages) == len(counts.pages):
        return counts
    old = counts.table
    while len(pages) * old.shape[2] > BINS:
        old = old[:, :, 0::2] + old[:, :, 1::2]
    table = np.zeros((3, len(pages), old.shape[2]))
    table[:, np.searchsorted(pages, counts.pages)] = old
    return replace(counts, pages=pages, table=table)


def _curves(counts: PixelCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
    """What passes each bin that holds a defective pixel, (U,) each as by `_counts`, and the regions' mean found share;
    then the numbers of defective and of normal pixels."""
    everything, defective, weights = counts.table.reshape(3, -1)
    normal = everything - defective
    tp, fp, overlap = (np.cumsum(row[::-1])[::-1] for row in (defective, normal, weights / max(counts.regions, 1)))
    bends = np.flatnonzero(defective)
    return tp[bends], fp[bends], (fp - normal)[bends], overlap[bends], int(defective.sum()), int(normal.sum())


def _counts(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many true positives (≥ threshold), false positives (≥ threshold) and false positives > threshold there are
    for the U distinct positive scores in ascending order: int (U,) each. Both arguments are sorted."""
    first = np.flatnonzero(np.append(True, positives[1:] != positives[:-1]))
    thresholds = positives[first]
    fp = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    fp_above = len(negatives) - np.searchsorted(negatives, thresholds, side="right")
    return len(positives) - first, fp, fp_above


def _steps(passed: np.ndarray) -> np.ndarray:
    """What each threshold adds to the next higher one, (U,) from (U,)."""
    return passed - np.append(passed[1:], 0)


def _pixel_metrics(tp, fp, fp_above, overlap, positives: int, negatives: int) -> dict[str, float]:
    """All four; overlap: float (U,), the mean over regions of the share that is found at each threshold."""
    ranking = _ranking(tp, fp, fp_above, positives, negatives)
    return dict(zip(PIXEL_METRICS, (*ranking, _aupro(overlap, fp, fp_above, negatives))))


def _ranking(tp, fp, fp_above, positives: int, negatives: int) -> tuple[float, float, float]:
    """AUROC, AP and F1-max from `_counts`; F1 = 2PR / (P + R) = 2 TP / (positives + TP + FP)."""
    here = _steps(tp)  # positives that have just this score
    # Mann and Whitney: how many negatives a positive outranks, a tie counting half
    auroc = 1.0 - float((here * (fp + fp_above)).sum()) / float(2 * positives * negatives)
    ap = (here / positives * (tp / (tp + fp))).sum()
    f1_max = (2 * tp / (positives + tp + fp)).max()
    return auroc, min(float(ap), 1.0), float(f1_max)


def _aupro(overlap: np.ndarray, fp: np.ndarray, fp_above: np.ndarray, negatives: int) -> float:
    """Mean of the per-region-overlap curve for false-positive rates from 0 to AUPRO_LIMIT.

    overlap: float (U,), ascending thresholds, as `fp` and `fp_above`. The curve arrives at each threshold on a level
    piece and leaves it on a slope (vertical unless normal pixels share the score).
    """
    before = np.append(overlap[1:], 0.0)
    rate = np.stack([fp_above, fp], axis=1)[::-1].ravel() / negatives  # (2U,), ascending
    height = np.stack([before, overlap], axis=1)[::-1].ravel()
    rate, height = np.concatenate([[0.0], rate, [1.0]]), np.concatenate([[0.0], height, [1.0]])
    inside = np.searchsorted(rate, AUPRO_LIMIT, side="right")
    end = np.interp(AUPRO_LIMIT, rate[inside - 1 : inside + 1], height[inside - 1 : inside + 1])
    area = np.trapezoid(np.append(height[:inside], end), np.append(rate[:inside], AUPRO_LIMIT))
    return min(float(area / AUPRO_LIMIT), 1.0)
