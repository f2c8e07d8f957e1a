"""Train K sub-models as one: every leaf of the state is stacked on a leading axis of length K.

    params, optimiser state   (K, …)
    features                  (K, B, …)   row k holds images of sub-model k only
    losses                    (K, 1 + B)  the loss, then each image's own highest distances
    seen                      (K, steps kept, 1 + B)   these of some steps: what the sub-models have seen

One step is written for ONE sub-model and vmapped. So the clipped gradient norm, the optimiser's moments, the dropout
mask and the hard-mining quantile belong to each sub-model, and a sub-model that is trained beside others equals the
same sub-model trained without them. Stage 2 is the same with K = 1. On the devices the axis has R ≥ K rows
(llb.placement). Detectors in closed form are fitted by llb.fit.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.checkpoint import (
    CheckpointFolder,
    Params,
    check_digest,
    check_params,
    open_checkpoints,
    restore_finished,
    restore_state,
    save,
)
from llb.console import progress, say, stop_later
from llb.detectors import DETECTORS
from llb.detectors.common import Setup
from llb.features import Features, encoding_devices, prefetch
from llb.files import UserError
from llb.placement import Placement, on_own_rows, place_submodels
from llb.processes import agreed

SAVE_SECONDS = 10.0  # minimum time between two checkpoints
SAVE_FRACTION = 0.05  # maximum fraction of the time that is spent on saving
PREPARING = 2  # batches that threads prepare meanwhile; for ViT-B/14 a thread needs 57 ms, an H200's step 55 ms
UNREAD_LOSSES = 2  # reading a loss waits for the device, so the newest steps' stay unread while the device works
MOST_SEEN = 20_000  # distances of single images that a training keeps, of all sub-models together
SMALLER = "a smaller --batch-size, --image-size or --submodels"  # needs less memory
State = dict[str, Params]  # {"params": …, "opt": …}


def check_memory(needed: int, what: str = "a step", advice: str = SMALLER) -> None:
    """Raise a UserError if `what` needs more memory than a CPU has: Linux ends such a process without a word.

    needed: bytes, of all sub-models.
    """
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        there = jax.process_count() * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            room = f"{what} needs about {needed >> 30} GiB of memory, and this machine has {there >> 30}"
            raise UserError(f"{room}: give {advice}")


@dataclass(frozen=True)
class Submodels:
    """Which images and which random numbers each of the K sub-models gets."""

    subsets: Sequence[np.ndarray]  # K × int (n_k,), image indices
    keys: jax.Array  # (K,)
    others: bool = False  # each learns from all subsets but its own

    @property
    def images(self) -> Sequence[np.ndarray]:
        """K × int (m_k,): the images that each learns from."""
        if not self.others:
            return self.subsets
        everything = np.sort(np.concatenate(self.subsets))
        return [np.setdiff1d(everything, subset) for subset in self.subsets]


def submodel_keys(key: jax.Array, submodels: int) -> jax.Array:
    """(K,) random keys; the key of sub-model k does not depend on K."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(submodels))


def key_for(purpose: str, key: jax.Array) -> jax.Array:
    """One sub-model's key for its initial "weights", for the order of its "batches", or for its steps' "noise"."""
    return jax.random.split(key, 3)[("weights", "batches", "noise").index(purpose)]


