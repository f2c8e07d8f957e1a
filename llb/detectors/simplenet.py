"""SimpleNet: a small network tells adapted normal features from the same features with noise added.

Source: Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization" (CVPR 2023,
arXiv 2303.15140), section 3, and the released code. The idea: a defect moves a feature away from the normal ones, and
so does noise. A discriminator D that learns to see little noise also sees defects, and −D is the anomaly score.

    maps         (B, h, w, 512), (B, h/2, w/2, 1024)   of wide_resnet50_2: strides 8 and 16
    embedding x  (B · h · w, W)      local means of both maps, side by side on the finer grid; W = 1536
    adapted q    (B · h · w, W)      one linear layer, which makes the ImageNet features fit the images at hand
    D(q)         (B · h · w,)        Linear W → ⅔ W, BatchNorm, LeakyReLU, Linear → 1; high: normal
    distance     (B, h, w)           −D, which may be negative; only its order means something
    score        (B,)                highest distance

The embedding of a CNN: the 3 × 3 neighbourhood of a position, flattened as (channel, row, column), is cut into windows
of 6 (finer map) or 12 numbers (coarser map), and their means are kept. So a window mixes rows and neighbouring
channels. The release upsamples the neighbourhoods before it takes the means; both are linear, so their order is free.
On a ViT: plain 3 × 3 means of the two groups.

Differs from the release: windows of 6 and 12 for every encoder (there 1536 means); noise in proportion to the features
except on wide_resnet50_2 (there 0.015 for all); no biases before the BatchNorm, which removes them (their gradient is
rounding error, which Adam amplifies); fewer steps (there 160 passes, 4,300 steps of 209 images), no best one by test.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llb.detectors.common import MapRule, Setup, between, highest_part, maps_of, mean3x3, resize

STRIDES = (8, 16)
PUBLISHED = {"wide_resnet50_2": {"resize": 329, "image_size": 288, "batch_size": 8}}
STEPS = (600, 1200)
LEARNING_RATE = 2e-4  # the discriminator's; the adaptor's is half of it
BATCH_SIZE = 8
MAP, SCORE, AGGREGATE = MapRule(align_corners=False, sigma=4.0), "patch-max", "out-of-fold"

WINDOW = 6  # numbers of the finest map's neighbourhood that are averaged; twice as many on the next map
XAVIER = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


@dataclass(frozen=True)
class Settings:
    # standard deviation of the noise; None: on the published encoder as published, else a tenth of the embedding's
    noise: float | None = between(None, 0.0, 10.0)
    margin: float = between(0.5, 0.0, 10.0)  # D should be above it for normal features, below −margin for noisy ones
    hidden: int = between(0, 0, 1 << 16)  # width of the discriminator; 0: two thirds of the embedding's (1024 of 1536)


def window_means(maps: jax.Array, window: int) -> jax.Array:
    """(B, h, w, C) → (B, h, w, 9 C / window): means of the consecutive numbers of each flattened neighbourhood."""
    batch, height, width, _ = maps.shape
    padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return jnp.stack(shifted, axis=-1).reshape(batch, height, width, -1, window).mean(axis=-1)


def embedding(maps: tuple[jax.Array, ...]) -> jax.Array:
    """Maps, finest first → (B, h, w, W) on the finest grid. Maps on one grid are a ViT's groups."""
    height, width = maps[0].shape[1:3]
    if maps[-1].shape[1:3] == (height, width):
        return jnp.concatenate([mean3x3(one) for one in maps], axis=-1)
    means = [window_means(one, WINDOW * 2**level) for level, one in enumerate(maps)]
    return jnp.concatenate([resize(one, height, width) for one in means], axis=-1)


def linear(features: int, precision: str, name: str | None = None) -> nn.Dense:
    """A dense layer without bias."""
    return nn.Dense(features, use_bias=False, dtype=precision, kernel_init=XAVIER, name=name)


class Discriminator(nn.Module):
    """D: float32 (n, W) → float32 (n,). When it trains, BatchNorm takes mean and variance of these n vectors."""

    hidden: int
    precision: str

    @nn.compact
    def __call__(self, q: jax.Array, train: bool = False) -> jax.Array:
        q = linear(self.hidden, self.precision, "first")(q).astype(jnp.float32)
        q = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="norm")(q)
        return linear(1, "float32", "last")(nn.leaky_relu(q, 0.2))[:, 0]  # in bfloat16 many scores would be equal


