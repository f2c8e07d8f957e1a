"""Reference values of tests/test_banks.py: PatchCore's, SoftPatch's and MuSc's arithmetic as PyTorch and scikit-learn
do it, written plainly. `python tests/reference/banks_reference.py` writes banks.npz beside itself."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import LocalOutlierFactor

random = np.random.default_rng(0)
stored = {}


def normal(*shape):
    return random.normal(size=shape).astype(np.float32)


# ---- the embedding: unfold 3 × 3, upsample tap by tap, average adaptively twice ----
fine, coarse = (torch.tensor(normal(1, channels, side, side)) for channels, side in ((512, 4), (1024, 2)))
fine, coarse = (one.half().float() for one in (fine, coarse))
stored |= {"fine": fine.half().numpy(), "coarse": coarse.half().numpy()}


def windows(maps):
    """(1, C, h, w) → (C, 3, 3, h, w)."""
    channels, height, width = maps.shape[1:]
    return F.unfold(maps, 3, padding=1).reshape(channels, 3, 3, height, width)


tapped = windows(coarse)
tapped = F.interpolate(tapped.reshape(1, -1, 2, 2), size=(4, 4), mode="bilinear", align_corners=False)
layers = [windows(fine), tapped.reshape(1024, 3, 3, 4, 4)]
flat = [layer.permute(3, 4, 0, 1, 2).reshape(16, 1, -1) for layer in layers]  # (patches, 1, 9 C)
stack = torch.stack([F.adaptive_avg_pool1d(layer, 1024)[:, 0] for layer in flat], dim=1)  # (patches, 2, 1024)
embedded = F.adaptive_avg_pool1d(stack.reshape(16, 1, -1), 1024)[:, 0]
columns = np.sort(random.permutation(1024)[:256])
stored |= {"columns": columns, "embedded": embedded.numpy()[:, columns]}

# ---- the greedy coreset, one pass over all rows for each choice ----
rows = torch.tensor(normal(900, 8) * random.uniform(0.2, 2.0, (900, 1)).astype(np.float32))
starts = random.permutation(900)[:10]
value = torch.cdist(rows.double(), rows[starts].double()).mean(dim=1)
chosen = []
for _ in range(450):
    chosen.append(int(value.argmax()))
    value = torch.minimum(value, torch.cdist(rows.double(), rows[chosen[-1:]].double())[:, 0])
stored |= {"rows": rows.numpy(), "starts": starts, "chosen": np.array(chosen)}

# ---- the nearest entries ----
queries, entries = normal(40, 16) + 5, normal(70, 16) + 5
distance, number = torch.cdist(torch.tensor(queries).double(), torch.tensor(entries).double()).topk(3, largest=False)
stored |= {"queries": queries, "entries": entries, "nearest": (distance**2).numpy(), "number": number.numpy()}

# ---- the local outlier factor ----
cloud = normal(60, 5)
cloud[:3] *= 4
stored["cloud"] = cloud
for neighbours in (5, 6):
    stored[f"lof{neighbours}"] = -LocalOutlierFactor(neighbours).fit(cloud.astype(float)).negative_outlier_factor_

# ---- mutual scores: layer normalisation over a whole map, r × r means, unit length, two layers, three r ----
images = torch.tensor(normal(11, 2, 9, 6) + normal(1, 2, 9, 6)).half().float()  # (images, layers, 3 · 3, width)
parts = []
for side in (1, 3, 5):
    for layer in images.unbind(dim=1):
        maps = F.layer_norm(layer.reshape(11, 3, 3, 6).permute(0, 3, 1, 2), (6, 3, 3))
        maps = F.avg_pool2d(maps, side, stride=1, padding=side // 2)  # zeros count
        patches = F.normalize(maps.flatten(2).transpose(1, 2), dim=-1)  # (images, 9, 6)
        smallest = torch.stack([torch.cdist(patches[i], patches).amin(dim=-1) for i in range(11)])  # (i, j, 9)
        others = torch.stack([torch.cat([smallest[i, :i], smallest[i, i + 1 :]]) for i in range(11)])  # (11, 10, 9)
        parts.append(others.sort(dim=1).values[:, : int(0.3 * 10)].mean(dim=1))
stored |= {"images": images.numpy().astype(np.float16), "mutual": torch.stack(parts).mean(dim=0).numpy()}

np.savez_compressed(Path(__file__).with_suffix("").with_name("banks.npz"), **stored)
