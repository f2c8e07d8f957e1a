"""Frozen Vision Transformers: DINO v1, DINOv2 with and without registers, and `tiny`, this project's own.

    images   float32 (B, H, W, 3)   ImageNet-normalised
    patches  (B, P, D)              P = (H / patch) · (W / patch), row by row
    tokens   (B, T, D)              class, registers, patches: T = 1 + registers + P
    output   depth × (B, T, D)      after every block, before the final norm

Sources: Caron et al. (DINO, ICCV 2021), Oquab et al. (DINOv2, arXiv 2304.07193), Darcet et al. (registers, ICLR 2024).

    from llb import load_encoder
    encoder = load_encoder("dinov2_vitb14_reg", weights="model.safetensors", image_size=392)
    tokens = encoder(images)
"""

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llb.files import UserError
from llb.stem import FilterBankStem, energies
from llb.weights_io import digest, fetch, read_tensors, read_tree, to_params

log = logging.getLogger(__name__)
LAYER_SCALE = 0.1  # before training
TINY_WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"


@dataclass(frozen=True)
class Spec:
    """What distinguishes one encoder from another."""

    name: str
    patch: int  # pixels
    width: int  # D
    depth: int  # blocks
    heads: int
    registers: int
    layer_scale: bool
    native_grid: int  # patches a side for which position embeddings are stored
    antialias: bool  # in interpolating them to another grid
    image_size: int  # default side in pixels
    groups: tuple[tuple[int, ...], ...]  # 0-based blocks whose means Dinomaly reconstructs
    repository: str = ""  # on the Hugging Face hub
    filter_bank: bool = False  # tiny's stem in place of a convolution


_GROUPS_12 = ((2, 3, 4, 5), (6, 7, 8, 9))
_GROUPS_24 = ((4, 6, 8, 10), (12, 14, 16, 18))
_SIZES = {"s": ("small", 384, 12, 6), "b": ("base", 768, 12, 12), "l": ("large", 1024, 24, 16)}


def _specs() -> dict[str, Spec]:
    specs = [Spec("tiny", 8, 192, 6, 6, 4, True, 14, True, 112, ((2, 3), (4, 5)), filter_bank=True)]
    for letter in "sb":
        _, width, depth, heads = _SIZES[letter]
        for patch, size in ((16, 384), (8, 392)):  # 392 is no multiple of 16
            name, repository = f"dino_vit{letter}{patch}", f"facebook/dino-vit{letter}{patch}"
            specs.append(
                Spec(name, patch, width, depth, heads, 0, False, 224 // patch, False, size, _GROUPS_12, repository)
            )
    for letter, (word, width, depth, heads) in _SIZES.items():
        groups = _GROUPS_12 if depth == 12 else _GROUPS_24
        for suffix, registers, infix in (("", 0, ""), ("_reg", 4, "-with-registers")):
            name, repository = f"dinov2_vit{letter}14{suffix}", f"facebook/dinov2{infix}-{word}"
            specs.append(
                Spec(name, 14, width, depth, heads, registers, True, 37, registers > 0, 392, groups, repository)
            )
    return {spec.name: spec for spec in specs}


SPECS = _specs()


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a, zero beyond |x| = 2."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@lru_cache
def interpolation_matrix(grid: int, native: int, antialias: bool) -> np.ndarray:
    """float64 (grid, native): bicubic interpolation along one axis, pixel centres aligned, as PyTorch does it.

    Without antialiasing a = −0.75 and indices beyond the border are clamped to it. With antialiasing PyTorch uses
    a = −0.5 (Pillow's), widens the kernel when shrinking, and renormalises it at the border.
    """
    scale = native / grid
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
    """Position embeddings (1 + native², D), class first → (1 + rows · columns, D), as transformers does it.

    The original releases of DINO v1 and of DINOv2 without registers pass a scale factor of (side + 0.1) / native in
    place of the side, which shifts every sampling point by up to 0.1 of a patch. In RMS that changes random
    embeddings by 18.0 % and waves of two periods a side by 2.5 % at 392 pixels for patch 14, by 8.3 % and 3.4 % at 320
    for patch 16.
    """
    native = spec.native_grid
    if rows == columns == native:
        return positions
    down, across = (
        jnp.asarray(interpolation_matrix(side, native, spec.antialias), jnp.float32) for side in (rows, columns)
    )
    grid = positions[1:].reshape(native, native, -1)
    grid = jnp.einsum("rn,cm,nmd->rcd", down, across, grid, precision="highest").reshape(rows * columns, -1)
    return jnp.concatenate([positions[:1], grid])


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √E) v for each head, the softmax in float32: three (B, T, H, E) → (B, T, H, E).

    On a CPU written out with the heads first: 1.5 × as fast there as jax.nn's, which is what an accelerator gets.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v, implementation=attention_kernel(q.shape, q.dtype.name))
    q, k, v = (y.swapaxes(1, 2) for y in (q * q.shape[-1] ** -0.5, k, v))  # (B, H, T, E)
    logits = jnp.einsum("bhte,bhse->bhts", q, k, preferred_element_type=jnp.float32)
    return (jax.nn.softmax(logits, axis=-1).astype(v.dtype) @ v).swapaxes(1, 2)


