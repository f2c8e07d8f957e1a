"""PaDiM: a Gaussian for every position of the grid; the distance is Mahalanobis' to the Gaussian of the position.

Source: Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization" (ICPR
2020 workshops, arXiv 2011.08785), section 3. The idea: in aligned images each position looks about the same, so a few
hundred normal images tell how its features are distributed there.

    maps      (B, h, w, C) each    of ResNets strides 4, 8, 16: at 224 pixels 56², 28², 14²
    x         (B, h, w, d)         brought to one grid; d of the channels, drawn once, the same everywhere
    sums      Σ1, Σx, Σxxᵀ         (), (h, w, d), (h, w, d, d): all that a fit needs, whatever the number of images
    C         (h, w, d, d)         (Σxxᵀ − n μμᵀ) / (n − 1) + 0.01 · I, the covariance
    whiten    (h, w, d, d)         L⁻¹, where C = LLᵀ: so that ‖L⁻¹(x − μ)‖² = (x − μ)ᵀ C⁻¹ (x − μ)
    distance  (B, h, w)            ‖L⁻¹(x − μ)‖

Without the ridge the images of the fit have a mean squared distance of d(n − 1)/n whatever they show, and none above
(n − 1)²/n: in-fold scores say little while n is not far above d. (Ranking AUROC on the demo set, n = 133, d = 100, each
sub-model fitted to all subsets but one, seeds 0 to 2: .894 by the mean of all, .883 out of fold.) Sums are float32,
about zero: so subsets add up. A channel mean 64 deviations from 0 costs 6e-4 of a distance (300: half); tiny's is 13.

Differs from the release: encoders that are no ResNets have one coarse grid (pooling "mean") and the score `top-1%` in
place of the maximum, and sums replace the features of all images in memory.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from llb.detectors.common import MapRule, Setup, between, choice, maps_of, mean3x3, resize

STRIDES = (4, 8, 16)
MAP, SCORE, AGGREGATE, ADDITIVE = MapRule(align_corners=False, sigma=4.0), "top-1%", "mean", True
PUBLISHED = dict.fromkeys(("resnet18", "wide_resnet50_2"), {"image_size": 224, "resize": 256, "image_score": "max"})
BATCH_SIZE = 32  # all sums are read and written once a batch
DIMENSIONS = {"wide_resnet50_2": 550}  # d of the release; 100 for others
SMALL = 32  # see `inverse_of_lower`


@dataclass(frozen=True)
class Settings:
    dimensions: int = between(0, 0, 100_000)  # d; 0: the release's
    ridge: float = between(0.01, 0, 1e9)  # added to the covariance's diagonal
    pooling: str = choice("auto", "nearest", "mean")  # see `embed`; auto: nearest for ResNets, mean for others
    channel_seed: int = between(1024, 0, 2**31)  # of the draw of channels: the release's


# ---- features of one grid ----


def pooled(maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """3 × 3 means of the two coarsest maps, on the coarser one's grid: (B, h, w, C) each."""
    height, width = maps[-1].shape[1:3]
    return tuple(resize(mean3x3(one), height, width) for one in maps[-2:])


def embed(setup: Setup, features: jax.Array) -> jax.Array:
    """Cached features → float32 (B, h, w, d).

    pooling "nearest": a coarser map is copied to all positions of the finest grid that it covers, as published;
    "mean": 3 × 3 means of the two coarsest maps on the coarser grid.
    """
    maps = maps_of(setup, features)
    if takes_mean(setup):
        maps = pooled(maps)
    height, width = maps[0].shape[1:3]
    starts, parts = np.cumsum([0, *(one.shape[-1] for one in maps)]), []
    for start, one in zip(starts, maps):
        here = channels(setup) - start
        rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), one.shape[1:3]))
        parts.append(one[..., here[(here >= 0) & (here < one.shape[-1])]][:, rows][:, :, columns])
    return jnp.concatenate(parts, axis=-1)


