"""What detectors with a memory bank share: patches, room for them while the images come, and the nearest-entry search.

    patches     float32 (b, P, D)        one for each position of the finest grid, P = h · w
    candidates  float16 (images, P, D)   the patches of all training images, from which the bank is chosen
    projected   float32 (images, P, 128) the same in few numbers, for the choice only
    bank        entries float32 (M, D), norms float32 (M,): squared lengths; +inf: not in use, never the nearest

No function holds a matrix of all patches × all entries: products are made block by block.
"""

import jax
import jax.numpy as jnp

from llb.detectors.common import Setup, joined, maps_of, mean3x3, to_patches

PUBLISHED_CHANNELS = (512, 1024)  # of Wide ResNet-50-2's stages of stride 8 and 16
PROJECTED = 128  # width of the random projection
BLOCK = 2048  # entries that are compared at a time

State = dict[str, jax.Array]


# ---- patches ----


def published_form(setup: Setup) -> bool:
    """Whether PatchCore's own pooling applies, which makes 1024 numbers of 512 + 1024 channels."""
    return tuple(channels for _, _, channels in setup.grids) == PUBLISHED_CHANNELS


def patch_shape(setup: Setup) -> tuple[int, int]:
    """(P, D): the patches of an image and their width."""
    height, width, _ = setup.grids[0]
    return height * width, 1024 if published_form(setup) else sum(channels for _, _, channels in setup.grids)


def embedding(setup: Setup, features: jax.Array) -> jax.Array:
    """Cached features → patches: the 3 × 3 means of all maps on the finest grid, side by side.

    PatchCore unfolds 3 × 3 windows, averages the 9 · C numbers of each layer adaptively to 1024, and both layers to
    1024 again. For 512 and 1024 channels that is (9 · mean + centre) / 10 of the first layer, whose windows share the
    centre, and of the second the mean of channels 2j and 2j + 1.
    """
    maps = maps_of(setup, features)
    means = tuple(mean3x3(one) for one in maps)
    if published_form(setup):
        fine, coarse = means
        means = (0.9 * fine + 0.1 * maps[0], (coarse[..., ::2] + coarse[..., 1::2]) / 2)
    return to_patches(joined(means))


# ---- while the images come ----


def start(setup: Setup, key: jax.Array, images: int) -> State:
    """Room for the patches of `images` images; weight: float32 (images,), 1 where an image has come."""
    return {"candidates": jnp.zeros((images, *patch_shape(setup)), jnp.float16), "weight": jnp.zeros(images)}


def add(setup: Setup, state: State, features: jax.Array, weight: jax.Array, first: jax.Array) -> State:
    """Store the patches of b images from place `first` on. Images of weight 0 are not stored."""
    places = jnp.where(weight > 0, first + jnp.arange(len(weight)), len(state["weight"]))  # the end: dropped
    patches = embedding(setup, features).astype(jnp.float16)
    return {
        "candidates": state["candidates"].at[places].set(patches, mode="drop"),
        "weight": state["weight"].at[places].set(1.0, mode="drop"),
    }


def project(key: jax.Array, candidates: jax.Array) -> jax.Array:
    """(images, P, D) → float32 (images, P, 128): a random linear layer, weights uniform in ±1/√D, no bias."""
    bound = candidates.shape[-1] ** -0.5
    weights = jax.random.uniform(key, (candidates.shape[-1], PROJECTED), minval=-bound, maxval=bound)
    return jax.lax.map(lambda patches: patches.astype(jnp.float32) @ weights, candidates)


def random_rows(key: jax.Array, allowed: jax.Array, count: int) -> jax.Array:
    """int (count,): distinct rows, drawn from the allowed ones, bool (n,); if these are too few, others follow."""
    return jax.lax.top_k(jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0), min(count, len(allowed)))[1]


def make_bank(candidates: jax.Array, rows: jax.Array, used: jax.Array) -> State:
    """The chosen rows, int (M,), of images · P; used: bool (M,)."""
    entries = candidates.reshape(-1, candidates.shape[-1])[rows].astype(jnp.float32)
    return {"entries": entries, "norms": jnp.where(used, jnp.square(entries).sum(axis=-1), jnp.inf)}


# ---- the search ----


def nearest(queries: jax.Array, entries: jax.Array, norms: jax.Array, neighbours: int) -> tuple[jax.Array, jax.Array]:
    """The nearest entries of every query.

    Args:
        queries, entries, norms: (q, D), (M, D), (M,).
        neighbours: how many of them; at most M.

    Returns:
        squared distances, float32 (q, neighbours), ascending, +inf where fewer entries are in use, and the entries'
        numbers, int. The products only find the entries, since squares of float32 cancel; the distances are computed
        from the differences.
    """
    size, width = min(BLOCK, len(entries)), entries.shape[1]
    surplus = -len(entries) % size
    blocks = jnp.pad(entries, ((0, surplus), (0, 0))).reshape(-1, size, width)
    block_norms = jnp.pad(norms, (0, surplus), constant_values=jnp.inf).reshape(-1, size)

    def merge(best: tuple, block: tuple) -> tuple[tuple, None]:
        entries, norms, first = block
        closeness = 2.0 * queries @ entries.T - norms  # (q, size); the query's own length changes no order
        if neighbours == 1:  # much faster on a CPU than top_k, and than argmax
            highest = closeness.max(axis=1, keepdims=True)
            number = jnp.where(closeness == highest, jnp.arange(size), size).min(axis=1, keepdims=True)
            better = highest > best[0]
            return (jnp.where(better, highest, best[0]), jnp.where(better, first + number, best[1])), None
        closeness, number = jax.lax.top_k(closeness, min(neighbours, size))
        closeness, order = jax.lax.top_k(jnp.concatenate([best[0], closeness], axis=1), neighbours)
        number = jnp.concatenate([best[1], first + number], axis=1)
        return (closeness, jnp.take_along_axis(number, order, axis=1)), None

    shape = (len(queries), neighbours)
    none = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
    (closeness, numbers), _ = jax.lax.scan(merge, none, (blocks, block_norms, jnp.arange(len(blocks)) * size))
    squared = jnp.square(queries[:, None] - entries[numbers]).sum(axis=-1)
    return jnp.where(jnp.isfinite(closeness), squared, jnp.inf), numbers
