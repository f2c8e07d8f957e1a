"""Stage 1 as the released code does it, in plain JAX, NumPy and SciPy: `python -m llb.bench` compares with it.

The arithmetic is that of llb.encoders, llb.detectors.dinomaly and llb.metrics, written a second time. The organisation
differs (LLBNAD, arXiv 2508.07441, and its repository): the frozen encoder runs again for every batch of every
sub-model; attention forms its (T, T) matrix; sub-models are trained and applied one after the other; maps are upsampled
and blurred image by image; AUPRO labels the defects again at every threshold (the released loop; the release also has a
CUDA program for it). Weights are the same trees as llb's, so both ways can get the same weights.

    images   uint8 (B, S, S, 3)      features  float32 (B, 2, T, D)
    decoded  float32 (B, 2, P, D)    distance  float32 (B, 2, P)      map  float32 (S, S)
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from llb.bench.common import Stage, Way, multiply_adds, random_distances
from llb.detectors import dinomaly
from llb.detectors.common import COSINE_EPS, TOP_FRACTION, Setup
from llb.detectors.decoder import ATTENTION_EPS, Dinomaly
from llb.encoders import parameter_shapes
from llb.encoders.specs import Spec
from llb.encoders.vit import interpolate_positions
from llb.features import normalise
from llb.images import load_image
from llb.metrics import AUPRO_LIMIT

THRESHOLDS = 100  # of the released AUPRO


# ---- the model ----


def dense(p: dict, x: jax.Array) -> jax.Array:
    p = p.get("dense", p)
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: dict, x: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def heads_first(p: dict, x: jax.Array, heads: int) -> jax.Array:
    """(B, T, D) → q, k, v, stacked: (3, B, H, T, D/H)."""
    batch, tokens, width = x.shape
    return dense(p, x).reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)


def heads_merged(x: jax.Array) -> jax.Array:
    """(B, H, T, D/H) → (B, T, D)."""
    batch, heads, tokens, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width)


def softmax_attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    q, k, v = heads_first(p["qkv"], x, heads)
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1)  # (B, H, T, T)
    return dense(p["proj"], heads_merged(weights @ v))


def linear_attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    q, k, v = heads_first(p["qkv"], x, heads)
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    normaliser = (q * k.sum(axis=-2, keepdims=True)).sum(axis=-1, keepdims=True) + ATTENTION_EPS
    return dense(p["proj"], heads_merged(q @ (k.swapaxes(-1, -2) @ v) / normaliser))


def mlp(p: dict, x: jax.Array, drop=lambda x, place: x) -> jax.Array:
    hidden = jax.nn.gelu(dense(p["fc1"], drop(x, 0)), approximate=False)
    return drop(dense(p["fc2"], drop(hidden, 1)), 2)


def encode(params: dict, images: jax.Array, spec: Spec) -> jax.Array:
    """uint8 (B, S, S, 3) → float32 (B, 2, T, D): the means of the two groups of blocks."""
    x = normalise(images)
    batch, side = len(x), x.shape[1] // spec.patch
    x = x.reshape(batch, side, spec.patch, side, spec.patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(batch, side**2, -1)
    kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
    positions = interpolate_positions(params["pos_embed"], side, side, spec)
    leading = params["cls_token"][None] + positions[:1]
    if spec.registers:
        leading = jnp.concatenate([leading, params["register_tokens"]])
    leading = jnp.broadcast_to(leading, (batch, *leading.shape))
    x = jnp.concatenate([leading, x @ kernel.reshape(-1, spec.width) + bias + positions[1:]], axis=1)
    outputs = []
    for index in range(max(map(max, spec.groups)) + 1):  # later blocks are not needed
        p = params[f"block_{index}"]
        scale1, scale2 = (p["ls1"], p["ls2"]) if spec.layer_scale else (1.0, 1.0)
        x = x + scale1 * softmax_attention(p["attn"], layer_norm(p["norm1"], x, 1e-6), spec.heads)
        x = x + scale2 * mlp(p["mlp"], layer_norm(p["norm2"], x, 1e-6))
        outputs.append(x)
    return jnp.stack([sum(outputs[block] for block in group) / len(group) for group in spec.groups], axis=1)


def decode(params: dict, features: jax.Array, model: Dinomaly, key: jax.Array | None = None) -> jax.Array:
    """float32 (B, 2, T, D) → (B, 2, P, D). model: for its sizes; key: of the dropout, None for no dropout."""

    def drop(x: jax.Array, place: int) -> jax.Array:
        if key is None or model.dropout == 0:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - model.dropout, x.shape)
        return jnp.where(kept, x / (1 - model.dropout), 0)

    x = mlp(params["bottleneck"], features.mean(axis=1), drop)
    outputs = []
    for index in range(model.depth):
        p = params[f"block_{index}"]
        x = x + linear_attention(p["attn"], layer_norm(p["norm1"], x, 1e-8), model.heads)
        x = x + mlp(p["mlp"], layer_norm(p["norm2"], x, 1e-8))
        outputs.append(x[:, -model.patches :])
    half = model.depth // 2
    return jnp.stack([sum(outputs[half:]) / half, sum(outputs[:half]) / half], axis=1)


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 − cosine similarity over the last axis."""
    return 1 - (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), COSINE_EPS)