def batch_stream(key: jax.Array, subset: np.ndarray, batch_size: int) -> Callable[[int], np.ndarray]:
    """A sub-model's endless stream of training images, cut into batches: step ↦ int (B,) image indices.

    One shuffled pass over the subset follows another. A batch may begin in one pass and end in the next, so no image is
    left out and every batch is full. A batch depends on the step only, so a resumed training sees the same batches.
    """
    count = len(subset)

    @lru_cache(maxsize=2)
    def shuffled_pass(number: int) -> np.ndarray:
        return subset[np.asarray(jax.random.permutation(jax.random.fold_in(key, number), count))]

    def batch(step: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return np.array([shuffled_pass(int(p // count))[p % count] for p in positions])

    return batch


def batch_streams(submodels: Submodels, batch_size: int) -> list[Callable[[int], np.ndarray]]:
    """The stream of each sub-model."""
    keys = (key_for("batches", key) for key in submodels.keys)
    return [batch_stream(key, images, batch_size) for key, images in zip(keys, submodels.images)]


def seen_steps(setup: Setup, submodels: int) -> range:
    """The steps that are kept: all of a short training, else one in so many that at most MOST_SEEN distances are kept.
    A step is kept whole: every sub-model, every image."""
    most = max(1, MOST_SEEN // (submodels * setup.batch_size))
    return range(0, setup.steps, -(-setup.steps // most))


@partial(jax.jit, donate_argnames="seen")
def see(seen: jax.Array, losses: jax.Array, place: jax.Array) -> jax.Array:
    """Keep the losses of a step, (R, 1 + B), at a place in what was seen, (R, steps kept, 1 + B)."""
    return seen.at[:, place].set(losses)


def seen_images(submodels: Submodels, setup: Setup, seen: np.ndarray) -> list[tuple[int, int, int, float]]:
    """What was seen, an entry for every image of every kept step: step, sub-model, image index, its distance.

    seen: of `train`. An image of which the step has taken nothing has no entry.
    """
    entries, streams = [], batch_streams(submodels, setup.batch_size)
    for place, step in enumerate(seen_steps(setup, len(seen))):
        for model, stream in enumerate(streams):
            for image, distance in zip(stream(step), seen[model, place, 1:]):
                entries += [(step, model, int(image), float(distance))] if not np.isnan(distance) else []
    return entries


@partial(jax.jit, static_argnames=("setup", "sharding"))
def init_state(keys: jax.Array, setup: Setup, sharding: jax.NamedSharding | None = None) -> State:
    """New sub-models. keys: (R,); sharding: of every leaf."""
    detector = DETECTORS[setup.detector]

    def one(key: jax.Array) -> State:
        params = detector.init(setup, key_for("weights", key))
        return {"params": params, "opt": detector.optimizer(setup, 1).init(params["params"])}

    state = jax.vmap(one)(keys)
    return state if sharding is None else jax.lax.with_sharding_constraint(state, sharding)


@partial(jax.jit, static_argnames=("setup", "mesh"), donate_argnames="state")
def train_step(
    state: State,
    features: jax.Array,
    each: dict[str, jax.Array],
    shared: tuple[Params | None, jax.Array],
    setup: Setup,
    mesh: jax.sharding.Mesh,
) -> tuple[State, jax.Array]:
    """One optimiser step of every sub-model.

    Args:
        state: every leaf (R, …); donated.
        features: float16 (R, B, …); uint8 images for a detector that gets images.
        each: what every sub-model has of its own: "key" (R,), and "steps_per_pass" int (R,), batches in a pass over its
            images.
        shared: `frozen` of `Features`, and the step, int scalar, 0-based.

    Returns:
        the state after the step, and of before it the loss and what it sees of each image, float32 (R, 1 + B).
    """
    detector = DETECTORS[setup.detector]

    def one(
        state: State, features: jax.Array, own: dict[str, jax.Array], shared: tuple[Params | None, jax.Array]
    ) -> tuple[State, jax.Array]:
        frozen, step = shared
        key = jax.random.fold_in(key_for("noise", own["key"]), step)
        inputs = features if frozen is None else (features, frozen)
        params = state["params"]

        def loss_of(trained: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
            return detector.loss(setup, params | {"params": trained}, inputs, key, step)

        (loss, (highest, changed)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params["params"])
        optimizer = detector.optimizer(setup, own["steps_per_pass"])
        updates, opt = optimizer.update(gradients, state["opt"], params["params"])
        params = params | changed | {"params": optax.apply_updates(params["params"], updates)}
        return {"params": params, "opt": opt}, jnp.append(loss, highest)

    rows = jax.vmap(one, in_axes=(0, 0, 0, None))
    return on_own_rows(rows, mesh, stacks=3, shared=1)(state, features, each, shared)


def train(
    setup: Setup,
    features: Features,
    submodels: Submodels,
    at: CheckpointFolder,
    title: str,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Params, np.ndarray | None]:
    """Train every sub-model on its images; continue from the last checkpoint, if there is one.

    Args:
        at: where checkpoints are saved.
        title: names the training on the console.
        devices: where the sub-models are placed; all devices by default.

    Returns:
        the parameters, a host tree with leading axis K, and what was seen, float32 (K, steps kept, 1 + B):
        the losses of `seen_steps`; None if the parameters come from elsewhere.

    Raises:
        UserError: a loss or a parameter is not finite, or the checkpoint is damaged, belongs to other images or cannot
            be saved.
        KeyboardInterrupt: a signal has come; the state after the last step is saved.
    """
    count, batch_size = len(submodels.subsets), setup.batch_size
    devices = devices or jax.devices()
    # a detector that gets images encodes them in its step
    placement = place_submodels(count, devices if features.frozen is None else encoding_devices(devices))
    passes = np.array([-(-len(images) // batch_size) for images in submodels.images], np.int32)
    each = {"key": placement.spread_keys(submodels.keys), "steps_per_pass": placement.spread(passes)}
    frozen = placement.copied(features.frozen)

    streams, kept_steps = batch_streams(submodels, batch_size), seen_steps(setup, count)

    def batch_of(step: int) -> jax.Array:
        indices = np.stack([stream(step) for stream in streams])  # (K, B)
        return placement.spread_features(features.fetch, indices, features.shape)  # (R, B, …)

    with open_checkpoints(at.folder, tidy=True) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            check_digest(checkpoints, at)
        if start == setup.steps:
            return restore_finished(checkpoints)
        seen = np.full((count, len(kept_steps), 1 + batch_size), np.nan, np.float32)
        if start:
            say(f"{title}: continues from step {start} of {setup.steps}")
            shapes = jax.eval_shape(partial(init_state, setup=setup), submodels.keys)
            state = placement.spread(restore_state(checkpoints, shapes | {"seen": seen}))
            seen = state.pop("seen")
        else:
            state = init_state(each["key"], setup=setup, sharding=placement.sharding)
            seen = placement.spread(seen)

        def keep(step: int) -> None:
            host_state = placement.gather(state | {"seen": seen}, count)
            check_params(host_state["params"], step)
            save(checkpoints, step, host_state, at.digest)

        unread, saved_at, save_cost = deque(), time.monotonic(), 0.0
        done = kept = start  # steps
        with progress(total=setup.steps, initial=start, desc=title, unit="step") as bar:
            try:
                for step, batch in prefetch(batch_of, range(start, setup.steps), PREPARING, PREPARING):
                    # train_step destroys the old state (donated): an interrupt waits until the new one is stored
                    with stop_later():
                        state, losses = train_step(
                            state, batch, each, (frozen, np.int32(step)), setup=setup, mesh=placement.mesh
                        )
                        if step in kept_steps:
                            seen = see(seen, losses, np.int32(kept_steps.index(step)))
                        done = step + 1
                        unread.append((step, losses))

                        last = done == setup.steps
                        save_now = agreed(time.monotonic() - saved_at > max(SAVE_SECONDS, save_cost / SAVE_FRACTION))
                        while len(unread) > (0 if save_now or last else UNREAD_LOSSES):
                            read_losses(*unread.popleft(), placement, bar)
                        if last:  # the optimiser's state is not needed again
                            finished = placement.gather({"params": state["params"], "seen": seen}, count)
                            check_params(finished["params"], done)
                            save(checkpoints, done, finished, at.digest)
                        elif save_now:
                            began = time.monotonic()
                            keep(done)
                            kept, saved_at = done, time.monotonic()
                            save_cost = saved_at - began
            except KeyboardInterrupt:
                if kept < done < setup.steps and jax.process_count() == 1:  # several would have to agree
                    keep(done)
                raise
    return finished["params"], finished["seen"]


def read_losses(step: int, losses: jax.Array, placement: Placement, bar) -> None:
    """Advance the bar by one step. A training that has diverged ends here, before it is saved. losses: (R, 1 + B)."""
    local = {model: row[0] for model, row in placement.local_values(losses).items()}
    for model, loss in local.items():
        if not np.isfinite(loss):
            where = f"the loss of sub-model {model} is not finite at step {step}"
            raise UserError(f"--learning-rate: {where}; lower the rate")
    bar.set_postfix_str(f"loss {np.mean(list(local.values())):.4f}", refresh=False)
    bar.update()
