"""CFlow-AD: one conditional normalizing flow per feature level learns log p(feature vector | its position).

Source: Gudovskiy et al., "CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional
Normalizing Flows" (WACV 2022, arXiv 2107.12571), section 4, and the released code. The idea: a flow z = f(x; position)
is invertible and has a known log-determinant, so a normal density of z gives an exact density of x. Training makes
normal vectors likely. A vector that is unlikely at any level is anomalous.

    maps          levels × (B, h, w, C)   of a CNN strides 8, 16, 32; of a ViT its two groups
    fibre x       levels × (256, C)       vectors drawn from all positions of the batch
    condition     levels × (256, 128)     sines and cosines of their columns and rows
    z, log-det    (256, C), (256,)        after 8 coupling blocks
    likelihood    (256,)                  log p(x) / C = −½ ln 2π − ½ mean(z²) + log-det / C
    distance      (B, S, S)               levels − Σ of exp(likelihood − highest), each upsampled to the image's size
    score         (B,)                    highest distance

"highest": of a level, over the fibres of the last tenth of the steps, when the rate is small and the flow hardly moves.

Differs from the release: a step takes one fibre per level of a new batch (there each batch is cut up into fibres:
154,000 steps of the first level for 209 images, 9,600 of the last); bilinear resizing (there Lanczos'); no rotation by
±5°; neither "highest" nor a best step is chosen on the test set, so the exponent is clipped at 0.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from llb.detectors.common import MapRule, Setup, between, maps_of, resize

STRIDES = (8, 16, 32)
PUBLISHED = {"wide_resnet50_2": {"image_size": 256, "batch_size": 32}}
DEMO_STEPS, LEARNING_RATE, BATCH_SIZE = (500, 1000), 2e-4, 32
MAP, SCORE, AGGREGATE = MapRule(align_corners=True, sigma=0.0), "max", "out-of-fold"

STAGES = 25  # of the schedule, of which 2 are a warm start
SETTLED = 0.9  # of the steps: from here on "highest" is a maximum over steps


@dataclass(frozen=True)
class Settings:
    blocks: int = between(8, 1, 64)  # coupling blocks of a flow
    waves: int = between(32, 1, 1024)  # frequencies in a position's encoding, which has four times as many numbers
    fibre: int = between(256, 1, 1 << 20)  # vectors of a level in one step


def encoding(height: int, width: int, waves: int) -> np.ndarray:
    """Float32 (h · w, 4 · waves): sine, cosine of the column at each frequency, then sine, cosine of the row."""
    frequency = np.exp(-np.arange(waves) * np.log(1e4) / waves)
    angle = np.indices((height, width))[::-1].reshape(2, -1, 1) * frequency  # of column and row: (2, h · w, waves)
    both = np.stack([np.sin(angle), np.cos(angle)], axis=-1, dtype=np.float32)
    return both.swapaxes(0, 1).reshape(height * width, -1)


def init_block(settings: Settings, channels: int, key: jax.Array) -> tuple[dict, jax.Array]:
    """A coupling block for vectors of C numbers: its parameters, and its fixed matrix, uniformly random in SO(C)."""
    keys = jax.random.split(key, 3)

    def linear(key: jax.Array, inputs: int, outputs: int) -> dict:  # PyTorch's default
        rows = jax.random.uniform(key, (inputs + 1, outputs), minval=-(inputs**-0.5), maxval=inputs**-0.5)
        return {"kernel": rows[:-1], "bias": rows[-1]}

    second = channels // 2
    width = channels - second + 4 * settings.waves
    params = {"first": linear(keys[0], width, 2 * width), "last": linear(keys[1], 2 * width, 2 * second)}
    params |= {"gain": jnp.full(channels, 2 * np.log(np.expm1(5.0))), "offset": jnp.zeros(channels)}  # scale 1
    q, r = jnp.linalg.qr(jax.random.normal(keys[2], (channels, channels)))
    q = q * jnp.sign(jnp.diagonal(r))  # without it the signs, which QR chooses, are not random
    return params, q.at[0].multiply(jnp.linalg.slogdet(q)[0])  # determinant 1


def init(setup: Setup, key: jax.Array) -> dict:
    """New variables: "params"; "fixed", the matrices that are not trained; "highest". Slow for C ≥ 1024."""
    params, fixed = {}, {}
    for level, (_, _, channels) in enumerate(setup.grids):
        keys = jax.random.split(jax.random.fold_in(key, level), setup.settings.blocks)
        blocks = jax.lax.map(partial(init_block, setup.settings, channels), keys)  # every leaf (blocks, …)
        params[f"level_{level}"], fixed[f"level_{level}"] = blocks
    return {"params": params, "fixed": fixed, "highest": jnp.zeros(len(params))}


def flow(blocks: tuple[dict, jax.Array], x: jax.Array, condition: jax.Array, precision: str = "float32") -> tuple:
    """x (n, C), condition (n, 128) → z (n, C), log-determinant of dz/dx (n,). blocks: parameters, fixed matrices."""
    first = x.shape[-1] - x.shape[-1] // 2

    def linear(weights: dict, x: jax.Array) -> jax.Array:
        return (x.astype(precision) @ weights["kernel"].astype(precision)).astype(jnp.float32) + weights["bias"]

    def block(carry: tuple[jax.Array, jax.Array], weights: tuple[dict, jax.Array]):
        (x, log_det), (block, matrix) = carry, weights
        x1, x2 = x[:, :first], x[:, first:]  # x1 stays and decides how x2 changes: so a block is invertible
        hidden = nn.relu(linear(block["first"], jnp.concatenate([x1, condition], axis=-1)))
        log_s, t = jnp.split(0.1 * linear(block["last"], hidden), 2, axis=-1)
        log_s = 1.9 * jnp.tanh(log_s)
        scale = 0.2 * nn.softplus(block["gain"] / 2)
        y = jnp.concatenate([x1, x2 * jnp.exp(log_s) + t], axis=-1) * scale + block["offset"]
        z = jnp.matmul(y, matrix.T, precision="highest")  # mixes the halves for the next block
        return (z, log_det + log_s.sum(axis=-1) + jnp.log(scale).sum()), None

    return jax.lax.scan(block, (x, jnp.zeros(len(x))), blocks)[0]


def log_likelihood(setup: Setup, variables: dict, level: int, maps: jax.Array, chosen: jax.Array) -> jax.Array:
    """log p(x | position) / C, float32 (n,), of some vectors of a level. maps: (B, h, w, C); chosen: int (n,)."""
    _, height, width, channels = maps.shape
    x = maps.reshape(-1, channels)[chosen]
    condition = jnp.asarray(encoding(height, width, setup.settings.waves))[chosen % (height * width)]
    blocks = (variables["params"][f"level_{level}"], variables["fixed"][f"level_{level}"])
    z, log_det = flow(blocks, x, condition, setup.precision)
    return -0.5 * np.log(2 * np.pi) - 0.5 * (z * z).mean(axis=-1) + log_det / channels


def loss(setup: Setup, variables: dict, features: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
    """−log σ(log p / C), mean over each level's fibre, summed over levels; of each image the highest, or NaN."""
    total, each, highest = 0.0, 0.0, []
    for level, maps in enumerate(maps_of(setup, features)):
        chosen = jax.random.permutation(jax.random.fold_in(key, level), maps[..., 0].size)[: setup.settings.fibre]
        values = log_likelihood(setup, variables, level, maps, chosen)
        surprise, image = -nn.log_sigmoid(values), chosen // maps[0, ..., 0].size
        drawn = image == jnp.arange(len(maps))[:, None]  # (B, n)
        total, each = total + surprise.mean(), each + jnp.nanmax(jnp.where(drawn, surprise, jnp.nan), axis=1)
        highest.append(values.max())
    now, before = jnp.stack(highest), variables["highest"]
    return total, (each, {"highest": jnp.where(step > int(SETTLED * setup.steps), jnp.maximum(before, now), now)})


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    """Adam, one for all levels, as each step trains each. Its rate: linear from a tenth for 2 stages, then a cosine."""
    rates = setup.learning_rate * (0.001 + 0.999 * (1 + np.cos(np.pi * np.arange(STAGES) / STAGES)) / 2)

    def rate(step: jax.Array) -> jax.Array:
        stage = step * STAGES // setup.steps
        warm = jnp.interp(step * STAGES / setup.steps, jnp.array([0, 2]), jnp.array([rates[0] / 10, rates[2]]))
        return jnp.where(stage < 2, warm, jnp.asarray(rates)[stage])

    return optax.adam(rate)


def distance(setup: Setup, variables: dict, features: jax.Array) -> jax.Array:
    """Cached features → float32 (B, S, S), in 0 … levels."""
    total = 0.0
    for level, maps in enumerate(maps_of(setup, features)):
        values = log_likelihood(setup, variables, level, maps, jnp.arange(maps[..., 0].size))
        share = jnp.exp(jnp.minimum(values - variables["highest"][level], 0.0)).reshape(*maps.shape[:3], 1)
        total += 1.0 - resize(share, setup.image_size, setup.image_size, align_corners=True)[..., 0]
    return total