def loss(
    params: dict, features: jax.Array, model: Dinomaly, hard: jax.Array, factor: float, key: jax.Array
) -> jax.Array:
    """Dinomaly's loss with hard mining; the gradient at easy positions is multiplied by `factor`."""
    decoded, target = decode(params, features, model, key), features[:, :, -model.patches :]
    losses = []
    for group in range(2):
        ours, theirs = decoded[:, group], target[:, group]
        here = jax.lax.stop_gradient(distance(ours, theirs))  # (B, P)
        easy = here < jnp.sort(here.ravel())[::-1][hard - 1]
        scaled = factor * ours + jax.lax.stop_gradient((1 - factor) * ours)  # its value is `ours`
        ours = jnp.where(easy[..., None], scaled, ours)
        losses.append(distance(ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)).mean())
    return (losses[0] + losses[1]) / 2


# ---- stage 1: one batch of one sub-model at a time ----

compiled_encode = jax.jit(encode, static_argnames="spec")


@partial(jax.jit, static_argnames="setup", donate_argnames="state")
def train_step(encoder_params, state, images, own, setup: Setup):
    """One step of ONE sub-model, the frozen encoder included.

    state: {"params", "opt"}, donated; own: {"key", "steps_per_pass", "hard"}, scalars → state, loss.
    """
    features, factor = encode(encoder_params, images, setup.spec), dinomaly.recipe_of(setup).easy_factor
    value, gradient = jax.value_and_grad(loss)(
        state["params"], features, dinomaly.network(setup), own["hard"], factor, own["key"]
    )
    # llb's own: the optimiser is not compared
    optimizer = dinomaly.optimizer(setup, own["steps_per_pass"])
    updates, opt = optimizer.update(gradient, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value


def new_state(setup: Setup, params: dict, steps_per_pass: int) -> dict:
    """The state before the first step; `params` are copied, since a step donates its state."""
    return jax.tree.map(jnp.array, {"params": params, "opt": dinomaly.optimizer(setup, steps_per_pass).init(params)})


@partial(jax.jit, static_argnames="setup")
def distances(encoder_params, params, images, setup: Setup) -> jax.Array:
    """ONE sub-model on a batch of images, the encoder included → float32 (B, 2, P)."""
    features, model = encode(encoder_params, images, setup.spec), dinomaly.network(setup)
    return distance(decode(params, features, model), features[:, :, -model.patches :])


def score(encoder_params, params, images, setup: Setup) -> np.ndarray:
    """ONE sub-model's image scores, (B,): the maps' highest 1 %."""
    batch = np.asarray(distances(encoder_params, params, images, setup=setup))
    return np.array([top_mean(heat_map(distance, setup.image_size)) for distance in batch])


def top_mean(heat: np.ndarray) -> float:
    return np.sort(heat, axis=None)[-max(1, int(heat.size * TOP_FRACTION)) :].mean()


def upsample(grid: np.ndarray, size: int) -> np.ndarray:
    """(g, g) → (size, size), bilinear with aligned corners."""
    position = np.linspace(0, len(grid) - 1, size, dtype=np.float32)
    low = np.minimum(position.astype(int), max(len(grid) - 2, 0))
    high = np.minimum(low + 1, len(grid) - 1)
    weight = position - low.astype(np.float32)  # an integer would make all of it float64, which takes twice as long
    rows = grid[low] * (1 - weight)[:, None] + grid[high] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, high] * weight


def heat_map(distance: np.ndarray, size: int) -> np.ndarray:
    """One image's distances, float32 (2, P) → (size, size): each group upsampled, their mean, SciPy's Gaussian."""
    side = round(distance.shape[1] ** 0.5)
    mean = np.mean([upsample(group.reshape(side, side), size) for group in distance], axis=0)
    return ndimage.gaussian_filter(mean, dinomaly.MAP.sigma)


# ---- pixel metrics ----


