"""The tiles of the report: small pictures of an image and of its heat map, kept in a file of the run. No JAX.

RUN/<category>/tiles-suspects.json        of training images, by stage 1
RUN/<category>/tiles-<train-on>.json      of test images, by evaluate.py
RUN/<category>/tiles-next-<train-on>.json of unseen training images, by evaluate.py (llb/next_page.py)

So the report can be written again without the images. Which images stand in which group is decided here, from what the
tables say, for who makes the tiles and for who shows them.
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from scipy import ndimage

from llb.files import UserError, write_text
from llb.pictures import heat_overlay

NEAR = 10  # images on either side of stage 1's threshold
LARGEST = 24  # of any other group
SIDE, QUALITY = 160, 75  # pixels, and of WebP or JPEG; an image takes about 3 KB
LOOKED_AT = 240  # pixels, of images that a person judges: a defect of 1 % of the area is 24 pixels large
OUTLINE = (70, 255, 214)  # of a mask: a hue that heat maps do not have
Tile = tuple[str, np.ndarray, np.ndarray, np.ndarray | None]  # of `write_tiles`: path, image, map, mask
PICTURE = re.compile(r"data:image/(webp|jpeg);base64,[A-Za-z0-9+/=]+")


def shown_suspects(rank: np.ndarray, kept: np.ndarray, labels: Sequence[int | None]) -> dict[str, np.ndarray]:
    """Which training images are shown beside the pages of suspects: group → int (n,), indices in the order shown.

    "dropped first" and "kept last": NEAR images on either side of the threshold, if any is dropped. "defects kept" and
    "normal dropped", by the labels, if all are known: the stranger first, at most LARGEST.

    rank: int (N,), 1 for the first suspect; kept: bool (N,).
    """
    order = np.argsort(rank)
    kept_ones, dropped = order[kept[order]], order[~kept[order]]
    groups = {"dropped first": dropped[-NEAR:], "kept last": kept_ones[: NEAR if len(dropped) else 0]}
    if None not in labels:
        defective = np.array(labels, bool)
        groups["defects kept"] = kept_ones[defective[kept_ones]][:LARGEST]
        groups["normal dropped"] = dropped[~defective[dropped]][:LARGEST]
    return groups


def shown_tests(scores: np.ndarray, labels: Sequence[int | None], threshold: float | None) -> dict[str, np.ndarray]:
    """Which test images are shown, as by `shown_suspects`.

    "missed": defective images that are not above the threshold, the lowest score first; "false alarms": normal ones
    that are, the highest first; at most LARGEST of each. "all": LARGEST at equal distances in the ranking, from the
    highest score down.

    scores: float (N,); threshold: None if there is none.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    outcomes = np.array([outcome(labels[i], scores[i], threshold) or "" for i in order])
    steps = np.unique(np.linspace(0, len(order) - 1, LARGEST).round().astype(int)) if len(order) else []
    return {
        "missed": order[outcomes == "missed"][::-1][:LARGEST],
        "false alarms": order[outcomes == "false alarm"][:LARGEST],
        "all": order[steps],
    }


def outcome(label: int | None, score: float, threshold: float | None) -> str | None:
    """What a threshold makes of a test image; None if its label is unknown or there is no threshold."""
    if label is None or threshold is None:
        return None
    return (("passed", "false alarm"), ("missed", "found"))[label][int(score > threshold)]


def united(groups: dict[str, np.ndarray]) -> np.ndarray:
    """Every index of the groups once, int (n,)."""
    return np.unique(np.concatenate(list(groups.values())))


def small(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """An image, uint8 (S, S, 3), or a map, float32 (S, S), at most `side` pixels large."""
    if len(picture) <= side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX))


def outlined(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A line around what the mask marks, one pixel away. picture: uint8 (s, s, 3); mask: bool (S, S)."""
    covered = Image.fromarray(mask.astype(np.float32)).resize(picture.shape[1::-1], Image.Resampling.BOX)
    inside = np.asarray(covered) > 0  # a small defect has an outline, too
    near, around = (ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=times) for times in (1, 2))
    return np.where((around & ~near)[..., None], np.uint8(OUTLINE), picture)


def write_tiles(file: Path, shown: Iterable[Tile], side: int = SIDE) -> None:
    """Write a file of tiles. All maps have one colour scale, from the median to the highest thousandth of their values.

    shown: for each image its path; the image, uint8 (S, S, 3), and the map, float32 (S, S), `small` or not; the mask,
        bool (S, S), or None; side: of a tile, pixels.
    """
    shown = [(path, small(image, side), small(heat, side), mask) for path, image, heat, mask in shown]
    low, high = np.quantile(np.stack([heat for _, _, heat, _ in shown]), [0.5, 0.999]) if shown else (0.0, 1.0)
    tiles = {}
    for path, image, heat, mask in shown:
        pictures = {"image": image, "heat": heat_overlay(image, heat, low, high)}
        if mask is not None and mask.any():
            pictures = {name: outlined(picture, mask) for name, picture in pictures.items()}
        tiles[path] = {name: encoded(picture) for name, picture in pictures.items()}
    write_text(file, json.dumps({"low": float(low), "high": float(high), "tiles": tiles}, ensure_ascii=False) + "\n")


def encoded(picture: np.ndarray) -> str:
    """A picture, uint8 (s, s, 3), as the address of an <img>."""
    buffer, kind = io.BytesIO(), "webp" if features.check("webp") else "jpeg"
    Image.fromarray(picture).save(buffer, kind, quality=QUALITY)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def read_tiles(file: Path) -> dict[str, Any]:
    """What `write_tiles` wrote: "low" and "high" of the colour scale, "tiles": path → {"image", "heat"}, addresses.

    No tiles without the file. A damaged file raises a UserError.
    """
    if not file.is_file():
        return {"low": 0.0, "high": 1.0, "tiles": {}}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scale = [float(content[name]) for name in ("low", "high")]
        pictures = [tile[name] for tile in content["tiles"].values() for name in ("image", "heat")]
        if all(map(math.isfinite, scale)) and all(map(PICTURE.fullmatch, pictures)):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    writer = "stage 1 again" if file.name == tiles_file("suspects") else "evaluate.py again, with --overwrite"
    raise UserError(f"{file} is damaged: delete it and run {writer}")


def tiles_file(name: str) -> str:
    """name: "suspects", or a final detector's."""
    return f"tiles-{name}.json"


def next_tiles_file(final: str) -> str:
    """Of the next page, see llb.next_page."""
    return tiles_file(f"next-{final}")
