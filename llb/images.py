"""Reading pictures. No JAX.

image   uint8 (S, S, 3)     any picture file → RGB, resized to a square (llb.masks reads masks)

Before Pillow decodes a file, its kind, format, size and number of pages are checked. Whatever Pillow raises becomes a
UserError that names the file. Which value of deep images is white is decided for a whole category (`find_white`): a
dark image of a set stays dark, and the 12 bits of a camera in a file of 16 do not come out black.
"""

import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llb.files import UserError
from llb.layouts import Record

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
# Pillow takes an image of 90 megapixels for an attack and warns; line-scan cameras deliver more. Our limits are errors.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # of damaged files; llb says what is wrong
MEGAPIXELS, DEEP_MEGAPIXELS = 1000, 250  # 4 GB each: colours take 4 bytes a pixel, a deep image up to 16
SMALL_MEGAPIXELS = 100  # the size of a larger file must be credible
# Pillow knows more formats, but some start other programs (EPS starts Ghostscript), and none is for photographs.
Image.init()
FORMATS = [name for name in "PNG JPEG BMP TIFF WEBP JPEG2000 GIF PPM AVIF TGA".split() if name in Image.OPEN]
PREVIEWS = 16  # smaller pages behind the first of a TIFF, at most
HEADER = 2**16  # bytes of a file in which its header lies
TEXT_BYTES, TEXT_COMMENTS, SCANS = 2**24, 100, 100  # of a PNM whose pixels are text, and of a JPEG, at most
BITS, PHOTOMETRIC, SAMPLES, PLANES = 258, 262, 277, 284  # tags of a TIFF
WHITE = {"integer": [2**bits - 1 for bits in (8, 10, 12, 14, 16)], "float": [1, 255, 65535]}
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageFiles:
    """Images of one category, and the values that `load_image` shows as white (of `find_white`)."""

    paths: tuple[Path, ...]
    white: Mapping[str, int] = field(default_factory=dict)
    resize: int | None = None  # side of the square of which the centre is shown
    states: tuple[tuple[int, int, str], ...] = ()  # size, time in ns, SHA-256 of each, where features are looked up


class ImageError(UserError):
    """A file that cannot be read as an image."""


def load_image(
    path: Path | str, size: int, white: Mapping[str, int] | None = None, resize: int | None = None
) -> np.ndarray:
    """Read any image as RGB and resize it: uint8 (size, size, 3), Pillow's bilinear filter (averaging as it shrinks).

    resize: side of a larger square, of which the centre is taken; None: size, the whole image is shown.

    EXIF rotation is applied. Greyscale is repeated in the three channels. Transparent pixels lie on white, but an alpha
    channel that is zero everywhere, or nowhere, cuts nothing out: the colours stay. The first image of an MPO is read
    (the others are previews), and the first page of a TIFF if the others are smaller. Other files with several images
    are refused.

    Deep values are shown from 0, black, to white; larger ones are white, too. White is what the file declares (12 bits
    of a TIFF, the maxval of a PGM, sBIT of a PNG), else what `white` says for "integer" or "float" pixels, else the
    smallest that holds the file's values: of 8, 10, 12, 14 or 16 bits, or 1.0, 255.0 or 65535.0.

    A UserError is raised if the file is missing, damaged, of none of FORMATS or of several images, or out of range.
    """
    with opened(path) as image:
        image = to_rgb(with_8_bits(image, path, white or {}, np.rint), "white")
        side = resize or size
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR).convert("RGB"))
        return centre(pixels, size)  # (S, S, 3)


def centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """(side, side, …) → (size, size, …), side ≥ size; an odd rest is cut as torchvision's CenterCrop cuts it."""
    start = round((len(pixels) - size) / 2)
    return pixels[start : start + size, start : start + size]


def find_white(dataset: Any) -> Any:
    """A llb.data.Dataset with `white` for `load_image`: of the images of train and test that declare none, the largest;
    {} if there is no such image. Others are not decoded, but each header is read, and a bad one raises a UserError."""

    def white_of(record: Record) -> dict[str, int]:
        path = dataset.root / record.path
        with opened(path) as image:
            if not (_is_deep(image) or _is_wide(image)) or _declared_white(image, path):
                return {}
            return dict([_kind_and_white(image, path)])

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(white_of, (*dataset.train, *dataset.test)))
    kinds = [kind for kind in WHITE if any(kind in white for white in found)]
    return replace(dataset, white={kind: max(white.get(kind, 0) for white in found) for kind in kinds})