def networks(setup: Setup, width: int) -> tuple[nn.Dense, Discriminator]:
    """The adaptor and the discriminator for an embedding of `width` numbers."""
    return linear(width, setup.precision), Discriminator(setup.settings.hidden or width * 2 // 3, setup.precision)


def init(setup: Setup, key: jax.Array) -> dict:
    """New variables: {"params": {"adaptor", "discriminator"}, "batch_stats"}."""
    maps = tuple(jax.ShapeDtypeStruct((1, *grid), jnp.float32) for grid in setup.grids)
    width = jax.eval_shape(embedding, maps).shape[-1]
    keys, x = jax.random.split(key), jnp.zeros((1, width))
    adaptor, discriminator = (network.init(k, x) for network, k in zip(networks(setup, width), keys))
    params = {"adaptor": adaptor["params"], "discriminator": discriminator["params"]}
    return {"params": params, "batch_stats": discriminator["batch_stats"]}


def margin_loss(setup: Setup, variables: dict, x: jax.Array, noise: jax.Array) -> tuple:
    """x: embedding (n, W); noise: (n, W) → mean of max(0, m − D(q)) + max(0, m + D(q + noise)); −D(q) (n,), changed."""
    adaptor, discriminator = networks(setup, x.shape[-1])
    params, old = variables["params"], variables["batch_stats"]
    q = adaptor.apply({"params": params["adaptor"]}, x).astype(jnp.float32)
    # One batch: with statistics of its own each half would be centred, and D could not tell them apart.
    both = jnp.concatenate([q, q + noise])
    scores, changed = discriminator.apply(
        {"params": params["discriminator"], "batch_stats": old}, both, train=True, mutable="batch_stats"
    )
    # Flax adds a tenth of the biased variance to the running one, PyTorch a tenth of the unbiased one.
    new = changed["batch_stats"]["norm"]
    kept = 0.9 * old["norm"]["var"]
    var = kept + (new["var"] - kept) * len(both) / (len(both) - 1)
    (normal, noisy), margin = jnp.split(scores, 2), setup.settings.margin
    loss = nn.relu(margin - normal).mean() + nn.relu(margin + noisy).mean()
    return loss, (-normal, {"batch_stats": {"norm": {"mean": new["mean"], "var": var}}})


def noise_deviation(setup: Setup, x: jax.Array) -> jax.Array | float:
    """The standard deviation of the noise for an embedding x (n, W)."""
    default = 0.015 if setup.spec.name in PUBLISHED else 0.1 * jnp.sqrt(x.var(axis=0).mean())
    return default if setup.settings.noise is None else setup.settings.noise


def loss(setup: Setup, variables: dict, features: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
    x = embedding(maps_of(setup, features))
    x = x.reshape(-1, x.shape[-1])
    noise = noise_deviation(setup, x) * jax.random.normal(key, x.shape)
    mean, (distance, changed) = margin_loss(setup, variables, x, noise)
    return mean, (highest_part(distance.reshape(len(features), -1)), changed)


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    """AdamW for the adaptor; for the discriminator Adam whose decay joins the gradient (L2). Constant rates."""
    adaptor = optax.adamw(setup.learning_rate / 2, weight_decay=0.01)
    discriminator = optax.chain(optax.add_decayed_weights(1e-5), optax.adam(setup.learning_rate))
    both = {"adaptor": adaptor, "discriminator": discriminator}
    return optax.multi_transform(both, {name: name for name in both})


def distance(setup: Setup, variables: dict, features: jax.Array) -> jax.Array:
    """−D at each position: cached features → float32 (B, h, w). BatchNorm takes its running statistics."""
    x = embedding(maps_of(setup, features))
    adaptor, discriminator = networks(setup, x.shape[-1])
    params = variables["params"]
    q = adaptor.apply({"params": params["adaptor"]}, x.reshape(-1, x.shape[-1])).astype(jnp.float32)
    of_discriminator = {"params": params["discriminator"], "batch_stats": variables["batch_stats"]}
    return -discriminator.apply(of_discriminator, q).reshape(x.shape[:3])
