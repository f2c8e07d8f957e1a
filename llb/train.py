"""Train and apply K sub-models as one: every leaf of the state is stacked on a leading axis of length K.

    params, optimiser state   (K, …)
    batch                     (K, B, 2, T, D)   row k holds images of subset k only
    loss                      (K,)
    scores                    (N, K)

One step is written for ONE sub-model and vmapped, so the gradient norm that is clipped, the optimiser's moments, the
dropout mask and the hard-mining quantile are each sub-model's own, and a sub-model trained beside others is the one
that would have been trained alone. Stage 2 is the same with K = 1.

Steps are compiled into loops of CHUNK, so that Python is not asked between two steps.

The devices, of all processes, form a mesh with two axes. "model" shares the sub-models out; they never talk to each
other, so nothing is communicated. Where there are more devices than sub-models, "data" shares out each sub-model's
batch as well. While scoring, a process is alone with its devices and its share of the images.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.checkpoint import check_digest, check_params, open_checkpoints, restore_params, restore_state, save
from llb.console import progress, say
from llb.dinomaly import Dinomaly, anomaly_map, cosine_distance, image_score, patch_targets, reconstruction_loss
from llb.encoder import Encoder
from llb.features import Fetch, ahead, by_image
from llb.files import UserError
from llb.optimizer import Recipe, hard_positions, make_optimizer
from llb.processes import agreed, gathered, joined, share

CHUNK = 10  # steps in one compiled loop; the state is looked at, and saved, between loops
# At most this much is fetched for one loop. On a CPU, where a step on as much takes many seconds, a loop must be
# short for the sake of checkpoints and of Ctrl-C (measured there: steps in a loop are no slower than one by one).
CHUNK_BYTES = {"cpu": 2**27, "accelerator": 2**31}
RESIDENT_SHARE = 0.5  # of an accelerator's memory may hold features
SCORE_BATCH = 16  # images per call while scoring
SAVE_SECONDS = 10.0  # between checkpoints, or more where saving is slow:
SAVE_SHARE = 0.05  # at most this share of the time goes into saving
State = dict  # {"params": …, "opt": …}, every leaf (K, …)
log = logging.getLogger(__name__)


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
    """Dinomaly as large as the encoder asks: as many decoder blocks as are reconstructed, its heads and precision."""
    depth = sum(len(group) for group in encoder.spec.groups)
    model = Dinomaly(depth, encoder.spec.heads, encoder.grid**2, dropout, recipe.linear_init, encoder.precision)
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
    mesh: jax.sharding.Mesh  # axes "model", "data"

    def sharding(self, *axes: str | None) -> jax.NamedSharding:
        return jax.NamedSharding(self.mesh, jax.P(*axes))

    def spread(self, tree):
        """A host tree with leading axis K → on the devices, with leading axis len(rows)."""

        def one(leaf) -> jax.Array:
            leaf = np.asarray(leaf)[self.rows]
            return jax.make_array_from_callback(leaf.shape, self.sharding("model"), leaf.__getitem__)

        return jax.tree.map(one, tree)

    def spread_keys(self, keys: jax.Array) -> jax.Array:
        """(K,) keys → (len(rows),), each on its sub-model's device."""
        return jax.random.wrap_key_data(self.spread(jax.random.key_data(keys)))

    def spread_rows(self, fetch: Fetch, indices: np.ndarray, row: tuple[int, int, int]) -> jax.Array:
        """int (K, n) → features (len(rows), n, 2, T, D), each sub-model's on its device.

        Only what this process's devices need is fetched. row: (2, T, D).
        """
        indices = indices[self.rows]
        fetch_once = lru_cache(lambda start, stop: fetch(indices[start:stop]))  # the devices of axis "data" share it

        def part(where: tuple[slice, ...]) -> np.ndarray:
            return fetch_once(*where[0].indices(len(indices))[:2])

        return jax.make_array_from_callback((*indices.shape, *row), self.sharding("model"), part)

    def gather(self, tree, submodels: int):
        """The reverse of `spread`: a host tree with leading axis K, in all processes."""
        return jax.tree.map(lambda leaf: leaf[:submodels], gathered(tree))


