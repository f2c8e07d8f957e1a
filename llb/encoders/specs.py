"""The encoders by name, and the sizes of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """The sizes of one encoder. The digest of a feature cache contains these fields in this order."""

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


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(name="tiny", filter_bank=True, **SIZES["tiny"], **TINY),
        *(_dino(letter, patch) for letter in "sb" for patch in (16, 8)),
        *(_dinov2(letter, registers) for letter in "sbl" for registers in (0, 4)),
    )
}
