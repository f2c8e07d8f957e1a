"""Weights that a reference and its test draw alike, so that they need not be stored."""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter or a batch statistic at the start, float32, in the shape that it has in llb."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)
    if name.endswith("kernel"):
        return numbers * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
    if name.endswith(("scale", "variance")):
        return 1 + np.abs(numbers) / 4
    return numbers / 4
