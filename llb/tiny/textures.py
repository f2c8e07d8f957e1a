"""Draw the images that `tiny` is pre-trained on: surfaces, shapes and lines, no photograph and no real object.

Nine kinds of drawing. Each is a function (random, size) → float (size, size, 3) with values of about 0 to 1.
The encoder learns from them how image structure continues from patch to patch. For this, variety matters more than
realism (Baradad et al., "Learning to see by looking at noise", NeurIPS 2021).
"""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column number of every pixel: float32 (size, size) each."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    return rows, columns


def _unit(x: np.ndarray) -> np.ndarray:
    """Scale the values to 0..1."""
    return (x - x.min()) / max(float(np.ptp(x)), 1e-6)


def _colourise(random: np.random.Generator, grey: np.ndarray) -> np.ndarray:
    """Map a grey picture (S, S) in 0..1 to a gradient of two or three random colours: (S, S, 3)."""
    colours = random.uniform(0, 1, (int(random.integers(2, 4)), 3))
    levels = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(grey, levels, colours[:, channel]) for channel in range(3)], axis=-1)


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
    """Voronoi cells: flat, with borders, or shaded by the distance to the cell's centre."""
    centres = random.uniform(0, size, (int(np.exp(random.uniform(np.log(10), np.log(400)))), 2))
    points = np.stack(_grid(size), axis=-1).reshape(-1, 2)
    distance, index = cKDTree(centres).query(points, k=2)
    style = random.integers(3)
    if style == 0:
        return random.uniform(0, 1, (len(centres), 3))[index[:, 0]].reshape(size, size, 3)
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
        if shape == 2:
            distance = abs(distance - 0.8 * radius) + 0.8 * radius
        cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
        fill = random.uniform(0, 1, 3) if random.random() < 0.6 else fills[int(random.integers(2))]
        picture += cover * (fill - picture)
    return picture


def strokes(random: np.random.Generator, size: int) -> np.ndarray:
    """Curved lines on a blurred background."""
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
    """A smooth or ridged surface under a lamp, with some gloss."""
    noise = random.normal(size=(size, size))
    sigma = np.exp(random.uniform(0.3, 2.3))
    height = gaussian_filter(noise, sigma)
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
    """Many copies of one small motif, turned by right angles, lighter or darker, on a blurred background."""
    side = int(random.integers(5, 24))
    shape = gaussian_filter(random.normal(size=(side, side)), side / random.uniform(5, 10))
    rows, columns = _grid(side)
    round_edge = np.clip(side / 2 - np.hypot(rows - side / 2 + 0.5, columns - side / 2 + 0.5), 0, 1)
    cover = np.clip(shape / shape.std() * 2 + 1, 0, 1) * round_edge
    if random.random() < 0.5:
        motif = spectrum(random, side)
    else:
        motif = np.broadcast_to(random.uniform(0, 1, 3), (side, side, 3))
    picture = spectrum(random, size) * random.uniform(0, 0.5) + random.uniform(0, 0.6, 3)
    for _ in range(int(random.uniform(0.3, 2.5) * (size / side) ** 2)):
        turns = int(random.integers(4))
        top, left = random.integers(0, size - side + 1, 2)
        under = picture[top : top + side, left : left + side]
        fill = np.rot90(motif, turns) * random.uniform(0.8, 1.2)
        under += np.rot90(cover, turns)[..., None] * (fill - under)
    return picture


def panels(random: np.random.Generator, size: int) -> np.ndarray:
    """A square that is cut in two repeatedly; each part has its own colour or texture, some have a seam."""
    fills = [KINDS[name](random, size) for name in random.choice(["spectrum", "grating", "relief"], 2)]
    picture, seam = np.empty((size, size, 3)), random.uniform(0, 1, 3)
    parts = [(0, 0, size, size)]  # top, left, bottom, right
    smallest = random.integers(8, 40)
    while parts:
        top, left, bottom, right = parts.pop()
        tall = bottom - top > right - left
        length = bottom - top if tall else right - left
        if length > 2 * smallest and random.random() < 0.9:
            cut = int(random.integers(smallest, length - smallest + 1))
            if tall:
                parts += [(top, left, top + cut, right), (top + cut, left, bottom, right)]
            else:
                parts += [(top, left, bottom, left + cut), (top, left + cut, bottom, right)]
            continue
        fill = random.uniform(0, 1, 3) if random.random() < 0.5 else fills[int(random.integers(2))]
        part = np.s_[top:bottom, left:right]
        picture[part] = np.broadcast_to(fill, (size, size, 3))[part]
        if random.random() < 0.4:
            picture[top : top + 2, left:right] = picture[top:bottom, left : left + 2] = seam
    return picture


KINDS = {kind.__name__: kind for kind in (spectrum, grating, cells, leaves, strokes, rings, relief, scatter, panels)}
MIXES = {  # sets of kinds, to measure the value of variety
    "noise": ("spectrum", "cells"),
    "six": ("spectrum", "grating", "cells", "leaves", "strokes", "rings"),
    "nine": tuple(KINDS),
}


def _warp(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Distort the picture (S, S, 3) by a smooth random displacement."""
    size = len(picture)
    coarse = random.normal(0, random.uniform(1, 8), (2, 5, 5))
    shift = np.stack([zoom(field, size / 5, order=3, grid_mode=True, mode="nearest") for field in coarse])
    positions = np.mgrid[:size, :size] + shift
    return np.stack([map_coordinates(picture[..., c], positions, order=1, mode="reflect") for c in range(3)], axis=-1)


def draw(random: np.random.Generator, size: int = 112, kinds: tuple[str, ...] = tuple(KINDS)) -> np.ndarray:
    """Draw one image: one kind or a blend of two, then random distortion, shading, blur, scale, turn, tone and noise.

    Half of the images are grey.

    Args:
        random: all choices follow from this generator.
        size: side in pixels.
        kinds: keys of KINDS to choose from.

    Returns:
        uint8 (size, size, 3).
    """
    canvas = int(random.integers(size, 193)) if size < 193 else size
    picture = KINDS[random.choice(kinds)](random, canvas)
    if random.random() < 0.5:  # a second kind inside a region with a soft edge
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
        sigma = random.uniform(0.3, 2)
        picture = gaussian_filter(picture, (sigma, sigma, 0))
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