def pixel_metrics(masks: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """scikit-learn's AUROC, AP and F1-max, and AUPRO threshold by threshold. masks bool, maps float32 (M, H, W)."""
    labels, scores = masks.ravel(), maps.ravel()
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "pixel_auroc": roc_auc_score(labels, scores),
        "pixel_ap": average_precision_score(labels, scores),
        "pixel_f1_max": (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(),
        "pixel_aupro": aupro(masks, maps),
    }


def aupro(masks: np.ndarray, maps: np.ndarray, thresholds: int = THRESHOLDS) -> float:
    """Per-region overlap up to a false-positive rate of 0.3, at equally spaced thresholds.

    Follows the released loop (every mask's connected components again at every threshold). Only its rescaling of the
    rates is left out, since the metric's definition has none.
    """
    rates, overlaps = [1.0], [1.0]
    for threshold in np.linspace(maps.min(), maps.max(), thresholds, endpoint=False)[1:]:
        above = maps > threshold
        parts = []
        for mask, passed in zip(masks, above):
            labelled, regions = ndimage.label(mask, structure=np.ones((3, 3)))
            parts += [passed[labelled == region].mean() for region in range(1, regions + 1)]
        rates.append((above & ~masks).sum() / (~masks).sum())
        overlaps.append(np.mean(parts))
    rates, overlaps = np.array([*rates, 0.0])[::-1], np.array([*overlaps, 0.0])[::-1]
    inside = rates <= AUPRO_LIMIT
    rate = np.append(rates[inside], AUPRO_LIMIT)
    overlap = np.append(overlaps[inside], np.interp(AUPRO_LIMIT, rates, overlaps))
    return np.trapezoid(overlap, rate) / AUPRO_LIMIT


# ---- the work to time ----


def count_work(setup: Setup) -> dict[str, int]:
    """Multiply-adds that stage 1 needs: of the encoder and of one sub-model, for one image each.

    Counted in the programs above, so work that an implementation repeats does not raise its rate.
    """
    model, size, encoder = dinomaly.network(setup), setup.image_size, partial(encode, spec=setup.spec)
    inputs = parameter_shapes(setup.spec), jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    features = jax.eval_shape(encoder, *inputs)
    params = jax.eval_shape(partial(dinomaly.init, setup), jax.random.key(0))["params"]
    hard = jax.ShapeDtypeStruct((), jnp.int32)

    def gradient(params, features, hard):
        return jax.value_and_grad(loss)(params, features, model, hard, 0.1, jax.random.key(0))

    return {
        "encoder": multiply_adds(encoder, *inputs),
        "sub-model": multiply_adds(partial(decode, model=model), params, features),
        "sub-model and gradient": multiply_adds(gradient, params, features, hard),
    }


def stage1_ways(stage: Stage, rounds: int) -> dict[str, Way]:
    """Encoder, training and scoring. The rounds divide the steps and the images of every sub-model among them."""
    encoder, setup, hard = stage.encoder, stage.setup, np.int32(stage.hard)
    size, random = setup.batch_size, np.random.default_rng(2)
    steps, batches = -(-setup.steps // rounds), -(-len(stage.images) // size // rounds)

    def batch(number: int) -> np.ndarray:
        return np.take(stage.images, np.arange(number * size, (number + 1) * size), axis=0, mode="wrap")

    def encoding(batches: int = batches) -> None:
        for number in range(batches):
            np.asarray(compiled_encode(encoder.params, batch(number), spec=setup.spec))

    def training_steps(steps: int = steps) -> None:
        for subset, params in zip(stage.subsets, stage.params):
            passes = np.int32(-(-len(subset) // size))
            state = new_state(setup, params, passes)
            for step in range(steps):
                images = stage.images[random.choice(subset, size)]
                own = {"key": jax.random.fold_in(jax.random.key(0), step), "steps_per_pass": passes, "hard": hard}
                state, value = train_step(encoder.params, state, images, own, setup=setup)
                float(value)  # as the released loop does, for its log

    def scoring(batches: int = batches, submodels: int = len(stage.params)) -> None:
        for params in stage.params[:submodels]:
            for number in range(batches):
                score(encoder.params, params, batch(number), setup)

    return {
        "encoder": Way(encoding, batches * size, partial(encoding, 1)),
        "training step": Way(training_steps, steps, partial(training_steps, 1)),
        "scoring": Way(scoring, batches * size, partial(scoring, 1, 1)),
    }


def other_ways(stage: Stage, masks: np.ndarray, maps: np.ndarray) -> dict[str, Way]:
    """Decoding, map post-processing and pixel metrics."""
    size, batch = stage.setup.image_size, random_distances(stage)
    return {
        "decoding": Way(lambda: np.stack([load_image(path, size) for path in stage.paths]), len(stage.paths)),
        "maps": Way(lambda: np.stack([heat_map(distance, size) for distance in batch]), len(batch)),
        "pixel metrics": Way(lambda: pixel_metrics(masks, maps), len(maps), lambda: None),
    }
