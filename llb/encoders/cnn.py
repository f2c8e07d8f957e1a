"""ResNets and EfficientNets with the BatchNorm folded into the convolutions, and the names that their files use.

    images            float32 (B, H, W, 3)             ImageNet-normalised
    stem              (B, ⌈H/2⌉, ⌈W/2⌉, stem)          in a ResNet max-pooled to stride 4
    a block           (B, h, w, I) → (B, ⌈h/s⌉, ⌈w/s⌉, C)
    maps              float32 (B, ⌈H/stride⌉, ⌈W/stride⌉, C), one for each stage that is wanted, finest first

                      stride 2   4    8     16     32
    resnet18                 –   64   128   256    512     layer1 … layer4, after the last ReLU
    wide_resnet50_2          –   256  512   1024   2048    the same
    efficientnet_b4          24  32   56    160    448     blocks 1, 5, 9, 21, 31
    efficientnet_lite0       16  24   40    112    320     blocks 0, 2, 4, 10, 15

BatchNorm with frozen statistics is affine, γ (x − μ) / √(σ² + ε) + β, so `folded` makes it part of the convolution.
Sources: He et al. (CVPR 2016), Zagoruyko and Komodakis (Wide ResNets, BMVC 2016), Tan and Le (EfficientNet, ICML 2019).
Differs from the release: UniAD pads block 6 of its EfficientNet-B4 by (2, 2), as at 380 pixels; here it has (1, 2) at
224, TensorFlow's "same", with which the weights were trained.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llb.encoders.specs import CnnSpec
from llb.images import IMAGENET_MEAN, IMAGENET_STD

EXPANSION = 6  # of an inverted bottleneck, whose first layer has none
SQUEEZE = 4  # squeeze and excitation: the inner width is the block's input width divided by this


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "same": zeros before and after, so that the output has ⌈side / stride⌉ numbers."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


@partial(jax.jit, static_argnames="stride")  # equal blocks are traced once
def depthwise_convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Each channel with its own filter: (B, h, w, C) padded, (k, k, 1, C) → (B, h', w', C).

    A sum of k² shifted products: on a CPU 10 to 50 times as fast as a convolution with C groups.
    """
    side, (batch, height, width, channels) = kernel.shape[0], x.shape
    rows, columns = ((n - side) // stride * stride + 1 for n in (height, width))  # that one element of the filter meets
    total = 0.0
    for row in range(side):
        for column in range(side):
            stop = (batch, row + rows, column + columns, channels)
            total += jax.lax.slice(x, (0, row, column, 0), stop, (1, stride, stride, 1)) * kernel[row, column, 0]
    return total


class Conv(nn.Module):
    """A convolution with its BatchNorm: (B, h, w, I) → (B, ⌈h/s⌉, ⌈w/s⌉, C).

    same: TensorFlow's padding "same"; False: symmetric padding.
    precision: "float32" or "bfloat16", to which the operands are rounded, but those of a depthwise convolution.
    """

    width: int  # C
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False  # then I = C
    same: bool = False
    precision: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, stride, inputs = self.kernel, self.stride, 1 if self.depthwise else x.shape[-1]
        kernel = self.param("kernel", nn.initializers.he_normal(), (side, side, inputs, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        padding = [same_padding(n, side, stride) if self.same else (side // 2, side // 2) for n in x.shape[1:3]]
        if self.depthwise:
            return depthwise_convolution(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel, stride) + bias
        x, kernel = x.astype(self.precision), kernel.astype(self.precision)
        if side == 1:  # a matrix product, which is faster on a CPU
            x = x[:, ::stride, ::stride] @ kernel[0, 0]
        else:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)
        return x.astype(jnp.float32) + bias


class Residual(nn.Module):
    """A block of a ResNet: two 3 × 3 convolutions, or 1 × 1, 3 × 3 and 1 × 1 with half the width inside."""

    width: int
    kernel: int
    stride: int
    bottleneck: bool
    conv: Callable[..., Conv]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.width // 2 if self.bottleneck else self.width
        layers = [(inner, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            layers = [(inner, 1, 1), (inner, 3, self.stride), (self.width, 1, 1)]
        y = x
        for number, layer in enumerate(layers, 1):
            y = self.conv(*layer, name=f"conv{number}")(y if number == 1 else nn.relu(y))
        if x.shape != y.shape:
            x = self.conv(self.width, 1, self.stride, name="downsample")(x)
        return nn.relu(x + y)


class InvertedBottleneck(nn.Module):
    """A block of an EfficientNet: 1 × 1 to six times the width, depthwise, squeeze and excitation, 1 × 1 back.

    Lite has ReLU6 in place of swish, and no squeeze and excitation.
    """

    width: int
    kernel: int
    stride: int
    lite: bool
    first: bool  # of the first layer, which does not expand
    conv: Callable[..., Conv]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act, inputs, y = nn.relu6 if self.lite else nn.silu, x.shape[-1], x
        if not self.first:
            y = act(self.conv(EXPANSION * inputs, name="expand")(y))
        y = act(self.conv(y.shape[-1], self.kernel, self.stride, depthwise=True, name="depthwise")(y))
        if not self.lite:
            gate = self.conv(inputs // SQUEEZE, name="squeeze")(y.mean(axis=(1, 2), keepdims=True))
            y = y * nn.sigmoid(self.conv(y.shape[-1], name="excite")(act(gate)))
        y = self.conv(self.width, name="project")(y)
        return x + y if x.shape == y.shape else y


class CNN(nn.Module):
    """Stem and blocks, up to the last stage that is wanted.

    precision: "float32" or "bfloat16", to which the operands of convolutions are rounded. Sums, activations and
    parameters are float32.
    """

    spec: CnnSpec
    precision: str = "float32"

    @nn.compact
    def __call__(self, images: jax.Array, strides: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
        """The maps of the stages of `strides`, of all if none is given: float32 (B, h, w, C), finest first.

        images: float32 (B, H, W, 3), ImageNet-normalised.
        """
        spec, lite, blocks = self.spec, self.spec.block == "mbconv-lite", block_sizes(self.spec)
        conv = partial(Conv, same=not spec.resnet, precision=self.precision)
        if spec.resnet:
            x = nn.relu(conv(spec.stem, 7, 2, name="stem")(images))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pads with −∞
            block = partial(Residual, bottleneck=spec.block == "bottleneck", conv=conv)
        else:
            if lite:  # trained with another normalisation
                images = ((images * IMAGENET_STD + IMAGENET_MEAN) * 255 - 127) / 128
            x = (nn.relu6 if lite else nn.silu)(conv(spec.stem, 3, 2, name="stem")(images))
            block = partial(InvertedBottleneck, lite=lite, conv=conv)
        last = [index for _, index in spec.wanted(strides).values()]
        maps = []
        for index, (layer, _, *sizes) in enumerate(blocks[: last[-1] + 1]):
            first = {} if spec.resnet else {"first": layer == 0}
            x = block(*sizes, **first, name=f"block_{index}")(x)
            if index in last:
                maps.append(x)
        return tuple(maps)


def block_sizes(spec: CnnSpec) -> list[tuple[int, int, int, int, int]]:
    """Of each block: its layer, its number in the layer, channels, kernel, stride."""
    return [
        (layer, number, channels, kernel, 1 if number else stride)
        for layer, (blocks, channels, kernel, stride) in enumerate(spec.layers)
        for number in range(blocks)
    ]


@cache  # a grid of runs loads the same encoder for each command
def parameter_shapes(spec: CnnSpec) -> dict:
    """The tree of parameters, a jax.ShapeDtypeStruct for each."""
    images = jax.ShapeDtypeStruct((1, spec.patch, spec.patch, 3), jnp.float32)
    return jax.eval_shape(CNN(spec).init, jax.random.key(0), images)["params"]


# An EfficientNet's convolutions, each with the BatchNorm behind it: names of lukemelas/EfficientNet-PyTorch, of timm.
NAMES = {
    "stem": (("_conv_stem", "_bn0"), ("conv_stem", "bn1")),
    "expand": (("_expand_conv", "_bn0"), ("conv_pw", "bn1")),
    "depthwise": (("_depthwise_conv", "_bn1"), ("conv_dw", "bn2")),
    "squeeze": (("_se_reduce", ""), ("se.conv_reduce", "")),
    "excite": (("_se_expand", ""), ("se.conv_expand", "")),
    "project": (("_project_conv", "_bn2"), ("conv_pwl", "bn3")),
}
TIMM_FIRST_LAYER = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}  # where nothing expands
# In the files, but not part of a stage: the head, the classifier, and how many batches gave the statistics.
UNUSED = re.compile(r"(.*\.)?num_batches_tracked|(_conv_head|conv_head|_bn1|bn2|_fc|fc|classifier|head)\.\w+")


@dataclass(frozen=True)
class Released:
    """A convolution of the tree, and what it is called in a released file."""

    path: tuple[str, ...]  # in the tree: ("stem",) or ("block_3", "expand")
    shape: tuple[int, int, int, int]  # of its kernel: k, k, I, C
    name: str  # in the file
    norm: str  # of the BatchNorm behind it, "" if there is none


def released(spec: CnnSpec, tensors: Collection[str]) -> Iterator[Released]:
    """All convolutions, by the names that a file with these tensors has.

    A ResNet has torchvision's names, which are timm's too; an EfficientNet timm's, or those of
    lukemelas/EfficientNet-PyTorch.
    """
    timm, blocks = "conv_stem.weight" in tensors, block_sizes(spec)
    for (*block, part, kind), leaf in flatten_dict(parameter_shapes(spec)).items():
        if kind != "kernel":
            continue
        index = int(block[0].removeprefix("block_")) if block else 0
        layer, number, *_ = blocks[index]
        if spec.resnet:
            prefix, name = f"layer{layer + 1}.{number}.", part.replace("stem", "conv1")
            names = ("downsample.0", "downsample.1") if part == "downsample" else (name, name.replace("conv", "bn"))
        else:
            prefix, names = f"blocks.{layer}.{number}." if timm else f"_blocks.{index}.", NAMES[part][timm]
            if timm and block and layer == 0:
                names = TIMM_FIRST_LAYER.get(part, names)
        name, norm = (name and (prefix if block else "") + name for name in names)
        yield Released((*block, part), leaf.shape, name, norm)


def folded(weight: np.ndarray, norm: dict[str, np.ndarray], spec: CnnSpec) -> dict[str, np.ndarray]:
    """A convolution (C, I, k, k) and its BatchNorm as one: "kernel" (k, k, I, C) and "bias" (C,), float32.

    norm: "weight" γ, "bias" β, "running_mean" μ, "running_var" σ², each (C,); of a convolution without one its "bias".
    """
    kernel, bias = weight.transpose(2, 3, 1, 0), norm["bias"]
    if "running_var" in norm:
        with np.errstate(invalid="ignore"):  # a negative variance is found by whoever calls
            scale = norm["weight"] / np.sqrt(norm["running_var"] + np.float32(1e-5 if spec.resnet else 1e-3))
        kernel, bias = kernel * scale, bias - norm["running_mean"] * scale
    return {"kernel": kernel, "bias": bias}
