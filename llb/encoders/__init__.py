"""Frozen encoders by name: ViTs (DINO v1, DINOv2 with and without registers, and `tiny`, this project's own) and CNNs
(ResNets, EfficientNets).

Example:
    from llb import load_encoder
    encoder = load_encoder("dinov2_vitb14_reg", weights="model.safetensors", image_size=392)
    tokens = encoder(images)  # float32 (B, 392, 392, 3), ImageNet-normalised → 12 × (B, 789, 768)
    maps = load_encoder("resnet18")(small)  # small (B, 224, 224, 3) → (B, 56, 56, 64) … (B, 7, 7, 512)
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp

from llb.encoders import cnn
from llb.encoders.cnn import CNN
from llb.encoders.specs import SPECS, CnnSpec, Spec, grids
from llb.encoders.stem import ENERGIES, energies
from llb.encoders.vit import ViT
from llb.encoders.weights import download_weights, read_tensors, read_tree, to_params, weights_digest
from llb.files import UserError

TINY_WEIGHTS = Path(__file__).parent.parent / "tiny" / "tiny.safetensors"


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder: its spec, its weights, and the image size at which it is used."""

    spec: Spec | CnnSpec
    params: dict
    image_size: int
    weights_digest: str
    precision: str = "float32"  # of matrix products and convolutions, see ViT and CNN
    strides: tuple[int, ...] = ()  # the stages of a CNN that are computed, all if none is given

    @property
    def grid(self) -> int:
        """Patches a side of a ViT."""
        return self.image_size // self.spec.patch

    @property
    def tokens_per_image(self) -> int:
        """T of a ViT: class, registers and patches."""
        return 1 + self.spec.registers + self.grid**2

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one image's `features`: (G, T, D) of a ViT (G groups of blocks), (L,) of a CNN."""
        if isinstance(self.spec, CnnSpec):
            return (sum(h * w * channels for h, w, channels in grids(self.spec, self.image_size, self.strides)),)
        return (len(self.spec.groups), self.tokens_per_image, self.spec.width)

    def apply(self, params: dict, images: jax.Array) -> list[jax.Array]:
        """What every block of a ViT or every wanted stage of a CNN gives. A pure function, for use inside a jitted one.

        params: the tree of this encoder's parameters.
        images: float32 (B, H, W, 3), ImageNet-normalised; H and W are multiples of a ViT's patch size.

        Returns the tokens of a ViT, depth × (B, T, D), or the maps of a CNN, (B, h, w, C) each, finest first.
        """
        return _apply(params, images, self.spec, self.precision, self.strides)

    def features(self, params: dict, images: jax.Array) -> jax.Array:
        """What is cached of each image. Of a ViT float32 (B, G, T, D): means of groups of blocks, which Dinomaly
        reconstructs. Of a CNN float32 (B, L): the maps of all wanted stages in a row, finest first. See `apply`.
        """
        outputs = self.apply(params, images)
        if isinstance(self.spec, CnnSpec):
            return jnp.concatenate([stage.reshape(len(images), -1) for stage in outputs], axis=1)
        return _group_means(params, outputs, self.spec)

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Compiled `apply` with this encoder's weights, in full float32: by default JAX on a GPU uses TF32 instead."""
        with jax.default_matmul_precision("highest"):
            return _compiled_apply(self.params, jnp.asarray(images), self.spec, self.precision, self.strides)


