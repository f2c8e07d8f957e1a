"""UniAD: a transformer rebuilds all feature tokens of an image, and three measures keep it from copying them.

Source: You et al., "A Unified Model for Multi-class Anomaly Detection" (NeurIPS 2022, arXiv 2206.03687), section 3. The
three measures: attention that is blind for a token's own neighbourhood; a decoder whose every layer starts from learned
queries in place of the tokens; and noise on the input, "jitter". A defect, which training has not shown, is rebuilt
badly. Sizes for EfficientNet-B4 at 224 pixels:

    maps      24 × 112², 32 × 56², 56 × 28², 160 × 14²   the encoder's, strides 2, 4, 8, 16
    tokens    (B, 196, 272)   all maps side by side on the grid of the coarsest: the target, and
    noisy     (B, 196, 272)   + noise · ‖token‖ / 272 · 20 while training: the input
    x         (B, 196, 256)   a dense layer
    memory    (B, 196, 256)   encoder: 4 layers of self-attention, query = key = x + position, value = x
    output    (B, 196, 256)   decoder: 4 layers; in each the learned queries attend to the memory, then to the output
                              of the layer before (the first layer: to the memory again)
    rebuilt   (B, 196, 272)   a norm and a dense layer
    distance  (B, 14, 14)     length of rebuilt − token
    score     (B,)            highest mean of 16 × 16 pixels of the map

The grid is that of the coarsest map. A side above 20 is halved, rounded up, until it is not, as attention costs
tokens²: a ViT's 28² becomes 14², the means of 2 × 2 (its two maps give 2 D numbers a token). On a grid with fewer
than 8 rows the neighbourhood is smaller than 7 × 7, so that each query sees something.

Differs from the release: one model a category (there one for all), batches of 8 (there of 8 GPUs with 8 each) and fewer
steps (there 1,000 epochs); no best step chosen on test; its encoder pads as for 380 pixels, ours for the image's own
size; AUROC is never flipped.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from llb.detectors.common import MapRule, Setup, between, highest_part, joined, maps_of, resize, to_patches
from llb.encoders.specs import CnnSpec
from llb.files import UserError

STRIDES = (2, 4, 8, 16)
PUBLISHED = {"efficientnet_b4": {"image_size": 224, "batch_size": 8}}
DEMO_STEPS, LEARNING_RATE, BATCH_SIZE = (40, 100), 1e-4, 8
MAP, SCORE, AGGREGATE = MapRule(align_corners=True, sigma=0.0), "max-16", "mean"
LARGEST_SIDE = 20  # of the grid of tokens
CLIP, DECAY = 0.1, 1e-4  # largest norm of the gradient; AdamW's weight decay
LATE = 0.8  # after this share of the steps the learning rate is a tenth


@dataclass(frozen=True)
class Settings:
    """The published sizes and rates."""

    width: int = between(256, 2, 4096)  # E
    heads: int = between(8, 1, 64)
    layers: int = between(4, 1, 24)  # of the encoder, and of the decoder
    window: int = between(7, 1, 99)  # side of the neighbourhood that attention does not see; an even one counts as + 1
    jitter: float = between(20.0, 0, 1000)
    dropout: float = between(0.1, 0, 0.9)


# ---- tokens ----


def side_of(setup: Setup) -> int:
    """The side of the grid of tokens."""
    side = setup.grids[-1][0]
    while side > LARGEST_SIDE:
        side = -(-side // 2)
    return side


def tokens_of(setup: Setup, features: jax.Array) -> jax.Array:
    """Cached features → float32 (B, P, ΣC). Between equal grids nothing is interpolated.

    Of a CNN bilinear with aligned corners, as the release. Of a ViT not aligned, and halved step by step: each step is
    the mean of 2 × 2, so that every patch counts.
    """
    maps, side, aligned = maps_of(setup, features), side_of(setup), isinstance(setup.spec, CnnSpec)
    while not aligned and maps[0].shape[1] > side:
        half = -(-maps[0].shape[1] // 2)
        maps = tuple(resize(one, half, half) for one in maps)
    return to_patches(joined(tuple(resize(one, side, side, aligned) for one in maps)))


def jittered(tokens: jax.Array, noise: jax.Array, scale: float) -> jax.Array:
    """noise: standard normal, (B, P, C) as the tokens. Long tokens get more of it."""
    return tokens + scale / tokens.shape[-1] * jnp.linalg.norm(tokens, axis=-1, keepdims=True) * noise


def neighbourhood(side: int, window: int) -> np.ndarray:
    """bool (P, P): whether the key (second axis) lies in the window around the query, which is blocked.

    The window reaches window // 2 positions to each side, less on a small grid: a query in the centre keeps some keys.
    """
    reach = min(window // 2, side // 2 - 1)
    position = np.arange(side)
    near = np.abs(position[:, None] - position) <= reach  # (side, side), along one axis
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(side**2, side**2)


# ---- the network ----


class Dropout(nn.Module):
    """Dropout from 16 random bits a number. Drawing 32, as Flax does, takes a third of a step's time on a CPU."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        bits = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 2),))  # uint32
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).ravel()[: x.size].reshape(x.shape)
        return jnp.where(bits >= round(self.rate * 2**16), x / (1 - self.rate), 0.0)


def attention_weights(query: jax.Array, key: jax.Array, blocked: np.ndarray, precision: str) -> jax.Array:
    """(B, P, H, d), (B, P, H, d) → float32 (B, H, P, P), rows sum to 1, blocked entries are 0."""
    query, key = query.astype(precision), key.astype(precision)
    products = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return nn.softmax(jnp.where(blocked, -jnp.inf, products * query.shape[-1] ** -0.5))


