"""Train K sub-models as one: every leaf of the state is stacked on a leading axis of length K.

    params, optimiser state   (K, …)
    features                  (K, B, 2, T, D)   row k holds images of subset k only
    loss                      (K,)

One step is written for ONE sub-model and vmapped. So the clipped gradient norm, the optimiser's moments, the dropout
mask and the hard-mining quantile belong to each sub-model, and a sub-model that is trained beside others equals the
same sub-model trained without them. Stage 2 is the same with K = 1. On the devices the axis has R ≥ K rows
(llb.placement).
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
    restore_params,
    restore_state,
    save,
)
from llb.console import progress, say, stop_later
from llb.detectors.dinomaly import Dinomaly, patch_targets, reconstruction_loss
from llb.detectors.recipes import Recipe, hard_positions, make_optimizer
from llb.encoders import Encoder
from llb.features import Fetch, prefetch
from llb.files import UserError
from llb.placement import Placement, place_submodels
from llb.processes import agreed

SAVE_SECONDS = 10.0  # minimum time between two checkpoints
SAVE_FRACTION = 0.05  # maximum fraction of the time that is spent on saving
PREPARING = 2  # batches that threads prepare meanwhile; for ViT-B/14 a thread needs 57 ms, an H200's step 55 ms
STEP_ARRAYS = 25  # float32 (T, D) that a step keeps for each decoder block and image: XLA reports 33 to 36
UNREAD_LOSSES = 2  # reading a loss waits for the device, so the newest steps' stay unread while the device works
State = dict[str, Params]  # {"params": …, "opt": …}


@dataclass(frozen=True)
class Training:
    """The settings of a training. The compiled step depends on all of them."""

    model: Dinomaly
    image_size: int  # side of the anomaly maps, pixels
    recipe: Recipe
    learning_rate: float  # peak
    steps: int
    batch_size: int  # images a step, for each sub-model


def make_training(
    encoder: Encoder, recipe: Recipe, *, learning_rate: float, dropout: float, steps: int, batch_size: int
) -> Training:
    """Dinomaly in the size of the encoder: as many decoder blocks as encoder blocks are reconstructed, equal heads."""
    model = Dinomaly(
        depth=sum(len(group) for group in encoder.spec.groups),
        heads=encoder.spec.heads,
        patches=encoder.grid**2,
        dropout=dropout,
        linear_init=recipe.linear_init,
        precision=encoder.precision,
    )
    return Training(model, encoder.image_size, recipe, learning_rate, steps, batch_size)


def check_memory(training: Training, encoder: Encoder, submodels: int) -> None:
    """Raise a UserError if a step needs more memory than a CPU has: Linux ends such a process without a word."""
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        arrays = submodels * training.batch_size * training.model.depth * STEP_ARRAYS
        needed = arrays * encoder.tokens_per_image * encoder.spec.width * 4
        there = jax.process_count() * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            room = f"a step needs about {needed >> 30} GiB of memory, and this machine has {there >> 30}"
            raise UserError(f"{room}: give a smaller --batch-size, --image-size or --submodels")


@dataclass(frozen=True)
class Submodels:
    """Which images and which random numbers each of the K sub-models gets."""

    subsets: Sequence[np.ndarray]  # K × int (n_k,), image indices
    keys: jax.Array  # (K,)


def submodel_keys(key: jax.Array, submodels: int) -> jax.Array:
    """(K,) random keys; the key of sub-model k does not depend on K."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(submodels))


def key_for(purpose: str, key: jax.Array) -> jax.Array:
    """One sub-model's key for its initial "weights", for the order of its "batches", or for its "dropout" masks."""
    return jax.random.split(key, 3)[("weights", "batches", "dropout").index(purpose)]


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


@partial(jax.jit, static_argnames=("training", "sharding"))
def init_state(
    keys: jax.Array, sample: jax.Array, training: Training, sharding: jax.NamedSharding | None = None
) -> State:
    """New sub-models. keys: (R,); sample: (1, 2, T, D), of which only the shape matters; sharding: of every leaf."""

    def one(key: jax.Array) -> State:
        params = training.model.init(key_for("weights", key), sample)["params"]
        return {"params": params, "opt": _optimizer(training, 1).init(params)}

    state = jax.vmap(one)(keys)
    return state if sharding is None else jax.lax.with_sharding_constraint(state, sharding)


