"""llb's way of every part, and how far its results differ from the reference's."""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb.bench import reference
from llb.bench.common import EXACT, OURS, Parts, Sizes, Stage, Way, difference, random_distances, stack
from llb.checkpoint import CheckpointFolder
from llb.detectors.common import anomaly_map
from llb.features import cached_features, load_batches
from llb.metrics import PixelCounts, accumulate, pixel_metrics, pixel_metrics_error, pixel_metrics_of
from llb.score import SCORE_BATCH, score, score_all
from llb.train import Submodels, submodel_keys, train

MEMORY_GIB = 64.0  # features are held in memory


def stage1_ways(stage: Stage, folder: Path) -> dict[str, Way]:
    """Encoder, training and scoring as stage1_partition.py calls them: with features on the disk and checkpoints."""
    setup, images = stage.setup, len(stage.paths)
    submodels = Submodels(stage.subsets, submodel_keys(jax.random.key(0), len(stage.subsets)))
    numbers = count()
    latest = {"params": {"params": stack(stage.params)}}  # what is scored before the first training

    def features() -> None:
        cache = folder / f"features{next(numbers)}"
        latest["features"] = cached_features(stage.source, stage.files, cache, MEMORY_GIB, MEMORY_GIB, "  features")

    def training_steps() -> None:
        at = CheckpointFolder(folder / f"training{next(numbers)}", "bench")
        latest["params"], _ = train(setup, latest["features"], submodels, at, "  training")

    def scoring(images: int = images) -> None:
        score_all(latest["params"], setup, latest["features"], images, "  scoring")

    return {
        "encoder": Way(features, images),
        "training step": Way(training_steps, setup.steps),
        "scoring": Way(scoring, images, partial(scoring, 1)),
    }


def other_ways(stage: Stage, masks: np.ndarray, maps: np.ndarray) -> Parts:
    """Decoding, map post-processing and pixel metrics."""
    size, distances, grid = stage.setup.image_size, random_distances(stage), stage.setup.grids[0][:2]

    @jax.jit
    def to_maps(distances: jax.Array) -> jax.Array:
        return anomaly_map(distances.mean(axis=1).reshape(-1, *grid), size, stage.setup.map_rule)

    batches = [distances[start : start + SCORE_BATCH] for start in range(0, len(distances), SCORE_BATCH)]
    return {
        "decoding": {OURS: Way(lambda: np.concatenate(list(load_batches(stage.files, size))), len(stage.paths))},
        "maps": {OURS: Way(lambda: [np.asarray(to_maps(batch)) for batch in batches], len(distances))},
        "pixel metrics": {
            OURS: Way(lambda: pixel_metrics_of(count_pixels(masks, maps)), len(maps), lambda: None),
            EXACT: Way(lambda: pixel_metrics(masks, maps), len(maps), lambda: None),
        },
    }


def count_pixels(masks: np.ndarray, maps: np.ndarray) -> PixelCounts:
    """Batch by batch, as evaluate.py does."""
    counts = PixelCounts()
    for start in range(0, len(maps), SCORE_BATCH):
        counts = accumulate(counts, masks[start : start + SCORE_BATCH], maps[start : start + SCORE_BATCH])
    return counts


def product_ways(side: int) -> dict[str, Way]:
    """The machine's matrix product in float32; a unit is one operation (a multiply-add is two)."""
    random = np.random.default_rng(4)
    a, b = (random.random((side, side), np.float32) for _ in range(2))
    on_device, product = (jnp.asarray(a), jnp.asarray(b)), jax.jit(jnp.matmul)
    repeats = 4

    def repeatedly(call: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            for _ in range(repeats):
                call()

        return work

    return {
        "JAX": Way(repeatedly(lambda: product(*on_device).block_until_ready()), repeats * 2 * side**3),
        "NumPy": Way(repeatedly(lambda: a @ b), repeats * 2 * side**3),
    }


def agreement(sizes: Sizes, stage: Stage, masks: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """How far llb's results and the reference's differ on the same input: relative; metrics absolute."""
    encoder, setup = stage.encoder, stage.setup
    images = stage.images[: min(sizes.batch_size, SCORE_BATCH)]
    features = stage.source.encode(images)
    their_features = reference.compiled_encode(encoder.params, images, spec=setup.spec)
    params, fetched = {"params": stack(stage.params)}, stage.source.features(features.__getitem__)
    _, our_scores, our_maps = next(score(params, setup, fetched, np.arange(len(images)), "", with_maps=True))
    their_distances = np.asarray(reference.distances(encoder.params, stage.params[0], images, setup=setup))
    their_maps = np.stack([reference.heat_map(distance, setup.image_size) for distance in their_distances])
    masks, maps = masks[: sizes.reference_maps], maps[: sizes.reference_maps]
    counts = count_pixels(masks, maps)
    ours, theirs = pixel_metrics_of(counts), reference.pixel_metrics(masks, maps)
    return {
        "features": difference(features, their_features),
        "maps": difference(our_maps[:, 0], their_maps),
        "scores": difference(our_scores[:, 0], np.array([reference.top_mean(heat) for heat in their_maps])),
        "bound stated for pixel metrics": max(pixel_metrics_error(counts).values()),
    } | {name: abs(ours[name] - theirs[name]) for name in ours}
