"""The Vision Transformer of DINO v1, of DINOv2 with and without registers, and of this project's own `tiny`.

    images    float32 (B, H, W, 3)   ImageNet-normalised
    patches   (B, P, D)              P = (H / patch) · (W / patch), row by row
    tokens    (B, T, D)              class, registers, patches: T = 1 + registers + P
    output    depth × (B, T, D)      after every block, before the final norm

Sources: Caron et al. (DINO, ICCV 2021), Oquab et al. (DINOv2, arXiv 2304.07193), Darcet et al. (registers, ICLR 2024).
"""

import logging
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llb.encoders.specs import Spec
from llb.encoders.stem import FilterBankStem

log = logging.getLogger(__name__)
LAYER_SCALE = 0.1  # initial value


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a, zero beyond |x| = 2."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@lru_cache
def interpolation_matrix(grid: int, native: int, antialias: bool, offset: float = 0.0) -> np.ndarray:
    """Bicubic interpolation along one axis as PyTorch does it, pixel centres aligned: float64 (grid, native).

    offset: of the side, when PyTorch is given the scale factor (grid + offset) / native.
    Without antialiasing a = −0.75, and indices beyond the border are clamped to it. With antialiasing a = −0.5 (as in
    Pillow), the kernel is widened when the grid shrinks, and its weights are renormalised at the border.
    """
    scale = native / (grid + offset)
    centre = (np.arange(grid) + 0.5) * scale  # in native pixels, from the border
    if antialias:
        stretch = max(scale, 1.0)
        weights = cubic((np.arange(native) + 0.5 - centre[:, None]) / stretch, -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((grid, native))
    first = np.floor(centre - 0.5).astype(int)
    for tap in range(-1, 3):
        weight = cubic(centre - 0.5 - (first + tap), -0.75)
        np.add.at(matrix, (np.arange(grid), np.clip(first + tap, 0, native - 1)), weight)
    return matrix


def interpolate_positions(positions: jax.Array, rows: int, columns: int, spec: Spec) -> jax.Array:
    """Position embeddings for another grid: (1 + native², D), class first → (1 + rows · columns, D).

    The result equals transformers'. The original releases of DINO v1 and of DINOv2 without registers pass the scale
    factor (side + 0.1) / native instead of the side, which shifts the sampling points by up to 0.1 of a patch. So do
    Dinomaly and LLBNAD with every encoder, and none of them antialiases (`spec.release`).
    """
    native = spec.native_grid
    if rows == columns == native:
        return positions
    way = (False, 0.1) if spec.release else (spec.antialias, 0.0)
    down, across = (jnp.asarray(interpolation_matrix(side, native, *way), jnp.float32) for side in (rows, columns))
    grid = positions[1:].reshape(native, native, -1)
    grid = jnp.einsum("rn,cm,nmd->rcd", down, across, grid, precision="highest").reshape(rows * columns, -1)
    return jnp.concatenate([positions[:1], grid])


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √(D/heads)) v for each head, the softmax in float32: three (B, T, heads, D/heads) → the same."""
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v, implementation=attention_kernel(q.shape, q.dtype.name))
    # heads first: 1.5 × as fast on a CPU as jax.nn's
    q, k, v = (y.swapaxes(1, 2) for y in (q * q.shape[-1] ** -0.5, k, v))  # (B, heads, T, D/heads)
    logits = jnp.einsum("bhte,bhse->bhts", q, k, preferred_element_type=jnp.float32)
    return (jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v).swapaxes(1, 2)


@lru_cache
def attention_kernel(shape: tuple[int, ...], dtype: str) -> str | None:
    """The kernel for this shape (B, T, heads, D/heads) and dtype: "cudnn" where a trial compilation succeeds, else
    None, which means XLA. cuDNN never forms the (T, T) matrix, but JAX does not choose it by itself."""
    if jax.default_backend() != "gpu" or dtype == "float32":
        return None
    examples = [jax.ShapeDtypeStruct(shape, dtype)] * 3
    try:
        jax.jit(partial(jax.nn.dot_product_attention, implementation="cudnn")).lower(*examples).compile()
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as reason:
        log.debug("attention by XLA, not by cuDNN: %s", reason)
        return None
    return "cudnn"


class Attention(nn.Module):
    """Multi-head softmax attention, (B, T, D) → (B, T, D)."""

    heads: int
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.precision, name="qkv")(x)  # (B, T, 3 D)
        # (B, T, heads, D/heads) each
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        x = attention(q, k, v)
        return nn.Dense(width, dtype=self.precision, name="proj")(x.reshape(batch, tokens, width))


class Mlp(nn.Module):
    """D → 4 D → D with exact GELU."""

    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(4 * width, dtype=self.precision, name="fc1")(x), approximate=False)
        return nn.Dense(width, dtype=self.precision, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, D) → (B, T, D), with LayerScale in DINOv2 and tiny.

    The norms have ε = 1e-6 as in the original releases. transformers' ViT configuration has 1e-12, whose result differs
    by less than 1e-4 where a token's variance is above 0.005.
    """

    heads: int
    layer_scale: bool
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm1 = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm1")
        norm2 = nn.LayerNorm(1e-6, use_fast_variance=False, name="norm2")
        scale1, scale2 = 1.0, 1.0
        if self.layer_scale:
            constant, shape = nn.initializers.constant(LAYER_SCALE), (x.shape[-1],)
            scale1, scale2 = self.param("ls1", constant, shape), self.param("ls2", constant, shape)
        x = x + scale1 * Attention(self.heads, self.precision, name="attn")(norm1(x))
        return x + scale2 * Mlp(self.precision, name="mlp")(norm2(x))


