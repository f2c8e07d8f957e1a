"""Reference values for tests/test_dinomaly.py and tests/test_recipes.py, from an independent PyTorch implementation.

    pip install torch==2.13.0 numpy scipy && python tests/reference/make_dinomaly.py

Writes dinomaly.npz and optimizer.npz beside this file. Everything is computed in float64 and stored in float32, so that
the stored values are right to the last digit that the tests compare.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

HERE = Path(__file__).parent
WIDTH, HEADS, DEPTH, PREFIX, GRID, BATCH = 16, 2, 4, 5, 4, 3
torch.set_default_dtype(torch.float64)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        heads = []
        for q, k, v in zip(*(part.chunk(HEADS, dim=-1) for part in self.qkv(x).chunk(3, dim=-1))):
            q, k = F.elu(q) + 1, F.elu(k) + 1
            weights = q @ k.transpose(-2, -1)  # the explicit T × T matrix that the product form avoids
            heads.append(weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))
        return self.proj(torch.cat(heads, dim=-1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-8)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-8)
        self.attn = Attention()
        self.mlp = Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottleneck = Mlp()
        for index in range(DEPTH):
            setattr(self, f"block_{index}", Block())

    def forward(self, features):
        x = self.bottleneck(features.mean(dim=1))
        outputs = []
        for index in range(DEPTH):
            x = getattr(self, f"block_{index}")(x)
            outputs.append(x)
        outputs = outputs[::-1]
        first, second = outputs[: DEPTH // 2], outputs[DEPTH // 2 :]
        return [torch.stack(group).mean(dim=0)[:, PREFIX:] for group in (first, second)]


def loss_of(decoded, features, p, factor):
    """Global cosine with a hook on each decoded group, as Dinomaly describes it."""
    total = 0.0
    for group, output in enumerate(decoded):
        target = features[:, group, PREFIX:]
        distance = 1 - F.cosine_similarity(target, output.detach(), dim=-1)  # (B, P)
        if p > 0:
            count = int(distance.numel() * (1 - p) + 1e-9)
            threshold = distance.flatten().sort(descending=True).values[count - 1]
            easy = (distance < threshold).unsqueeze(-1)
            output.register_hook(lambda gradient, easy=easy: torch.where(easy, gradient * factor, gradient))
        total = total + (1 - F.cosine_similarity(target.flatten(1), output.flatten(1), dim=-1)).mean()
    return total / len(decoded)


def flax_name(name):
    """PyTorch's parameter name → the path in the Flax tree."""
    parts = name.split(".")
    kind = {"weight": "kernel", "bias": "bias"}[parts[-1]]
    if parts[-2].startswith("norm"):
        return "/".join([*parts[:-1], kind.replace("kernel", "scale")])
    return "/".join([*parts[:-1], "dense", kind])


def flax_value(tensor, name):
    array = tensor.detach().numpy()
    return (array.T if name.endswith("kernel") else array).astype(np.float32)


def make_dinomaly():
    random = np.random.default_rng(7)
    model = Detector()
    stored = {}
    for name, parameter in model.named_parameters():
        # Rounded to float32 first: both sides start from the same numbers.
        value = random.normal(0, 0.3, parameter.shape) + (1.0 if "norm" in name and "weight" in name else 0.0)
        parameter.data = torch.tensor(value.astype(np.float32).astype(np.float64))
        stored["params/" + flax_name(name)] = flax_value(parameter, flax_name(name))
    features = random.normal(0, 1, (BATCH, 2, PREFIX + GRID * GRID, WIDTH)).astype(np.float32)
    stored["features"] = features
    features = torch.tensor(features.astype(np.float64))
    for case, p, factor in (("off", 0.0, 1.0), ("llbnad", 0.9, 0.0), ("dinomaly", 0.5, 0.1)):
        model.zero_grad()
        decoded = model(features)
        loss = loss_of(decoded, features, p, factor)
        loss.backward()
        stored[f"{case}/p"], stored[f"{case}/factor"] = np.float64(p), np.float64(factor)
        stored[f"{case}/loss"] = np.float32(loss.item())
        for name, parameter in model.named_parameters():
            stored[f"{case}/gradients/" + flax_name(name)] = flax_value(parameter.grad, flax_name(name))
    stored["decoded"] = torch.stack(decoded, dim=1).detach().numpy().astype(np.float32)

    # the anomaly map by the long way: upsample each group, average, SciPy's filter
    for size in (112, 392):
        distance = random.uniform(0, 1, (2, 2, 14, 14))
        big = F.interpolate(torch.tensor(distance), size=(size, size), mode="bilinear", align_corners=True)
        maps = np.stack([gaussian_filter(one.mean(0).numpy(), sigma=4) for one in big])
        stored[f"map_{size}/distance"] = distance.reshape(2, 2, 196).astype(np.float32)
        stored[f"map_{size}/map"] = maps[:, ::7, ::7].astype(np.float32)  # every seventh pixel keeps the file small
        top = maps.reshape(2, -1)
        top.sort(axis=1)
        stored[f"map_{size}/score"] = top[:, -int(size * size * 0.01) :].mean(axis=1).astype(np.float32)
    np.savez_compressed(HERE / "dinomaly.npz", **stored)