def white_line(dataset: Any) -> str | None:
    """One line about the white of a category; None if it has no deep images, or integers that use all 16 bits."""
    bits = dataset.white.get("integer", 0).bit_length()
    names = {"float": "floating-point images", "integer": f"images of {bits} bits"}
    whites = dataset.white.items() - {("integer", 65535)}
    parts = [f"{names[kind]} (largest value {white} is white)" for kind, white in sorted(whites)]
    return f"{dataset.category}: {', '.join(parts)}" if parts else None


# ---- files ----


@contextmanager
def opened(path: Path | str) -> Iterator[Image.Image]:
    """An image, not decoded yet, whose header is checked. Any error, also of the caller's work, becomes a UserError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a FIFO would wait for ever
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
        if not status.st_size:
            raise ValueError("it is empty")
        _check_text(path, status.st_size)
        with Image.open(path, formats=FORMATS) as image:
            megapixels = image.width * image.height / 1e6
            limit = DEEP_MEGAPIXELS if _is_deep(image) or _is_wide(image) else MEGAPIXELS
            if megapixels > limit:
                raise ImageError(f"{path} has {megapixels:.0f} megapixels, more than {limit}: scale it down")
            if megapixels > max(SMALL_MEGAPIXELS, status.st_size / 100):  # deflate packs up to 8256 pixels in a byte
                raise ValueError(f"{status.st_size} bytes do not hold {megapixels:.0f} megapixels")
            if _has_pages(image):
                raise ImageError(f"{path} has several frames or pages: save one image a file")
            if image.format == "PPM" and (tile := image.tile[0]).codec_name == "ppm" and tile.args[1] > 255:
                # Pillow would scale the values one by one in Python, a second for a megapixel
                image.info["maxval"] = tile.args[1]
                image.tile = [tile._replace(codec_name="raw", args="I;16B" if image.mode == "I" else "RGB;16B")]
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path} is not there: put it back, or take it off the list") from None
    except PermissionError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}): grant access to it") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} cannot be read (no image format that llb knows): remove or replace it") from None
    except Exception as error:  # for damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error, …
        text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        reason = "truncated" if "truncated" in text.lower() else text
        raise ImageError(f"{path} cannot be read ({reason}): remove or replace it") from None


def _check_text(path: Path | str, size: int) -> None:
    """Raise an error for a text in an image's place, and for a PNM with too much text in it: Pillow reads it byte by
    byte."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
        if head.startswith(b"version https://git-lfs"):
            raise ImageError(f"{path} is a git-LFS pointer, not the image: fetch the images with: git lfs pull")
        if size <= HEADER or not re.match(rb"P[0-6fy]", head):
            return
        numbers = 2 if head[:2] in (b"P1", b"P4") else 3  # width, height, largest value
        if not re.match(rb"\w+" + rb"\s+[-+.\w]+" * numbers + rb"\s", re.sub(rb"#[^\r\n]*", b"", head)):
            raise ValueError("the comments in its header are too long")
        if head[1:2] in b"123" and (size > TEXT_BYTES or (head + file.read()).count(b"#") > TEXT_COMMENTS):
            raise ValueError("its pixels are text, and too much of it")


def _has_pages(image: Image.Image) -> bool:
    """Whether a file holds several images: more than previews, in an MPO or, smaller, behind a TIFF's first page."""
    if image.format != "TIFF":
        return image.format != "MPO" and getattr(image, "is_animated", False)
    pixels = image.width * image.height
    for page in range(1, PREVIEWS + 2):
        try:
            image.seek(page)
        except EOFError:
            image.seek(0)
            return False
        if image.width * image.height >= pixels:
            break
    return True


def decode(image: Image.Image) -> Image.Image:
    """The same image, decoded and turned upright."""
    if image.mode == "LAB":
        raise ValueError("colour space LAB, not RGB")
    if image.format == "TIFF" and image.tag_v2.get(PLANES) == 2 and image.tile[0].codec_name == "raw":
        if image.tag_v2.get(SAMPLES, 1) > 1 and max(image.tag_v2[BITS]) > 8:  # Pillow would take each byte for a pixel
            raise ValueError("colours of 16 bits in separate planes, not compressed")
    if image.format in ("JPEG", "MPO") and Path(image.filename).read_bytes().count(b"\xff\xda") > SCANS:
        raise ValueError(f"it has more than {SCANS} scans")  # empty ones take as long as others
    if image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4:
        image.filename = ""  # else Pillow maps uncompressed grey pixels in the turned size, which garbles them
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


