"""Student: PaDiM's Gaussian for every position, fitted so that outliers in the training images count little.

Source: the t distribution's maximum likelihood by expectation and maximisation, Liu and Rubin, "ML Estimation of the t
Distribution Using EM and Its Extensions, ECM and ECME" (Statistica Sinica 5, 1995), with ν known. The idea: hidden
defects pull a mean and a covariance towards themselves, and so hide themselves. A patch that is far from the others at
its position gets a small weight; then all is fitted again.

    x         (N, P, d)        the images' vectors at every position, as PaDiM embeds them: held until the fit
    weight    (N,)             for each position apart: (ν + d) / (ν + ‖L⁻¹(x − μ)‖²), 1 before the first round
    μ, Σ                       weighted mean; weighted covariance + 0.01 · I = LLᵀ, as PaDiM has them
    distance  (B, h, w)        ‖L⁻¹(x − μ)‖

A defect covers few positions, so an image counts less there and in full elsewhere. No image is left out of the fit,
which is in-fold for all; so one model of all images ranks them (K = 1), where PaDiM needs sub-models.

Differs from PaDiM: the vectors stay in memory until the fit ends, N · P · d numbers of 16 bits, since every round needs
them again. Sums of subsets cannot be added.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llb.detectors import padim
from llb.detectors.common import MapRule, Setup, between, to_patches

STRIDES, PUBLISHED, BATCH_SIZE = padim.STRIDES, padim.PUBLISHED, padim.BATCH_SIZE
MAP, SCORE, AGGREGATE = MapRule(align_corners=False, sigma=4.0), "top-1%", "mean"
SUBMODELS = 1  # default K: all images at once


@dataclass(frozen=True)
class Settings(padim.Settings):
    freedom: float = between(4.0, 0.01, 1e9)  # ν, degrees of freedom: fewer give outliers less weight
    rounds: int = between(6, 0, 1000)  # fits with new weights; 0: PaDiM


def describe(setup: Setup, images: int) -> str:
    height, width, depth = padim.sizes(setup)
    held, result = (height * width * depth * size / 2**30 for size in (2 * images, 4 * depth))
    gaussians = f"{height * width} Gaussians of {depth} dimensions, {result:.2f} GiB a sub-model"
    return f"{gaussians}, and {held:.2f} GiB for the features of {images:,} images until they are fitted"


def start(setup: Setup, key: jax.Array, images: int) -> dict:
    height, width, depth = padim.sizes(setup)
    return {"x": jnp.zeros((height * width, images, depth), jnp.float16), "there": jnp.zeros(images)}


def add(setup: Setup, state: dict, features: jax.Array, weight: jax.Array, first: jax.Array) -> dict:
    """Store the vectors of B images from place `first` on. Images of weight 0 are not stored."""
    places = jnp.where(weight > 0, first + jnp.arange(len(weight)), len(state["there"]))  # the end: dropped
    x = to_patches(padim.embed(setup, features)).swapaxes(0, 1).astype(jnp.float16)  # (P, B, d)
    return {
        "x": state["x"].at[:, places].set(x, mode="drop"),
        "there": state["there"].at[places].set(1.0, mode="drop"),
    }


def finish(setup: Setup, state: dict, key: jax.Array) -> dict:
    there, own = state["there"], setup.settings

    def position(x: jax.Array) -> dict:  # (N, d)
        x, depth = x.astype(jnp.float32), x.shape[-1]

        def fitted(weight: jax.Array) -> dict:
            mean = weight @ x / weight.sum()
            deviation = x - mean
            covariance = (deviation * weight[:, None]).T @ deviation / jnp.maximum(weight.sum() - 1, 1)
            lower = jnp.linalg.cholesky(covariance + own.ridge * jnp.eye(depth))
            return {"mean": mean, "whiten": padim.inverse_of_lower(lower)}

        def again(_: int, fit: dict) -> dict:
            squared = jnp.square((x - fit["mean"]) @ fit["whiten"].T).sum(axis=-1)
            return fitted(there * (own.freedom + depth) / (own.freedom + squared))

        return jax.lax.fori_loop(0, own.rounds, again, fitted(there))

    height, width, depth = padim.sizes(setup)
    fit = jax.lax.map(position, state["x"])  # one after another: see padim
    return jax.tree.map(lambda leaf: leaf.reshape(height, width, *leaf.shape[1:]), fit)


distance = padim.distance
