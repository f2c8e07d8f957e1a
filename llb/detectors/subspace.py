"""Subspace: what the principal components of normal patches do not explain; the distance is this residual's length.

Source: Lendering et al., "SubspaceAD: Training-Free Few-Shot Anomaly Detection via Subspace Modeling" (CVPR 2026,
arXiv 2602.23013). The idea: features of normal patches, of all positions together, vary in few directions. A defect's
also differ in the other ones.

    maps      (B, h, w, C) each
    x         (B, h, w, D)         3 × 3 means of the two coarsest maps, side by side on the coarser grid
    sums      Σ1, Σx, Σxxᵀ         (), (D,), (D, D) over all patches: all that a fit needs
    residual  (D, D)               the eigenvectors of the covariance, zero for the first ones, which together explain
                                   a share of the variance
    distance  (B, h, w)            ‖residualᵀ (x − μ)‖, the distance from x to the subspace

Differs from the release: it takes the mean of seven blocks of a DINOv2 (giant) at 672 pixels, turns the few images that
it has, explains 99 % of the variance, and squares the distance.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llb.detectors.common import MapRule, Setup, between, maps_of, to_patches
from llb.detectors.padim import pooled

STRIDES = (8, 16)
MAP, SCORE, AGGREGATE, ADDITIVE = MapRule(align_corners=False, sigma=4.0), "top-1%", "mean", True


@dataclass(frozen=True)
class Settings:
    share: float = between(0.95, 0, 1)  # of the variance, explained by the components that are kept


def embed(setup: Setup, features: jax.Array) -> jax.Array:
    return jnp.concatenate(pooled(maps_of(setup, features)), axis=-1)


def start(setup: Setup, key: jax.Array, images: int) -> dict:
    width = sum(grid[-1] for grid in setup.grids[-2:])
    return {"count": jnp.zeros(()), "sum": jnp.zeros(width), "products": jnp.zeros((width, width))}


def add(setup: Setup, state: dict, features: jax.Array, weight: jax.Array, first: jax.Array) -> dict:
    x = to_patches(embed(setup, features))  # (B, P, D)
    weighted, patches = (x * weight[:, None, None]).reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
    return {
        "count": state["count"] + weight.sum() * x.shape[1],
        "sum": state["sum"] + weighted.sum(axis=0),
        "products": state["products"] + weighted.T @ patches,
    }


def finish(setup: Setup, state: dict, key: jax.Array) -> dict:
    mean = state["sum"] / state["count"]
    values, vectors = jnp.linalg.eigh(state["products"] / state["count"] - jnp.outer(mean, mean))  # smallest first
    others = jnp.cumsum(values)  # of a component and all smaller ones
    return {"mean": mean, "residual": vectors * (others <= (1 - setup.settings.share) * others[-1])}


def distance(setup: Setup, params: dict, features: jax.Array) -> jax.Array:
    return jnp.linalg.norm((embed(setup, features) - params["mean"]) @ params["residual"], axis=-1)
