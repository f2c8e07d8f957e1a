"""Detectors beside the way people write them. Each function returns {part: {name of the way: Way}}."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llb.bench.common import EAGER, OURS, Parts, Way
from llb.detectors import banks, patchcore

NUMPY = "NumPy"


def bank_ways(images: int = 67, patches: int = 196, width: int = 384, fraction: float = 0.1) -> Parts:
    """PatchCore's greedy coreset, in patches chosen, and its search, in images. Sizes: a third of the demo's.

    The other way is the release's sampler, which computes the distance of all patches to each newly chosen one, and
    the whole distance matrix of an image's patches and the bank; in PyTorch where it is installed, and in NumPy.
    """
    random = np.random.default_rng(0)
    place = random.normal(size=(patches, width))
    numbers = (place + 0.5 * random.normal(size=(images, patches, width))).astype(np.float32)
    projected = numbers[..., : banks.PROJECTED].copy()
    size, starts = int(images * patches * fraction), random.permutation(images * patches)[: patchcore.STARTS]
    flat, bank, queries = projected.reshape(-1, banks.PROJECTED), numbers.reshape(-1, width)[:size], numbers[-16:]
    norms = np.square(bank).sum(axis=1)
    choose = jax.jit(partial(patchcore.coreset, size=size))

    @jax.jit
    def search(queries: jax.Array, bank: jax.Array, norms: jax.Array) -> jax.Array:
        return jax.lax.map(lambda image: banks.nearest(image, bank, norms, 1)[0], queries)

    parts: Parts = {
        "coreset": {
            OURS: Way(
                lambda: jax.block_until_ready(choose(projected, jnp.ones(len(flat), bool), starts, jnp.int32(size))),
                size,
            ),
            NUMPY: Way(lambda: numpy_coreset(flat, starts, size), size, lambda: numpy_coreset(flat, starts, 5)),
        },
        "search": {
            OURS: Way(lambda: jax.block_until_ready(search(queries, bank, norms)), len(queries)),
            NUMPY: Way(lambda: [numpy_distances(image, bank).min(axis=1) for image in queries], len(queries)),
        },
    }
    try:
        import torch
    except ImportError:
        return parts
    rows, entries, pictures = (torch.from_numpy(array) for array in (flat, bank, queries))
    parts["coreset"][EAGER] = Way(
        lambda: torch_coreset(torch, rows, starts, size), size, lambda: torch_coreset(torch, rows, starts, 5)
    )
    parts["search"][EAGER] = Way(lambda: [torch.cdist(image, entries).min(dim=1) for image in pictures], len(queries))
    return parts


def numpy_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T, 0))


def numpy_coreset(rows: np.ndarray, starts: np.ndarray, size: int) -> list[int]:
    value, chosen = numpy_distances(rows, rows[starts]).mean(axis=1), []
    for _ in range(size):
        chosen.append(int(value.argmax()))
        value = np.minimum(value, numpy_distances(rows, rows[chosen[-1:]])[:, 0])
    return chosen


def torch_coreset(torch, rows, starts: np.ndarray, size: int) -> list[int]:
    value, chosen = torch.cdist(rows, rows[starts]).mean(dim=1), []
    for _ in range(size):
        chosen.append(int(value.argmax()))
        value = torch.minimum(value, torch.cdist(rows, rows[chosen[-1:]])[:, 0])
    return chosen
