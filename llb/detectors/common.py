"""What the detectors share: what they are told, features as maps, maps of distances, scores of images.

features      as cached (llb.features): of a ViT float16 (B, G, T, D); of a CNN (B, L), all its stages in one row
feature maps  `maps_of`: tuple of float32 (B, h, w, C), finest first: of a ViT G on one grid; of a CNN one a stage
distance      float32 (B, h, w): how anomalous each position is
anomaly map   float32 (B, S, S), `heat`: the distances at full image size, blurred: A · distance · Aᵀ
score         float32 (B,): of an image
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter1d

from llb import encoders
from llb.encoders.specs import Spec, grids

COSINE_EPS = 1e-8  # torch.nn.CosineSimilarity's
TAPS = 5  # of the kernel in Dinomaly's evaluation, along each axis
TOP_FRACTION = 0.01  # share of a map's pixels whose mean is the score "top-1%"


def choice(first: str, *others: str) -> Any:
    """A field of Settings that has one of these values; the first is the default."""
    return field(default=first, metadata={"choices": (first, *others)})


def between(default: float | None, lowest: float, highest: float) -> Any:
    """A field of Settings that is a number between two bounds, both included."""
    return field(default=default, metadata={"bounds": (lowest, highest)})


@dataclass(frozen=True)
class Setup:
    """What a detector may know besides its features. Compiled programs depend on all of it."""

    spec: Spec  # of the encoder
    strides: tuple[int, ...]  # of the stages that are taken of a CNN
    image_size: int  # S, pixels
    settings: Any  # the detector's own Settings
    precision: str = "float32"  # operands of a trained detector's matrix products are rounded to this
    learning_rate: float = 0.0  # main peak rate of a trained detector
    steps: int = 0  # of its training
    batch_size: int = 0  # images a step
    detector: str = ""  # name
    score: str = ""  # of SCORES
    map_rule: "MapRule | None" = None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """(h, w, C) of each map of an image, finest first."""
        return grids(self.spec, self.image_size, self.strides)

    def encode(self, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        """Maps of images, for a detector that gets images: float32 (B, S, S, 3), ImageNet-normalised → maps."""
        return encoders.feature_maps(params, images, self.spec, self.precision, self.strides)


def maps_of(setup: Setup, features: jax.Array) -> tuple[jax.Array, ...]:
    """Cached features, float16 (B, G, T, D) or (B, L) → feature maps."""
    batch, shapes = len(features), setup.grids
    if features.ndim == 4:
        height, width, channels = shapes[0]
        patches = features[:, :, -height * width :].astype(jnp.float32)  # the class token and registers come first
        return tuple(patches[:, group].reshape(batch, height, width, channels) for group in range(len(shapes)))
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    rows = jnp.split(features, ends, axis=1)
    return tuple(row.reshape(batch, *shape).astype(jnp.float32) for row, shape in zip(rows, shapes))


# ---- on maps ----


@lru_cache
def resize_matrix(size: int, grid: int, align_corners: bool) -> np.ndarray:
    """Bilinear interpolation along one axis, without antialiasing as PyTorch's: float64 (size, grid).

    align_corners: source = i · (grid − 1) / (size − 1), else (i + ½) · grid / size − ½, clipped to the border.
    """
    if align_corners:
        position = np.linspace(0.0, grid - 1.0, size)
    else:
        position = ((np.arange(size) + 0.5) * grid / size - 0.5).clip(0, grid - 1)
    return np.stack([np.interp(position, np.arange(grid), row) for row in np.eye(grid)], axis=1)


def resize(maps: jax.Array, height: int, width: int, align_corners: bool = False) -> jax.Array:
    """(B, h, w, C) → (B, height, width, C), bilinear without antialiasing."""
    if maps.shape[1:3] == (height, width):
        return maps
    sizes = zip((height, width), maps.shape[1:3])
    down, across = (resize_matrix(n, m, align_corners).astype(np.float32) for n, m in sizes)
    return jnp.einsum("rh,cw,bhwd->brcd", down, across, maps, precision="highest")


def mean3x3(maps: jax.Array) -> jax.Array:
    """The mean of each position's 3 × 3 neighbourhood, (B, h, w, C) → the same; zeros around the border count."""
    return nn.avg_pool(maps, (3, 3), (1, 1), ((1, 1), (1, 1)))


