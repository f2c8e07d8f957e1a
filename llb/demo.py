"""The embedded image set: a turned metal disc on a woven belt, drawn by this file alone, some with planted defects.

    FOLDER/part/train/good/000.png …               160 good discs
    FOLDER/part/test/good/…, test/<kind>/…          50 good, six kinds of defect with 16 each
    FOLDER/part/ground_truth/<kind>/000_mask.png    where the defect is

It has MVTec AD's layout, so the embedded set takes the same path through the program as anybody's own data. Every disc
differs in place, angle, light, tint and grain, and the defects go from obvious to hardly visible.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d

SIZE = 128  # pixels
KINDS = ("scratch", "dent", "filled_hole", "stain", "chip", "fibre")
COUNTS = {"train/good": 160, "test/good": 50} | {f"test/{kind}": 16 for kind in KINDS}
RADIUS, BORE, HOLES, HOLE_RADIUS = 54.0, 15.0, 36.0, 5.5  # of the disc, its bore, the circle of holes, a hole


def inside(distance: np.ndarray) -> np.ndarray:
    """Coverage 0..1 of a shape from the signed distance to its edge in pixels (negative inside)."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def segment_distance(x: np.ndarray, y: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance to a polyline, points (n, 2)."""
    nearest = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in zip(points[:-1], points[1:]):
        length = (bx - ax) ** 2 + (by - ay) ** 2
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0.0, 1.0)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
    return nearest


def on_metal(random: np.random.Generator) -> tuple[float, float]:
    """A point on the disc's face, clear of bore, holes and rim."""
    while True:
        radius, angle = random.uniform(BORE + 8, RADIUS - 8), random.uniform(0, 2 * np.pi)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        if all(np.hypot(x - hx, y - hy) > HOLE_RADIUS + 5 for hx, hy in hole_centres()):
            return x, y


def hole_centres() -> list[tuple[float, float]]:
    return [(HOLES * np.cos(a), HOLES * np.sin(a)) for a in np.pi / 4 + np.arange(4) * np.pi / 2]


