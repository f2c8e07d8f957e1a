"""Reading pictures and masks, and the encoders' normalisation.

image   uint8 (S, S, 3)     any picture file → RGB, resized to a square
mask    bool (S, S)         True where defective
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llb.data import Record
from llb.files import UserError

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
# Pillow takes an image of 90 megapixels for an attack and warns; line-scan cameras deliver more. Our limit is an error.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 10**9


def normalise(images: jax.Array) -> jax.Array:
    """ImageNet's normalisation: uint8 (…, 3) → float32, each colour with about mean 0 and standard deviation 1."""
    return (images.astype(jnp.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD


def load_image(path: Path | str, size: int) -> np.ndarray:
    """Read any image as RGB and resize it: uint8 (size, size, 3), Pillow's bilinear filter (averaging as it shrinks).

    EXIF rotation is applied. Greyscale is repeated in the three channels. 16-bit values are divided by 257, and so are
    32-bit integers, which must not be larger. Floating-point values have the range 0…1, 0…255 or 0…65535: the smallest
    that holds them, with one per cent of tolerance for resampling. Transparent images lie on white. A UserError is
    raised if the file is missing, truncated or no image, or its values or its size are out of range.
    """
    image = _open(path)
    if _is_deep(image):
        image = Image.fromarray(_to_8_bits(np.asarray(image), path))
    return np.asarray(_to_rgb(image, "white").resize((size, size), Image.Resampling.BILINEAR))  # (S, S, 3)


def load_mask(path: Path | str, size: int) -> np.ndarray:
    """Read a defect mask: bool (size, size), True where at least half of the pixel's surroundings are defective.

    In the file, a pixel that is neither black nor transparent is defective; in a JPEG, whose compression leaves traces
    around edges, a pixel from 128 on. EXIF rotation is applied. The size may differ from the image's. The bilinear
    filter gives the defective share of a pixel's surroundings. If no pixel reaches one half, those with the largest
    share stay, so that every defective image keeps a mask. A small defect beside a larger one may vanish. A UserError
    is raised if the file is missing, truncated or no image.
    """
    image = _open(path)
    floor = 127 if image.format == "JPEG" else 0  # traces of the compression are no defect
    if not _is_deep(image):
        image = _to_rgb(image, "black")
    pixels = np.asarray(image)
    defect = (pixels if pixels.ndim == 2 else pixels.max(axis=2)) > floor  # (H, W)
    share = Image.fromarray(defect.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    share = np.asarray(share)  # (S, S), 0…1
    return share >= min(0.5, share.max()) if defect.any() else np.zeros((size, size), bool)


def load_masks(root: Path, records: Sequence[Record], size: int) -> np.ndarray | None:
    """Masks of normal and defective images: bool (b, size, size), all False for a normal one.

    None when pixels cannot be judged: a label is unknown or a defective image has no mask.
    """
    if any(record.label is None or (record.label == 1 and record.mask is None) for record in records):
        return None

    def load(record: Record) -> np.ndarray:
        return load_mask(root / record.mask, size) if record.label == 1 else np.zeros((size, size), bool)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(load, records)))


def _open(path: Path | str) -> Image.Image:
    """An image, decoded and turned upright."""
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
            if pixels <= MAX_PIXELS:
                image.load()
                if image.mode == "LAB":
                    raise ValueError("colour space LAB, not RGB")
                ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: put it back, or take it off the list") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} cannot be read (no image format that Pillow knows): remove or replace it") from None
    except Exception as error:  # for damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error, …
        reason = "truncated" if "truncated" in str(error).lower() else " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason or type(error).__name__}): remove or replace it") from None
    if pixels > MAX_PIXELS:
        raise UserError(f"{path} has {pixels / 1e6:.0f} megapixels, more than 1000: scale it down")
    return image


def _to_rgb(image: Image.Image, ground: str) -> Image.Image:
    """The image in RGB, a transparent one on a ground of that colour."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow holds more than 8 bits a pixel, which its own conversion to RGB would clip at 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bits(pixels: np.ndarray, path: Path | str) -> np.ndarray:
    """uint16, int32 or float32 (H, W) → uint8 (H, W). Fixed scales: dark images of a set stay dark."""
    low, high = float(pixels.min()), float(pixels.max())
    scales, over = ((1, 255, 65535), 0.01) if pixels.dtype.kind == "f" else ((65535,), 0.0)
    scale = next((scale for scale in scales if high <= (1 + over) * scale), None)
    if scale is None or not low >= -over * scale:
        raise UserError(f"{path} has values from {low:g} to {high:g}: save it with 8 or 16 bits a channel")
    return np.rint((pixels * np.float32(255 / scale)).clip(0, 255)).astype(np.uint8)
