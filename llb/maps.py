"""Anomaly maps on the disk: 16-bit PNGs that hold their scale. No JAX."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llb.files import LONGEST_NAME, UserError, discard_files, writing
from llb.layouts import Record


def write_maps(folder: Path, records: list[Record], maps: np.ndarray) -> None:
    """One 16-bit PNG for each image, at its path below `folder`. The text chunk "scale" times the pixel is the map,
    plus the chunk "offset" where the map has negative numbers. maps: float32 (n, S, S)."""
    for name, heat in zip(map_names(records), maps):
        file = folder / name
        low = min(0.0, float(heat.min()))
        scale = max(float(heat.max()) - low, 1e-12) / 65535
        text = PngInfo()
        text.add_text("scale", repr(scale))
        if low < 0:
            text.add_text("offset", repr(low))
        image = Image.fromarray(np.rint((heat - low) / scale).astype(np.uint16))
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, pnginfo=text)


def replace_maps(unfinished: Path, folder: Path, records: Sequence[Record]) -> None:
    """Move all maps into `folder`; whatever else lies there stays."""
    # without predictions the detector counts as not evaluated: after an interruption, all maps are written again
    discard_files(folder.parent, [f"predictions-{folder.name.removeprefix('maps-')}.csv"])
    for name in map_names(records):
        with writing(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / name, folder / name)
    discard_files(unfinished, map_names(records))


def check_map_names(records: Sequence[Record]) -> None:
    """Raise a UserError if an image's name, with .png behind it, is too long for a file."""
    for record in records:
        if len(os.fsencode(f"{os.path.basename(record.path)}.png")) > LONGEST_NAME:
            problem = f"{record.path}: its map would have a name of more than {LONGEST_NAME} bytes"
            raise UserError(f"{problem}; give it a shorter name, or leave out --save-maps (or --overlays)")


def map_names(records: Sequence[Record]) -> list[str]:
    return [f"{record.path}.png" for record in records]