def draw(random: np.random.Generator, kind: str = "good") -> tuple[np.ndarray, np.ndarray]:
    """One image.

    Returns:
        uint8 (SIZE, SIZE, 3), and bool (SIZE, SIZE), where the defect is.
    """
    # ---- pose: pixel coordinates → coordinates of the disc ----
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(float)
    dx, dy, turn = *random.uniform(-3, 3, 2), np.deg2rad(random.uniform(-4, 4))
    px, py = columns - SIZE / 2 - dx, rows - SIZE / 2 - dy
    x = px * np.cos(turn) + py * np.sin(turn)
    y = py * np.cos(turn) - px * np.sin(turn)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)

    # ---- materials: a woven belt, turned metal ----
    phase = random.uniform(0, 2 * np.pi, 2)
    weave = np.sin(columns * 0.9 + phase[0]) * np.sin(rows * 0.9 + phase[1])
    belt = 0.17 + 0.035 * weave + 0.02 * gaussian_filter(random.normal(size=(SIZE, SIZE)), 1.0)
    grooves = gaussian_filter1d(random.normal(size=400), 1.2)[(radius * 4).astype(int).clip(0, 399)]
    gleam = 0.10 * np.cos(2 * (angle + turn) - 1.0)  # two brighter sectors, as light leaves a turned face
    metal = 0.58 + gleam + 0.045 * grooves + 0.05 * gaussian_filter(random.normal(size=(SIZE, SIZE)), 0.7)
    metal -= 0.16 * np.exp(-((radius - 46.5) ** 2) / 1.5)  # the engraved ring
    metal += 0.10 * np.exp(-((radius - RADIUS + 1.5) ** 2) / 2.0)  # the bright chamfer

    # ---- geometry, with its defects ----
    defect = np.zeros((SIZE, SIZE))  # coverage 0..1
    disc = inside(radius - RADIUS)
    openings = [inside(radius - BORE)] + [inside(np.hypot(x - hx, y - hy) - HOLE_RADIUS) for hx, hy in hole_centres()]
    tint = np.ones((SIZE, SIZE, 3))
    if kind == "filled_hole":
        defect = openings.pop(1 + int(random.integers(4)))
        metal = metal - 0.05 * defect
    elif kind == "chip":
        where, depth = random.uniform(0, 2 * np.pi), random.uniform(4.0, 7.0)
        ragged = np.hypot(x - RADIUS * np.cos(where), y - RADIUS * np.sin(where)) + random.normal(0, 0.5) * np.sin(5 * angle)
        defect = inside(ragged - depth) * disc
        disc = disc - defect
    elif kind == "scratch":
        start, heading, length = np.array(on_metal(random)), random.uniform(0, 2 * np.pi), random.uniform(12, 26)
        bend = heading + random.normal(0, 0.2)
        middle = start + length / 2 * np.array([np.cos(heading), np.sin(heading)])
        points = np.stack([start, middle, middle + length / 2 * np.array([np.cos(bend), np.sin(bend)])])
        defect = inside(segment_distance(x, y, points) - random.uniform(0.5, 1.0)) * disc
        metal = metal + random.choice([-1, 1]) * random.uniform(0.12, 0.25) * defect
    elif kind == "dent":
        cx, cy = on_metal(random)
        width = random.uniform(3.0, 4.5)
        bump = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
        metal = metal + random.uniform(0.13, 0.24) * bump * ((px - py) - (cx - cy)) / width  # lit from one side
        defect = np.clip(2 * bump, 0, 1)
    elif kind == "stain":
        cx, cy = on_metal(random)
        blotch = gaussian_filter(random.normal(size=(SIZE, SIZE)), 4.0)
        edge = np.hypot(x - cx, y - cy) - random.uniform(7, 10) + 14 * blotch
        defect = np.clip(0.5 - edge / 3, 0, 1) * disc
        tint = 1 - random.uniform(0.06, 0.13) * defect[..., None] * np.array([0.5, 1.0, 1.8])
    elif kind == "fibre":
        cx, cy = on_metal(random)
        steps = random.uniform(0, 2 * np.pi) + np.cumsum(random.normal(0, 0.5, 7))
        points = np.cumsum(np.stack([3.5 * np.cos(steps), 3.5 * np.sin(steps)], axis=1), axis=0)
        points = points - points.mean(axis=0) + (cx, cy)
        defect = inside(segment_distance(x, y, points) - 0.5) * 0.8

    for opening in openings:
        disc = disc * (1 - opening)

    # ---- composition, light, sensor ----
    shadow = gaussian_filter(np.roll(disc, (3, 3), (0, 1)), 2.0)
    grey = belt * (1 - 0.5 * shadow) * (1 - disc) + metal * disc
    colour = grey[..., None] * (np.array([0.94, 0.98, 1.05]) * disc[..., None] + np.array([0.9, 1.0, 1.15]) * (1 - disc[..., None]))
    colour = colour * tint
    if kind == "fibre":
        colour = colour + defect[..., None] * (np.array([0.18, 0.22, 0.38]) - colour)
    slope = random.normal(0, 0.05, 2)
    light = random.uniform(0.9, 1.1) * (1 + slope[0] * (columns / SIZE - 0.5) + slope[1] * (rows / SIZE - 0.5))
    colour = colour * light[..., None] * (1 + random.normal(0, 0.012, 3))
    colour = colour + random.normal(0, 0.012, colour.shape)
    return np.rint(colour.clip(0, 1) * 255).astype(np.uint8), defect > 0.3


def write_demo(folder: Path, seed: int = 0) -> None:
    """Draw the set into `folder`, unless it is there. The folder appears when it is complete."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, (place, count) in enumerate(COUNTS.items()):
        kind = place.split("/")[1]
        for index in range(count):
            image, mask = draw(np.random.default_rng([seed, part, index]), kind)
            files = {unfinished / "part" / place / f"{index:03}.png": image}
            if kind != "good":
                files[unfinished / "part" / "ground_truth" / kind / f"{index:03}_mask.png"] = mask.astype(np.uint8) * 255
            for file, pixels in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    unfinished.rename(folder)