@lru_cache
def attention_kernel(shape: tuple[int, ...], dtype: str) -> str | None:
    """cuDNN's, by name, where it takes this shape: it never forms the (T, T) matrix. Else None: XLA's own.

    By itself JAX chooses XLA's. What cuDNN takes depends on its version, on the GPU and on the dtype (16 bits): ask it.
    """
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
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))  # (B, T, H, D/H)
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
    """A pre-norm transformer block, with LayerScale in DINOv2 and tiny.

    ε = 1e-6 as in the original releases; transformers' ViT configuration says 1e-12, the same to 1e-4
    where a token's variance is above 0.005.
    """

    heads: int
    layer_scale: bool
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm1, norm2 = (nn.LayerNorm(1e-6, use_fast_variance=False, name=name) for name in ("norm1", "norm2"))
        scale1, scale2 = 1.0, 1.0
        if self.layer_scale:
            scale1, scale2 = (
                self.param(name, nn.initializers.constant(LAYER_SCALE), (x.shape[-1],)) for name in ("ls1", "ls2")
            )
        x = x + scale1 * Attention(self.heads, self.precision, name="attn")(norm1(x))
        return x + scale2 * Mlp(self.precision, name="mlp")(norm2(x))


class ViT(nn.Module):
    """images float32 (B, H, W, 3) → the tokens after every block, depth × (B, T, D).

    Pre-training `tiny` (llb.objectives) gives the energies (B, P, E) of square images in place of the images, and a
    mask, bool (B, P): True replaces a patch by the learned mask token; or `visible`, int (B, V): only these enter.

    precision: "float32" or "bfloat16", what the operands of matrix products are rounded to; sums, the residual stream,
    norms and parameters are float32.
    """

    spec: Spec
    precision: str = "float32"

    @nn.compact
    def __call__(
        self, images: jax.Array, mask: jax.Array | None = None, visible: jax.Array | None = None
    ) -> list[jax.Array]:
        spec, batch = self.spec, images.shape[0]
        width, small = spec.width, nn.initializers.truncated_normal(0.02)
        if images.ndim == 4:
            rows, columns = images.shape[1] // spec.patch, images.shape[2] // spec.patch
        else:
            rows = columns = round(images.shape[1] ** 0.5)

        if spec.filter_bank:
            known = images if images.ndim == 3 else energies(images, spec.patch)
            x = FilterBankStem(width, name="stem")(known)  # (B, P, D)
            mask_token = self.param("mask_token", small, (width,))
            if mask is not None:
                x = jnp.where(mask[..., None], mask_token, x)
        else:
            patch = (spec.patch, spec.patch)
            x = nn.Conv(width, patch, patch, padding="VALID", dtype=self.precision, name="patch_embed")(images)
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


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: its spec, its weights, and the image size that it is used at."""

    spec: Spec
    params: dict
    image_size: int
    weights_digest: str
    precision: str = "float32"  # of matrix products, see ViT

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.spec.patch

    @property
    def tokens_per_image(self) -> int:
        """T: class, registers and patches."""
        return 1 + self.spec.registers + self.grid**2

    def apply(self, params: dict, images: jax.Array) -> list[jax.Array]:
        """Pure: float32 (B, H, W, 3), ImageNet-normalised → depth × (B, T, D). For use inside a jitted function."""
        return ViT(self.spec, self.precision).apply({"params": params}, images)

    def features(self, params: dict, images: jax.Array) -> jax.Array:
        """Pure: what Dinomaly reconstructs, float32 (B, H, W, 3) → (B, 2, T, D), the means of two groups of blocks.

        tiny's are whitened by their mean and covariance over drawn images, which come with its weights: trained for
        minutes, it puts most of its variance into a few directions (brightness, contrast), and a cosine would see
        nothing else.
        """
        tokens = self.apply(params, images)
        groups = jnp.stack([sum(tokens[block] for block in group) / len(group) for group in self.spec.groups], axis=1)
        if self.spec.filter_bank:
            mean, matrix = params["whitening"]["mean"], params["whitening"]["matrix"]  # (2, D), (2, D, D)
            groups = jnp.einsum("bgtd,gde->bgte", groups - mean[:, None], matrix)
        return groups

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Compiled `apply` with this encoder's weights; "float32" is float32, where JAX on a GPU would make it TF32."""
        with jax.default_matmul_precision("highest"):
            return _apply(self.params, jnp.asarray(images), self.spec, self.precision)


