"""Subsets, and from N × K scores to one for each image. These functions know neither labels nor the noise ratio.

Source: LLBNAD (arXiv 2508.07441). Every sub-model scores a normal image low. A defective image scores high with every
sub-model that was not trained on it, and often with the one that was; so its aggregated score is high.
Differs from the paper: `standardised` and the aggregates median, max and out-of-fold are llb's own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

FEWEST = 3  # unseen images: with two, both deviate equally; with one, the deviation is 0


def partition(key: jax.Array, images: int, submodels: int) -> np.ndarray:
    """Shuffle the images and deal them out: int32 (N,), each image's subset 0 … K−1; sizes differ by at most one."""
    order = np.asarray(jax.random.permutation(key, images))
    subset = np.empty(images, np.int32)
    subset[order] = np.arange(images) % submodels
    return subset


def seen_by(subset: np.ndarray, submodels: int, others: bool) -> np.ndarray:
    """bool (N, K): whether a sub-model has learned from an image, so that its score is in-fold.

    subset: int (N,), 0 … K − 1; others: sub-models have learned from all subsets but their own.
    """
    return (np.arange(submodels) == subset[:, None]) ^ others


def standardised(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Scores of sub-models whose scales differ, on one scale: float32 (N, K), finite.

    Each column is shifted and stretched so that its median and its median absolute deviation, over the images that this
    sub-model has not seen, become the means of all columns' medians and deviations. Where a detector remembers, in-fold
    scores lie far below, so that an error of the deviation moves all of them, and an image's subset decides (of 40
    images PaDiM's whole subsets stood apart): if they lie more than a deviation below, they get one median, too. The
    scores stay as they are if for some sub-model fewer than FEWEST images are unseen, which is too few for a deviation,
    or if its deviation is 0.
    """
    enough = (~seen).sum(axis=0).min() >= FEWEST
    unseen = jnp.where(seen, jnp.nan, scores)
    middle = jnp.nanmedian(unseen, axis=0)  # (K,)
    width = jnp.nanmedian(jnp.abs(unseen - middle), axis=0)
    result = (scores - middle) / jnp.where(width > 0, width, 1.0) * width.mean() + middle.mean()
    inside = jnp.nanmedian(jnp.where(seen, result, jnp.nan), axis=0)  # (K,)
    far = middle.mean() - jnp.nanmean(inside) > width.mean()
    result = jnp.where(seen & far, result - inside + jnp.nanmean(inside), result)
    return jnp.where(enough & (width > 0).all(), result, scores)


def out_of_fold(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """The mean over the sub-models that have not seen the image (K ≥ 2). As in AGGREGATES."""
    return jnp.where(seen, 0.0, scores).sum(axis=1) / (~seen).sum(axis=1)


def max_var(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """The released code's: the maximum times the variance. As in AGGREGATES.

    Below 0 a larger variance would make an image more normal, so scores that may be negative (SimpleNet's) are counted
    from the lowest one.
    """
    return (scores.max(axis=1) - jnp.minimum(scores.min(), 0)) * scores.var(axis=1)


# scores float32 (N, K) and seen bool (N, K) of `seen_by` → one score for each image, float32 (N,)
AGGREGATES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mean": lambda scores, seen: scores.mean(axis=1),  # the paper's
    "median": lambda scores, seen: jnp.median(scores, axis=1),
    "max": lambda scores, seen: scores.max(axis=1),
    "out-of-fold": out_of_fold,
    "max-var": max_var,
}


def combine(scores: np.ndarray, subset: np.ndarray, others: bool, standardise: bool, how: str) -> np.ndarray:
    """From N × K scores to one for each image, float32 (N,): `standardised` if wanted, then one of AGGREGATES.

    scores: float32 (N, K); subset, others: as in `seen_by`; how: a name in AGGREGATES.
    """
    comparable, seen = jnp.asarray(scores), jnp.asarray(seen_by(subset, scores.shape[1], others))
    return np.asarray(AGGREGATES[how](standardised(comparable, seen) if standardise else comparable, seen))