def takes_mean(setup: Setup) -> bool:
    return {"nearest": False, "mean": True}.get(setup.settings.pooling, not getattr(setup.spec, "resnet", False))


@lru_cache
def channels(setup: Setup) -> np.ndarray:
    """The channels that are drawn of those of all maps together: int (d,), sorted. Equal for all sub-models."""
    total = sum(grid[-1] for grid in setup.grids[-2 if takes_mean(setup) else 0 :])
    wanted = setup.settings.dimensions or DIMENSIONS.get(setup.spec.name, 100)
    return np.array(sorted(random.Random(setup.settings.channel_seed).sample(range(total), min(wanted, total))))


def sizes(setup: Setup) -> tuple[int, int, int]:
    """h, w, d."""
    return *setup.grids[-1 if takes_mean(setup) else 0][:2], len(channels(setup))


# ---- the detector, as llb.detectors describes it ----


def describe(setup: Setup, images: int) -> str:
    height, width, depth = sizes(setup)
    memory = height * width * depth**2 * 4 / 2**30
    return f"{height * width} Gaussians of {depth} dimensions, {memory:.2f} GiB a sub-model for any number of images"


def start(setup: Setup, key: jax.Array, images: int) -> dict:
    height, width, depth = sizes(setup)
    products = jnp.zeros((height, width, depth, depth))
    return {"count": jnp.zeros(()), "sum": products[..., 0], "products": products}


def add(setup: Setup, state: dict, features: jax.Array, weight: jax.Array, first: jax.Array) -> dict:
    x = embed(setup, features)
    weighted = x * weight[:, None, None, None]

    def add_row(row: jax.Array, products: jax.Array) -> jax.Array:  # in place: no second array of this size
        new = products[row] + jnp.einsum("bwi,bwj->wij", weighted[:, row], x[:, row])
        return jax.lax.dynamic_update_index_in_dim(products, new, row, axis=0)

    products = jax.lax.fori_loop(0, x.shape[1], add_row, state["products"])
    return {"count": state["count"] + weight.sum(), "sum": state["sum"] + weighted.sum(axis=0), "products": products}


def finish(setup: Setup, state: dict, key: jax.Array) -> dict:
    count, mean = state["count"], state["sum"] / state["count"]
    depth = mean.shape[-1]

    def whitening(position: tuple[jax.Array, jax.Array]) -> jax.Array:  # (d,), (d, d) → (d, d)
        mean, products = position
        covariance = (products - count * jnp.outer(mean, mean)) / jnp.maximum(count - 1, 1)
        return inverse_of_lower(jnp.linalg.cholesky(covariance + setup.settings.ridge * jnp.eye(depth)))

    positions = mean.reshape(-1, depth), state["products"].reshape(-1, depth, depth)
    # one after another: two Cholesky factorisations of stacks at once can wait for each other forever on two CPU cores
    whiten = jax.lax.map(whitening, positions)
    return {"mean": mean, "whiten": whiten.reshape(*mean.shape, depth)}


def inverse_of_lower(lower: jax.Array) -> jax.Array:
    """The inverse of a lower triangular matrix (n, n), by matrix products: XLA's triangular_solve takes 7 times as
    long on a CPU. Halves are inverted apart; a small one by Newton's iteration, exact after log₂ n steps."""
    size, half = len(lower), len(lower) // 2
    if size <= SMALL:
        inverse = jnp.diag(1 / jnp.diagonal(lower))
        for _ in range((size - 1).bit_length()):
            inverse = 2 * inverse - inverse @ lower @ inverse
        return inverse
    first, second = inverse_of_lower(lower[:half, :half]), inverse_of_lower(lower[half:, half:])
    return jnp.block([[first, jnp.zeros((half, size - half))], [-second @ lower[half:, :half] @ first, second]])


def distance(setup: Setup, params: dict, features: jax.Array) -> jax.Array:
    deviation = embed(setup, features) - params["mean"]
    return jnp.linalg.norm(jnp.einsum("hwij,bhwj->bhwi", params["whiten"], deviation), axis=-1)
