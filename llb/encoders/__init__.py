"""Frozen encoders by name: DINO v1, DINOv2 with and without registers, and `tiny`, this project's own.

Example:
    from llb import load_encoder
    encoder = load_encoder("dinov2_vitb14_reg", weights="model.safetensors", image_size=392)
    tokens = encoder(images)  # float32 (B, 392, 392, 3), ImageNet-normalised → 12 × (B, 789, 768)
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from llb.encoders.specs import SPECS, Spec
from llb.encoders.stem import ENERGIES, energies
from llb.encoders.vit import ViT
from llb.encoders.weights import download_weights, read_tensors, read_tree, to_params, weights_digest
from llb.files import UserError

TINY_WEIGHTS = Path(__file__).parent.parent / "tiny" / "tiny.safetensors"


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: its spec, its weights, and the image size at which it is used."""

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
        """The tokens after every block, depth × (B, T, D). A pure function, for use inside a jitted one.

        params: the tree of this encoder's parameters.
        images: float32 (B, H, W, 3), ImageNet-normalised; H and W are multiples of the patch size.
        """
        return _apply(params, images, self.spec, self.precision)

    def features(self, params: dict, images: jax.Array) -> jax.Array:
        """The features that Dinomaly reconstructs, float32 (B, 2, T, D): means of two groups of blocks. See `apply`.

        The features of tiny are whitened by their mean and covariance over drawn images, which its weight file
        contains. Without that a few directions (brightness, contrast) hold most of their variance, and a cosine
        distance would see nothing else.
        """
        tokens = self.apply(params, images)
        groups = jnp.stack([sum(tokens[block] for block in group) / len(group) for group in self.spec.groups], axis=1)
        if self.spec.filter_bank:
            mean, matrix = params["whitening"]["mean"], params["whitening"]["matrix"]  # (2, D), (2, D, D)
            groups = jnp.einsum("bgtd,gde->bgte", groups - mean[:, None], matrix)
        return groups

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Compiled `apply` with this encoder's weights, in full float32: by default JAX on a GPU uses TF32 instead."""
        with jax.default_matmul_precision("highest"):
            return _compiled_apply(self.params, jnp.asarray(images), self.spec, self.precision)


def _apply(params: dict, images: jax.Array, spec: Spec, precision: str) -> list[jax.Array]:
    grid = images.shape[1] // spec.patch, images.shape[2] // spec.patch
    inputs = energies(images, spec.patch) if spec.filter_bank else images
    return ViT(spec, precision).apply({"params": params}, inputs, grid)


_compiled_apply = jax.jit(_apply, static_argnames=("spec", "precision"))


def load_encoder(
    name: str, weights: Path | str | None = None, image_size: int | None = None, precision: str = "float32"
) -> Encoder:
    """A frozen encoder by name. Calling it maps images to tokens: float32 (B, H, W, 3), ImageNet-normalised → a list
    with one array (B, T, D) for each block.

    Args:
        name: a key of SPECS.
        weights: Hugging Face's model.safetensors or the original release's .pth. None downloads them from the hub once;
            tiny's are part of this package.
        image_size: side in pixels, a multiple of the patch size; None takes the encoder's default.
        precision: "float32" or "bfloat16", to which the operands of matrix products are rounded.

    Raises a UserError if the name is unknown, the size does not fit, or weights are missing or of another encoder.
    """
    if name not in SPECS:
        raise UserError(f"--encoder {name}: unknown encoder; give one of {', '.join(SPECS)}")
    if weights is not None and not str(weights):
        raise UserError('--weights "": is empty (a variable that is not set?); give a file, or leave the flag out')
    spec = SPECS[name]
    size = spec.image_size if image_size is None else image_size
    if size < spec.patch or size % spec.patch:
        below = max(1, size // spec.patch) * spec.patch
        advice = f"give {below} or {below + spec.patch}"
        raise UserError(f"--image-size {size}: not a multiple of {name}'s patch size {spec.patch}; {advice}")
    if spec.filter_bank:
        params = read_tree(weights or TINY_WEIGHTS, parameter_shapes(spec))
    else:
        file = Path(weights) if weights else download_weights(spec)
        params = to_params(read_tensors(file), spec, file)
    return Encoder(spec, jax.tree.map(jnp.asarray, params), size, weights_digest(params), precision)


def parameter_shapes(spec: Spec) -> dict:
    """The tree of an encoder's parameters, a jax.ShapeDtypeStruct for each."""
    array, side = partial(jax.ShapeDtypeStruct, dtype=jnp.float32), spec.native_grid
    inputs = array((1, side**2, ENERGIES) if spec.filter_bank else (1, side * spec.patch, side * spec.patch, 3))
    shapes = jax.eval_shape(partial(ViT(spec).init, grid=(side, side)), jax.random.key(0), inputs)["params"]
    if spec.filter_bank:
        mean = (len(spec.groups), spec.width)
        shapes["whitening"] = {"mean": array(mean), "matrix": array((*mean, spec.width))}
    return shapes
