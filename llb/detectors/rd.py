"""RD, reverse distillation: a decoder rebuilds the encoder's maps from a narrow code of them, the deepest first.

Source: Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding" (CVPR 2022, arXiv
2201.10703), section 3. The code has no room for a defect, and the decoder has seen normal images only: where there is
a defect, the decoded maps differ from the encoder's. Sizes for WideResNet-50-2 at 256 pixels:

    maps     256 × 64², 512 × 32², 1024 × 16²   the encoder's, strides 4, 8, 16: both input and target
    joined   3072 × 16²                         3 × 3 convolutions of stride 2 bring each map to 16²
    code     2048 × 8²                          3 bottleneck blocks; 0.13 million numbers of 1.8
    decoded  1024 × 16², 512 × 32², 256 × 64²   3, 4, 6 blocks, the first of each doubles the side
    distance (B, 256, 256)                      sum over the maps of 1 − cosine similarity, each upsampled first

Widths follow the encoder's channels C₁, C₂, C₃: joined 3 C₃, code 2 C₃, decoded C₃, C₂, C₁; a block's inner width is
half. A ViT has two maps on one grid, so one stride is made and undone. Sizes for ViT-B/14 at 392 pixels (D = 768):

    joined   1536 × 28²                         both maps, side by side
    code     1024 × 14²  (4/3 D)                one 3 × 3 convolution of stride 2, then 3 bottleneck blocks
    decoded  768 × 28²                          3 blocks, then a 1 × 1 convolution for each of the two maps

Differs from the release: EfficientNets' maps have negative numbers, so they get these last 1 × 1 convolutions too;
ResNet-18 gets WideResNet's blocks (there basic ones, two a stage); fixed numbers of steps (there 200 passes).
"""

from dataclasses import dataclass
from functools import partial
from itertools import combinations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llb.detectors.common import MapRule, Setup, choice, cosine_distance, highest_part, maps_of, resize
from llb.detectors.layers import normalised
from llb.encoders.specs import CnnSpec

STRIDES = (4, 8, 16)
PUBLISHED = {"wide_resnet50_2": {"image_size": 256, "batch_size": 16}}
DEMO_STEPS, LEARNING_RATE, BATCH_SIZE = (150, 300), 5e-3, 16
MAP, SCORE, AGGREGATE = MapRule(align_corners=True, sigma=4.0), "max", "mean"
CODE_BLOCKS, DECODER_BLOCKS = 3, (3, 4, 6)  # the decoder's: the deepest map first


@dataclass(frozen=True)
class Settings:
    loss: str = choice("flattened", "positions")  # each map compared as one vector, or, as the paper says, by position


@partial(jax.checkpoint, static_argnums=(2, 3))  # the backward pass needs x, not its nine copies
def convolve(x: jax.Array, kernel: jax.Array, stride: int, precision: str) -> jax.Array:
    """(B, h, w, C), (k, k, C, C'), k odd → (B, ⌈h / stride⌉, ⌈w / stride⌉, C'), with a padding of k // 2, as one
    matrix product: of K stacked models a convolution would become a grouped one, which is slow. (That of layers.py
    compiles sooner, but a step of RD takes 1.2 to 1.4 times as long with it.)"""
    size, (_, height, width, _) = len(kernel), x.shape
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    shifted = [x[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
    x, kernel = jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1])
    return jnp.dot(x.astype(precision), kernel.astype(precision), preferred_element_type=jnp.float32)