def place(submodels: int, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Share K sub-models out evenly, on as few devices as that takes; then their batches over the devices left.

    devices: all of all processes by default. Where these are several, no device is left out, since each must have some.
    """
    devices = devices or jax.devices()
    per_device = -(-submodels // len(devices))
    model = -(-submodels // per_device)
    several = len({device.process_index for device in devices}) > 1
    shared_out = batch_size if not several else math.gcd(batch_size, len(devices))
    data = max(n for n in range(1, len(devices) // model + 1) if shared_out % n == 0)
    if several:
        model = len(devices) // data
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((model, data), ("model", "data"), (auto, auto), devices=devices[: model * data])
    return Placement(np.arange(per_device * model) % submodels, mesh)


@partial(jax.jit, static_argnames=("training", "sharding"))
def init_state(
    keys: jax.Array, sample: jax.Array, training: Training, sharding: jax.NamedSharding | None = None
) -> State:
    """K fresh sub-models. keys: (K,); sample: (1, 2, T, D), only its shape matters; sharding: of every leaf."""

    def one(key: jax.Array) -> State:
        params = training.model.init(purposes(key)[0], sample)["params"]
        return {"params": params, "opt": _optimizer(training, 1).init(params)}

    state = jax.vmap(one)(keys)
    return state if sharding is None else jax.lax.with_sharding_constraint(state, sharding)


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
        state: stacked (K, …).
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


@partial(jax.jit, static_argnames=("sharding", "training"), donate_argnames="state")
def train_steps(
    state: State,
    rows: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    steps_per_pass: jax.Array,
    steps: jax.Array,
    hard: jax.Array,
    sharding: jax.NamedSharding,
    training: Training,
) -> tuple[State, jax.Array]:
    """`train_step` at each of `steps`, in one compiled loop.

    Args:
        state: stacked (K, …); donated.
        rows: float16 (K, n, 2, T, D), features to take batches from, each sub-model's own.
        positions: int (K, steps, B), which of the n rows each step sees.
        steps, hard: int (steps,), as for `train_step`.
        sharding: of one step's features (K, B, 2, T, D).

    Returns:
        the state after the last step, and the losses, float32 (K, steps).
    """

    def one_step(state: State, inputs: tuple[jax.Array, jax.Array, jax.Array]):
        positions, step, hard = inputs
        features = jax.vmap(lambda rows, positions: rows[positions])(rows, positions)
        features = jax.lax.with_sharding_constraint(features, sharding)
        return train_step(state, features, keys, steps_per_pass, step, hard, training)

    state, losses = jax.lax.scan(one_step, state, (positions.swapaxes(0, 1), steps, hard))
    return state, losses.T


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
        devices: those to share the work out to; all by default.

    Returns:
        the parameters, a host tree with leading axis K.

    Raises:
        UserError: a loss is not finite, or the checkpoint belongs to other images.
    """
    submodels, batch_size = len(subsets), training.batch_size
    placement = place(submodels, batch_size, devices)
    spread_keys = placement.spread_keys(keys)
    sample = fetch(np.zeros(1, int))  # (1, 2, T, D)
    passes = placement.spread(np.array([-(-len(subset) // batch_size) for subset in subsets], np.int32))

    with open_checkpoints(folder, tidy=True) as checkpoints:
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
            state = init_state(spread_keys, sample, training=training, sharding=placement.sharding("model"))

        batch_sharding = placement.sharding("model", "data")
        chunks, prepare = plan(training, fetch, subsets, keys, placement, start, sample[0])
        pending, last_save, save_cost = deque(), time.monotonic(), 0.0
        with progress(total=training.steps, initial=start, desc=title, unit="step") as bar:
            for steps, (rows, positions) in ahead(prepare, chunks):
                hard = [hard_positions(training.recipe, step, batch_size * training.model.patches) for step in steps]
                numbers = np.array(steps, np.int32), np.array(hard, np.int32)
                state, losses = train_steps(
                    state, rows, positions, spread_keys, passes, *numbers, batch_sharding, training=training
                )
                pending.append((steps, losses))
                due = agreed(time.monotonic() - last_save > max(SAVE_SECONDS, save_cost / SAVE_SHARE))
                last = steps.stop == training.steps
                # Reading losses waits for the device: leave it the newest chunk to work on meanwhile.
                while len(pending) > (0 if due or last else 1):
                    done, losses = pending.popleft()
                    losses = placement.gather(losses, submodels)
                    check_finite(losses.T, done.start)
                    bar.set_postfix_str(f"loss {losses[:, -1].mean():.4f}", refresh=False)
                    bar.update(len(done))
                if due and not last:
                    began = time.monotonic()
                    gathered = placement.gather(state, submodels)
                    check_params(gathered["params"], steps.stop)
                    save(checkpoints, steps.stop, gathered, digest)
                    last_save = time.monotonic()
                    save_cost = last_save - began
        params = placement.gather(state["params"], submodels)
        check_params(params, training.steps)
        save(checkpoints, training.steps, {"params": params}, digest)  # what stays: no optimiser state
    return params


def plan(
    training: Training,
    fetch: Fetch,
    subsets: list[np.ndarray],
    keys: jax.Array,
    placement: Placement,
    start: int,
    sample: np.ndarray,
) -> tuple[list[range], Callable[[range], tuple[jax.Array, np.ndarray]]]:
    """Cut the steps from `start` on into chunks, and say how a chunk gets its features.

    Features that fit an accelerator's memory are sent there once, each sub-model's own; a chunk is then a list of
    positions in them. Otherwise a chunk brings its own features. What a step sees is the same.

    Chunks end at multiples of their length, so that an interrupted training goes on with the chunks it would have had.
    All but the last (and a first that goes on from another machine's checkpoint) are equally long: two compilations.

    sample: one image's features, (2, T, D).

    Returns:
        chunks of steps, and steps ↦ (rows (K, n, 2, T, D) on the devices, positions (K, steps, B) in them).
    """
    batch_size, longest, row_bytes = training.batch_size, max(len(subset) for subset in subsets), sample.nbytes
    streams = [batches(purposes(keys[k])[1], np.arange(len(subset)), batch_size) for k, subset in enumerate(subsets)]
    resident_bytes = longest * row_bytes * len(placement.rows) // placement.mesh.shape["model"]
    resident = agreed(fits_device(resident_bytes, placement))
    step_bytes = len(placement.rows) * batch_size * row_bytes
    kind = "cpu" if placement.mesh.devices.flat[0].platform == "cpu" else "accelerator"
    length = CHUNK if resident else max(1, min(CHUNK, CHUNK_BYTES[kind] // step_bytes))
    first_end = min(start - start % length + length, training.steps)
    ends = [*range(first_end, training.steps, length), training.steps]
    chunks = [range(begin, end) for begin, end in zip([start, *ends], ends)]
    where, lengths = "stay on the devices" if resident else "come with each chunk", {len(chunk) for chunk in chunks}
    log.debug("features %s; compiled once for each length of a chunk: %s", where, lengths)

    if resident:
        images = np.stack([np.resize(subset, longest) for subset in subsets])
        all_rows = placement.spread_rows(fetch, images, sample.shape)

    def prepare(steps: range) -> tuple[jax.Array, jax.Array]:
        positions = np.stack([[stream(step) for step in steps] for stream in streams])  # (K, steps, B)
        if resident:
            return all_rows, placement.spread(positions)
        flat = positions.reshape(len(subsets), -1)
        images = np.stack([subset[p] for subset, p in zip(subsets, flat)])
        rows = placement.spread_rows(fetch, images, sample.shape)
        own = np.broadcast_to(np.arange(flat.shape[1]).reshape(positions.shape[1:]), positions.shape)
        return rows, placement.spread(own)

    return chunks, prepare


def fits_device(size: int, placement: Placement) -> bool:
    """Whether `size` bytes may stay on each device. Never on the CPU, whose memory is where the features come from."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in placement.mesh.local_devices]
    return size <= RESIDENT_SHARE * min(limits)


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

    params: stacked (K, …); features: (b, 2, T, D) → maps float32 (b, K, size, size), scores float32 (b, K).
    """

    def all_of(features: jax.Array) -> tuple[jax.Array, jax.Array]:
        target = patch_targets(features, model.patches)

        def one(params):
            distance = cosine_distance(model.apply({"params": params}, features), target)
            maps = anomaly_map(distance, size)
            return maps, image_score(maps)

        return jax.vmap(one, out_axes=1)(params)  # (b, K, …)

    return by_image(all_of)(features)


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
    placement = place(submodels, SCORE_BATCH, jax.local_devices())
    params = placement.spread(params)

    def prepare(positions: np.ndarray) -> jax.Array:
        return jax.device_put(fetch(indices[np.resize(positions, SCORE_BATCH)]), placement.sharding("data"))

    everything = np.arange(len(indices))
    chunks = [everything[start : start + SCORE_BATCH] for start in range(0, len(indices), SCORE_BATCH)]
    for positions, features in progress(ahead(prepare, chunks), total=len(chunks), desc=title, unit="batch"):
        maps, scores = score_step(params, features, model=model, size=size)

        def wanted(stack: jax.Array, count: int = len(positions)) -> np.ndarray:
            return np.asarray(stack)[:count, :submodels]

        yield positions, wanted(scores), wanted(maps) if with_maps else None


def score_all(params, model: Dinomaly, fetch: Fetch, count: int, size: int, title: str) -> np.ndarray:
    """Every image by every sub-model: float32 (N, K); row i belongs to image i. Each process scores its share."""
    own = [scores for _, scores, _ in score(params, model, fetch, share(count), size, title)]
    scores = joined(np.concatenate([np.empty((0, len(jax.tree.leaves(params)[0])), np.float32), *own]), count)
    assert scores.shape[0] == count and not np.isnan(scores).any()
    return scores


def heat_maps(
    params, model: Dinomaly, fetch: Fetch, indices: np.ndarray, size: int, title: str
) -> Iterator[tuple[int, np.ndarray]]:
    """A few images' maps, for a picture: each index with float32 (size, size), the mean over the sub-models.

    Which images are worth showing is known only when all are scored, so these few are scored again.
    """
    for positions, _, maps in score(params, model, fetch, indices, size, title, with_maps=True):
        yield from zip(indices[positions], maps.mean(axis=1))