def feature_maps(
    params: dict, images: jax.Array, spec: Spec | CnnSpec, precision: str, strides: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """The feature maps of images, float32 (B, h, w, C) each, finest first; their sizes are those of `grids`.

    Of a ViT the means of its groups, patch tokens only. Of a CNN the wanted stages. A pure function.
    images: float32 (B, H, W, 3), ImageNet-normalised.
    """
    outputs = _apply(params, images, spec, precision, strides)
    if isinstance(spec, CnnSpec):
        return tuple(outputs)
    rows, columns = images.shape[1] // spec.patch, images.shape[2] // spec.patch
    patches = _group_means(params, outputs, spec)[:, :, -rows * columns :]  # (B, G, P, D)
    return tuple(jnp.moveaxis(patches, 1, 0).reshape(len(spec.groups), len(images), rows, columns, spec.width))


def _apply(
    params: dict, images: jax.Array, spec: Spec | CnnSpec, precision: str, strides: tuple[int, ...]
) -> list[jax.Array]:
    if isinstance(spec, CnnSpec):
        return list(CNN(spec, precision).apply({"params": params}, images, strides))
    grid = images.shape[1] // spec.patch, images.shape[2] // spec.patch
    inputs = energies(images, spec.patch) if spec.filter_bank else images
    return ViT(spec, precision).apply({"params": params}, inputs, grid)


def _group_means(params: dict, tokens: list[jax.Array], spec: Spec) -> jax.Array:
    """The mean of each group of a ViT's blocks: depth × (B, T, D) → (B, G, T, D).

    The features of tiny are whitened by their mean and covariance over drawn images, which its weight file contains.
    Without that a few directions (brightness, contrast) hold most of their variance, and a cosine distance would see
    nothing else.
    """
    groups = jnp.stack([sum(tokens[block] for block in group) / len(group) for group in spec.groups], axis=1)
    if spec.filter_bank:
        # a single block in place of a group is whitened as its group
        own = [next(i for i, usual in enumerate(SPECS[spec.name].groups) if group[0] in usual) for group in spec.groups]
        mean, matrix = (params["whitening"][name][jnp.array(own)] for name in ("mean", "matrix"))  # (G, D), (G, D, D)
        groups = jnp.einsum("bgtd,gde->bgte", groups - mean[:, None], matrix)
    return groups


_compiled_apply = jax.jit(_apply, static_argnames=("spec", "precision", "strides"))


def load_encoder(
    name: str,
    weights: Path | str | None = None,
    image_size: int | None = None,
    precision: str = "float32",
    strides: tuple[int, ...] = (),
) -> Encoder:
    """A frozen encoder by name. Calling it maps images float32 (B, H, W, 3), ImageNet-normalised, to a list: of a ViT
    the tokens (B, T, D) of each block, of a CNN the maps (B, h, w, C) of each stage.

    Args:
        name: a key of SPECS.
        weights: Hugging Face's model.safetensors or the original release's .pth. None downloads them from the hub once;
            tiny's are part of this package, efficientnet_lite0's of a Python package in requirements.txt.
        image_size: side in pixels, a multiple of the patch size or largest stride; None takes the encoder's default.
        precision: "float32" or "bfloat16", to which the operands of matrix products and convolutions are rounded.
        strides: of a CNN, the stages that are computed; those that it lacks are left out, and none means all.

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
        step = "largest stride" if isinstance(spec, CnnSpec) else "patch size"
        raise UserError(f"--image-size {size}: not a multiple of {name}'s {step} {spec.patch}; {advice}")
    if isinstance(spec, Spec) and spec.filter_bank:
        params = read_tree(weights or TINY_WEIGHTS, parameter_shapes(spec))
    else:
        file = Path(weights) if weights else download_weights(spec)
        params = to_params(read_tensors(file), spec, file)
    return Encoder(spec, jax.tree.map(jnp.asarray, params), size, weights_digest(params), precision, strides)


@cache
def parameter_shapes(spec: Spec | CnnSpec) -> dict:
    """The tree of an encoder's parameters, a jax.ShapeDtypeStruct for each. Tracing them takes a second; do not change
    the tree."""
    if isinstance(spec, CnnSpec):
        return cnn.parameter_shapes(spec)
    array, side = partial(jax.ShapeDtypeStruct, dtype=jnp.float32), spec.native_grid
    inputs = array((1, side**2, ENERGIES) if spec.filter_bank else (1, side * spec.patch, side * spec.patch, 3))
    shapes = jax.eval_shape(partial(ViT(spec).init, grid=(side, side)), jax.random.key(0), inputs)["params"]
    if spec.filter_bank:
        mean = (len(spec.groups), spec.width)
        shapes["whitening"] = {"mean": array(mean), "matrix": array((*mean, spec.width))}
    return shapes
