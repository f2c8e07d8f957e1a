"""From N × K scores to the purified set. These functions know neither labels nor the noise ratio.

Source: LLBNAD (arXiv 2508.07441). Every sub-model scores a normal image low. A defective image scores high with every
sub-model that was not trained on it, and often with the one that was; so its aggregated score is high.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llb.metrics import ranks


def partition(key: jax.Array, images: int, submodels: int) -> np.ndarray:
    """Shuffle the images and deal them out: int32 (N,), each image's subset 0 … K−1; sizes differ by at most one."""
    order = np.asarray(jax.random.permutation(key, images))
    subset = np.empty(images, np.int32)
    subset[order] = np.arange(images) % submodels
    return subset


def seen_by(subset: np.ndarray, submodels: int, others: bool) -> np.ndarray:
    """bool (N, K): whether a sub-model has learned from an image. others: from all subsets but its own."""
    return (np.arange(submodels) == subset[:, None]) ^ others


def standardised(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Scores of sub-models whose scales differ, on one scale: float32 (N, K), finite.

    Each column is shifted and stretched so that its median and its median absolute deviation, over the images that this
    sub-model has not seen, become the means of all columns' medians and deviations.
    """
    unseen = jnp.where(seen, jnp.nan, scores)
    middle = jnp.nanmedian(unseen, axis=0)  # (K,)
    width = jnp.nanmedian(jnp.abs(unseen - middle), axis=0)
    return (scores - middle) / jnp.where(width > 0, width, 1.0) * width.mean() + middle.mean()


def out_of_fold(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """The mean over the sub-models that have not seen the image (K ≥ 2)."""
    return jnp.where(seen, 0.0, scores).sum(axis=1) / (~seen).sum(axis=1)


# scores float32 (N, K) and seen bool (N, K) of `seen_by` → one score for each image, float32 (N,)
AGGREGATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda scores, seen: scores.mean(axis=1),  # the paper's
    "median": lambda scores, seen: jnp.median(scores, axis=1),
    "max": lambda scores, seen: scores.max(axis=1),
    "out-of-fold": out_of_fold,
    "max-var": lambda scores, seen: scores.max(axis=1) * scores.var(axis=1),  # the released code's
}


def combine(scores: np.ndarray, subset: np.ndarray, others: bool, standardise: bool, how: str) -> np.ndarray:
    """From scores (N, K) of sub-models that have learned from their own subset, or from all others, to one for each
    image, float32 (N,): `standardised` if wanted, then one of AGGREGATES."""
    comparable, seen = jnp.asarray(scores), jnp.asarray(seen_by(subset, scores.shape[1], others))
    return np.asarray(AGGREGATES[how](standardised(comparable, seen) if standardise else comparable, seen))


def keep_lowest(scores: np.ndarray, share: float) -> np.ndarray:
    """bool (N,): the round(share · N) lowest scores (at least one); of equal scores the later image is kept."""
    return ranks(scores) > len(scores) - max(1, round(share * len(scores)))


def keep_auto(scores: np.ndarray, width: float = 2.5) -> np.ndarray:
    """bool (N,): which images look normal, judged by the scores only.

    Normal images are the majority and score low. Defective images score high. So the lower half of the distribution
    consists of normal images, and its mirror image shows how far normal scores reach upwards. This is done on the
    logarithm of the scores, whose noise is closer to symmetric:

        c = mean of the shortest interval that holds half of log s    (robust while normal images are the majority)
        w = 1.4826 · median(c − log s) over the images with log s ≤ c    (half a median absolute deviation, as a σ)
        keep where log s ≤ c + 2.5 w

    No ratio is set: with many defects it drops many images, without any it keeps nearly all, unless the scores of
    normal images have a long upper tail. It needs some dozens of images: of two, it always drops the higher. Scores
    that may be negative have no logarithm and are taken as they are.
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
    return logs <= centre + width * spread
