"""SoftPatch: PatchCore that expects defects in its training set. Each training patch gets an outlier factor: how sparse
its surroundings are among the same position's patches in the other images. The worst 15 % stay out of the bank, and
the factor of an entry multiplies the distances to it, so that a doubtful entry vouches for less.

Source: Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data" (NeurIPS 2022, arXiv 2403.14233),
section 3, and its release. The factor is Breunig et al.'s local outlier factor (SIGMOD 2000).

    candidates float16 (images, P, D)     as PatchCore's
    projected  float32 (images, P, 128)   one random projection for the factor, another one for the coreset
    factor     float32 (images, P)        about 1 in the middle of a cluster, larger outside
    bank       float32 (M, D)             with the factor of each entry, (M,)
    distance   float32 (b, h, w)          squared, to the nearest entry, times its factor
    score      float32 (b,)               highest distance

Differs from the release: no dropped patch is in the bank (there the first choice is not masked, and the farthest patch
of all is often a defect); k is the paper's 6 (there `--lof_k` is ignored and k is 5); neighbours come from at most
`references` random images; and what patchcore.py says.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llb.detectors import banks, patchcore
from llb.detectors.common import Setup, between

STRIDES, PUBLISHED, AGGREGATE = patchcore.STRIDES, patchcore.PUBLISHED, patchcore.AGGREGATE
SCORE, MAP = patchcore.SCORE, patchcore.MAP
LOF_EPS = 1e-10  # scikit-learn's: the density of equal patches stays finite


@dataclass(frozen=True)
class Settings:
    fraction: float = between(0.1, 0, 1)  # of all patches
    most: int = between(32_768, 1, 10**9)  # entries, see patchcore.py
    dropped: float = between(0.15, 0, 1)  # τ, the share of patches that stay out of the bank
    lof_neighbours: int = between(6, 1, 1000)  # k
    references: int = between(512, 2, 10**9)  # images whose patches can be neighbours: so time grows with N, not N²


start, add = banks.start, banks.add


def describe(setup: Setup, images: int) -> str:
    """One line: the bank's size, memory and time."""
    patches, others = banks.patch_shape(setup)[0], min(images, setup.settings.references)
    seconds = 2 * patches * images * others * banks.PROJECTED / patchcore.RATE
    return f"{patchcore.describe(setup, images)}; {seconds:,.0f} s for the outlier factors"


def outlier_factor(patches: jax.Array, real: jax.Array, others: jax.Array, neighbours: int) -> jax.Array:
    """Local outlier factor of patches of one position.

    k-distance(j): from j to its k-th neighbour. reach(i, j) = max(distance(i, j), k-distance(j)).
    density(i) = 1 / mean of reach(i, ·) over the neighbours of i. factor(i) = mean density of these / density(i).

    Args:
        patches: float32 (images, d).
        real: bool (images,); the others are nobody's neighbour, and their factor means nothing.
        others: int (R,), the images in which neighbours are looked for; a patch is not its own neighbour.
        neighbours: k; fewer where there are fewer.

    Returns:
        float32 (images,). With all images as `others` it is scikit-learn's LocalOutlierFactor.
    """
    references = patches[others]
    norms = jnp.where(real[others], jnp.square(references).sum(axis=1), jnp.inf)
    squared, found = banks.nearest(patches, references, norms, min(neighbours + 1, len(others)))
    found = others[found]  # (images, k + 1)
    own = found == jnp.arange(len(patches))[:, None]
    length = jnp.where(own, jnp.inf, jnp.sqrt(squared))
    order = length.argsort(axis=1)[:, :neighbours]
    length, found = (jnp.take_along_axis(values, order, axis=1) for values in (length, found))  # (images, k)
    there = jnp.isfinite(length)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(there, values, 0.0).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)

    k_distance = jnp.where(there, length, 0.0).max(axis=1)
    density = 1.0 / (mean(jnp.maximum(length, k_distance[found])) + LOF_EPS)
    return jnp.where(there.any(axis=1), mean(density[found]) / density, 1.0)  # alone: nothing to compare with


def factors_and_kept(setup: Setup, state: banks.State, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every candidate's factor, float32 (images, P), and whether it may enter the bank, bool (images, P)."""
    projection, choice = jax.random.split(key)
    real, settings = state["weight"] > 0, setup.settings
    others = banks.random_rows(choice, real, settings.references)
    projected = banks.project(projection, state["candidates"])
    factors = jax.lax.map(
        lambda patches: outlier_factor(patches, real, others, settings.lof_neighbours), projected.swapaxes(0, 1)
    ).T
    limit = jnp.nanquantile(jnp.where(real[:, None], factors, jnp.nan), 1.0 - settings.dropped)
    return factors, real[:, None] & (factors <= limit)


def finish(setup: Setup, state: banks.State, key: jax.Array) -> banks.State:
    """state (banks.add's) → bank: PatchCore's, chosen from the patches that are kept; factors float32 (M,)."""
    factor_key, bank_key = jax.random.split(key)
    factors, kept = factors_and_kept(setup, state, factor_key)
    rows, used = patchcore.choose(setup, state, kept.ravel(), bank_key)
    return banks.make_bank(state["candidates"], rows, used) | {"factors": factors.ravel()[rows]}


def distance(setup: Setup, params: banks.State, features: jax.Array) -> jax.Array:
    """Squared distance to the nearest entry, times its factor: float32 (b, h, w)."""

    def of_image(patches: jax.Array) -> jax.Array:
        squared, entry = banks.nearest(patches, params["entries"], params["norms"], 1)
        return (squared * params["factors"][entry])[:, 0]

    return jax.lax.map(of_image, banks.embedding(setup, features)).reshape(-1, *setup.grids[0][:2])
