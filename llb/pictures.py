"""Pictures for people: heat maps over images, and contact sheets of them. No JAX."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def make_palette() -> np.ndarray:
    """uint8 (256, 3), sRGB: dark violet, red, orange, pale yellow, each step equally lighter to the eye.

    A half-turn of hue in OKLab (Ottosson, "A perceptual color space for image processing", 2020) with linear lightness.
    """
    t = np.linspace(0, 1, 256)
    lightness, hue = 0.28 + 0.67 * t, np.radians(290 + 175 * t)
    chroma = 0.10 + 0.11 * np.sin(np.pi * t**0.8)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    cones = [1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]
    red = [4.0767416621, -3.3077115913, 0.2309699292]
    green = [-1.2684380046, 2.6097574011, -0.3413193965]
    blue = [-0.0041960863, -0.7034186147, 1.7076147010]
    linear = (np.array([red, green, blue]) @ (np.array(cones) @ lab) ** 3).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb.T).astype(np.uint8)


PALETTE = make_palette()
INK, FAINT, GROUND = (236, 238, 242), (150, 157, 170), (24, 26, 31)  # colours of a contact sheet
MARGIN, LINE = 14, 18  # pixels between tiles, pixels per line of a caption


def heat_overlay(image: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """The image in grey with the anomaly map over it, the hotter, the more colour: uint8 (S, S, 3).

    image: uint8 (S, S, 3), resized if the map has another size; heat: float32 (S, S); low, high: the map's values at
        both ends of the colour scale.
    """
    if image.shape[:2] != heat.shape:
        image = np.asarray(Image.fromarray(image).resize(heat.shape[::-1], Image.Resampling.BILINEAR))
    level = ((heat - low) / max(high - low, 1e-12)).clip(0, 1)  # (S, S)
    grey = image @ np.array([0.299, 0.587, 0.114])  # (S, S), ITU-R BT.601 luma
    opacity = (0.10 + 0.70 * np.sqrt(level))[..., None]
    blend = (1 - opacity) * grey[..., None] + opacity * PALETTE[np.rint(255 * level).astype(int)]
    return np.rint(blend).astype(np.uint8)


def contact_sheet(
    tiles: Sequence[tuple[np.ndarray, np.ndarray, tuple[str, str]]],
    columns: int = 3,
    side: int = 192,
    scale: tuple[float, float] | None = None,
) -> Image.Image:
    """A grid of tiles in the given order, row by row: each image beside its heat map.

    The whole sheet has one colour scale, from the median of the shown maps to their highest thousandth, so that tiles
    can be compared.

    tiles: for each the image, uint8 (S, S, 3), the map, float32 (S, S), and the caption: a headline, and the image's
        path (shortened from the left to fit); columns: tiles in a row; side: of an image on the sheet, pixels;
        scale: the map's values at both ends of the colour scale, if this sheet is one of several.
    """
    tiles = list(tiles)
    columns = max(1, min(columns, len(tiles)))
    width, height = 2 * side + 2, side + 2 * LINE + 4
    size = (MARGIN + columns * (width + MARGIN), MARGIN + math.ceil(len(tiles) / columns) * (height + MARGIN))
    sheet = Image.new("RGB", size, GROUND)
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(12)
    if scale is not None:
        low, high = scale
    elif tiles:
        low, high = np.quantile(np.stack([heat for _, heat, _ in tiles]), [0.5, 0.999])
    for place, (image, heat, (headline, path)) in enumerate(tiles):
        x, y = MARGIN + place % columns * (width + MARGIN), MARGIN + place // columns * (height + MARGIN)
        for left, pixels in ((x, image), (x + side + 2, heat_overlay(image, heat, low, high))):
            sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (left, y))
        y += side + 4
        draw.text((x, y), first_fitting(beginnings(printable(headline)), font, width), INK, font)
        draw.text((x, y + LINE), first_fitting(last_parts(printable(path)), small, width), FAINT, small)
    return sheet


def printable(text: str) -> str:
    """The text in one line: file names may hold line breaks, and bytes that are no characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def beginnings(text: str) -> list[str]:
    """The text and its ever shorter beginnings."""
    return [text, *(text[:end] + "…" for end in range(len(text) - 1, 0, -1))]


def last_parts(path: str) -> list[str]:
    """The path, ever fewer of its last parts, and ever shorter ends of its name."""
    parts = path.split("/")
    fewer = ["…/" + "/".join(parts[start:]) for start in range(1, len(parts))]
    return [path, *fewer, *("…" + parts[-1][start:] for start in range(1, len(parts[-1])))]


def first_fitting(candidates: list[str], font: ImageFont.FreeTypeFont, room: float) -> str:
    """The first text that is at most `room` pixels wide."""
    return next((text for text in candidates if font.getlength(text) <= room), "…")
