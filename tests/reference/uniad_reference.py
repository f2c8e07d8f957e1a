"""Reference values for tests/test_uniad.py, from an independent PyTorch implementation.

    pip install torch==2.13.0 numpy && python tests/reference/uniad_reference.py

Writes uniad.npz beside this file. The model has the published form: 2 + 2 layers, 8 wide, 2 heads, tokens of two maps
(2 × 16², 3 × 8²) on a grid of 8². Computed in float64, stored in float32.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LAYERS, SIDE, CHANNELS, BATCH, IMAGE = 8, 2, 2, 8, 5, 2, 32
torch.set_default_dtype(torch.float64)


def mask():
    """True where a key may not be seen: the 7 × 7 window around the query, written with loops."""
    blocked = torch.zeros(SIDE, SIDE, SIDE, SIDE, dtype=torch.bool)
    for row in range(SIDE):
        for column in range(SIDE):
            blocked[row, column, max(0, row - 3) : row + 4, max(0, column - 3) : column + 4] = True
    return blocked.reshape(SIDE**2, SIDE**2)


class Feedforward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


def attention():
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.ffn = attention(), Feedforward()
        self.norm1, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, position):
        x = self.norm1(x + self.attention(x + position, x + position, x, attn_mask=mask())[0])
        return self.norm3(x + self.ffn(x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.attention_output, self.ffn = attention(), attention(), Feedforward()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.query = nn.Parameter(torch.zeros(SIDE**2, WIDTH))

    def forward(self, output, memory, position):
        t = self.query.expand(len(memory), -1, -1)
        t = self.norm1(t + self.attention(t + position, memory + position, memory, attn_mask=mask())[0])
        t = self.norm2(t + self.attention_output(t + position, output + position, output, attn_mask=mask())[0])
        return self.norm3(t + self.ffn(t))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.columns, self.rows = (nn.Parameter(torch.zeros(SIDE, WIDTH // 2)) for _ in range(2))
        self.encoder = nn.ModuleList([Encoder() for _ in range(LAYERS)])
        self.decoder = nn.ModuleList([Decoder() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        position = torch.stack(
            [torch.cat([self.columns[j], self.rows[i]]) for i in range(SIDE) for j in range(SIDE)]
        )  # (P, E)
        memory = self.input(tokens)
        for layer in self.encoder:
            memory = layer(memory, position)
        x = memory
        for layer in self.decoder:
            x = layer(x, memory, position)
        return self.output(self.norm(x))


def our_name(name):
    for theirs, ours in (
        *(("encoder.", "encoder_"), ("decoder.", "decoder_"), (".ffn.", "."), ("in_proj_weight", "in_proj")),
        (".weight", ".scale" if "norm" in name else ".kernel"),
    ):
        name = name.replace(theirs, ours)
    return name.replace(".", "/")


def store(stored, prefix, values):
    for name, tensor in values.items():
        array, ours = tensor.detach().numpy().astype(np.float32), our_name(name)
        stored[prefix + ours] = array.T if ours.endswith(("kernel", "in_proj")) else array


def main():
    random, model, stored = np.random.default_rng(9), Model(), {}
    for name, parameter in model.named_parameters():
        value = random.normal(0, 0.4, parameter.shape) + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data = torch.tensor(value.astype(np.float32).astype(np.float64))
    store(stored, "params/", dict(model.named_parameters()))
    maps = [random.normal(0, 1, (BATCH, side, side, c)).astype(np.float16) for side, c in ((16, 2), (8, 3))]
    stored["features"] = np.concatenate([one.reshape(BATCH, -1) for one in maps], axis=1)
    maps = [torch.tensor(one.astype(np.float64)).permute(0, 3, 1, 2) for one in maps]
    maps = [F.interpolate(one, size=SIDE, mode="bilinear", align_corners=True) for one in maps]
    tokens = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
    stored["tokens"] = tokens.numpy().astype(np.float32)
    stored["blocked"] = mask().numpy()

    rebuilt = model(tokens)
    stored["rebuilt"] = rebuilt.detach().numpy().astype(np.float32)
    distance = ((rebuilt - tokens) ** 2).sum(-1).sqrt().reshape(BATCH, 1, SIDE, SIDE)
    maps = F.interpolate(distance, size=IMAGE, mode="bilinear", align_corners=True)
    stored["map"] = maps[:, 0].detach().numpy().astype(np.float32)
    stored["score"] = F.avg_pool2d(maps, 16, stride=1).amax(dim=(1, 2, 3)).detach().numpy().astype(np.float32)

    noise = random.normal(0, 1, tokens.shape).astype(np.float32)
    stored["noise"] = noise
    noisy = torch.empty_like(tokens)
    for image in range(BATCH):
        for token in range(SIDE**2):
            length = torch.linalg.vector_norm(tokens[image, token]) / CHANNELS
            noisy[image, token] = tokens[image, token] + torch.tensor(noise[image, token]) * length * 20.0
    stored["noisy"] = noisy.numpy().astype(np.float32)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4)
    loss = F.mse_loss(model(noisy), tokens)
    loss.backward()
    stored["loss"] = np.float32(loss.item())
    store(stored, "gradients/", {name: parameter.grad for name, parameter in model.named_parameters()})
    stored["norm"] = np.float32(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    store(stored, "update/", {name: parameter - before[name] for name, parameter in model.named_parameters()})
    np.savez_compressed(Path(__file__).parent / "uniad.npz", **stored)


if __name__ == "__main__":
    main()
