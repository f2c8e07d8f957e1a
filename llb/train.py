"""Train and apply K sub-models as one: every leaf of the state is stacked on a leading axis of length K.

    params, optimiser state   (K, …)
    batch                     (K, B, 2, T, D)   row k holds images of subset k only
    loss                      (K,)
    scores                    (N, K)

One step is written for ONE sub-model and vmapped, so the gradient norm that is clipped, the optimiser's moments, the
dropout mask and the hard-mining quantile are each sub-model's own, and a sub-model trained beside others is the one
that would have been trained alone. Stage 2 is the same with K = 1.

The axis K is sharded over the devices there are. Sub-models never talk to each other, so nothing is communicated.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.checkpoint import check_digest, open_checkpoints, restore_params, restore_state, save
from llb.console import progress, say
from llb.dinomaly import Dinomaly, anomaly_map, cosine_distance, image_score, patch_targets, reconstruction_loss
from llb.encoder import Encoder
from llb.features import Fetch
from llb.files import UserError
from llb.optimizer import Recipe, hard_positions, make_optimizer

SCORE_BATCH = 16  # images per call while scoring
SAVE_SECONDS = 10.0  # between checkpoints, or more where saving is slow:
SAVE_SHARE = 0.05  # at most this share of the time goes into saving
State = dict  # {"params": …, "opt": …}, every leaf (K, …)


@dataclass(frozen=True)
class Training:
    """Everything about a training that its compiled step depends on."""

    model: Dinomaly
    recipe: Recipe
    learning_rate: float
    steps: int
    batch_size: int


def make_training(
    encoder: Encoder, recipe: Recipe, learning_rate: float, dropout: float, steps: int, batch_size: int
) -> Training:
    """Dinomaly as large as the encoder asks: as many decoder blocks as are reconstructed, the encoder's heads."""
    depth = sum(len(group) for group in encoder.spec.groups)
    model = Dinomaly(depth, encoder.spec.heads, encoder.grid**2, dropout, recipe.linear_init)
    return Training(model, recipe, learning_rate, steps, batch_size)


def submodel_keys(key: jax.Array, submodels: int) -> jax.Array:
    """(K,) keys; sub-model k's does not depend on how many there are."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(submodels))


def purposes(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One sub-model's key, split by purpose: initial weights, order of the batches, dropout."""
    weights, batches, dropout = jax.random.split(key, 3)
    return weights, batches, dropout


