"""Reference values for tests/test_rd.py, from an independent PyTorch implementation.

    pip install torch==2.13.0 numpy scipy && python tests/reference/rd_reference.py

Writes rd.npz beside this file. The model has the published form with channels 4, 6, 8 and fewer blocks, on grids of
12², 6², 3²: the side 3 is odd, so the decoder's doubled 2² → 4² is cut. Computed in float64, stored in float32.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

CHANNELS, SIDES, BATCH, IMAGE = (4, 6, 8), (12, 6, 3), 3, 48
BLOCKS = 1, 1, 2  # of the decoder, the deepest map first
torch.set_default_dtype(torch.float64)


def up(inputs, outputs):
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)


def down(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class Normed(nn.Module):
    """A convolution and BatchNorm; `side`: the output is cut to it before the norm."""

    def __init__(self, convolution, channels, side=None):
        super().__init__()
        self.conv, self.norm, self.side = convolution, nn.BatchNorm2d(channels), side

    def forward(self, x):
        return self.norm(self.conv(x)[:, :, : self.side, : self.side])


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1, side=None):
        super().__init__()
        inner = outputs // 2
        middle = up(inner, inner) if side else down(inner, inner, 3, stride)
        self.one = Normed(down(inputs, inner, 1), inner)
        self.two = Normed(middle, inner, side)
        self.three = Normed(down(inner, outputs, 1), outputs)
        self.shortcut = None
        if side:
            self.shortcut = Normed(up(inputs, outputs), outputs, side)
        elif stride > 1 or inputs != outputs:
            self.shortcut = Normed(down(inputs, outputs, 1, stride), outputs)

    def forward(self, x):
        y = self.three(F.relu(self.two(F.relu(self.one(x)))))
        return F.relu(y + (self.shortcut(x) if self.shortcut else x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        a, b, c = CHANNELS
        self.join_0_1, self.join_0_2 = Normed(down(a, b, 3, 2), b), Normed(down(b, c, 3, 2), c)
        self.join_1_2 = Normed(down(b, c, 3, 2), c)
        self.code = nn.ModuleList([Block(3 * c, 2 * c, 2)])
        self.decoder, width = nn.ModuleList(), 2 * c
        for blocks, channels, side in zip(BLOCKS, CHANNELS[::-1], SIDES[::-1]):
            stage = [Block(width if i == 0 else channels, channels, side=None if i else side) for i in range(blocks)]
            self.decoder.append(nn.ModuleList(stage))
            width = channels

    def forward(self, maps):
        first = F.relu(self.join_0_2(F.relu(self.join_0_1(maps[0]))))
        x = torch.cat([first, F.relu(self.join_1_2(maps[1])), maps[2]], dim=1)
        for block in self.code:
            x = block(x)
        decoded = []
        for stage in self.decoder:
            for block in stage:
                x = block(x)
            decoded.append(x)
        return decoded[::-1]


def our_name(name):
    """PyTorch's name → (collection, our name)."""
    name, last = name.rsplit(".", 1)
    name, kind = name.rsplit(".", 1)
    for word, digit in (("one", "1"), ("two", "2"), ("three", "3")):
        name = name.replace(f".{word}", f"_{digit}")
    name = name.replace(".", "_")
    if kind == "conv":
        return "params", f"{name}_kernel"
    last = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "variance"}[last]
    return ("batch_stats" if last in ("mean", "variance") else "params"), f"{name}_{last}"


def our_value(name, tensor, transposed):
    array = tensor.detach().numpy().astype(np.float32)
    return array.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0)) if array.ndim == 4 else array


def main():
    random = np.random.default_rng(15)
    model, stored = Model(), {}
    transposed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        value = (
            random.normal(0, 1, tensor.shape) * (2 / np.prod(tensor.shape[1:])) ** 0.5
            if tensor.ndim == 4
            else (
                random.uniform(0.5, 1.5, tensor.shape)
                if name.endswith(("weight", "var"))
                else random.normal(0, 0.2, tensor.shape)
            )
        )
        tensor.copy_(torch.tensor(value.astype(np.float32).astype(np.float64)))
        stored["/".join(our_name(name))] = our_value(name, tensor, name in transposed)
    maps = [
        random.normal(0, 1, (BATCH, side, side, channels)).astype(np.float16) for side, channels in zip(SIDES, CHANNELS)
    ]
    stored["features"] = np.concatenate([one.reshape(BATCH, -1) for one in maps], axis=1)
    maps = [torch.tensor(one.astype(np.float64)).permute(0, 3, 1, 2) for one in maps]

    model.eval()
    decoded = model(maps)
    total = np.zeros((BATCH, IMAGE, IMAGE))
    for level, (a, b) in enumerate(zip(maps, decoded)):
        stored[f"evaluation/{level}"] = b.detach().permute(0, 2, 3, 1).numpy().astype(np.float32)
        distance = 1 - F.cosine_similarity(a, b)[:, None]
        total += F.interpolate(distance, size=IMAGE, mode="bilinear", align_corners=True)[:, 0].detach().numpy()
    stored["map"] = np.stack([gaussian_filter(one, sigma=4) for one in total]).astype(np.float32)
    stored["score"] = stored["map"].max(axis=(1, 2))

    model.train()
    decoded = model(maps)
    flat = [F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(maps, decoded)]
    loss = sum((1 - one).mean() for one in flat)
    loss.backward()
    stored["loss"] = np.float32(loss.item())
    stored["loss_positions"] = np.float32(
        sum((1 - F.cosine_similarity(a, b)).mean().item() for a, b in zip(maps, decoded))
    )
    for level, b in enumerate(decoded):
        stored[f"training/{level}"] = b.detach().permute(0, 2, 3, 1).numpy().astype(np.float32)
    for name, parameter in model.named_parameters():
        stored["gradients/" + our_name(name)[1]] = our_value(name, parameter.grad, name in transposed)
    for name, tensor in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            stored["changed/" + our_name(name)[1]] = our_value(name, tensor, False)
    np.savez_compressed(Path(__file__).parent / "rd.npz", **stored)


if __name__ == "__main__":
    main()
