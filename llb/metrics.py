"""How well scores rank defects: AUROC, AP and F1-max of images and of pixels, AUPRO of pixels.

Everything is exact: each distinct score is a threshold, equal scores pass it together. One fact keeps that cheap: the
curves bend only at scores that a *defective* image or pixel has. Between two of them a falling threshold adds false
positives alone: the ROC and the per-region-overlap curve run level, precision and F1 fall. So the normal pixels (nearly
all of them) are sorted as bare numbers, and never indexed. 504 maps of 392 × 392 take about 5 seconds on one core.

Sources: AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, and Real-IAD (CVPR 2024). AP and
F1-max: precision and recall at every threshold, AP without interpolation.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from llb.files import UserError

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro")
AUPRO_LIMIT = 0.3  # the false-positive rate up to which the per-region overlap is averaged


def image_metrics(labels: Sequence[int | None] | np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Image AUROC, AP and F1-max.

    Args:
        labels: (N,), 0 normal, 1 anomalous, None unknown.
        scores: float (N,), higher is more anomalous.

    Returns:
        Fractions in 0..1, or None for all three if a label is unknown or only one class is there (`why_undefined`).

    Raises:
        UserError: a score is not finite.
    """
    scores = np.asarray(scores)
    _check_finite(scores, "image scores")
    if any(label is None for label in labels):
        return dict.fromkeys(IMAGE_METRICS)
    anomalous = np.array(labels, bool)
    positives, negatives = np.sort(scores[anomalous]), np.sort(scores[~anomalous])
    if not len(positives) or not len(negatives):
        return dict.fromkeys(IMAGE_METRICS)
    return dict(zip(IMAGE_METRICS, _ranking(*_counts(positives, negatives), len(positives), len(negatives))))


def pixel_metrics(masks: np.ndarray | None, maps: np.ndarray) -> dict[str, float | None]:
    """Pixel AUROC, AP, F1-max and AUPRO over all pixels of all images.

    AUPRO: the share of a defect region that is found, averaged over all regions (8-connected components of each mask),
    as a function of the false-positive rate over all normal pixels; its mean over rates from 0 to 0.3, with linear
    interpolation between thresholds and at 0.3.

    Args:
        masks: bool (M, H, W), True where defective, all False for a normal image; None when masks are unknown.
        maps: float32 (M, H, W), higher is more anomalous.

    Returns:
        Fractions in 0..1, or None for all four without masks, without a defective or without a normal pixel
        (`why_undefined`).

    Raises:
        UserError: a map is not finite.
    """
    maps = np.asarray(maps)
    _check_finite(maps, "anomaly maps")
    if masks is None:
        return dict.fromkeys(PIXEL_METRICS)
    masks = np.asarray(masks, bool)
    positives, weights = _region_pixels(masks, maps)
    negatives = maps[~masks]
    if not len(positives) or not len(negatives):
        return dict.fromkeys(PIXEL_METRICS)
    negatives.sort()
    order = np.argsort(positives)
    positives, weights = positives[order], weights[order]
    tp, fp, fp_above = _counts(positives, negatives)
    overlap = np.cumsum(weights[::-1])[tp - 1]  # at each threshold: the regions' mean share of found pixels
    ranking = _ranking(tp, fp, fp_above, len(positives), len(negatives))
    return dict(zip(PIXEL_METRICS, (*ranking, _aupro(overlap, fp, fp_above, len(negatives)))))


def purification(labels: Sequence[int | None], scores: np.ndarray, kept: np.ndarray) -> dict[str, int | float | None]:
    """What purification did to the training set.

    Args:
        labels: (N,), 0 normal, 1 anomalous, None unknown.
        scores: float (N,), stage 1's aggregated scores.
        kept: bool (N,), what stage 2 trains on.

    Returns:
        n and kept, numbers of images; contamination_before and contamination_after, shares of anomalous images among
        all and among the kept ones; train_auroc, the AUROC of the scores. What labels are needed for is None without.
    """
    kept = np.asarray(kept, bool)
    facts = {"n": len(labels), "kept": int(kept.sum()), "contamination_before": None, "contamination_after": None}
    if len(labels) and not any(label is None for label in labels):
        anomalous = np.array(labels, bool)
        facts["contamination_before"] = float(anomalous.mean())
        facts["contamination_after"] = float(anomalous[kept].mean()) if kept.any() else None
    return facts | {"train_auroc": image_metrics(labels, scores)["image_auroc"]}


def why_undefined(metric: str, labels: Sequence[int | None]) -> str:
    """Why a metric of these images is None; for a metric that starts with "pixel_", the masks may be to blame."""
    if not len(labels):
        return "there is no image to judge"
    if any(label is None for label in labels):
        return "it is not known which images are anomalous"
    if not any(labels):
        return "no image is anomalous"
    if metric.startswith("pixel_"):
        return "an anomalous image has no mask, or the masks leave no defective or no normal pixel"
    return "no image is normal"


def _check_finite(scores: np.ndarray, what: str) -> None:
    if not np.isfinite(scores).all():
        raise UserError(f"the {what} are not all finite: train the detector anew with a lower --learning-rate")


def _region_pixels(masks: np.ndarray, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and weights of the P defective pixels, each (P,): a pixel of a region weighs 1 / (regions · its size).

    So the sum of the weights of found pixels is the mean over regions of the share that is found.
    """
    scores, weights, regions = [maps[:0].reshape(-1)], [np.zeros(0)], 0
    for mask, scores_map in zip(masks, maps):
        if mask.any():
            labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))  # 8-connected
            inside = labelled[mask]  # 1 … count
            scores.append(scores_map[mask])
            weights.append(1.0 / np.bincount(inside)[inside])
            regions += count
    return np.concatenate(scores), np.concatenate(weights) / max(regions, 1)


def _counts(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What passes each threshold, for the U distinct positive scores in ascending order; both arguments are sorted.

    Returns:
        int (U,) each: true positives (≥ threshold), false positives (≥ threshold), false positives > threshold.
    """
    first = np.flatnonzero(np.append(True, positives[1:] != positives[:-1]))
    thresholds = positives[first]
    fp = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    fp_above = len(negatives) - np.searchsorted(negatives, thresholds, side="right")
    return len(positives) - first, fp, fp_above


def _ranking(
    tp: np.ndarray, fp: np.ndarray, fp_above: np.ndarray, positives: int, negatives: int
) -> tuple[float, float, float]:
    """AUROC, AP and F1-max from `_counts`; F1 = 2PR / (P + R) = 2 TP / (positives + TP + FP)."""
    here = tp - np.append(tp[1:], 0)  # positives that have just this score
    # Mann and Whitney: how many negatives a positive outranks, a tie counting half; sums of whole numbers, exact
    auroc = 1.0 - int((here * (fp + fp_above)).sum()) / (2 * positives * negatives)
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
