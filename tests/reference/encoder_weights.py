"""Small encoders whose weights and images follow from their names, so that only their outputs are stored.

make_encoder.py (PyTorch, transformers) and tests/test_encoders.py (JAX) both draw from here.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np

# The real patch sizes and grids of stored positions with tiny widths: interpolation is exercised as in the full models.
FAMILIES = {
    "dinov2": dict(patch=14, width=12, depth=2, heads=3, registers=0, layer_scale=True, native_grid=37),
    "dinov2_reg": dict(patch=14, width=16, depth=3, heads=2, registers=4, layer_scale=True, native_grid=37),
    "dino16": dict(patch=16, width=12, depth=2, heads=3, registers=0, layer_scale=False, native_grid=14),
    "dino8": dict(patch=8, width=8, depth=2, heads=2, registers=0, layer_scale=False, native_grid=28),
    # small in every respect: its .pth files are stored
    "stored": dict(patch=4, width=8, depth=2, heads=2, registers=2, layer_scale=True, native_grid=5),
}
SIZES = {
    "dinov2": (392, 224),
    "dinov2_reg": (392, 224),
    "dino16": (224, 320),
    "dino8": (224, 320),
    "stored": (28,),
}
EVERY = 5  # patch token is stored: prime to every grid's side, so that all columns have their turn


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal float32 numbers, the same everywhere for the same name: RandomState's stream is frozen (NEP 19).

    The scale depends on the name's meaning in transformers. Matrices keep the size of what they multiply. Norms and
    LayerScale vary around 1. Embeddings have standard deviation 0.01, so that the first norm's epsilon is visible.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.startswith("images"):
        value = normal
    elif name.endswith("projection.weight"):
        value = 0.01 * normal / np.sqrt(np.prod(shape[1:]))
    elif name.startswith("embeddings"):
        value = 0.01 * normal
    elif re.search(r"norm\w*\.weight|lambda1", name):
        value = 1 + 0.3 * normal
    else:
        value = 0.3 * normal
    return value.astype(np.float32)


def images(size: int) -> np.ndarray:
    """float32 (2, size, size, 3)"""
    return draw(f"images {size}", (2, size, size, 3))


def kept(tokens: np.ndarray, registers: int) -> np.ndarray:
    """The stored part of tokens (B, T, D): class, registers and every fifth patch."""
    return np.concatenate([tokens[:, : 1 + registers], tokens[:, 1 + registers :: EVERY]], axis=1)


def names(family: str) -> dict[str, list]:
    """make_encoder.py's list of transformers' tensors: name in model.safetensors → shape, name in state_dict()."""
    return json.loads(Path(__file__).with_name("encoder.json").read_text())[family]


def saved(family: str) -> dict[str, np.ndarray]:
    """The weights by the names that transformers gives them in model.safetensors."""
    return {name: draw(name, tuple(shape)) for name, (shape, _) in names(family).items()}


def in_memory(family: str) -> dict[str, np.ndarray]:
    """The weights by the names of transformers' state_dict(), which differ since version 5."""
    return {other: draw(name, tuple(shape)) for name, (shape, other) in names(family).items()}


ORIGINAL = (  # transformers' names → the original releases', as its conversion scripts pair them
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.attention\.query", "attn.qkv"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm", "norm"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
)


def original(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors as the original release has them: other names, and query, key and value in one."""
    renamed = {}
    for name, value in tensors.items():
        if ".query." in name:
            value = np.concatenate([tensors[name.replace("query", part)] for part in ("query", "key", "value")])
        if not re.search(r"\.key\.|\.value\.|pooler", name):
            for pattern, replacement in ORIGINAL:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
    return renamed
