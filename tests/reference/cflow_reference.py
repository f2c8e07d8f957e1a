"""Reference values for tests/test_cflow.py, from an independent PyTorch implementation.

    pip install torch==2.13.0 numpy && python tests/reference/cflow_reference.py

Writes cflow.npz beside this file. Computed in float64, stored in float32. The encoding and the schedule are computed in
plain loops, the log-determinant as the sum of the released formula.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

torch.set_default_dtype(torch.float64)
random = np.random.default_rng(11)
BLOCKS, CONDITION, STEPS, TOTAL_STEPS, RATE = 8, 8, 5, 50, 1e-2


def drawn(*shape, scale=1.0):
    """Normal numbers that float32 holds exactly."""
    return torch.tensor((scale * random.standard_normal(shape)).astype(np.float32).astype(float))


def position_encoding(height, width, size):
    """(size, h, w), number by number."""
    encoded = np.zeros((size, height, width))
    for row in range(height):
        for column in range(width):
            for i in range(size // 4):
                frequency = math.exp(-2 * i * math.log(1e4) / (size / 2))
                encoded[2 * i, row, column] = math.sin(column * frequency)
                encoded[2 * i + 1, row, column] = math.cos(column * frequency)
                encoded[size // 2 + 2 * i, row, column] = math.sin(row * frequency)
                encoded[size // 2 + 2 * i + 1, row, column] = math.cos(row * frequency)
    return encoded


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.sizes = [channels - channels // 2, channels // 2]
        width = self.sizes[0] + CONDITION
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * self.sizes[1])
        self.gain, self.offset = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(drawn(*tensor.shape, scale=0.3))
            self.last.weight.mul_(2)  # so that the clamp matters
            self.gain.copy_(2 * math.log(math.exp(5) - 1) + drawn(channels, scale=0.3))
        matrix = torch.linalg.qr(drawn(channels, channels))[0].numpy().astype(np.float32).astype(float)
        self.register_buffer("matrix", torch.tensor(matrix))

    def forward(self, x, condition):
        x1, x2 = x.split(self.sizes, dim=1)
        a = 0.1 * self.last(F.relu(self.first(torch.cat([x1, condition], dim=1))))
        s, t = 1.9 * torch.tanh(a[:, : self.sizes[1]]), a[:, self.sizes[1] :]
        scale = 0.1 * F.softplus(self.gain, beta=0.5)
        y = torch.cat([x1, x2 * torch.exp(s) + t], dim=1) * scale + self.offset
        return F.linear(y, self.matrix), s.sum(dim=1) + torch.log(scale).sum()


class Flow(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels) for _ in range(BLOCKS))

    def forward(self, x, condition):
        log_det = 0.0
        for block in self.blocks:
            x, part = block(x, condition)
            log_det = log_det + part
        return x, log_det

    def log_likelihood(self, x, condition):
        z, log_det = self(x, condition)
        return -0.9189385332046727 * x.shape[1] - 0.5 * (z**2).sum(dim=1) + log_det

    def arrays(self):
        """Parameters as llb has them: kernels (in, out), blocks on the leading axis."""
        of = {"gain": lambda b: b.gain, "offset": lambda b: b.offset}
        of |= {"first/kernel": lambda b: b.first.weight.T, "first/bias": lambda b: b.first.bias}
        of |= {"last/kernel": lambda b: b.last.weight.T, "last/bias": lambda b: b.last.bias}
        return {name: np.stack([get(b).detach().numpy() for b in self.blocks]) for name, get in of.items()}

    def matrices(self):
        return np.stack([block.matrix.numpy() for block in self.blocks])


def rate_at(step):
    """Learning rate in 0-based step `step`: 25 parts, the first two of them a linear start."""
    lowest = RATE * 0.1**3
    part = step * 25 // TOTAL_STEPS
    if part < 2:
        warm_to = lowest + (RATE - lowest) * (1 + math.cos(math.pi * 2 / 25)) / 2
        done = step / (2 * TOTAL_STEPS / 25)
        return RATE / 10 + done * (warm_to - RATE / 10)
    return lowest + (RATE - lowest) * (1 + math.cos(math.pi * part / 25)) / 2


values = {"encoding": position_encoding(3, 5, 128)}
odd, x, condition = Flow(9), drawn(20, 9), drawn(20, CONDITION)
z, log_det = odd(x, condition)
values |= {"odd/x": x, "odd/condition": condition, "odd/z": z, "odd/log_det": log_det, "odd/fixed": odd.matrices()}
values |= {f"odd/params/{name}": array for name, array in odd.arrays().items()}

# two levels on a 2 × 2 grid, three images: all 12 vectors are one fibre
features = random.standard_normal((3, 2, 4, 8)).astype(np.float16)
values["features"] = features
encoded = torch.tensor(position_encoding(2, 2, CONDITION)).reshape(CONDITION, 4).T.repeat(3, 1)
losses = np.zeros((STEPS, 2))
for level in range(2):
    model, vectors = Flow(8), torch.tensor(features[:, level].astype(float)).reshape(12, 8)
    values[f"fixed/level_{level}"] = model.matrices()
    values |= {f"before/level_{level}/{name}": array for name, array in model.arrays().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        log_p = model.log_likelihood(vectors, encoded) / 8
        loss = -F.logsigmoid(log_p).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step, level] = loss.item()
    values |= {f"after/level_{level}/{name}": array for name, array in model.arrays().items()}
    values[f"likelihood/level_{level}"] = model.log_likelihood(vectors, encoded).reshape(3, 2, 2) / 8
values["losses"] = losses.sum(axis=1)
values["rates"] = np.array([rate_at(step) for step in range(TOTAL_STEPS)])

arrays = {}
for name, array in values.items():
    array = array.detach().numpy() if isinstance(array, torch.Tensor) else array
    arrays[name] = array if array.dtype == np.float16 else np.asarray(array, np.float32)
np.savez_compressed(Path(__file__).with_name("cflow.npz"), **arrays)