class ViT(nn.Module):
    """Patch embedding, class token and registers, positions, blocks.

    precision: "float32" or "bfloat16", to which the operands of matrix products are rounded. Sums, the residual stream,
    norms and parameters are float32.
    """

    spec: Spec
    precision: str = "float32"

    @nn.compact
    def __call__(
        self, inputs: jax.Array, grid: tuple[int, int], mask: jax.Array | None = None, visible: jax.Array | None = None
    ) -> list[jax.Array]:
        """The tokens after every block: depth × (B, T, D).

        inputs: images float32 (B, H, W, 3), ImageNet-normalised; with `spec.filter_bank` their energies (B, P, E).
        grid: rows and columns of patches; P = rows · columns.
        mask: bool (B, P), True where the learned mask token replaces a patch; only to pre-train `tiny`.
        visible: int (B, V), the patches that enter the blocks, T = 1 + registers + V; only to pre-train `tiny`.
        """
        spec, batch, (rows, columns) = self.spec, inputs.shape[0], grid
        width, small = spec.width, nn.initializers.truncated_normal(0.02)
        if spec.filter_bank:
            x = FilterBankStem(width, name="stem")(inputs)  # (B, P, D)
            mask_token = self.param("mask_token", small, (width,))
            if mask is not None:
                x = jnp.where(mask[..., None], mask_token, x)
        else:
            patch = (spec.patch, spec.patch)
            x = nn.Conv(width, patch, patch, padding="VALID", dtype=self.precision, name="patch_embed")(inputs)
            x = x.reshape(batch, rows * columns, width)

        # Positions belong to the class token and the patches; registers have none.
        positions = self.param("pos_embed", small, (1 + spec.native_grid**2, width))
        positions = interpolate_positions(positions, rows, columns, spec)
        leading = [self.param("cls_token", small, (width,))[None] + positions[:1]]
        if spec.registers:
            leading.append(self.param("register_tokens", small, (spec.registers, width)))
        leading = jnp.broadcast_to(jnp.concatenate(leading), (batch, 1 + spec.registers, width))
        x = x + positions[1:]
        if visible is not None:
            x = jnp.take_along_axis(x, visible[..., None], axis=1)
        x = jnp.concatenate([leading, x], axis=1)  # (B, T, D)

        outputs = []
        for index in range(spec.depth):
            x = Block(spec.heads, spec.layer_scale, self.precision, name=f"block_{index}")(x)
            outputs.append(x)
        return outputs