# ---- depth ----


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow holds more than 8 bits a pixel, which its own conversion to RGB would clip at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _is_wide(image: Image.Image) -> bool:
    """Whether a file that is not decoded, and so has tiles, has colours of 16 bits. Pillow holds their high bytes."""
    return not _is_deep(image) and image.format in ("PNG", "TIFF", "PPM") and ";16" in str(image.tile[:1])


def _declared_white(image: Image.Image, path: Path | str) -> int | None:
    """The value of white that a deep file, not decoded yet, declares."""
    if image.format == "TIFF" and (bits := image.tag_v2.get(BITS, (16,))[0]) % 16:
        return 2**bits - 1
    if image.format == "PPM":
        if image.tile[0].codec_name == "ppm_plain":
            return 65535  # Pillow scales the values to it
        return image.info.get("maxval", 65535) % 65535 or None
    with open(path, "rb") as file:
        header = file.read(HEADER).partition(b"IDAT")[0]
    return 65535 if image.format == "PNG" and b"sBIT" in header else None  # values of sBIT bits are scaled to 16


def _kind_and_white(image: Image.Image, path: Path | str) -> tuple[str, int]:
    """Decode a deep or wide image: "integer" or "float", and the smallest white that holds its values."""
    if _is_wide(image):
        decode(image)
        levels = [high for band, (_, high) in zip(image.getbands(), image.getextrema()) if band != "A"]
        kind, low, high = "integer", 0.0, 256.0 * max(levels) + 255
    else:
        pixels = np.asarray(decode(image))
        kind, low, high = "float" if pixels.dtype.kind == "f" else "integer", float(pixels.min()), float(pixels.max())
    tolerance = 0.01 if kind == "float" else 0.0  # resampling exceeds the range of an image a little
    white = next((white for white in WHITE[kind] if high <= (1 + tolerance) * white), None)
    if white is None or not low >= -tolerance * white:
        raise ImageError(f"{path} has values from {low:g} to {high:g}: save it with 8 or 16 bits a channel")
    return kind, white


def with_8_bits(image: Image.Image, path: Path | str, white: Mapping[str, int], to_integer: Callable) -> Image.Image:
    """Decode an image; a deep or wide one is scaled to 8 bits, and `to_integer` rounds its pixels."""
    wide = _is_wide(image)
    if not wide and not _is_deep(image):
        return decode(image)
    declared = _declared_white(image, path)
    kind, own = _kind_and_white(image, path)
    scale = declared or white.get(kind, own)
    clear = image.info.get("transparency")  # the colour of transparent pixels
    if not wide:
        pixels = np.asarray(image)  # uint16, int32 or float32 (H, W)
        # Pillow inverts a TIFF in which 0 is white, unless it is deep
        inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
        shown = Image.fromarray(_scaled(pixels, scale, to_integer, inverted))
        if clear is not None:
            shown.putalpha(Image.fromarray(pixels != clear))
        return shown
    if clear is not None or (scale != 65535 and image.mode == "RGBA"):
        raise ValueError(f"transparency, and values up to {scale} in 16 bits a channel")
    if scale == 65535:
        return image
    pixels = 256 * np.asarray(image).astype(np.uint16) + _low_bytes(path)  # (H, W, 3), or 4 of CMYK
    return Image.frombytes(image.mode, image.size, _scaled(pixels, scale, to_integer).tobytes())


def _low_bytes(path: Path | str) -> np.ndarray:
    """The low bytes of colours of 16 bits, uint8 (H, W, C): Pillow takes them for the high ones in the wrong order."""
    opposite = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    with opened(path) as image:
        for index, tile in enumerate(image.tile):
            mode, *rest = [tile.args] if isinstance(tile.args, str) else tile.args
            image.tile[index] = tile._replace(args=(mode[:-1] + opposite[mode[-1]], *rest))
        return np.asarray(decode(image))


def _scaled(pixels: np.ndarray, white: int, to_integer: Callable, inverted: bool = False) -> np.ndarray:
    """Values of any type from 0 to white, uint8 (…) from 0 to 255."""
    levels = pixels * np.float32(255 / white)
    np.clip(levels, 0, 255, out=levels)
    return to_integer(255 - levels if inverted else levels).astype(np.uint8)


def to_rgb(image: Image.Image, ground: str) -> Image.Image:
    """The image in RGB or L, the transparent pixels of one that is not transparent as a whole on a ground."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest, highest = image.getextrema()[3]
        if lowest == 0 < highest:
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
