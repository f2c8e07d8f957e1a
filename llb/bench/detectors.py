"""Detectors beside the way people write them. Each function returns {part: {name of the way: Way}}."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llb.bench.common import EAGER, OURS, Parts, Way
from llb.detectors import banks, padim, patchcore, subspace
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

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


# ---- PaDiM and the PCA residual ----


def gaussian_ways(images: int = 32) -> Parts:
    """Fits of PaDiM (ResNet-18 at 224 pixels, as published) and of the PCA residual (28 × 28 patches of a small ViT).

    The other way holds the features of all images, joined and pooled beforehand: PaDiM's covariances are computed
    position by position and inverted together; the components are those of a singular value decomposition of all
    patches, in double precision as anomalib does it. llb's time contains joining and pooling.
    """
    random, batch = np.random.default_rng(0), 32
    resnet = Setup(SPECS["resnet18"], padim.STRIDES, 224, padim.Settings())
    vit = Setup(SPECS["dinov2_vits14"], (), 392, subspace.Settings())
    shapes = {resnet: (sum(map(math.prod, resnet.grids)),), vit: (2, 1 + math.prod(vit.grids[0][:2]), vit.spec.width)}
    features = {
        setup: random.standard_normal((images, *shape), np.float32).astype(np.float16)
        for setup, shape in shapes.items()
    }

    def fit(module, setup: Setup) -> Callable[[], None]:
        add = jax.jit(partial(module.add, setup), donate_argnums=0)
        finish = jax.jit(partial(module.finish, setup))

        def work() -> None:
            state = module.start(setup, jax.random.key(0), images)
            for first in range(0, images, batch):
                state = add(state, features[setup][first : first + batch], np.ones(batch, np.float32), first)
            jax.block_until_ready(finish(state, jax.random.key(0)))

        return work

    def joined(module, setup: Setup) -> np.ndarray:
        x = np.concatenate([module.embed(setup, jnp.asarray(row[None])) for row in features[setup]])
        return x.reshape(images, -1, x.shape[-1])

    positions, patches = joined(padim, resnet), joined(subspace, vit).reshape(-1, 2 * vit.spec.width).astype(np.float64)
    parts: Parts = {
        "PaDiM fit": {OURS: Way(fit(padim, resnet), images)},
        "subspace fit": {OURS: Way(fit(subspace, vit), images)},
    }
    libraries = {NUMPY: (np, np.asarray)}
    try:
        import torch

        libraries[EAGER] = (torch, torch.from_numpy)
    except ImportError:
        pass
    for name, (library, array) in libraries.items():
        x, rows = array(positions), array(patches)
        parts["PaDiM fit"][name] = Way(partial(gaussians_one_by_one, library, x), images, lambda: None)
        parts["subspace fit"][name] = Way(partial(components_of_all, library, rows), images, lambda: None)
    return parts


def gaussians_one_by_one(library, x) -> tuple:
    """library: numpy or torch, whose arrays are (N, P, d) → means (P, d), inverse covariances (P, d, d)."""
    covariances = library.stack([library.cov(x[:, position].T) for position in range(x.shape[1])])
    return x.mean(0), library.linalg.inv(covariances + 0.01 * library.eye(x.shape[-1]))


def components_of_all(library, patches):
    """(n, D) → the principal components, (D, D)."""
    return library.linalg.svd(patches - patches.mean(0), full_matrices=False)[2]