@partial(jax.jit, static_argnames="training", donate_argnames="state")
def train_step(
    state: State, features: jax.Array, each: dict[str, jax.Array], step: jax.Array, hard: jax.Array, training: Training
) -> tuple[State, jax.Array]:
    """One optimiser step of every sub-model.

    Args:
        state: every leaf (R, …); donated.
        features: float16 (R, B, 2, T, D).
        each: what every sub-model has of its own: "key" (R,), and "steps_per_pass" int (R,), batches in a pass over its
            subset.
        step: int scalar, 0-based.
        hard: int scalar, see `llb.detectors.dinomaly.reconstruction_loss`.

    Returns:
        the state after the step, and the loss before it, float32 (R,).
    """

    def one(state: State, features: jax.Array, own: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        dropout_key = jax.random.fold_in(key_for("dropout", own["key"]), step)
        target = patch_targets(features, training.model.patches)

        def loss_of(params: Params) -> jax.Array:
            decoded = training.model.apply({"params": params}, features, train=True, rngs={"dropout": dropout_key})
            return reconstruction_loss(decoded, target, hard, training.recipe.easy_factor)

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        optimizer = _optimizer(training, own["steps_per_pass"])
        updates, opt = optimizer.update(gradients, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return jax.vmap(one)(state, features, each)


def _optimizer(training: Training, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    return make_optimizer(training.recipe, training.learning_rate, training.steps, steps_per_pass)


def train(
    training: Training,
    fetch: Fetch,
    submodels: Submodels,
    at: CheckpointFolder,
    title: str,
    devices: Sequence[jax.Device] | None = None,
) -> Params:
    """Train one sub-model on each subset; continue from the last checkpoint, if there is one.

    Args:
        fetch: image indices (…) → float16 features (…, 2, T, D).
        at: where checkpoints are saved.
        title: names the training on the console.
        devices: where the sub-models are placed; all devices by default.

    Returns:
        the parameters, a host tree with leading axis K.

    Raises:
        UserError: a loss or a parameter is not finite, or the checkpoint is damaged, belongs to other images or cannot
            be saved.
        KeyboardInterrupt: a signal has come; the state after the last step is saved.
    """
    count, batch_size = len(submodels.subsets), training.batch_size
    placement = place_submodels(count, devices)
    passes = np.array([-(-len(subset) // batch_size) for subset in submodels.subsets], np.int32)
    each = {"key": placement.spread_keys(submodels.keys), "steps_per_pass": placement.spread(passes)}
    sample = fetch(np.zeros(1, int))  # (1, 2, T, D)

    streams = [
        batch_stream(key_for("batches", submodels.keys[k]), subset, batch_size)
        for k, subset in enumerate(submodels.subsets)
    ]

    def features_of(step: int) -> jax.Array:
        indices = np.stack([stream(step) for stream in streams])  # (K, B)
        return placement.spread_features(fetch, indices, sample.shape[1:])  # (R, B, 2, T, D)

    with open_checkpoints(at.folder, tidy=True) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            check_digest(checkpoints, at)
        if start == training.steps:
            return restore_params(checkpoints)
        if start:
            say(f"{title}: continues from step {start} of {training.steps}")
            shapes = jax.eval_shape(partial(init_state, training=training), submodels.keys, sample)
            state = placement.spread(restore_state(checkpoints, shapes))
        else:
            state = init_state(each["key"], sample, training=training, sharding=placement.sharding)

        def keep(step: int) -> None:
            host_state = placement.gather(state, count)
            check_params(host_state["params"], step)
            save(checkpoints, step, host_state, at.digest)

        unread, saved_at, save_cost = deque(), time.monotonic(), 0.0
        done = kept = start  # steps
        with progress(total=training.steps, initial=start, desc=title, unit="step") as bar:
            try:
                for step, features in prefetch(features_of, range(start, training.steps), PREPARING, PREPARING):
                    with stop_later():  # no signal comes between a step, which takes the old state, and the new state
                        hard = hard_positions(training.recipe, step, batch_size * training.model.patches)
                        state, losses = train_step(
                            state, features, each, np.int32(step), np.int32(hard), training=training
                        )
                        done = step + 1
                        unread.append((step, losses))

                        last = done == training.steps
                        save_now = agreed(time.monotonic() - saved_at > max(SAVE_SECONDS, save_cost / SAVE_FRACTION))
                        while len(unread) > (0 if save_now or last else UNREAD_LOSSES):
                            read_losses(*unread.popleft(), placement, bar)
                        if last:  # the optimiser's state is not needed again
                            params = placement.gather(state["params"], count)
                            check_params(params, done)
                            save(checkpoints, done, {"params": params}, at.digest)
                        elif save_now:
                            began = time.monotonic()
                            keep(done)
                            kept, saved_at = done, time.monotonic()
                            save_cost = saved_at - began
            except KeyboardInterrupt:
                if kept < done < training.steps and jax.process_count() == 1:  # several would have to agree
                    keep(done)
                raise
    return params


def read_losses(step: int, losses: jax.Array, placement: Placement, bar) -> None:
    """Advance the bar by one step. A training that has diverged ends here, before it is saved. losses: (R,)."""
    local = placement.local_values(losses)
    for model, loss in local.items():
        if not np.isfinite(loss):
            where = f"the loss of sub-model {model} is not finite at step {step}"
            raise UserError(f"--learning-rate: {where}; lower the rate")
    bar.set_postfix_str(f"loss {np.mean(list(local.values())):.4f}", refresh=False)
    bar.update()