@jax.jit(static_argnames=("spec", "precision"))
def _apply(params: dict, images: jax.Array, spec: Spec, precision: str) -> list[jax.Array]:
    return ViT(spec, precision).apply({"params": params}, images)


def load_encoder(
    name: str, weights: Path | str | None = None, image_size: int | None = None, precision: str = "float32"
) -> Encoder:
    """A frozen encoder by name.

    Args:
        name: a key of SPECS.
        weights: Hugging Face's model.safetensors or the original release's .pth; None fetches the named weights from
            the hub once (tiny's are part of this package).
        image_size: side in pixels, a multiple of the patch size; None takes the encoder's default.
        precision: "float32" or "bfloat16", what the operands of matrix products are rounded to.

    Returns:
        `encoder(images)`: float32 (B, H, W, 3), ImageNet-normalised → list, one array for each block: (B, T, D).

    Raises:
        UserError: unknown name, a size that does not fit, weights that are missing or not this encoder's.
    """
    if name not in SPECS:
        raise UserError(f"--encoder {name} is not known; one of {', '.join(SPECS)}")
    spec = SPECS[name]
    size = spec.image_size if image_size is None else image_size
    if size < spec.patch or size % spec.patch:
        below = max(1, size // spec.patch) * spec.patch
        near = f"near it are {below} and {below + spec.patch}"
        raise UserError(f"--image-size {size} is no multiple of {name}'s patch size {spec.patch}; {near}")
    if spec.filter_bank:
        params = read_tree(weights or TINY_WEIGHTS, parameter_shapes(spec))
    else:
        file = Path(weights) if weights else fetch(spec)
        params = to_params(read_tensors(file), spec, file)
    return Encoder(spec, jax.tree.map(jnp.asarray, params), size, digest(params), precision)


def parameter_shapes(spec: Spec) -> dict:
    """The tree of shapes of an encoder's parameters."""
    side = spec.native_grid * spec.patch
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(spec).init, jax.random.key(0), images)["params"]
    if spec.filter_bank:
        groups, width = len(spec.groups), spec.width
        shapes["whitening"] = {
            "mean": jax.ShapeDtypeStruct((groups, width), jnp.float32),
            "matrix": jax.ShapeDtypeStruct((groups, width, width), jnp.float32),
        }
    return shapes
