"""Student's t: PaDiM's Gaussian for every position, fitted so that outliers in the training images count little.

No network is trained here; the student networks of the field are in rd.py and destseg.py.

Source: the t distribution's maximum likelihood by expectation and maximisation, Liu and Rubin, "ML Estimation of the t
Distribution Using EM and Its Extensions, ECM and ECME" (Statistica Sinica 5, 1995), with ν known. The idea: hidden
defects pull a mean and a covariance towards themselves, and so hide themselves. A patch that is far from the others at
its position gets a small weight; then all is fitted again.

    x         (P, N, d)        the images' vectors at every position, as PaDiM embeds them: held until the fit
    weight    (P, N)           (ν + d) / (ν + m²), m = ‖L⁻¹(x − μ)‖, 1 before the first round
    μ, Σ                       weighted mean; weighted covariance + 0.01 · I = LLᵀ, as PaDiM has them
    outlier   (P, N)           log m more than 2.5 deviations above the median of its position (see `outliers`)
    recurs    (P,)             around the position outliers are 2.5 times as frequent as at a quiet one: they weigh 0
    distance  (B, h, w)        ‖L⁻¹(x − μ)‖

A defect covers few positions, so an image counts less there and in full elsewhere. No image is left out of the fit,
which is in-fold for all; so one model of all images ranks them (K = 1), where PaDiM needs sub-models. Defects harm a
Gaussian where they recur; there, and only there, outliers are left out altogether (our addition, not of the source).

As a final detector small weights cost where defects are few and normal images are unlike each other. `weights=trim`
has no weights but 1, and 0 for the outliers that recur: without these it is PaDiM.

Differs from PaDiM: the vectors stay in memory until the fit ends, N · P · d numbers of 16 bits, since every round needs
them again. Sums of subsets cannot be added.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from llb.detectors import padim
from llb.detectors.common import MapRule, Setup, between, choice, to_patches

STRIDES, PUBLISHED, BATCH_SIZE = padim.STRIDES, padim.PUBLISHED, padim.BATCH_SIZE
MAP, SCORE, AGGREGATE = MapRule(align_corners=False, sigma=4.0), "top-1%", "mean"
SUBMODELS = 1  # default K: all images at once
OUTLIER = 2.5  # deviations of log m above the median
TAIL = 0.006  # share of a normal distribution above it: no position is quieter


@dataclass(frozen=True)
class Settings(padim.Settings):
    freedom: float = between(4.0, 0.01, 1e9)  # ν, degrees of freedom: fewer give outliers less weight
    rounds: int = between(6, 0, 1000)  # fits with new weights
    recurrence: float = between(2.5, 1, 1e9)  # how frequent outliers are where they are left out; 1e9: nowhere
    weights: str = choice("t", "trim")  # trim: 1 for all that is not left out


def remembers(settings: Settings) -> bool:
    """Whether it scores what it has learned from far too low, as PaDiM does: weights below 1 keep it from that."""
    return settings.weights == "trim"


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
    there, own, (height, width, depth) = state["there"], setup.settings, padim.sizes(setup)

    def fitted(x: jax.Array, weight: jax.Array) -> dict:  # (N, d), (N,)
        mean = weight @ x / weight.sum()
        deviation = x - mean
        covariance = (deviation * weight[:, None]).T @ deviation / jnp.maximum(weight.sum() - 1, 1)
        lower = jnp.linalg.cholesky(covariance + own.ridge * jnp.eye(depth))
        return {"mean": mean, "whiten": padim.inverse_of_lower(lower)}

    def squared(x: jax.Array, fit: dict) -> jax.Array:
        return jnp.square((x - fit["mean"]) @ fit["whiten"].T).sum(axis=-1)

    def weigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)

        def again(_: int, weight: jax.Array) -> jax.Array:
            return there * (own.freedom + depth) / (own.freedom + squared(x, fitted(x, weight)))

        weight = jax.lax.fori_loop(0, own.rounds, again, there)
        return weight, squared(x, fitted(x, weight))

    weight, distances = jax.lax.map(weigh, state["x"])  # one position after another: see padim
    outlier = outliers(distances, there)
    left_out = outlier & recurs(outlier.sum(axis=1) / there.sum(), (height, width), own.recurrence)[:, None]
    weight = jnp.where(left_out, 0.0, there if own.weights == "trim" else weight)
    fit = jax.lax.map(lambda one: fitted(one[0].astype(jnp.float32), one[1]), (state["x"], weight))
    return jax.tree.map(lambda leaf: leaf.reshape(height, width, *leaf.shape[1:]), fit)


def outliers(squared: jax.Array, there: jax.Array) -> jax.Array:
    """bool (P, N): whose log distance is far above the median of its position, in median absolute deviations of the
    position (times 1.4826: a σ). squared: (P, N); there: float32 (N,), 0 where there is no image."""
    logs = jnp.where(there > 0, jnp.log(jnp.maximum(squared, 1e-12)), jnp.nan)
    above = logs - jnp.nanmedian(logs, axis=1, keepdims=True)
    return above > OUTLIER * 1.4826 * jnp.nanmedian(jnp.abs(above), axis=1, keepdims=True)  # of NaN: False


def recurs(share: jax.Array, grid: tuple[int, int], times: float) -> jax.Array:
    """bool (P,): where the share of outliers, float32 (P,), averaged over 3 × 3 positions, is more than so many times
    that of a quiet position (the lowest quarter of them)."""
    around = nn.avg_pool(share.reshape(1, *grid, 1), (3, 3), (1, 1), "SAME", count_include_pad=False).ravel()
    return around > times * jnp.maximum(jnp.quantile(around, 0.25), TAIL)


distance = padim.distance