class Attention(nn.Module):
    """Multi-head attention. q, k, v: (B, P, E), a triple."""

    settings: Settings
    side: int
    precision: str

    @nn.compact
    def __call__(self, qkv: tuple[jax.Array, jax.Array, jax.Array], train: bool) -> jax.Array:
        batch, patches, width = qkv[0].shape
        # one matrix, since its size determines the range of its initial values
        matrix = self.param("in_proj", nn.initializers.xavier_uniform(), (width, 3 * width))
        biases = self.param("in_proj_bias", nn.initializers.zeros, (3 * width,))

        def product(x: jax.Array, part: jax.Array) -> jax.Array:
            return jnp.dot(x.astype(self.precision), part.astype(self.precision), preferred_element_type=jnp.float32)

        parts = zip(qkv, jnp.split(matrix, 3, axis=1), jnp.split(biases, 3))
        q, k, v = (
            (product(x, part) + bias).reshape(batch, patches, self.settings.heads, -1) for x, part, bias in parts
        )
        weights = attention_weights(q, k, neighbourhood(self.side, self.settings.window), self.precision)
        weights = Dropout(self.settings.dropout)(weights, train).astype(self.precision)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v.astype(self.precision)).reshape(batch, patches, width)
        return dense(width, self.precision, "out_proj")(x)


def dense(width: int, precision: str, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=precision, kernel_init=nn.initializers.xavier_uniform(), name=name)


def norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(1e-5, use_fast_variance=False, name=name)


class Layer(nn.Module):
    """A layer of the encoder or, with memory, of the decoder; it adds, then normalises ("post-norm")."""

    settings: Settings
    side: int
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array | None, position: jax.Array, train: bool) -> jax.Array:
        """x: (B, P, E), the output of the layer before; memory: (B, P, E), the encoder's; position: (P, E)."""
        attention = partial(Attention, self.settings, self.side, self.precision)
        drop = lambda y: Dropout(self.settings.dropout)(y, train)  # noqa: E731
        if memory is None:
            x = norm("norm1")(x + drop(attention(name="attention")((x + position, x + position, x), train)))
        else:
            query = self.param("query", nn.initializers.normal(1.0), x.shape[1:])  # (P, E)
            query = jnp.broadcast_to(query, x.shape)
            y = attention(name="attention")((query + position, memory + position, memory), train)
            query = norm("norm1")(query + drop(y))
            y = attention(name="attention_output")((query + position, x + position, x), train)
            x = norm("norm2")(query + drop(y))
        y = drop(nn.relu(dense(4 * x.shape[-1], self.precision, "fc1")(x)))
        return norm("norm3")(x + drop(dense(x.shape[-1], self.precision, "fc2")(y)))


class UniAD(nn.Module):
    """Tokens (B, P, C) → rebuilt (B, P, C), float32. `train` needs the rng "dropout"."""

    settings: Settings
    side: int
    precision: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        width, grid = self.settings.width, (self.side, self.side, self.settings.width // 2)
        layer = partial(Layer, self.settings, self.side, self.precision)
        uniform = nn.initializers.uniform(1.0)
        columns, rows = (self.param(name, uniform, (self.side, width // 2)) for name in ("columns", "rows"))
        position = jnp.concatenate([jnp.broadcast_to(columns, grid), jnp.broadcast_to(rows[:, None], grid)], axis=-1)
        position = position.reshape(-1, width)  # (P, E)
        memory = dense(width, self.precision, "input")(tokens).astype(jnp.float32)
        for index in range(self.settings.layers):
            memory = layer(name=f"encoder_{index}")(memory, None, position, train)
        x = memory
        for index in range(self.settings.layers):
            x = layer(name=f"decoder_{index}")(x, memory, position, train)
        # float32: what is compared with the tokens would else be rounded to 8 bits
        return dense(tokens.shape[-1], "float32", "output")(norm("norm")(x))


# ---- the detector, as llb.detectors describes it ----


def network(setup: Setup) -> UniAD:
    width, heads = setup.settings.width, setup.settings.heads
    if width % heads or width % 2:
        raise UserError(f"--set width={width}: {heads} heads and two halves share it; give a multiple of both")
    return UniAD(setup.settings, side_of(setup), setup.precision)


def init(setup: Setup, key: jax.Array) -> dict:
    """The release copies one layer, then draws the dense ones again: the other parameters of all layers start equal."""
    channels = sum(grid[2] for grid in setup.grids)
    params = network(setup).init(key, jnp.zeros((1, side_of(setup) ** 2, channels)))["params"]
    flat = flatten_dict(params)
    for layer, *path in flat:
        if path and path[-1] in ("in_proj", "query"):
            flat[layer, *path] = flat[layer.split("_")[0] + "_0", *path]
    return {"params": unflatten_dict(flat)}


def loss(setup: Setup, variables: dict, features: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
    tokens, (noise_key, dropout_key) = tokens_of(setup, features), jax.random.split(key)
    noisy = jittered(tokens, jax.random.normal(noise_key, tokens.shape), setup.settings.jitter)
    rebuilt = network(setup).apply(variables, noisy, True, rngs={"dropout": dropout_key})
    squares = jnp.square(rebuilt - tokens)
    return squares.mean(), (highest_part(squares.mean(axis=-1)), {})


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    rate = optax.piecewise_constant_schedule(setup.learning_rate, {max(1, int(LATE * setup.steps)): 0.1})
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=DECAY))


def distance(setup: Setup, variables: dict, features: jax.Array) -> jax.Array:
    tokens, side = tokens_of(setup, features), side_of(setup)
    difference = network(setup).apply(variables, tokens) - tokens
    return jnp.linalg.norm(difference, axis=-1).reshape(-1, side, side)