def joined(maps: tuple[jax.Array, ...], align_corners: bool = False) -> jax.Array:
    """All maps on the finest grid, side by side: (B, h, w, ΣC)."""
    height, width = maps[0].shape[1:3]
    return jnp.concatenate([resize(one, height, width, align_corners) for one in maps], axis=-1)


def to_patches(maps: jax.Array) -> jax.Array:
    """(B, h, w, C) → (B, h · w, C)."""
    return maps.reshape(len(maps), -1, maps.shape[-1])


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 − cosine similarity over the last axis: (…, D), (…, D) → (…), in 0..2."""
    dot = (a * b).sum(axis=-1)
    # max inside the root: the gradient of a norm at zero is not a number
    norms = jnp.sqrt(jnp.maximum((a * a).sum(axis=-1) * (b * b).sum(axis=-1), COSINE_EPS**2))
    return 1.0 - dot / norms


# ---- from distances to maps and scores ----


@dataclass(frozen=True)
class MapRule:
    """How distances become a map: bilinear upsampling to the image's size, then a Gaussian of `sigma` pixels (0: none).
    Both are linear and act on rows and columns alike, so one matrix A does all.

    side: if given, the map is then resized to this side and smoothed by TAPS taps of the Gaussian instead, with zeros
    around the border, as Dinomaly's release does.
    """

    align_corners: bool
    sigma: float
    side: int | None = None


@lru_cache
def map_matrix(size: int, grid: int, rule: MapRule) -> np.ndarray:
    """A, float32 (size, grid), or (side, grid). The Gaussian is scipy.ndimage.gaussian_filter's (radius 4 σ, mirrored
    borders)."""
    matrix = resize_matrix(size, grid, rule.align_corners)
    if rule.side:
        matrix = resize_matrix(rule.side, size, align_corners=False) @ matrix
    if rule.side and rule.sigma:
        taps = np.exp(-((np.arange(TAPS) - TAPS // 2) ** 2) / (2 * rule.sigma**2))
        smooth = sum(np.eye(rule.side, k=tap - TAPS // 2) * weight for tap, weight in enumerate(taps / taps.sum()))
        matrix = smooth @ matrix
    elif rule.sigma:
        matrix = gaussian_filter1d(matrix, rule.sigma, axis=0)
    return matrix.astype(np.float32)


def anomaly_map(distance: jax.Array, size: int, rule: MapRule) -> jax.Array:
    """float32 (B, h, w) → (B, size, size), or (B, side, side) if the rule has a side."""
    rows, columns = (map_matrix(size, grid, rule) for grid in distance.shape[1:])
    return jnp.einsum("sg,bgh,th->bst", rows, distance, columns)


def highest_mean(heat: jax.Array, count: int) -> jax.Array:
    """(B, S, S) → (B,): the mean of the `count` highest pixels of each anomaly map."""
    pixels = heat.reshape(len(heat), -1)
    return jax.lax.top_k(pixels, min(count, pixels.shape[1]))[0].mean(axis=-1)


def highest_part(values: jax.Array) -> jax.Array:
    """What a training step sees of each image, (B, positions…) → (B,): the mean of the highest hundredth, at least one.

    A defect is small: in Dinomaly's steps on the demo set this tells defective from normal images with an AUROC of .90
    at the end, and the mean over all positions with .63.
    """
    values = jax.lax.stop_gradient(values).reshape(len(values), -1)
    return highest_mean(values, max(1, round(values.shape[1] * TOP_FRACTION)))


def highest_window(heat: jax.Array, side: int = 16) -> jax.Array:
    """(B, S, S) → (B,): the highest mean of a window of side × side pixels."""
    side = min(side, heat.shape[1])
    return nn.avg_pool(heat[..., None], (side, side)).max(axis=(1, 2, 3))


# (distance, anomaly map) → score of each image
SCORES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "max": lambda distance, heat: heat.max(axis=(1, 2)),
    "patch-max": lambda distance, heat: distance.max(axis=(1, 2)),
    "top-1%": lambda distance, heat: highest_mean(heat, max(1, int(heat[0].size * TOP_FRACTION))),
    "top-100": lambda distance, heat: highest_mean(heat, 100),
    "max-16": lambda distance, heat: highest_window(heat),
}
