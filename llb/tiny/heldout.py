"""Draw the held-out materials: five surfaces with planted defects, by which `tiny` is chosen.

    from llb.tiny.heldout import write_heldout
    write_heldout(Path("heldout"))     # heldout/{bricks,knit,labyrinth,perforated,weave}: an MVTec-style root

`tiny` learns from the images of llb/tiny/textures.py and is judged on these (llb/tiny/measure.py). The two files have
no code in common, and pre-training shows none of these materials.

A material is a regular lattice or a self-organising pattern. From image to image, position, angle, elements, light and
noise vary a little. A defect changes the finished surface.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from llb.demo import write_set

SIDE = 112  # pixels
VISIBLE = 8  # grey levels of 255: a pixel belongs to the mask where the blurred difference is larger


def write_heldout(folder: Path | str, seed: int = 0) -> None:
    """Draw the set into `folder` in MVTec AD's layout, one category for each material; a finished category stays.

    A category has 60 normal training images, 30 normal test images, 8 test images with each kind of defect, and masks.
    """
    counts = {"train/good": 60, "test/good": 30} | {f"test/{kind}": 8 for kind in DEFECTS}
    for name in MATERIALS:
        write_set(Path(folder) / name, counts, lambda key, kind, name=name: draw(name, key, kind), seed)


def draw(material: str, seed: int | list[int], kind: str = "good") -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        material: a key of MATERIALS.
        seed: all random numbers follow from it.
        kind: a key of DEFECTS, or "good".

    Returns:
        the image, uint8 (112, 112, 3); its mask, bool (112, 112): True where the image visibly differs from the same
        image without the defect.
    """
    random, fault = np.random.default_rng(seed).spawn(2)
    turn, shift = np.deg2rad(random.uniform(-3, 3)), random.uniform(0, 40, 2)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    u, v = np.cos(turn) * x + np.sin(turn) * y + shift[0], np.cos(turn) * y - np.sin(turn) * x + shift[1]
    grey, dark, bright = MATERIALS[material](random, u, v)
    surface = np.array(dark) + grey[..., None] * (np.array(bright) - np.array(dark))  # (S, S, 3)
    tilt = random.normal(0, 0.08, 2)
    light = random.uniform(0.9, 1.1) * (1 + (tilt[0] * x + tilt[1] * y) / SIDE)[..., None]
    noise = random.normal(0, 0.012, (SIDE, SIDE, 3))

    def photograph(surface: np.ndarray) -> np.ndarray:
        return np.rint(255 * (surface * light + noise).clip(0, 1)).astype(np.uint8)

    image = photograph(surface)
    if kind == "good":
        return image, np.zeros((SIDE, SIDE), bool)
    damaged = photograph(DEFECTS[kind](fault, surface))
    change = np.abs(damaged.astype(float) - image).max(axis=2)
    return damaged, gaussian_filter(change, 1.0) > VISIBLE


# ---- materials: (random, u, v) → grey (S, S) in 0..1, the colour of 0, the colour of 1 ----
# u, v: float (S, S), coordinates on the surface in pixels

Material = tuple[np.ndarray, tuple[float, float, float], tuple[float, float, float]]


def _of_cell(random: np.random.Generator, *indices: np.ndarray) -> np.ndarray:
    """For each pixel the random number (unit variance) of its lattice cell; indices: the cell's integer indices."""
    table = random.normal(size=(64,) * len(indices))
    return table[tuple(index.astype(int) % 64 for index in indices)]


def bricks(random: np.random.Generator, u: np.ndarray, v: np.ndarray) -> Material:
    """Brickwork in running bond: bricks of 24 × 10 px with pale mortar, a rough face, each with its own shade."""
    row = np.floor(v / 10)
    across = u + 12 * (row % 2)
    column = np.floor(across / 24)
    edge = np.minimum(np.minimum(across % 24, 24 - across % 24), np.minimum(v % 10, 10 - v % 10))
    face = 0.35 + 0.07 * _of_cell(random, row, column) + 0.04 * gaussian_filter(random.normal(size=u.shape), 1.0) * 3
    return np.where(edge < 1, 0.85, face), (0.15, 0.05, 0.03), (0.85, 0.75, 0.68)


def knit(random: np.random.Generator, u: np.ndarray, v: np.ndarray) -> Material:
    """Columns of V-shaped stitches, 12 px wide and 9 px high, each a slanted, rounded strand."""
    column = np.floor(u / 6)
    slant = np.where(column % 2 == 0, 1.0, -1.0)
    along = v + slant * ((u % 6) - 3) * 0.9
    row = np.floor(along / 9)
    strand = np.sin(np.pi * ((along / 9) % 1)) ** 0.7 * np.sin(np.pi * ((u / 6) % 1)) ** 0.5
    return strand * (0.8 + 0.06 * _of_cell(random, column, row)), (0.05, 0.08, 0.15), (0.55, 0.65, 0.8)


