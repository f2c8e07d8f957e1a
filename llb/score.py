"""Score images with every sub-model: N × K scores, and anomaly maps for those who ask.

A process shares each batch of images out to its own devices; each device holds all K sub-models. Of several processes
each scores its own part of the images (llb.processes).
"""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from llb.checkpoint import Params
from llb.console import progress
from llb.detectors import is_trained
from llb.detectors.common import SCORES, Setup, anomaly_map
from llb.features import Features, by_image, encoding_devices, image_mesh, on_devices, prefetch
from llb.head import Headed, distance_of
from llb.processes import joined, part_of

SCORE_BATCH = 16  # images per compiled call, filled up to a multiple of the devices


@partial(jax.jit, static_argnames=("setup", "mesh"))
def score_step(
    params: Params | Headed, features: jax.Array, setup: Setup, mesh: jax.sharding.Mesh, frozen: Params | None = None
) -> tuple[jax.Array, jax.Array]:
    """All sub-models on the same images.

    params: stacked (K, …); features: (b, …); frozen: of `Features`.
    Returns maps float32 (b, K, S, S), of the side of MapRule if it has one; scores float32 (b, K).
    """

    def of_images(params: Params, frozen: Params | None, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = features if frozen is None else (features, frozen)

        def of_one_submodel(params: Params) -> tuple[jax.Array, jax.Array]:
            distance = distance_of(setup, params, inputs)
            maps = anomaly_map(distance, setup.image_size, setup.map_rule)
            return maps, SCORES[setup.score](distance, maps)

        return jax.vmap(of_one_submodel, out_axes=1)(params)  # (b, K, …)

    def of_batch(both: tuple, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        work = partial(of_images, *both)
        # a fitted detector reads its whole bank for each call, however few images it gets
        return (by_image(work) if is_trained(setup.detector) else work)(features)

    return on_devices(of_batch, mesh)((params, frozen), features)


def score(
    params: Params | Headed,
    setup: Setup,
    features: Features,
    indices: np.ndarray,
    title: str,
    with_maps: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Score images in batches of one size; the last batch is filled up, and its surplus results are dropped.

    Args:
        params: host tree, leading axis K.
        indices: int (n,), the images to score, in this order.
        with_maps: also copy the maps, which are large, from the device.

    Yields:
        positions in `indices`, int (b,); scores, float32 (b, K); maps, float32 (b, K, S, S) or None.
    """
    local = jax.local_devices()
    mesh = image_mesh(local if features.frozen is None else encoding_devices(local))
    size = -(-SCORE_BATCH // mesh.size) * mesh.size
    params, frozen = jax.device_put((params, features.frozen), jax.NamedSharding(mesh, jax.P()))
    shared_out = jax.NamedSharding(mesh, jax.P("images"))
    batches = [np.arange(start, min(start + size, len(indices))) for start in range(0, len(indices), size)]

    def batch_of(positions: np.ndarray) -> jax.Array:
        return jax.device_put(features.fetch(indices[np.resize(positions, size)]), shared_out)  # filled by repetition

    for positions, batch in progress(prefetch(batch_of, batches), total=len(batches), desc=title, unit="batch"):
        maps, scores = score_step(params, batch, setup=setup, mesh=mesh, frozen=frozen)
        count = len(positions)
        yield positions, np.asarray(scores)[:count], np.asarray(maps)[:count] if with_maps else None


def score_some(
    params: Params | Headed, setup: Setup, features: Features, indices: np.ndarray, title: str
) -> np.ndarray:
    """Some images by every sub-model: float32 (n, K); row i belongs to image indices[i]."""
    return np.concatenate([scores for _, scores, _ in score(params, setup, features, indices, title)])


def score_all(params: Params, setup: Setup, features: Features, count: int, title: str) -> np.ndarray:
    """Every image by every sub-model: float32 (N, K); row i belongs to image i."""
    submodels = len(jax.tree.leaves(params)[0])
    own = [scores for _, scores, _ in score(params, setup, features, part_of(count), title)]
    scores = joined(np.concatenate([np.empty((0, submodels), np.float32), *own]), count)
    assert scores.shape == (count, submodels) and not np.isnan(scores).any()
    return scores


def heat_maps(
    params: Params | Headed, setup: Setup, features: Features, indices: np.ndarray, title: str
) -> Iterator[tuple[int, np.ndarray]]:
    """The maps of a few images, for a picture: each index with float32 (S, S), the mean over the sub-models.

    Only the finished ranking tells which images to show, so these few are scored a second time.
    """
    for positions, _, maps in score(params, setup, features, indices, title, with_maps=True):
        yield from zip(indices[positions], maps.mean(axis=1))
