"""Reference values for tests/test_protocols.py: Dinomaly's evaluation in PyTorch, the long way, and its
position embeddings.

    pip install torch==2.13.0 numpy && python tests/reference/make_protocol.py

Writes protocol.npz beside this file.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

if __name__ == "__main__":
    random, stored = np.random.default_rng(5), {}
    x, y = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    kernel = torch.exp(-((x - 2) ** 2 + (y - 2) ** 2) / (2 * 4.0**2))
    kernel = (kernel / kernel.sum())[None, None]  # (1, 1, 5, 5)
    for size, grid, side in ((392, 28, 256), (112, 14, 64), (70, 5, 96)):
        distance = torch.tensor(random.uniform(0, 1, (2, grid, grid)), dtype=torch.float32)
        maps = F.interpolate(distance[:, None], size=(size, size), mode="bilinear", align_corners=True)
        maps = F.interpolate(maps, size=side, mode="bilinear", align_corners=False)
        maps = F.conv2d(maps, kernel, padding=2)[:, 0]
        top = maps.flatten(1).sort(dim=1, descending=True)[0][:, : int(side * side * 0.01)].mean(dim=1)
        case = f"{size} {grid} {side}"
        stored[f"{case}/distance"], stored[f"{case}/score"] = distance.numpy(), top.numpy()
        stored[f"{case}/map"] = maps.numpy()[:, :: side // 32, :: side // 32]  # fewer pixels keep the file small
    for side in (5, 9):
        positions = torch.tensor(random.normal(0, 1, (1, 3, 7, 7)), dtype=torch.float32)
        resized = F.interpolate(positions, scale_factor=((side + 0.1) / 7,) * 2, mode="bicubic", antialias=False)
        stored[f"positions {side}"] = positions[0].permute(1, 2, 0).reshape(49, 3).numpy()
        stored[f"resized {side}"] = resized[0].permute(1, 2, 0).reshape(side * side, 3).numpy()
    np.savez_compressed(Path(__file__).parent / "protocol.npz", **stored)