def labyrinth(random: np.random.Generator, u: np.ndarray, v: np.ndarray) -> Material:
    """Winding ridges about 9 px apart, self-organised: noise that is band-passed and saturated 20 times."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    band = np.exp(-(((frequency - 1 / 9) / 0.025) ** 2))
    pattern = random.normal(size=(SIDE, SIDE))
    for _ in range(20):
        pattern = np.fft.irfft2(np.fft.rfft2(pattern) * band, s=pattern.shape)
        pattern = np.tanh(2 * pattern / pattern.std())
    return 0.5 + 0.4 * pattern, (0.30, 0.18, 0.10), (0.62, 0.46, 0.30)


def perforated(random: np.random.Generator, u: np.ndarray, v: np.ndarray) -> Material:
    """Sheet metal with faint rolling marks and holes of 3 px radius on a triangular lattice of 12 px."""
    height = 12 * np.sqrt(3) / 2
    distance = np.full(u.shape, np.inf)
    for shift in (0, 1):  # a triangular lattice is two rectangular ones
        du = (u + 6 * shift + 6) % 12 - 6
        dv = (v + height * shift + height) % (2 * height) - height
        distance = np.minimum(distance, np.hypot(du, dv))
    marks = gaussian_filter(random.normal(size=u.shape), (0.6, 12)) * 4
    sheet = 0.75 + 0.05 * marks + 0.12 * np.clip(1 - np.abs(distance - 4.2), 0, 1)
    return np.where(distance < 3, 0.08, sheet), (0.0, 0.0, 0.0), (0.80, 0.82, 0.85)


def weave(random: np.random.Generator, u: np.ndarray, v: np.ndarray) -> Material:
    """A twill: threads of 5 px, each over two and under two; the crossings shift by one from thread to thread."""
    warp, weft = np.floor(u / 5), np.floor(v / 5)
    over = (warp + weft) % 4 < 2
    profile_u, profile_v = np.sin(np.pi * ((u / 5) % 1)), np.sin(np.pi * ((v / 5) % 1))
    first = 0.75 * profile_u**0.5 * (1 + 0.05 * _of_cell(random, warp))
    second = 0.45 * profile_v**0.5 * (1 + 0.05 * _of_cell(random, weft))
    return np.where(over, first, second).clip(0, 1), (0.06, 0.05, 0.08), (0.75, 0.70, 0.55)


MATERIALS = {material.__name__: material for material in (bricks, knit, labyrinth, perforated, weave)}


# ---- defects: (random, surface (S, S, 3)) → damaged surface ----


def _blob(random: np.random.Generator, smallest: float, largest: float, softness: float) -> np.ndarray:
    """An irregular region: (S, S, 1) in 0..1. Radius between `smallest` and `largest`, width of the edge, in px."""
    y, x = np.mgrid[:SIDE, :SIDE]
    centre, radius = random.uniform(16, SIDE - 16, 2), random.uniform(smallest, largest)
    rough = gaussian_filter(random.normal(size=(SIDE, SIDE)), 3.0)
    distance = np.hypot(y - centre[0], x - centre[1]) - radius + 0.2 * radius * rough / rough.std()
    return np.clip(0.5 - distance / softness, 0, 1)[..., None]


def hole(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A small dark or bright spot."""
    colour = random.choice([0.02, 0.95])
    return surface + _blob(random, 2.5, 5.0, 1.5) * random.uniform(0.5, 0.9) * (colour - surface)


def scratch(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A straight line, 20 to 50 px long and about 1 px wide."""
    y, x = np.mgrid[:SIDE, :SIDE]
    centre, angle, half = random.uniform(25, SIDE - 25, 2), random.uniform(0, np.pi), random.uniform(10, 25)
    along = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
    away = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle)
    distance = np.hypot(away, np.maximum(np.abs(along) - half, 0))
    line = np.clip(random.uniform(0.9, 1.4) - distance, 0, 1)[..., None]
    return surface + line * random.uniform(0.25, 0.5) * random.choice([-1, 1])


def smear(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A worn region: the surface is blurred there."""
    blurred = gaussian_filter(surface, (random.uniform(2, 4),) * 2 + (0,))
    region = _blob(random, 8, 14, 4.0)
    return surface + region * (blurred - surface)


def shift(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A region that is pushed aside by up to 6 px, which distorts the pattern."""
    angle, longest = random.uniform(0, 2 * np.pi), random.uniform(3.5, 6)
    push = gaussian_filter(_blob(random, 9, 14, 2.0)[..., 0], 2.0) * longest
    positions = np.mgrid[:SIDE, :SIDE] - np.stack([push * np.sin(angle), push * np.cos(angle)])
    return np.stack([map_coordinates(surface[..., c], positions, order=1, mode="reflect") for c in range(3)], axis=-1)


def turned(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A patch of the same material, turned by a right angle."""
    region = _blob(random, 8, 13, 1.5)
    return surface + region * (np.rot90(surface, int(random.choice([1, 3]))) - surface)


def stain(random: np.random.Generator, surface: np.ndarray) -> np.ndarray:
    """A region with a slightly different tint."""
    tint = 1 + random.uniform(0.12, 0.3) * random.choice([-1, 1], 3) * random.uniform(0.3, 1, 3)
    return surface * (1 + _blob(random, 7, 13, 2.0) * (tint - 1))


Defect = Callable[[np.random.Generator, np.ndarray], np.ndarray]
DEFECTS: dict[str, Defect] = {defect.__name__: defect for defect in (hole, scratch, smear, shift, turned, stain)}
