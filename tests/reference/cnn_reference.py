"""Reference values for tests/test_cnn.py, from torchvision (ResNets) and timm (EfficientNets).

    pip install torch==2.13.0 torchvision==0.28.0 timm==1.0.31 numpy && python tests/reference/cnn_reference.py

Writes cnn_reference.npz: of each encoder the names and shapes of its tensors in the file's order, its number of
parameters, and of each stage some entries and the largest size. Weights and statistics are drawn from their names, so
only outputs are stored. The test draws them again; it needs no PyTorch.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
SHAPE = (1, 224, 161, 3)  # rows as at every multiple of 32; columns are odd in many layers: 161, 81, 41, 21, 11, 6
ENTRIES = 200  # stored of each stage
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
MODELS = {  # the name in timm, or None for torchvision; where the stages end
    "resnet18": (None, ("layer1", "layer2", "layer3", "layer4")),
    "wide_resnet50_2": (None, ("layer1", "layer2", "layer3", "layer4")),
    "efficientnet_b4": ("tf_efficientnet_b4", ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")),
    "efficientnet_lite0": ("tf_efficientnet_lite0", ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 numbers, the same everywhere for the same name: PCG64's stream is frozen (NEP 19).

    A convolution's outputs have about the variance of the BatchNorm behind it, 0.01, so that its epsilon is visible.
    """
    count = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-count // 2)).view(np.uint32)[:count]
    value = (np.float32(2 * 3**0.5 / 2**32) * bits.astype(np.float32) - np.float32(3**0.5)).reshape(shape)  # variance 1
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if len(shape) == 4 and not name.startswith("images"):
        return value * np.float32(0.005 / np.prod(shape[1:])) ** np.float32(0.5)
    if name.endswith("running_var"):
        return np.float32(0.01) + np.float32(0.005) * value
    if name.endswith("weight") and len(shape) == 1:
        return 1 + np.float32(0.3) * value
    if name.endswith("running_mean"):
        return np.float32(0.03) * value
    return value if name.startswith("images") else np.float32(0.3) * value


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: draw(name, tuple(shape)) for name, shape in shapes.items()}


def entries(stage: np.ndarray) -> np.ndarray:
    """Some entries of (h, w, C), spread over rows, columns and channels."""
    return stage.ravel()[np.linspace(0, stage.size - 1, ENTRIES).astype(int)]


def lukemelas(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A timm EfficientNet's tensors by lukemelas' names. Both have the modules in the same order."""
    convolutions = [name.removesuffix(".weight") for name, value in tensors.items() if value.ndim == 4]
    modules, block, known = ["_conv_stem", "_bn0"], -1, None
    for name in convolutions[1:-1]:
        if name.rpartition(".")[0].removesuffix(".se") != known:
            known, block = name.rpartition(".")[0].removesuffix(".se"), block + 1
            expands = f"{known}.conv_pwl.weight" in tensors
        kind = name.rpartition(".")[2]
        names = {"conv_dw": ("depthwise_conv", "bn1"), "conv_reduce": ("se_reduce",), "conv_expand": ("se_expand",)}
        names |= {"conv_pwl": ("project_conv", "bn2")}
        names["conv_pw"] = ("expand_conv", "bn0") if expands else ("project_conv", "bn2")
        modules += [f"_blocks.{block}._{part}" for part in names[kind]]
    modules += ["_conv_head", "_bn1", "_fc"]
    ours = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    assert len(ours) == len(modules)
    new = dict(zip(ours, modules))
    return {f"{new[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in tensors.items()}


def main() -> None:
    import timm
    import torch
    import torchvision

    stored = {}
    for name, (in_timm, ends) in MODELS.items():
        model = timm.create_model(in_timm) if in_timm else getattr(torchvision.models, name)()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        if not in_timm:
            assert shapes == {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights(shapes).items()})
        model = model.double().eval()
        images = draw("images", SHAPE).astype(np.float64)
        if name == "efficientnet_lite0":
            images = ((images * STD + MEAN) * 255 - 127) / 128
        outputs = []
        for end in ends:
            model.get_submodule(end).register_forward_hook(lambda *call, keep=outputs.append: keep(call[-1]))
        with torch.no_grad():
            model(torch.from_numpy(images).permute(0, 3, 1, 2))
        stored[f"{name}/shapes"] = np.frombuffer(zlib.compress(json.dumps(shapes).encode(), 9), np.uint8)
        stored[f"{name}/parameters"] = sum(value.numel() for value in model.parameters())
        for index, output in enumerate(outputs):
            stage = output[0].permute(1, 2, 0).numpy()
            print(name, index, stage.shape, np.abs(stage).max(), stage.std())
            stored[f"{name}/{index}/shape"] = stage.shape
            stored[f"{name}/{index}/entries"] = entries(stage).astype(np.float32)
            stored[f"{name}/{index}/largest"] = np.float32(np.abs(stage).max())
    np.savez(FILE, **stored)


if __name__ == "__main__":
    main()
