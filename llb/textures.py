"""Images that code draws, for pre-training `tiny`: surfaces, shapes and lines of many kinds, none of a real object.

Each kind is a function (random, size) → float (size, size, 3) in about 0..1. What is learned from them is how image
structure goes on from one patch to the next; variety matters more than realism (Baradad et al., "Learning to see by
looking at noise", NeurIPS 2021).
"""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    return rows, columns


def _unit(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / max(float(np.ptp(x)), 1e-6)


def _colourise(random: np.random.Generator, grey: np.ndarray) -> np.ndarray:
    """A grey picture in 0..1 → a gradient between two to three colours."""
    stops = random.uniform(0, 1, (int(random.integers(2, 4)), 3))
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(grey, places, stops[:, channel]) for channel in range(3)], axis=-1)


def spectrum(random: np.random.Generator, size: int) -> np.ndarray:
    """Noise with a power-law spectrum, stretched along one direction."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    angle, stretch = random.uniform(0, np.pi), np.exp(random.uniform(0, 2))
    u = fx * np.cos(angle) + fy * np.sin(angle)
    v = (fy * np.cos(angle) - fx * np.sin(angle)) * stretch
    amplitude = (np.hypot(u, v) + 1 / size) ** -random.uniform(0.5, 2.5)
    phase = random.normal(size=amplitude.shape) + 1j * random.normal(size=amplitude.shape)
    return _colourise(random, _unit(np.fft.irfft2(amplitude * phase, s=(size, size))))


def grating(random: np.random.Generator, size: int) -> np.ndarray:
    """One to three sets of parallel bars, multiplied."""
    rows, columns = _grid(size)
    total = np.ones((size, size))
    for _ in range(int(random.integers(1, 4))):
        angle, period = random.uniform(0, np.pi), np.exp(random.uniform(np.log(4), np.log(40)))
        wave = np.sin(2 * np.pi * (columns * np.cos(angle) + rows * np.sin(angle)) / period + random.uniform(0, 6.3))
        total *= 0.5 + 0.5 * np.tanh(wave * random.uniform(0.5, 5))
    return _colourise(random, _unit(total))


def cells(random: np.random.Generator, size: int) -> np.ndarray:
    """Voronoi cells: flat, with borders, or shaded by the distance."""
    seeds = random.uniform(0, size, (int(np.exp(random.uniform(np.log(10), np.log(400)))), 2))
    points = np.stack(_grid(size), axis=-1).reshape(-1, 2)
    distance, index = cKDTree(seeds).query(points, k=2)
    style = random.integers(3)
    if style == 0:
        return random.uniform(0, 1, (len(seeds), 3))[index[:, 0]].reshape(size, size, 3)
    value = distance[:, 1] - distance[:, 0] if style == 1 else distance[:, 0]
    grey = np.clip(value.reshape(size, size) / random.uniform(2, 12), 0, 1)
    return _colourise(random, grey)


def leaves(random: np.random.Generator, size: int) -> np.ndarray:
    """Dead leaves: overlapping discs, boxes and rings, each filled with its own colour or texture."""
    rows, columns = _grid(size)
    picture = np.broadcast_to(random.uniform(0, 1, 3), (size, size, 3)).copy()
    fills = [KINDS[name](random, size) for name in random.choice(["spectrum", "grating"], 2)]
    for _ in range(int(random.integers(10, 40))):
        radius = min(size / 2.5, 4 / random.uniform(0.05, 1) ** 0.9)
        cy, cx = random.uniform(0, size, 2)
        angle, aspect = random.uniform(0, np.pi), random.uniform(0.4, 1)
        u = (columns - cx) * np.cos(angle) + (rows - cy) * np.sin(angle)
        v = ((rows - cy) * np.cos(angle) - (columns - cx) * np.sin(angle)) / aspect
        shape = random.integers(3)
        distance = np.maximum(abs(u), abs(v)) if shape == 1 else np.hypot(u, v)
        distance = abs(distance - 0.8 * radius) + 0.8 * radius if shape == 2 else distance - 0
        cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
        fill = random.uniform(0, 1, 3) if random.random() < 0.6 else fills[int(random.integers(2))]
        picture += cover * (fill - picture)
    return picture


def strokes(random: np.random.Generator, size: int) -> np.ndarray:
    """Curved lines on a soft ground."""
    picture = spectrum(random, size) * 0.3 + random.uniform(0, 0.7, 3)
    rows, columns = _grid(size)
    points = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    for _ in range(int(random.integers(2, 10))):
        heading = random.uniform(0, 2 * np.pi) + np.cumsum(random.normal(0, random.uniform(0.02, 0.3), 60))
        line = random.uniform(0, size, 2) + np.cumsum(np.stack([np.sin(heading), np.cos(heading)], 1) * 2, axis=0)
        width = random.uniform(0.5, 3)
        distance = cKDTree(line).query(points, distance_upper_bound=width + 2)[0].reshape(size, size)
        cover = np.clip(width + 0.5 - distance, 0, 1)[..., None]
        picture += cover * (random.uniform(0, 1, 3) - picture)
    return picture


def rings(random: np.random.Generator, size: int) -> np.ndarray:
    """Concentric waves around one or two centres."""
    rows, columns = _grid(size)
    total = np.zeros((size, size))
    for _ in range(int(random.integers(1, 3))):
        cy, cx = random.uniform(-0.3 * size, 1.3 * size, 2)
        total += np.sin(np.hypot(rows - cy, columns - cx) * 2 * np.pi / np.exp(random.uniform(np.log(4), np.log(40))))
    return _colourise(random, _unit(np.tanh(total * random.uniform(0.5, 4))))


def relief(random: np.random.Generator, size: int) -> np.ndarray:
    """A bumpy surface under a lamp: smooth at one scale, or ridged, with a glossy share."""
    height = gaussian_filter(random.normal(size=(size, size)), sigma := np.exp(random.uniform(0.3, 2.3)))
    height /= height.std()
    if random.random() < 0.5:
        height = abs(height)
    slope = np.stack(np.gradient(height)) * random.uniform(0.3, 1.5) * sigma
    lamp, up = random.uniform(0, 2 * np.pi), random.uniform(0.5, 1.5)
    cosine = (slope[0] * np.sin(lamp) + slope[1] * np.cos(lamp) + up) / np.sqrt(1 + (slope**2).sum(axis=0))
    light = np.clip(cosine / np.hypot(1, up), 0, 1)
    gloss = random.uniform(0, 0.6) * light ** random.uniform(5, 30)
    return random.uniform(0.2, 1, 3) * (0.2 + 0.8 * light)[..., None] + gloss[..., None]


def scatter(random: np.random.Generator, size: int) -> np.ndarray:
    """One small motif, strewn about: turned by right angles, lighter or darker, on a soft ground."""
    side = int(random.integers(5, 24))
    shape = gaussian_filter(random.normal(size=(side, side)), side / random.uniform(5, 10))
    rows, columns = _grid(side)
    round_edge = np.clip(side / 2 - np.hypot(rows - side / 2 + 0.5, columns - side / 2 + 0.5), 0, 1)
    cover = np.clip(shape / shape.std() * 2 + 1, 0, 1) * round_edge
    motif = (
        spectrum(random, side) if random.random() < 0.5 else np.broadcast_to(random.uniform(0, 1, 3), (side, side, 3))
    )
    picture = spectrum(random, size) * random.uniform(0, 0.5) + random.uniform(0, 0.6, 3)
    for _ in range(int(random.uniform(0.3, 2.5) * (size / side) ** 2)):
        turns, (top, left) = int(random.integers(4)), random.integers(0, size - side + 1, 2)
        under = picture[top : top + side, left : left + side]
        fill = np.rot90(motif, turns) * random.uniform(0.8, 1.2)
        under += np.rot90(cover, turns)[..., None] * (fill - under)
    return picture


def panels(random: np.random.Generator, size: int) -> np.ndarray:
    """A rectangle cut in two again and again; the parts have colours or textures of their own, some have seams."""
    fills = [KINDS[name](random, size) for name in random.choice(["spectrum", "grating", "relief"], 2)]
    picture, seam = np.empty((size, size, 3)), random.uniform(0, 1, 3)
    parts, smallest = [(0, 0, size, size)], random.integers(8, 40)
    while parts:
        top, left, bottom, right = parts.pop()
        tall = bottom - top > right - left
        length = bottom - top if tall else right - left
        if length > 2 * smallest and random.random() < 0.9:
            cut = int(random.integers(smallest, length - smallest + 1))
            near, far = ((top + cut, right), (top + cut, left)) if tall else ((bottom, left + cut), (top, left + cut))
            parts += [(top, left, *near), (*far, bottom, right)]
            continue
        fill = random.uniform(0, 1, 3) if random.random() < 0.5 else fills[int(random.integers(2))]
        part = np.s_[top:bottom, left:right]
        picture[part] = np.broadcast_to(fill, (size, size, 3))[part]
        if random.random() < 0.4:
            picture[top : top + 2, left:right] = picture[top:bottom, left : left + 2] = seam
    return picture


KINDS = {f.__name__: f for f in (spectrum, grating, cells, leaves, strokes, rings, relief, scatter, panels)}
MIXES = {  # to compare: what variety is worth
    "noise": ("spectrum", "cells"),
    "six": ("spectrum", "grating", "cells", "leaves", "strokes", "rings"),
    "nine": tuple(KINDS),
}


def _warp(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    size = len(picture)
    coarse = random.normal(0, random.uniform(1, 8), (2, 5, 5))
    shift = np.stack([zoom(field, size / 5, order=3, grid_mode=True, mode="nearest") for field in coarse])
    at = np.mgrid[:size, :size] + shift
    return np.stack([map_coordinates(picture[..., c], at, order=1, mode="reflect") for c in range(3)], axis=-1)


def draw(random: np.random.Generator, size: int = 112, kinds: tuple[str, ...] = tuple(KINDS)) -> np.ndarray:
    """One image: one kind or two of them, warped, shaded, blurred, scaled down, turned, with noise, half of them grey.

    Returns:
        uint8 (size, size, 3).
    """
    canvas = int(random.integers(size, 193)) if size < 193 else size
    picture = KINDS[random.choice(kinds)](random, canvas)
    if random.random() < 0.5:  # two kinds, one inside a soft region of the other
        other = KINDS[random.choice(kinds)](random, canvas)
        region = gaussian_filter(random.normal(size=(canvas, canvas)), canvas / random.uniform(6, 20))
        region = np.clip(region / region.std() * random.uniform(1, 20) + 0.5, 0, 1)[..., None]
        picture = picture * (1 - region) + other * region
    if random.random() < 0.4:
        picture = _warp(random, picture)
    if random.random() < 0.5:  # shading
        coarse = random.uniform(0.4, 1.0, (3, 3))
        picture = picture * zoom(coarse, canvas / 3, order=1, grid_mode=True, mode="nearest")[..., None]
    if random.random() < 0.4:
        picture = gaussian_filter(picture, (s := random.uniform(0.3, 2), s, 0))
    picture = zoom(picture, (size / canvas, size / canvas, 1), order=1, grid_mode=True, mode="nearest")
    picture = np.rot90(picture, int(random.integers(4)))
    if random.random() < 0.5:
        picture = picture[:, ::-1]
    picture = np.clip(picture, 0, 1) ** np.exp(random.normal(0, 0.4))
    if random.random() < 0.5:
        picture = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1)
    contrast = random.uniform(0.15, 1.2)
    picture = (picture - picture.mean()) * contrast + random.uniform(0.25, 0.75)
    picture = picture + random.normal(0, random.uniform(0, 0.03), picture.shape)
    return np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
