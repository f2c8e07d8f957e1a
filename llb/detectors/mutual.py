"""Mutual scoring: a patch is anomalous if few other images have a similar patch. No training, no choice of a bank: the
images are each other's reference.

Source: MuSc, Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of the
Unlabeled Images" (ICLR 2024, arXiv 2401.16753), section 3, and its release.

    patches    (b, P, D)       of each map: its mean subtracted, r × r means, length 1
    references (R, P, D)       the same of R training images, float16
    nearest    (b, P, R)       distance of a patch to the nearest patch of each reference image
    distance   (b, h, w)       mean over the 30 % of the images with the smallest; mean over maps and r
    score      (b,)            maximum of the map

An image is not its own reference: where all its patches equal those of a reference image at the same positions, up to
rounding, that image (a copy of it, too) is left out. So a training image's score means something in its own sub-model.
This is the only detector whose time grows with N · R, N² if all images are references (`references` = N).

Differs from the release: a random subset of the images as references; one r, 3, where its defaults average 1, 3 and 5
(`sides`); no re-scoring of images by their neighbours (RsCIN); of a CNN the stage of stride 16 alone (its mean with
stride 8, on one grid, ranked the magnetic tiles worse).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import avg_pool

from llb.detectors.common import MapRule, Setup, between, choice, maps_of, to_patches

STRIDES = (16,)
AGGREGATE = "mean"
SCORE = "max"
MAP = MapRule(align_corners=True, sigma=0.0)

RATE = 1e11  # multiplications and additions a second, for the estimate of time: about two CPU cores
SAME = 1e-5  # mean squared distance of an image's patches from themselves: rounding makes 1e-7 of it


@dataclass(frozen=True)
class Settings:
    references: int = between(100, 1, 10**9)  # images, drawn from the sub-model's
    sides: str = choice("3", "1", "5", "1+3+5")  # of the neighbourhoods, r; the last are the published ones
    share: float = between(0.3, 0, 1)  # of the reference images, those with the smallest distances


def sides_of(setup: Setup) -> list[int]:
    return [int(side) for side in setup.settings.sides.split("+")]


def describe(setup: Setup, images: int) -> str:
    """One line: the references' number, memory and time."""
    count, (height, width, _) = min(setup.settings.references, images), setup.grids[0]
    numbers = count * len(sides_of(setup)) * height * width * sum(channels for _, _, channels in setup.grids)
    return (
        f"references: {count:,} of {images:,} images, {2 * numbers / 2**20:,.0f} MiB; "
        f"on two CPU cores about {1000 * 2 * numbers * height * width / RATE:,.0f} ms an image"
    )


# ---- the references ----


def start(setup: Setup, key: jax.Array, images: int) -> dict:
    """Room for R maps, and a random number for each image: the R images with the smallest become references."""
    count = min(setup.settings.references, images)
    kept = [jnp.zeros((count, *shape), jnp.float16) for shape in setup.grids]
    return {"kept": kept, "number": jnp.full(count, jnp.inf), "numbers": jax.random.uniform(key, (images,))}


def add(setup: Setup, state: dict, features: jax.Array, weight: jax.Array, first: jax.Array) -> dict:
    """Each image of weight 1 replaces the reference with the largest number, if its own is smaller."""
    numbers = state["numbers"].at[first + jnp.arange(len(weight))].get(mode="fill", fill_value=jnp.inf)

    def replace(carry: tuple, image: tuple) -> tuple[tuple, None]:
        kept, number = carry
        maps, own = image
        place = number.argmax()
        better = own < number[place]
        put = [old.at[place].set(jnp.where(better, new.astype(old.dtype), old[place])) for old, new in zip(kept, maps)]
        return (put, number.at[place].min(own)), None

    images = list(maps_of(setup, features)), jnp.where(weight > 0, numbers, jnp.inf)
    (kept, number), _ = jax.lax.scan(replace, (state["kept"], state["number"]), images)
    return {"kept": kept, "number": number, "numbers": state["numbers"]}


def patches_of(maps: jax.Array, side: int) -> jax.Array:
    """One map of some images, (b, h, w, C) → (b, P, C): centred, means of side × side, of length 1."""
    maps = maps - maps.mean(axis=(1, 2, 3), keepdims=True)
    pad = (side // 2, (side - 1) // 2)
    patches = to_patches(avg_pool(maps, (side, side), (1, 1), (pad, pad)))
    return patches / jnp.maximum(jnp.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)


def finish(setup: Setup, state: dict, key: jax.Array) -> dict:
    """→ references: float16 (R, P, C) for each r and map; there: bool (R,), whether a reference has come."""

    def pooled(kept: jax.Array, side: int) -> jax.Array:
        return jax.lax.map(lambda one: patches_of(one[None].astype(jnp.float32), side)[0].astype(kept.dtype), kept)

    references = [[pooled(kept, side) for kept in state["kept"]] for side in sides_of(setup)]
    return {"references": references, "there": jnp.isfinite(state["number"])}


# ---- the distance ----


def mutual_distance(patches: jax.Array, references: jax.Array, there: jax.Array, share: float) -> jax.Array:
    """patches (b, P, C), references (R, P, C), there (R,) → (b, P)."""

    def to_reference(reference: jax.Array) -> tuple[jax.Array, jax.Array]:
        reference = reference.astype(jnp.float32)
        norms = jnp.square(reference).sum(axis=-1)  # rounded to float16, they are not exactly 1
        squared = 1.0 + (norms - 2.0 * patches @ reference.T).min(axis=-1)  # (b, P)
        same = jnp.square(patches - reference).sum(axis=-1).mean(axis=-1) < SAME  # (b,)
        return jnp.sqrt(jnp.maximum(squared, 0.0)), same

    nearest, same = jax.lax.map(to_reference, references)  # (R, b, P), (R, b)
    others = there[:, None] & ~same
    nearest = jnp.sort(jnp.where(others[..., None], nearest, jnp.inf), axis=0)
    counts = np.maximum([int(count * share) for count in range(len(there) + 1)], 1)
    lowest = jnp.asarray(counts)[others.sum(axis=0)]  # (b,)
    chosen = jnp.arange(len(there))[:, None] < lowest  # (R, b)
    mean = jnp.where(chosen[..., None], nearest, 0.0).sum(axis=0) / lowest[:, None]
    return jnp.where(others.any(axis=0)[:, None], mean, 0.0)  # a sub-model of one image cannot judge it


def distance(setup: Setup, params: dict, features: jax.Array) -> jax.Array:
    """float32 (b, h, w)."""
    maps, share = maps_of(setup, features), setup.settings.share
    results = [
        mutual_distance(patches_of(one, side), reference, params["there"], share)
        for side, references in zip(sides_of(setup), params["references"])
        for one, reference in zip(maps, references)
    ]
    return (sum(results) / len(results)).reshape(-1, *setup.grids[0][:2])
