"""Stored AUPRO values for tests/test_metrics.py, from an implementation that shares nothing with llb.

    pip install numpy scikit-image && python tests/reference/make_metrics.py

Literal and slow: for each distinct score as the threshold, the maps become binary, every region's found share and the
false-positive rate are counted pixel by pixel, and the curve's area is summed piece by piece up to 0.3. Regions are
scikit-image's 8-connected ones. Twenty random cases: few and many ties, large and small regions, a good image in each.
"""

from pathlib import Path

import numpy as np
from skimage.measure import label, regionprops

LIMIT = 0.3


def aupro(masks, maps):
    regions = []
    for index, mask in enumerate(masks):
        for region in regionprops(label(mask, connectivity=2)):
            regions.append((index, region.coords))
    points = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        found = maps >= threshold
        rate = np.count_nonzero(found & ~masks) / np.count_nonzero(~masks)
        shares = [found[index][coords[:, 0], coords[:, 1]].mean() for index, coords in regions]
        points.append((rate, sum(shares) / len(shares)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= LIMIT:
            break
        if x1 > LIMIT:
            x1, y1 = LIMIT, y0 + (y1 - y0) * (LIMIT - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / LIMIT


def random_case(rng, levels):
    """masks bool (3, 20, 20), the last image good; maps float32 (3, 20, 20); the more `levels`, the fewer ties."""
    masks = np.zeros((3, 20, 20), bool)
    for mask in masks[:2]:
        for _ in range(rng.integers(1, 5)):
            (y, x), (h, w) = rng.integers(0, 18, 2), rng.integers(1, 7, 2)
            mask[y : y + h, x : x + w] = True
        mask |= rng.random(mask.shape) < 0.01  # lone pixels, some of them touching a region at a corner
    signal = 0.2 + rng.random(masks.shape) + rng.uniform(-0.2, 0.8) * masks
    return masks, np.round(signal * levels / 2).astype(np.float32)


def main():
    rng = np.random.default_rng(0)
    levels = [2, 3, 5, 10, 20, 50, 100, 200, 400, 1000] * 2
    cases = [random_case(rng, count) for count in levels]
    masks = np.stack([masks for masks, _ in cases])
    maps = np.stack([maps for _, maps in cases])
    values = np.array([aupro(*case) for case in cases])
    print(values)
    np.savez_compressed(
        Path(__file__).with_name("metrics.npz"),
        masks=np.packbits(masks),
        maps=maps.astype(np.uint16),
        shape=masks.shape,
        aupro=values,
    )


if __name__ == "__main__":
    main()
