"""From N × K scores to the purified set. Neither labels nor the noise ratio are known here.

Source: LLBNAD (arXiv 2508.07441): normal images are learned alike by every sub-model, anomalies are not, so the
aggregated score of an anomaly is high whether or not a sub-model was trained on it.
"""

import jax
import jax.numpy as jnp
import numpy as np

AGGREGATES = ("mean", "median", "max", "out-of-fold", "max-var")


def partition(key: jax.Array, images: int, submodels: int) -> np.ndarray:
    """Shuffle the images and deal them out: int32 (N,), each image's subset 0 … K−1; sizes differ by at most one."""
    order = np.asarray(jax.random.permutation(key, images))
    subset = np.empty(images, np.int32)
    subset[order] = np.arange(images) % submodels
    return subset


def aggregate(scores: jax.Array, subset: jax.Array, how: str) -> jax.Array:
    """The K scores of each image become one.

    Args:
        scores: float32 (N, K), image scores of the sub-models.
        subset: int32 (N,), the sub-model that was trained on the image.
        how: "mean" (the paper's); "median"; "max"; "out-of-fold", the mean over the sub-models that never saw the image
            (K ≥ 2); "max-var", the maximum times the variance (the released code's).

    Returns:
        float32 (N,).
    """
    if how == "mean":
        return scores.mean(axis=1)
    if how == "median":
        return jnp.median(scores, axis=1)
    if how == "max":
        return scores.max(axis=1)
    if how == "max-var":
        return scores.max(axis=1) * scores.var(axis=1)
    if how == "out-of-fold":
        unseen = jnp.arange(scores.shape[1]) != subset[:, None]  # (N, K)
        return jnp.where(unseen, scores, 0.0).sum(axis=1) / unseen.sum(axis=1)
    raise ValueError(f"aggregate is one of {AGGREGATES}, not {how!r}")


def ranks(scores: np.ndarray) -> np.ndarray:
    """int (N,): 1 for the highest score (the first suspect); of equal scores the earlier image ranks first."""
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(scores), int)
    rank[order] = np.arange(1, len(scores) + 1)
    return rank


def keep_lowest(scores: np.ndarray, share: float) -> np.ndarray:
    """bool (N,): the round(share · N) lowest scores (at least one); of equal scores the later image is kept."""
    kept = max(1, round(share * len(scores)))
    return ranks(scores) > len(scores) - kept


def keep_auto(scores: np.ndarray, width: float = 2.5) -> np.ndarray:
    """bool (N,): which images look normal, by the scores alone.

    Normal images are the majority and score low; defects only ever add to the upper side. So the lower side shows what
    normal scores look like, and the upper side is judged by its mirror image, on the logarithm of the scores, whose
    noise is closer to symmetric:

        c = mean of the shortest interval that holds half of log s    (robust while normal images are the majority)
        w = 1.4826 · median(c − log s) over the images with log s ≤ c    (half a median absolute deviation, as a σ)
        keep where log s ≤ c + 2.5 w

    There is no ratio to set: with many defects many are dropped; without any nearly everything is kept, unless normal
    images' scores have a long upper tail. It takes some dozens of images: of two, the higher is always dropped.
    """
    logs = np.log(np.maximum(scores, np.finfo(np.float32).tiny).astype(np.float64))
    ordered = np.sort(logs)
    half = (len(ordered) + 1) // 2
    start = np.argmin(ordered[half - 1 :] - ordered[: len(ordered) - half + 1])
    shortest = ordered[start : start + half]
    centre = np.clip(shortest.mean(), shortest[0], shortest[-1])  # the mean of equal numbers may round to below them
    spread = 1.4826 * np.median(centre - ordered[ordered <= centre])
    return logs <= centre + width * spread
