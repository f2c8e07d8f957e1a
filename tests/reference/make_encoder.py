"""Reference values for tests/test_encoders.py, test_pickles.py and test_weights.py, from PyTorch and transformers.

    pip install torch==2.13.0 transformers==5.24.0 numpy && python tests/reference/make_encoder.py

Writes beside this file
    encoder.json     for each family of encoder_weights.py the tensors that transformers saves: name, shape, and name in
                     memory, which is another since version 5
    encoder.npz      tokens after every block (class, registers, every fifth patch), interpolated grids
    encoder_*.pth    the family "stored" under the original release's names, in both formats of torch.save
    tensors_*.pth    one tensor of each kind that a .pth can hold
Models run in float64; float32 is stored.
"""

import json
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from encoder_weights import FAMILIES, SIZES, draw, images, kept, original
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

HERE = Path(__file__).parent


def build(patch, width, depth, heads, registers, layer_scale, native_grid):
    """transformers' model for one family, with its own default weights."""
    common = dict(
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=patch * native_grid,
    )
    if not layer_scale:
        # 1e-6 as in the release of DINO v1; the configurations on the hub have ViTConfig's default, 1e-12
        return ViTModel(ViTConfig(intermediate_size=4 * width, layer_norm_eps=1e-6, **common))
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **common))
    return Dinov2Model(Dinov2Config(**common))


def with_drawn_weights(model):
    """The model read from a file of drawn weights, and these by the names that transformers itself saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        drawn = {name: draw(name, value.shape) for name, value in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(drawn, file, {"format": "pt"})
        model, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model.double().eval(), drawn


def tokens_of(model, pixels):
    """After every block. Hooks, because ViTModel puts its final norm's output in place of the last block's."""
    outputs = []
    layers = model.layers if hasattr(model, "layers") else model.encoder.layer
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output)) for layer in layers]
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2).astype(np.float64))
    with torch.no_grad():
        model(pixels, **({"interpolate_pos_encoding": True} if isinstance(model, ViTModel) else {}))
    for hook in hooks:
        hook.remove()
    return [output.numpy() for output in outputs]


def make_tokens(stored):
    names = {}
    for family, about in FAMILIES.items():
        model, drawn = with_drawn_weights(build(**about))
        in_memory = {value.float().numpy().tobytes(): name for name, value in model.state_dict().items()}
        names[family] = {name: [value.shape, in_memory[value.tobytes()]] for name, value in drawn.items()}
        for size in SIZES[family]:
            for index, tokens in enumerate(tokens_of(model, images(size))):
                stored[f"{family}/{size}/{index}"] = kept(tokens, about["registers"]).astype(np.float32)
                spread = [float(np.abs(tokens).max()), float(tokens.std())]
                print(f"{family} {size} block {index}: maximum {spread[0]:.2f}, standard deviation {spread[1]:.2f}")
        if family == "stored":
            tensors = {name: torch.tensor(value) for name, value in original(drawn).items()}
            torch.save(tensors, HERE / "encoder_zip.pth")
            torch.save(tensors, HERE / "encoder_legacy.pth", _use_new_zipfile_serialization=False)
    lines = [f'"{family}": {json.dumps(shapes)}' for family, shapes in names.items()]
    (HERE / "encoder.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_interpolations(stored):
    """Grids of random numbers, interpolated as transformers does it."""
    for native, rows, columns in ((37, 28, 28), (37, 16, 28), (37, 41, 41), (14, 24, 24), (14, 10, 10)):
        grid = torch.tensor(draw(f"images {native}", (1, 1, native, native)).astype(np.float64))
        for antialias in (False, True):
            value = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias)
            stored[f"interpolated/{native}/{rows}/{columns}/{antialias}"] = value[0, 0].numpy().astype(np.float32)


def make_tensors():
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = OrderedDict(
        plain=base,
        tied=base,
        transposed=base.t(),
        sliced=base[1:, ::2],
        parameter=nn.Parameter(torch.tensor([0.5, -1.5])),
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 3),
    )
    for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8):
        tensors[str(kind).removeprefix("torch.")] = torch.tensor([[1, -2, 3]], dtype=kind)
    tensors["uint8"] = torch.tensor([255, 1], dtype=torch.uint8)
    tensors["bool"] = torch.tensor([True, False])
    tensors._metadata = OrderedDict(version=1)  # as the state_dict of a module has
    torch.save(tensors, HERE / "tensors_zip.pth")
    torch.save(tensors, HERE / "tensors_legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    stored = {}
    make_tokens(stored)
    make_interpolations(stored)
    np.savez_compressed(HERE / "encoder.npz", **stored)
    make_tensors()
