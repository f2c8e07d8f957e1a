"""Fit K sub-models in closed form: the images come once, in batches, to all K together.

    features   (R, B, …)   row k holds images of sub-model k; what fills its last batch has weight 0
    state      (R, …)      what a detector gathers, see llb.detectors
    params     (K, …)

A fit takes seconds, so it is saved once, at its end. Where the state is a sum over images, "all subsets but one" needs
no pass of its own: it is the sum of the other sub-models' states.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from llb.checkpoint import CheckpointFolder, Params, check_digest, open_checkpoints, restore_params, save
from llb.console import progress, say
from llb.detectors import DETECTORS, is_trained
from llb.detectors.common import Setup
from llb.features import Features, prefetch
from llb.files import UserError
from llb.placement import on_own_rows, place_submodels
from llb.train import Submodels, check_memory, key_for, train


def learn(
    setup: Setup,
    features: Features,
    submodels: Submodels,
    at: CheckpointFolder,
    title: str,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Params, np.ndarray | None]:
    """The K sub-models, trained or fitted, as the detector does it: a host tree with leading axis K; and what a
    training has seen (llb.train), None of a fit."""
    return (train if is_trained(setup.detector) else fit)(setup, features, submodels, at, title, devices)


@partial(jax.jit, static_argnames=("setup", "images", "mesh"))
def start_states(keys: jax.Array, setup: Setup, images: int, mesh: jax.sharding.Mesh) -> Params:
    """keys: (R,); images: how many will come to each, with what fills the last batch."""
    start = jax.vmap(lambda key: DETECTORS[setup.detector].start(setup, key_for("weights", key), images))
    return on_own_rows(start, mesh, stacks=1)(keys)


@partial(jax.jit, static_argnames=("setup", "mesh"), donate_argnames="states")
def add_batch(
    states: Params, features: jax.Array, weight: jax.Array, first: jax.Array, setup: Setup, mesh: jax.sharding.Mesh
) -> Params:
    """features: (R, B, …); weight: float32 (R, B), 1 or 0; first: int scalar, the batch's place among the images."""
    add = jax.vmap(partial(DETECTORS[setup.detector].add, setup), in_axes=(0, 0, 0, None))
    with jax.default_matmul_precision("highest"):
        return on_own_rows(add, mesh, stacks=3, shared=1)(states, features, weight, first)


@partial(jax.jit, static_argnames=("setup", "mesh"))
def finish_states(states: Params, keys: jax.Array, setup: Setup, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of R sub-models. A device finishes its own one after another, since a bank is large."""
    finish = DETECTORS[setup.detector].finish

    def own(states: Params, keys: jax.Array) -> Params:
        return jax.lax.map(lambda both: finish(setup, both[0], key_for("noise", both[1])), (states, keys))

    with jax.default_matmul_precision("highest"):
        return on_own_rows(own, mesh, stacks=2)(states, keys)


def fit(
    setup: Setup,
    features: Features,
    submodels: Submodels,
    at: CheckpointFolder,
    title: str,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Params, None]:
    """Fit every sub-model to its images. Arguments and errors are those of `llb.train.train`."""
    detector, size = DETECTORS[setup.detector], setup.batch_size
    by_sums = submodels.others and getattr(detector, "ADDITIVE", False)
    lists = submodels.subsets if by_sums else submodels.images
    count, longest = len(lists), max(map(len, lists))
    batches = -(-longest // size)
    with open_checkpoints(at.folder, tidy=True) as checkpoints:
        if checkpoints.latest_step():
            check_digest(checkpoints, at)
            return restore_params(checkpoints), None
        placement = place_submodels(count, devices)
        keys, begin = placement.spread_keys(submodels.keys), partial(start_states, setup=setup, mesh=placement.mesh)
        shapes = jax.eval_shape(partial(begin, images=batches * size), keys)
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        # measured with padim: the other subsets' sums, what they become, and their copies on the way to the checkpoint
        check_memory(
            needed * (5 if by_sums else 2),
            "the fit",
            "a smaller --image-size, fewer --submodels, or other settings of it (--set)",
        )
        if line := getattr(detector, "describe", lambda setup, images: None)(setup, longest):
            say(f"{title}: {line}")

        def batch_of(number: int) -> tuple[jax.Array, jax.Array]:
            positions = np.arange(number * size, (number + 1) * size)
            indices = np.stack([images[positions % len(images)] for images in lists])  # (K, B), filled by repetition
            weight = np.stack([positions < len(images) for images in lists]).astype(np.float32)
            return placement.spread_features(features.fetch, indices, features.shape), placement.spread(weight)

        states = begin(keys, images=batches * size)
        with progress(total=batches, desc=title, unit="batch") as bar:
            for number, (batch, weight) in prefetch(batch_of, range(batches)):
                states = add_batch(states, batch, weight, np.int32(number * size), setup=setup, mesh=placement.mesh)
                bar.update()
        if by_sums:
            states = placement.gather(states, count)  # one after the other: each line frees what it had
            states = jax.tree.map(others, states)
            states = placement.spread(states)
        params = placement.gather(finish_states(states, keys, setup=setup, mesh=placement.mesh), count)
        if any(np.isnan(leaf).any() for leaf in jax.tree.leaves(params)):
            problem = "all images may be alike, or a setting of --set too small for these features"
            raise UserError(f"--detector {setup.detector}: its parameters are not finite; {problem}")
        save(checkpoints, 1, {"params": params}, at.digest)
    return params, None


def others(leaf: np.ndarray) -> np.ndarray:
    """Sums (K, …) of the subsets → for each k the sum of all but the k-th."""
    sums = np.zeros_like(leaf)
    for k, j in itertools.permutations(range(len(leaf)), 2):
        sums[k] += leaf[j]
    return sums
