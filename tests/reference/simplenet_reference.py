"""Reference values for tests/test_simplenet.py, from an independent PyTorch implementation.

    pip install torch==2.13.0 numpy && python tests/reference/simplenet_reference.py

Writes simplenet.npz beside this file. Computed in float64, stored in float32. The embedding is computed as the release
does: unfold, upsample each tap of each channel, average adaptively to a width, stack the layers, average again.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

torch.set_default_dtype(torch.float64)
random = np.random.default_rng(7)
WIDTH, HIDDEN, STEPS = 24, 16, 3


def drawn(*shape, scale=1.0):
    """Normal numbers that float32 holds exactly."""
    return torch.tensor((scale * random.standard_normal(shape)).astype(np.float32).astype(float))


def released_embedding(maps, width):
    """maps: (B, C, h, w), finest first → (B · h · w, width)."""
    batch, _, height, across = maps[0].shape
    layers = []
    for one in maps:
        channels, rows, columns = one.shape[1:]
        patches = F.unfold(one, 3, padding=1).reshape(batch * channels * 9, 1, rows, columns)
        patches = F.interpolate(patches, (height, across), mode="bilinear", align_corners=False)
        patches = patches.reshape(batch, channels * 9, height * across).transpose(1, 2).reshape(-1, 1, channels * 9)
        layers.append(F.adaptive_avg_pool1d(patches, width)[:, 0])
    stacked = torch.stack(layers, dim=1).reshape(len(layers[0]), 1, -1)
    return F.adaptive_avg_pool1d(stacked, width)[:, 0]


fine, coarse = drawn(2, 8, 7, 7), drawn(2, 16, 4, 4)
x = released_embedding([fine, coarse], WIDTH)
noise = drawn(STEPS, len(x), WIDTH, scale=0.3)  # large, so that it matters in the comparison

adaptor = nn.Linear(WIDTH, WIDTH, bias=False)
first, norm, last = nn.Linear(WIDTH, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, 1, bias=False)
discriminator = nn.Sequential(first, norm, nn.LeakyReLU(0.2), last)
with torch.no_grad():
    for tensor in (*adaptor.parameters(), *discriminator.parameters()):
        tensor.copy_(drawn(*tensor.shape, scale=0.3))
    norm.running_mean.copy_(drawn(HIDDEN))
    norm.running_var.copy_(drawn(HIDDEN).abs() + 0.5)


def state():
    """Parameters and running statistics, named and laid out as llb's."""
    named = {"adaptor": adaptor, "discriminator/first": first, "discriminator/last": last}
    arrays = {f"params/{name}/kernel": layer.weight.T for name, layer in named.items()}
    arrays |= {"params/discriminator/norm/scale": norm.weight, "params/discriminator/norm/bias": norm.bias}
    arrays |= {"batch_stats/norm/mean": norm.running_mean, "batch_stats/norm/var": norm.running_var}
    return {name: array.detach().numpy().copy() for name, array in arrays.items()}


values = {"fine": fine.permute(0, 2, 3, 1), "coarse": coarse.permute(0, 2, 3, 1), "noise": noise}
values["embedding"] = x.reshape(2, 7, 7, WIDTH)
values |= {f"before/{name}": array for name, array in state().items()}
discriminator.eval()
values["scores_running"] = discriminator(adaptor(x))[:, 0].detach()
discriminator.train()

adaptor_optimizer = torch.optim.AdamW(adaptor.parameters(), lr=1e-2, weight_decay=0.01)
optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-2, weight_decay=1e-5)
losses = []
for step in range(STEPS):
    true = adaptor(x)
    scores = discriminator(torch.cat([true, true + noise[step]]))[:, 0]
    if step == 0:
        values["scores_batch"] = scores.detach()
        # the release's two linear layers before BatchNorm have biases; they change nothing
        mixed = first(torch.cat([true, true + noise[step]]) + drawn(WIDTH)) + drawn(HIDDEN)
        biased = last(F.leaky_relu(F.batch_norm(mixed, None, None, norm.weight, norm.bias, True), 0.2))
        assert torch.allclose(biased[:, 0], scores)
    loss = (0.5 - scores[: len(x)]).clamp(min=0).mean() + (0.5 + scores[len(x) :]).clamp(min=0).mean()
    adaptor_optimizer.zero_grad()
    optimizer.zero_grad()
    loss.backward()
    adaptor_optimizer.step()
    optimizer.step()
    losses.append(loss.item())
values["losses"] = np.array(losses)
values |= {f"after/{name}": array for name, array in state().items()}

arrays = {name: np.asarray(array, np.float32) for name, array in values.items()}
np.savez_compressed(Path(__file__).with_name("simplenet.npz"), **arrays)