def stable_adamw(parameters, moments, step, rate, b1=0.9, b2=0.999, eps=1e-10, decay=1e-4, threshold=1.0):
    """One step of StableAdamW with AMSGrad, in place."""
    for parameter, moment in zip(parameters, moments):
        gradient = parameter.grad
        parameter.data *= 1 - rate * decay
        moment["m"] = b1 * moment["m"] + (1 - b1) * gradient
        moment["v"] = b2 * moment["v"] + (1 - b2) * gradient**2
        moment["max"] = torch.maximum(moment["max"], moment["v"])
        denominator = moment["max"].sqrt() / (1 - b2**step) ** 0.5 + eps
        rms = ((gradient / denominator) ** 2).mean().sqrt()
        parameter.data -= rate / (1 - b1**step) / max(1.0, rms.item() / threshold) * moment["m"] / denominator


def make_optimizer():
    """40 steps of both recipes on gradients that are given, with clipping and schedule."""
    random = np.random.default_rng(11)
    start = [random.normal(0, 1, shape).astype(np.float32) for shape in ((5, 3), (4,))]
    scale = 10.0 ** random.uniform(-3, 1.5, 40)  # some steps are clipped, some are not
    gradients = [[(random.normal(0, s, a.shape)).astype(np.float32) for a in start] for s in scale]
    stored = {f"start_{i}": a for i, a in enumerate(start)}
    for i in range(2):
        stored[f"gradients_{i}"] = np.stack([g[i] for g in gradients])

    for recipe in ("llbnad", "dinomaly"):
        parameters = [nn.Parameter(torch.tensor(a.astype(np.float64))) for a in start]
        moments = [{key: torch.zeros_like(p) for key in ("m", "v", "max")} for p in parameters]
        adam = torch.optim.Adam(parameters, lr=5e-3, betas=(0.5, 0.999))
        path = []
        for step in range(40):
            for parameter, gradient in zip(parameters, gradients[step]):
                parameter.grad = torch.tensor(gradient.astype(np.float64))
            norm = sum((p.grad**2).sum() for p in parameters).sqrt().item()
            bound = {"llbnad": 5.0, "dinomaly": 0.1}[recipe]
            for parameter in parameters:
                parameter.grad *= min(1.0, bound / norm)
            if recipe == "llbnad":
                adam.param_groups[0]["lr"] = 5e-3 * 0.1 ** (step // 7)
                adam.step()
            else:
                warmup = 4  # a tenth of 40
                if step < warmup:
                    rate = np.linspace(0, 2e-3, warmup)[step]
                else:
                    rate = 2e-4 + 0.5 * (2e-3 - 2e-4) * (1 + np.cos(np.pi * (step - warmup) / (40 - warmup)))
                stable_adamw(parameters, moments, step + 1, rate)
            path.append(np.concatenate([p.detach().numpy().ravel() for p in parameters]))
        stored[f"{recipe}/path"] = np.stack(path).astype(np.float32)
    np.savez_compressed(HERE / "optimizer.npz", **stored)


if __name__ == "__main__":
    make_dinomaly()
    make_optimizer()
