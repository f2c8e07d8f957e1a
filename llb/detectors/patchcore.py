"""PatchCore: a memory bank of normal patches, thinned by a greedy coreset; a patch's score is its distance to the bank.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (CVPR 2022, arXiv 2106.08265), section 3,
and its release. A patch of a training image that is in the bank gets the score 0, a defective one too: that is why a
training set is partitioned, and why an image is scored by the sub-models that have not seen it (out of fold).

    patches    float32 (b, P, D)          3 × 3 means of the maps, joined on the finest grid
    candidates float16 (images, P, D)     all training patches, n = images · P
    projected  float32 (images, P, 128)   random projection, for the choice only
    bank       float32 (M, D)             M = fraction · n; the entries at the end are unused if images have weight 0
    distance   float32 (b, h, w)          squared, to the nearest entry (or the mean over several)
    score      float32 (b,)               highest distance

Differs from the release: candidates are rounded to float16; a bank has at most `most` entries; several choices are made
with one pass over the patches (the same choices); encoders other than Wide ResNet-50-2 get plain 3 × 3 means.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llb.detectors import banks
from llb.detectors.common import MapRule, Setup, between

STRIDES = (8, 16)
PUBLISHED = {"wide_resnet50_2": {"image_size": 224, "resize": 256}}
AGGREGATE = "out-of-fold"
SCORE = "patch-max"
MAP = MapRule(align_corners=False, sigma=4.0)

STARTS = 10  # random patches from which the greedy choice starts
TOGETHER = 256  # candidates of the greedy choice that are considered at a time
RATE = 1e11  # multiplications and additions a second, for the estimate of time: about two CPU cores


@dataclass(frozen=True)
class Settings:
    fraction: float = between(0.1, 0, 1)  # of all patches
    most: int = between(32_768, 1, 10**9)  # entries, so that time grows with N, not N²; MVTec AD's banks have ≤ 30,654
    neighbours: int = between(1, 1, 1000)  # the distance is the mean over so many nearest entries


start, add = banks.start, banks.add


def bank_sizes(setup: Setup, images: int) -> np.ndarray:
    """int (images + 1,): M for 0, 1, … images."""
    patches, settings = banks.patch_shape(setup)[0], setup.settings
    sizes = [int(count * patches * settings.fraction) for count in range(images + 1)]
    return np.clip(sizes, 1, settings.most)


def describe(setup: Setup, images: int) -> str:
    """One line: the bank's size, memory and time."""
    (patches, width), size = banks.patch_shape(setup), bank_sizes(setup, images)[-1]
    total = images * patches
    held, kept = (number / 2**20 for number in (total * (2 * width + 4 * banks.PROJECTED), size * 4 * width))
    choice, search = 2 * total * size * banks.PROJECTED / RATE, 2 * patches * size * width / RATE
    return (
        f"memory bank: {size:,} of {total:,} patches, {kept:,.1f} MiB, chosen from {held:,.0f} MiB; on two CPU cores "
        f"about {choice:,.0f} s for the choice and {1000 * search:,.0f} ms an image for the search"
    )


# ---- the coreset ----


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Euclidean: (n, d), (m, d) → (n, m)."""
    squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2.0 * a @ b.T
    return jnp.sqrt(jnp.maximum(squared, 0.0))


def coreset(
    projected: jax.Array, allowed: jax.Array, starts: jax.Array, count: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Greedy choice: again and again the patch that is farthest from the chosen ones.

    A patch's value is its distance to the nearest chosen patch, or to the `starts` (the mean) if that is less. Values
    only fall. So it is enough to look at the 256 highest: a patch outside has at most the lowest value that these had
    at the start. Choose among them while the best is at least that. Then one matrix product updates all values.

    Args:
        projected: float32 (images, P, d).
        allowed: bool (images · P,); the others are never chosen.
        starts: int (s,), rows of images · P.
        count: int scalar, how many to choose; size: static, at least `count`.

    Returns:
        rows, int (size,), in the order of the choice, and which of them are used, bool (size,).
    """
    flat = projected.reshape(-1, projected.shape[-1])
    together = min(TOGETHER, len(flat))
    count = jnp.minimum(count, allowed.sum())

    def choose_some(carry: tuple) -> tuple:
        values, chosen, done = carry
        highest, rows = jax.lax.top_k(values, together)
        among = distances(flat[rows], flat[rows])

        def is_sure(inner: tuple) -> jax.Array:
            left, _, picks = inner
            return (picks < jnp.minimum(together, count - done)) & ~(left.max() < highest[-1])

        def choose(inner: tuple) -> tuple:
            left, picked, picks = inner
            best = left.argmax()
            return jnp.minimum(left, among[best]), picked.at[picks].set(best), picks + 1

        picked = jnp.zeros(together, jnp.int32)
        _, picked, picks = jax.lax.while_loop(is_sure, choose, (highest, picked, 0))
        picked = rows[jnp.where(jnp.arange(together) < picks, picked, picked[0])]  # filled up by repetition
        nearest = jax.lax.map(lambda block: distances(block, flat[picked]).min(axis=1), projected).ravel()
        chosen = jax.lax.dynamic_update_slice(chosen, picked, (done,))  # the next choices replace the repetitions
        return jnp.minimum(values, nearest), chosen, done + picks

    values = jax.lax.map(lambda block: distances(block, flat[starts]).mean(axis=1), projected).ravel()
    first = jnp.where(allowed, values, -jnp.inf), jnp.zeros(size + together, jnp.int32), jnp.int32(0)
    _, chosen, _ = jax.lax.while_loop(lambda carry: carry[2] < count, choose_some, first)
    return chosen[:size], jnp.arange(size) < count


# ---- the bank ----


def choose(setup: Setup, state: banks.State, allowed: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The coreset of the allowed candidates, bool (images · P,) → rows, int (M,), and which are used, bool (M,)."""
    projection, first = jax.random.split(key)
    sizes = bank_sizes(setup, len(state["weight"]))
    starts, count = banks.random_rows(first, allowed, STARTS), jnp.asarray(sizes)[state["weight"].sum().astype(int)]
    return coreset(banks.project(projection, state["candidates"]), allowed, starts, count, int(sizes[-1]))


def finish(setup: Setup, state: banks.State, key: jax.Array) -> banks.State:
    """state (banks.add's) → bank: entries float32 (M, D), norms float32 (M,), +inf where unused."""
    allowed = jnp.repeat(state["weight"] > 0, state["candidates"].shape[1])
    return banks.make_bank(state["candidates"], *choose(setup, state, allowed, key))


def distance(setup: Setup, params: banks.State, features: jax.Array) -> jax.Array:
    """Squared distance to the nearest entries: float32 (b, h, w)."""
    neighbours = min(setup.settings.neighbours, len(params["norms"]))

    def of_image(patches: jax.Array) -> jax.Array:
        squared, _ = banks.nearest(patches, params["entries"], params["norms"], neighbours)
        return jnp.mean(squared, axis=1, where=jnp.isfinite(squared))

    return jax.lax.map(of_image, banks.embedding(setup, features)).reshape(-1, *setup.grids[0][:2])
