"""The two training recipes: optimiser, learning-rate schedule, initialisation and hard mining, for ONE sub-model.

"llbnad":   LLBNAD's trainer (arXiv 2508.07441 and its released code).
"dinomaly": Dinomaly's (CVPR 2025, arXiv 2405.14325, section 4.1 and its released code).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclass(frozen=True)
class Recipe:
    """The numbers of one way to train, as the original has them."""

    name: str
    learning_rate: float  # at batch 16
    clip_norm: float  # bound on the global gradient norm
    linear_init: str  # of linear layers, see llb.detectors.decoder.Linear
    easy_fraction: float  # p: fraction of the positions that count as easy
    easy_factor: float  # multiplies the gradient at easy positions; 1.0 switches hard mining off
    ramp_steps: int  # p grows linearly from 0 over these steps


RECIPES = {
    "llbnad": Recipe(
        name="llbnad",
        learning_rate=5e-3,
        clip_norm=5.0,
        linear_init="pytorch",
        easy_fraction=0.9,
        easy_factor=0.0,
        ramp_steps=0,
    ),
    "dinomaly": Recipe(
        name="dinomaly",
        learning_rate=2e-3,
        clip_norm=0.1,
        linear_init="truncated",
        easy_fraction=0.9,
        easy_factor=0.1,
        ramp_steps=1000,
    ),
}


def hard_positions(recipe: Recipe, step: int, positions: int) -> int:
    """How many of a batch's B · P positions keep their gradient at `step` (0-based): ⌊(1 − p) · positions⌋, at least 1.

    Computed on the host in double precision: in float32 the product can fall on the wrong side of a whole number.
    """
    progress = min(1.0, step / recipe.ramp_steps) if recipe.ramp_steps else 1.0
    return max(1, int(np.floor((1.0 - recipe.easy_fraction * progress) * positions + 1e-9)))


def warmup_cosine(peak: float, final: float, warmup: int, total: int) -> optax.Schedule:
    """Dinomaly's schedule: 0 → peak linearly over `warmup` steps (both ends included), then a cosine to `final`."""

    def schedule(step: jax.Array) -> jax.Array:
        rise = peak * step / max(1, warmup - 1)
        fall = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * (step - warmup) / max(1, total - warmup)))
        return jnp.where(step < warmup, rise, fall)

    return schedule


def tenth_each_pass(peak: float, steps_per_pass: jax.Array | int) -> optax.Schedule:
    """LLBNAD's schedule: a tenth after each pass over the subset, and no floor: timm's StepLR never gets `lr_min`."""

    def schedule(step: jax.Array) -> jax.Array:
        return peak * 0.1 ** (step // steps_per_pass)

    return schedule


class StableAdamWState(NamedTuple):
    count: jax.Array
    mean: optax.Updates
    square: optax.Updates
    square_max: optax.Updates


def stable_adamw(
    learning_rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-10,
    weight_decay: float = 1e-4,
    clip_threshold: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with AMSGrad whose step is divided by the RMS of g / √v̂ in each tensor when that exceeds the threshold.

    Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (NeurIPS 2023,
    algorithm 2), with Dinomaly's additions. For a tensor θ with gradient g at step t = 1, 2, …, rate η:

        m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²          v̂ ← max(v̂, v)
        d = √v̂ / √(1 − β₂ᵗ) + ε        r = max(1, RMS(g / d) / clip_threshold)
        θ ← (1 − η λ) θ − η / ((1 − β₁ᵗ) r) · m / d

    The maximum is of the uncorrected v, as in PyTorch's AMSGrad; optax.scale_by_amsgrad corrects differently.
    """

    def init(params: optax.Params) -> StableAdamWState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return StableAdamWState(jnp.zeros([], jnp.int32), zeros, zeros, zeros)

    def update(gradients, state, params):
        rate = learning_rate(state.count)
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradients)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, gradients)
        square_max = jax.tree.map(jnp.maximum, state.square_max, square)

        # 1 − βᵗ without the cancellation that costs float32 five digits at t = 1
        correction1, correction2 = (-jnp.expm1(count * np.log(beta)) for beta in (b1, b2))

        def step(g: jax.Array, m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            denominator = jnp.sqrt(v / correction2) + eps
            excess = jnp.maximum(1.0, jnp.sqrt(jnp.mean((g / denominator) ** 2)) / clip_threshold)
            # first the decay, then the step, as the reference does; the order only affects rounding
            return -rate * weight_decay * p - rate / correction1 / excess * m / denominator

        updates = jax.tree.map(step, gradients, mean, square_max, params)
        return updates, StableAdamWState(count, mean, square, square_max)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    recipe: Recipe, learning_rate: float, total_steps: int, steps_per_pass: jax.Array | int
) -> optax.GradientTransformation:
    """The recipe's optimiser for one sub-model, gradient clipping included.

    steps_per_pass: may be a traced scalar; under vmap each sub-model has its own, because subsets differ in size.
    Gradients are clipped by ‖g‖. PyTorch adds 1e-6 to it, a relative difference of at most 1e-5 at the norms used here.
    """
    clip = optax.clip_by_global_norm(recipe.clip_norm)
    if recipe.name == "llbnad":
        return optax.chain(clip, optax.adam(tenth_each_pass(learning_rate, steps_per_pass), b1=0.5, b2=0.999))
    if recipe.name != "dinomaly":
        raise ValueError(f"no optimiser for recipe {recipe.name!r}: add it to make_optimizer")
    # the original warms up for 100 of 5,000 steps; short runs (the demo set) warm up for a tenth of their steps
    warmup = min(100, total_steps // 10)
    return optax.chain(clip, stable_adamw(warmup_cosine(learning_rate, learning_rate / 10, warmup, total_steps)))