class ReverseDistillation(nn.Module):
    """Maps (B, h, w, C), finest first → decoded maps of the same shapes."""

    vit: bool  # the maps have one grid, so they are joined and decoded as one
    heads: bool  # decoded maps end in a 1 × 1 convolution, since a block's output is never negative
    precision: str = "float32"

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...], train: bool = False) -> tuple[jax.Array, ...]:
        def norm(name: str, x: jax.Array) -> jax.Array:
            width = x.shape[-1:]
            scale = self.param(f"{name}_scale", nn.initializers.ones, width)
            bias = self.param(f"{name}_bias", nn.initializers.zeros, width)
            means = self.variable("batch_stats", f"{name}_mean", jnp.zeros, width)
            variances = self.variable("batch_stats", f"{name}_variance", jnp.ones, width)
            return normalised(x, means, variances, train) * scale + bias

        def conv(name: str, x: jax.Array, width: int, size: int = 1, stride: int = 1) -> jax.Array:
            init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
            kernel = self.param(f"{name}_kernel", init, (size, size, x.shape[-1], width))
            return norm(name, convolve(x, kernel, stride, self.precision))

        def transposed(name: str, x: jax.Array, width: int, grid: tuple[int, ...]) -> jax.Array:
            """A transposed 2 × 2 convolution of stride 2; the last row and column are cut off where `grid` is odd."""
            init = partial(jax.random.uniform, minval=-((4 * width) ** -0.5), maxval=(4 * width) ** -0.5)  # PyTorch's
            x, kernel = x.astype(self.precision), self.param(f"{name}_kernel", init, (2, 2, x.shape[-1], width))
            y = jnp.einsum("bhwi,acio->bhawco", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
            return norm(name, y.reshape(len(x), 2 * x.shape[1], 2 * x.shape[2], width)[:, : grid[0], : grid[1]])

        def block(name: str, x: jax.Array, width: int, stride: int = 1, grid: tuple[int, ...] = ()) -> jax.Array:
            """A bottleneck block of ResNet. `grid`: it is a transposed one, whose output has this grid."""
            y = nn.relu(conv(f"{name}_1", x, width // 2))
            y = transposed(f"{name}_2", y, width // 2, grid) if grid else conv(f"{name}_2", y, width // 2, 3, stride)
            y = conv(f"{name}_3", nn.relu(y), width)
            if x.shape != y.shape:
                name = f"{name}_shortcut"
                x = transposed(name, x, width, grid) if grid else conv(name, x, width, 1, stride)
            return nn.relu(x + y)

        width = maps[-1].shape[-1]
        code, levels = (4 * width // 3, maps[:1]) if self.vit else (2 * width, maps)
        parts = list(maps)
        for level, deeper in combinations(range(len(levels)), 2):
            parts[level] = nn.relu(conv(f"join_{level}_{deeper}", parts[level], levels[deeper].shape[-1], 3, stride=2))
        x = jnp.concatenate(parts, axis=-1)
        if self.vit:
            x = nn.relu(conv("join", x, code, 3, stride=2))
        for index in range(CODE_BLOCKS):
            x = block(f"code_{index}", x, code, 1 if index or self.vit else 2)
        decoded = []
        for target, blocks in zip(levels[::-1], DECODER_BLOCKS):
            *grid, width = target.shape[1:]
            for index in range(blocks):
                x = block(f"decoder_{len(decoded)}_{index}", x, width, grid=() if index else grid)
            decoded.append(x)
        decoded = decoded * len(maps) if self.vit else decoded[::-1]
        if self.heads:
            decoded = [nn.Dense(x.shape[-1], name=f"head_{i}")(x) for i, x in enumerate(decoded)]  # float32: compared
        return tuple(decoded)


def network(setup: Setup) -> ReverseDistillation:
    cnn = isinstance(setup.spec, CnnSpec)
    return ReverseDistillation(not cnn, not (cnn and setup.spec.resnet), setup.precision)


def init(setup: Setup, key: jax.Array) -> dict:
    return network(setup).init(key, tuple(jnp.zeros((1, *grid)) for grid in setup.grids))


def loss(setup: Setup, variables: dict, features: jax.Array, key: jax.Array, step: jax.Array) -> tuple:
    maps = maps_of(setup, features)
    decoded, changed = network(setup).apply(variables, maps, True, mutable=["batch_stats"])
    each = sum(highest_part(cosine_distance(a, b)) for a, b in zip(decoded, maps))
    if setup.settings.loss == "flattened":
        decoded, maps = ([one.reshape(len(one), -1) for one in side] for side in (decoded, maps))
    return sum(cosine_distance(a, b).mean() for a, b in zip(decoded, maps)), (each, changed)


def optimizer(setup: Setup, steps_per_pass: jax.Array | int) -> optax.GradientTransformation:
    return optax.adam(setup.learning_rate, b1=0.5, b2=0.999)


def distance(setup: Setup, variables: dict, features: jax.Array) -> jax.Array:
    """(B, S, S) of a CNN; of a ViT (B, h, w): on one grid, summing and upsampling may change places."""
    maps, model = maps_of(setup, features), network(setup)
    side = maps[0].shape[1] if model.vit else setup.image_size
    levels = [cosine_distance(a, b)[..., None] for a, b in zip(model.apply(variables, maps), maps)]
    return sum(resize(one, side, side, align_corners=True) for one in levels)[..., 0]
