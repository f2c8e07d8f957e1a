"""Reference values of tests/test_gaussians.py: PaDiM's and the PCA residual's arithmetic as PyTorch does it, written
plainly in float64. `python tests/reference/gaussians_reference.py` writes gaussians.npz beside itself."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
IMAGES, NEW, DEPTH = 30, 5, 8
generator = np.random.default_rng(0)


def normal(*shape):
    """Images whose features have a mean at each position, as cached: float16."""
    mean = 2 * generator.normal(size=shape[1:])
    return torch.tensor((mean + generator.normal(size=shape)).astype(np.float16)).double()


def mahalanobis(x):
    """(N, C, h, w), the last NEW of which are new → their distances (NEW, h, w), position by position."""
    distances = torch.empty(NEW, *x.shape[2:])
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            here = x[:, :, row, column]
            covariance = torch.cov(here[:IMAGES].T) + 0.01 * torch.eye(here.shape[1])
            deviation = (here[IMAGES:] - here[:IMAGES].mean(dim=0)).T
            distances[:, row, column] = (deviation * torch.linalg.solve(covariance, deviation)).sum(dim=0).sqrt()
    return distances


def drawn(x):
    random.seed(1024)
    return x[:, random.sample(range(x.shape[1]), DEPTH)]


def residual(x):
    """(N, C, h, w) → distances of the last NEW from the components that explain 95 % of the others' variance."""
    patches = x.permute(0, 2, 3, 1)
    known = patches[:IMAGES].flatten(0, 2)
    mean = known.mean(dim=0)
    _, values, components = torch.linalg.svd(known - mean, full_matrices=False)
    explained = values.square().cumsum(dim=0) / values.square().sum()
    count = int((explained < 0.95).sum()) + 1
    deviation = patches[IMAGES:] - mean
    kept = components[:count]
    return (deviation - deviation @ kept.T @ kept).norm(dim=-1), count


# ---- published: strides 4, 8 and 16 of a small ResNet at 32 pixels, coarser maps copied to the finest grid ----
maps = [normal(IMAGES + NEW, channels, side, side) for channels, side in ((3, 8), (4, 4), (5, 2))]
joined = torch.cat([F.interpolate(one, size=(8, 8), mode="nearest") for one in maps], dim=1)
row = torch.cat([one.permute(0, 2, 3, 1).flatten(1) for one in maps], dim=1)

# ---- other encoders: 3 × 3 means of the two coarsest maps, on the coarser grid ----
means = [F.avg_pool2d(one, 3, stride=1, padding=1) for one in maps[-2:]]
coarse = torch.cat([F.interpolate(one, size=(2, 2), mode="bilinear", align_corners=False) for one in means], dim=1)
components, count = residual(coarse)

np.savez_compressed(
    Path(__file__).parent / "gaussians.npz",
    features=row.numpy().astype(np.float16),
    published=mahalanobis(drawn(joined)).numpy().astype(np.float32),
    pooled=mahalanobis(drawn(coarse)).numpy().astype(np.float32),
    residual=components.numpy().astype(np.float32),
    components=count,
)
print("components", count, "of", coarse.shape[1])
