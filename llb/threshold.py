"""The score above which an image is called defective: taken from training images that count as normal, judged on the
test images.

No JAX. Labels only judge: the threshold does not depend on them.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from llb.metrics import image_metrics

QUANTILE = 0.99  # of these images' scores


def threshold_facts(
    normal: np.ndarray | None, labels: Sequence[int | None], scores: np.ndarray
) -> dict[str, float | int | None]:
    """The threshold, taken from training images alone, and how it does on the test images.

    An image is called defective if its score is above the threshold. The training images may hold a few defects, and
    the detector has seen them: so more than 1 − QUANTILE of new normal images may lie above it. `false_alarm_rate` says
    how many do, `missed_rate` how many of the defective images do not; None if a label is unknown or there is no image.

    normal: float (n,), scores of the images of `llb.marks.normal_images`, such as the purified ones; None if there are
        none that can be compared: then the threshold is None. labels: (N,) of the test images; scores: float (N,).
    """
    threshold = None if normal is None else float(np.quantile(normal, QUANTILE))
    facts = {"threshold": threshold, "quantile": QUANTILE, "images": 0 if normal is None else len(normal)}
    facts |= {"false_alarm_rate": None, "missed_rate": None}
    if threshold is not None and None not in labels:
        above, defective = np.asarray(scores) > threshold, np.array(labels, bool)
        if not defective.all():
            facts["false_alarm_rate"] = float(above[~defective].mean())
        if defective.any():
            facts["missed_rate"] = float(1 - above[defective].mean())
    return facts


def judged(labels: Sequence[int | None], facts: dict[str, float | int | None]) -> Sequence[int | None]:
    """The labels by which a threshold is judged: those given, or None for all, if its facts have no rates."""
    return [None] * len(labels) if facts.get("false_alarm_rate") is facts.get("missed_rate") is None else labels


def list_digest(images: np.ndarray) -> int:
    """A number by which a threshold knows the list that it was taken from. images: int (n,)."""
    return zlib.crc32(images.astype("<i8").tobytes())


def by_kind(
    kinds: Sequence[str], labels: Sequence[int | None], scores: np.ndarray, threshold: float | None
) -> list[tuple[str, int, float | None, float | None]]:
    """For each kind of defect: its name, its images, their AUROC against all normal images, and the share of them above
    the threshold. [] if a label is unknown; None for what is undefined.

    kinds: (N,), of the test images; the others as in `threshold_facts`.
    """
    rows, scores = [], np.asarray(scores)
    defective = np.array([label == 1 for label in labels], bool)
    for kind in sorted({kind for kind, hit in zip(kinds, defective) if hit}) if None not in labels else ():
        own = np.array([of == kind for of in kinds]) & defective
        judged = own | ~defective
        auroc = image_metrics(own[judged].astype(int).tolist(), scores[judged])["image_auroc"]
        found = None if threshold is None else float((scores[own] > threshold).mean())
        rows.append((kind, int(own.sum()), auroc, found))
    return rows