def batches(key: jax.Array, subset: np.ndarray, batch_size: int) -> Callable[[int], np.ndarray]:
    """The endless stream of a sub-model's training images, cut into batches: step ↦ int (B,) image indices.

    The stream is one freshly shuffled pass over the subset after another. A batch may begin in one pass and end in the
    next, so no image is left out and no batch is incomplete. It is a function of the step alone: a resumed training
    sees what it would have seen.
    """
    count = len(subset)

    @lru_cache(maxsize=2)
    def shuffled_pass(number: int) -> np.ndarray:
        return subset[np.asarray(jax.random.permutation(jax.random.fold_in(key, number), count))]

    def batch(step: int) -> np.ndarray:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        return np.array([shuffled_pass(int(p // count))[p % count] for p in positions])

    return batch


@dataclass(frozen=True)
class Placement:
    """Where the K sub-models live. Any K fits any number of devices: the last ones are filled up with copies."""

    rows: np.ndarray  # the sub-model in each row of the stack: 0 … K−1, then copies from 0 on
    sharding: jax.sharding.NamedSharding

    def spread(self, tree):
        """A host tree with leading axis K → on the devices, with leading axis len(rows)."""
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[self.rows], self.sharding), tree)

    def gather(self, tree, submodels: int):
        """The reverse: a host tree with leading axis K. Copied, since the next step reuses the device's memory."""
        return jax.tree.map(lambda leaf: np.array(leaf)[:submodels], tree)


def place(submodels: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Share K sub-models out evenly, on as few devices as that takes."""
    devices = devices or jax.local_devices()
    per_device = -(-submodels // len(devices))
    used = -(-submodels // per_device)
    mesh = jax.make_mesh((used,), ("model",), (jax.sharding.AxisType.Auto,), devices=devices[:used])
    return Placement(np.arange(per_device * used) % submodels, jax.NamedSharding(mesh, jax.P("model")))


@partial(jax.jit, static_argnames="training")
def init_state(keys: jax.Array, sample: jax.Array, training: Training) -> State:
    """K fresh sub-models. keys: (K,); sample: (1, 2, T, D), only its shape matters."""

    def one(key: jax.Array) -> State:
        params = training.model.init(purposes(key)[0], sample)["params"]
        return {"params": params, "opt": _optimizer(training, 1).init(params)}

    return jax.vmap(one)(keys)


@partial(jax.jit, static_argnames="training", donate_argnames="state")
def train_step(
    state: State,
    features: jax.Array,
    keys: jax.Array,
    steps_per_pass: jax.Array,
    step: jax.Array,
    hard: jax.Array,
    training: Training,
) -> tuple[State, jax.Array]:
    """One optimiser step of every sub-model.

    Args:
        state: stacked (K, …); donated.
        features: (K, B, 2, T, D).
        keys: (K,) sub-model keys.
        steps_per_pass: int (K,), batches in a pass over the subset.
        step: int scalar, 0-based.
        hard: int scalar, see `llb.dinomaly.reconstruction_loss`.

    Returns:
        the state after the step, and the loss before it, float32 (K,).
    """

    def one(state: State, features: jax.Array, key: jax.Array, steps_per_pass: jax.Array):
        dropout_key = jax.random.fold_in(purposes(key)[2], step)
        target = patch_targets(features, training.model.patches)

        def loss_of(params):
            decoded = training.model.apply({"params": params}, features, train=True, rngs={"dropout": dropout_key})
            return reconstruction_loss(decoded, target, hard, training.recipe.easy_factor)

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, opt = _optimizer(training, steps_per_pass).update(gradients, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return jax.vmap(one)(state, features, keys, steps_per_pass)


def _optimizer(training: Training, steps_per_pass) -> optax.GradientTransformation:
    return make_optimizer(training.recipe, training.learning_rate, training.steps, steps_per_pass)


def train(
    training: Training,
    fetch: Fetch,
    subsets: list[np.ndarray],
    keys: jax.Array,
    folder: Path,
    digest: str,
    title: str,
    devices: Sequence[jax.Device] | None = None,
):
    """Train one sub-model on each subset; go on from the last checkpoint in `folder`, if there is one.

    Args:
        fetch: int indices (K, B) → float16 features (K, B, 2, T, D).
        subsets: K arrays of image indices.
        keys: (K,) keys, one for each sub-model, see `submodel_keys`.
        folder: where the Orbax checkpoints lie.
        digest: names what is trained on; a checkpoint of another digest is refused.
        devices: those to share the sub-models out to; all of this process by default.

    Returns:
        the parameters, a host tree with leading axis K.

    Raises:
        UserError: a loss is not finite, or the checkpoint belongs to other images.
    """
    submodels = len(subsets)
    placement = place(submodels, devices)
    spread_keys = jax.device_put(keys[placement.rows], placement.sharding)
    sample = fetch(np.zeros(1, int))  # (1, 2, T, D)
    streams = [batches(purposes(keys[k])[1], subset, training.batch_size) for k, subset in enumerate(subsets)]
    passes = placement.spread(np.array([-(-len(subset) // training.batch_size) for subset in subsets], np.int32))

    with open_checkpoints(folder) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            check_digest(checkpoints, digest, folder)
        if start == training.steps:
            return restore_params(checkpoints)
        if start:
            say(f"{title}: going on from step {start} of {training.steps}")
            shapes = jax.eval_shape(partial(init_state, training=training), keys, sample)
            state = placement.spread(restore_state(checkpoints, shapes))
        else:
            state = jax.device_put(init_state(spread_keys, sample, training=training), placement.sharding)

        pending, last_save, save_cost = [], time.monotonic(), 0.0
        with progress(total=training.steps, initial=start, desc=title, unit="step") as bar:
            for step in range(start, training.steps):
                indices = np.stack([stream(step) for stream in streams])  # (K, B)
                features = jax.device_put(fetch(indices[placement.rows]), placement.sharding)
                hard = hard_positions(training.recipe, step, training.batch_size * training.model.patches)
                state, loss = train_step(
                    state, features, spread_keys, passes, np.int32(step), np.int32(hard), training=training
                )
                pending.append(loss)
                # Reading a loss waits for the device, so look only now and then, and one step behind.
                due = time.monotonic() - last_save > max(SAVE_SECONDS, save_cost / SAVE_SHARE)
                if len(pending) == 10 or due or step + 1 == training.steps:
                    check_finite(np.stack(pending)[:, :submodels], step + 1 - len(pending))
                    bar.set_postfix_str(f"loss {np.asarray(loss)[:submodels].mean():.4f}", refresh=False)
                    bar.update(len(pending))
                    pending = []
                if due and step + 1 < training.steps:
                    began = time.monotonic()
                    save(checkpoints, step + 1, placement.gather(state, submodels), digest)
                    last_save = time.monotonic()
                    save_cost = last_save - began
        params = placement.gather(state["params"], submodels)
        save(checkpoints, training.steps, {"params": params}, digest)  # what stays: no optimiser state
    return params


def check_finite(losses: np.ndarray, first_step: int) -> None:
    """losses: (steps, K). A run that has diverged ends at once, before it is saved."""
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        step, model = bad[0]
        raise UserError(
            f"--learning-rate: the loss of sub-model {model} is not finite at step {first_step + step}; lower the rate"
        )


@partial(jax.jit, static_argnames=("model", "size"))
def score_step(params, features: jax.Array, model: Dinomaly, size: int) -> tuple[jax.Array, jax.Array]:
    """All sub-models on the same images.

    params: stacked (K, …); features: (b, 2, T, D) → maps float32 (K, b, size, size), scores float32 (K, b).
    """

    def one(params):
        decoded = model.apply({"params": params}, features)
        maps = anomaly_map(cosine_distance(decoded, patch_targets(features, model.patches)), size)
        return maps, image_score(maps)

    return jax.vmap(one)(params)


def score(
    params, model: Dinomaly, fetch: Fetch, indices: np.ndarray, size: int, title: str, with_maps: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Score images in batches of one shape; the last is filled up, and what filled it is dropped.

    Args:
        params: host tree, leading axis K.
        indices: int (n,), the images to score, in this order.
        size: side of the maps in pixels.
        with_maps: maps are large, so they leave the device only when asked for.

    Yields:
        positions in `indices`, int (b,); scores, float32 (b, K); maps, float32 (b, K, size, size) or None.
    """
    submodels = len(jax.tree.leaves(params)[0])
    placement = place(submodels)
    params = placement.spread(params)
    for start in progress(range(0, len(indices), SCORE_BATCH), desc=title, unit="batch"):
        positions = np.arange(start, min(start + SCORE_BATCH, len(indices)))
        filled = np.resize(positions, SCORE_BATCH)
        maps, scores = score_step(params, fetch(indices[filled]), model=model, size=size)

        def wanted(stack: jax.Array, count: int = len(positions)) -> np.ndarray:
            return np.asarray(stack)[:submodels, :count].swapaxes(0, 1)

        yield positions, wanted(scores), wanted(maps) if with_maps else None


def score_all(params, model: Dinomaly, fetch: Fetch, count: int, size: int, title: str) -> np.ndarray:
    """Every image by every sub-model: float32 (N, K); row i belongs to image i."""
    parts = list(score(params, model, fetch, np.arange(count), size, title))
    scores = np.concatenate([scores for _, scores, _ in parts])
    assert scores.shape[0] == count and not np.isnan(scores).any()
    return scores
