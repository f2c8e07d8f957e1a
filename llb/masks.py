"""Reading masks of defects: any picture file → bool (S, S), True where defective. No JAX."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from llb.files import UserError
from llb.images import HEADER, WORKERS, centre, decode, opened, to_rgb, with_8_bits
from llb.layouts import Record

LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
FAINT = 32  # smallest value of a mask that is no trace of a compression


@dataclass(frozen=True)
class MaskRule:
    """How a mask follows its image to the pixels that are judged. The defaults are llb's own.

    resize: side of the square of which the centre is taken (llb.images); None: the whole mask is.
    any_share: a pixel is defective if any of its surroundings are (Dinomaly's release); else if at least half are.
    side: of the judged maps; the mask's pixels are picked, as PyTorch's "nearest" does. None: the image's size.
    """

    resize: int | None = None
    any_share: bool = False
    side: int | None = None


OWN_RULE = MaskRule()


def load_mask(path: Path | str, size: int, rule: MaskRule = OWN_RULE) -> np.ndarray:
    """Read a defect mask: bool (size, size), or (side, side) of the rule; True where at least half of the pixel's
    surroundings are defective.

    Which pixels of the file are defective: `_defective`. EXIF rotation is applied. The size may differ from the
    image's. The bilinear filter gives the defective share of a pixel's surroundings. If no pixel reaches one half,
    those with the largest share stay, so that every defective image keeps a mask. A small defect beside a larger one
    may vanish, and so may all that lies outside the centre. A UserError is raised as by `load_image`, and for a mask
    that cannot be told from its background.
    """
    return _follow(_defective(path), size, rule)


def load_masks(
    root: Path, records: Sequence[Record], size: int, rule: MaskRule = OWN_RULE
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of images, and which images have pixels to judge.

    masks: bool (b, size, size) as by `load_mask`, all False for a normal image. Several masks of an image are united.
    judged: bool (b,), False if the label is unknown, or the image is defective and has no mask or only black ones.
    """

    def load(record: Record) -> tuple[np.ndarray, bool]:
        masks = record.masks if record.label == 1 else ()
        marked = [_turned(_defective(root / path), root / record.path) for path in masks]
        judged = record.label == 0 or any(defect.any() for defect in marked)
        side = rule.side or size
        return np.any(
            [np.zeros((side, side), bool), *(_follow(defect, size, rule) for defect in marked)], axis=0
        ), judged

    with ThreadPoolExecutor(WORKERS) as pool:
        masks, judged = zip(*pool.map(load, records))
    return np.stack(masks), np.array(judged)


def is_black(path: Path | str) -> bool:
    """Whether a mask marks nothing as defective."""
    return not _defective(path).any()


def _turned(defect: np.ndarray, path: Path) -> np.ndarray:
    """Marks of an image that EXIF turns on its side: turned with it if they have the size that the file of the image
    has, as programs draw them that do not know EXIF. defect: bool (H, W); path: of the image."""
    if defect.shape[0] == defect.shape[1]:
        return defect
    with opened(path) as image:
        orientation, (width, height) = image.getexif().get(ExifTags.Base.Orientation, 1), image.size
        if image.format == "TIFF":  # Pillow's size is turned already
            width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    if orientation < 5 or defect.shape != (height, width):
        return defect
    mask = Image.fromarray(defect)
    mask.getexif()[ExifTags.Base.Orientation] = orientation
    return np.asarray(ImageOps.exif_transpose(mask))


def _follow(defect: np.ndarray, size: int, rule: MaskRule) -> np.ndarray:
    """The marks of a file, bool (H, W) → bool (side, side)."""
    side = (rule.resize or size, rule.resize or size)
    if rule.any_share:  # of 8 bits, as the release has it: less than half of 1/255 is none
        mask = np.asarray(Image.fromarray(defect.astype(np.uint8) * 255).resize(side, Image.Resampling.BILINEAR)) > 0
    else:
        share = Image.fromarray(defect.astype(np.float32)).resize(side, Image.Resampling.BILINEAR)
        share = np.asarray(share)  # 0…1
        mask = share >= min(0.5, share.max()) if defect.any() else np.zeros(side, bool)
    mask = centre(mask, size)
    if rule.side:
        picked = np.arange(rule.side) * size // rule.side
        mask = mask[np.ix_(picked, picked)]
    return mask


def _defective(path: Path | str) -> np.ndarray:
    """The pixels that a mask file marks: bool (H, W). Black and transparent pixels are normal; others are defective.

    If compression has left traces (`_has_traces`), a pixel is defective above half of the largest value. If no colour
    of a palette is black, its first colour is the background. A UserError is raised for a compressed mask whose largest
    value is below FAINT, a JPEG 2000 of which more is grey than marked, and an inverted mask or one whose background is
    not black: it marks the whole border and more than half of the image, but is not all of one colour.
    """
    with opened(path) as image:
        lossy = image.format in LOSSY and not (image.format == "WEBP" and b"VP8L" in Path(path).read_bytes()[:HEADER])
        indices = np.asarray(decode(image)) if image.mode == "P" else None  # (H, W)
        pixels = np.asarray(to_rgb(with_8_bits(image, path, {}, np.ceil), "black"))
    levels = pixels if pixels.ndim == 2 else pixels.max(axis=2)  # (H, W)
    largest = int(levels.max())
    if lossy and 0 < largest < FAINT:
        raise UserError(f"{path}: its largest value of {largest} may be a trace of the compression; save it as PNG")
    lossy |= _has_traces(levels, largest)
    defect = levels > (largest // 2 if lossy else 0)
    grey = np.count_nonzero((levels > largest // 4) & (levels <= 3 * largest // 4))
    if image.format == "JPEG2000" and grey > np.count_nonzero(defect):
        raise UserError(f"{path} is compressed too much to tell the defects; save it as PNG")
    if indices is not None and defect.all() and indices.any():
        defect = indices > 0
    border = [defect[0], defect[-1], defect[:, 0], defect[:, -1]]
    one_colour = defect.all() if lossy else (pixels == pixels[0, 0]).all()
    if all(side.all() for side in border) and defect.mean() > 0.5 and not one_colour:
        raise UserError(f"{path} marks the whole border of the image; make what is normal black, or delete it")
    return defect


def _has_traces(levels: np.ndarray, largest: int) -> bool:
    """Whether a mask was probably saved as JPEG before: of the pixels between 0 and the largest value, most lie within
    an eighth of it from either end, some at each, and they have four grey levels or more."""
    between = Image.fromarray(levels).histogram()[1:largest]
    dark, bright = between[: largest // 8], between[len(between) - largest // 8 :]
    near = any(dark) and any(bright) and sum(dark + bright) > sum(between) / 2
    return largest >= FAINT and near and np.count_nonzero(between) >= 4
