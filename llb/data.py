"""Image sets on the disk: recognise the layout, list the records, mix in noise, read images and masks.

Four layouts, told apart by what the folder holds:

    "real-iad"  realiad_jsons_fuiad_0.1/<category>.json beside realiad_1024/<category>/…   (Real-IAD, CVPR 2024)
    "mvtec"     <category>/train/good, test/<kind>, ground_truth/<kind>                    (MVTec AD, CVPR 2019)
    "visa"      <category>/Data/Images/{Normal,Anomaly} beside split_csv/1cls.csv          (VisA, ECCV 2022)
    "folder"    any images, in any subfolders: all are for training, no labels, no test set

A record carries its label and its mask along, so that reports can use them; nothing that trains may look.
"""

import csv
import errno
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from llb.files import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
REALIAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first that is there is read
REALIAD_SPLIT = "realiad_jsons_fuiad_"
VISA_SPLIT = "split_csv/1cls.csv"
RESERVED = ("cache", "mean")  # of RUN/ and of metrics.json, where each category has an entry
LAYOUTS = "a Real-IAD root, an MVTec-AD or VisA root, or a folder with images"

# Pillow takes an image of 90 megapixels for an attack and warns; line-scan cameras deliver more. Our limit is an error.
Image.MAX_IMAGE_PIXELS = None
MAX_PIXELS = 10**9


@dataclass(frozen=True)
class Record:
    """One image. Paths are POSIX and relative to the data root."""

    path: str
    label: int | None  # 0 normal, 1 anomalous, None unknown
    mask: str | None  # only of anomalous images, and only if there is one
    kind: str  # "good", "scratch", …; "" when unknown


@dataclass(frozen=True)
class Dataset:
    """One category: every path occurs once, in train or in test."""

    root: Path
    layout: str  # "real-iad", "mvtec", "visa" or "folder"
    category: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]


# ---- layouts and categories ----


def recognise(root: Path | str) -> str:
    """The layout of `root`, by its content: "real-iad", "mvtec", "visa" or "folder".

    Raises:
        UserError: there is no such folder, it cannot be read, or it holds no images.
    """
    root = Path(root)
    if not os.path.exists(root):
        raise UserError(f"--data {root}: there is no such folder; give {LAYOUTS}")
    if not os.path.isdir(root):
        raise UserError(f"--data {root} is a file: give the folder that holds the images")
    names = _names(root)
    if any(name in REALIAD_IMAGES or name.startswith("realiad_jsons") for name in names):
        return "real-iad"
    if _is_dir(root, "train/good") or any(_is_dir(root, name, "train/good") for name in names):
        return "mvtec"
    if any(_is_dir(root, name, "Data/Images/Normal") for name in ("", *names)):
        return "visa"
    if next(_walk(root), None) is None:
        raise UserError(f"--data {root} holds no images: give {LAYOUTS}")
    return "folder"


def categories(root: Path | str) -> list[str]:
    """The categories below `root`, sorted; a plain folder and a single category's folder are called by their own name.

    Raises:
        UserError: what `recognise` raises; part of a layout is missing.
    """
    root, layout = Path(root), recognise(root)
    if layout == "real-iad":
        files = [Path(name) for split in _realiad_splits(root).values() for name in _names(split)]
        found = {file.stem for file in files if file.suffix == ".json"}
    elif layout == "mvtec" and not _is_dir(root, "train/good"):
        found = {name for name in _names(root) if _is_dir(root, name, "train/good")}
    elif layout == "visa":
        found = {row["object"] for row in _visa_rows(root)}
    else:
        found = {Path(os.path.abspath(root)).name or "images"}
    return sorted(found)


def choose_categories(root: Path | str, wanted: str | None) -> list[str]:
    """What `--category` asks for: one name, several with commas, "all", or None where there is only one.

    Raises:
        UserError: a category is not there, or none is given where there are several; the line lists them.
    """
    there = categories(root)
    if wanted is None and len(there) != 1:
        raise UserError(f"--category: {root} holds several, give one or more of {', '.join(there)}, or all")
    if wanted is None or wanted == "all":
        chosen = there
    else:
        chosen = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in chosen or [wanted]:
        _require_category(root, name, there)
        if name in RESERVED:
            raise UserError(f"--data {root}: a run has a {name} of its own, so no category is called that; rename it")
    return chosen


def load_category(root: Path | str, category: str, noise_ratio: float = 0.0, seed: int = 0) -> Dataset:
    """The records of one category, in an order that depends on the files and the seed alone.

    Args:
        root: the data root, of any layout.
        category: one of `categories(root)`.
        noise_ratio: share of anomalous images in train, 0 ≤ α < 1. Real-IAD: which FUIAD split is read. MVTec and VisA:
            round(α·n / (1 − α)) test anomalies join the n normal training images and leave test. Plain folder: 0.
        seed: which test anomalies are moved; no effect on Real-IAD.

    Raises:
        UserError: the category or the ratio cannot be had, or a listed file is missing or listed twice.
    """
    root, layout = Path(root), recognise(root)
    if not 0 <= noise_ratio < 1:
        raise UserError(f"--noise-ratio {noise_ratio}: give a share from 0 to below 1")
    _require_category(root, category, categories(root))
    if layout == "real-iad":
        train, test = _realiad(root, category, noise_ratio)
    elif layout == "folder":
        if noise_ratio:
            raise UserError(f"--noise-ratio {noise_ratio}: {root} is a plain folder without labels; leave the flag out")
        train, test = [Record(path, None, None, "") for path in _walk(root)], []
    else:
        train, test = _visa(root, category) if layout == "visa" else _mvtec(root, category)
        train, test = _mix_noise(train, test, noise_ratio, category, seed)
    for record in (*train, *test):
        if not _fits_a_line(record.path):
            raise UserError(f"{root}: {record.path!r} does not fit a list with one path a line; rename the file")
        if PurePosixPath(record.path).is_absolute() or ".." in PurePosixPath(record.path).parts:
            raise UserError(f"{root}: {record.path} is listed, but lies elsewhere; images are named from the root on")
    return Dataset(root, layout, category, tuple(train), tuple(test))


def _fits_a_line(path: str) -> bool:
    """Whether a text file with one path a line, blanks around it stripped, gives the path back."""
    return path.encode(errors="replace").decode().strip().splitlines() == [path]


def _require_category(root: Path | str, name: str, there: list[str]) -> None:
    if name not in there:
        raise UserError(f"--category {name} is not in {root}; there is {', '.join(there) or 'none'}")


# ---- Real-IAD ----


def _realiad_splits(root: Path) -> dict[float, Path]:
    """Noise ratio → the folder with that split's JSON files, for every split that is there."""
    splits = {}
    for place in (root, root / "realiad_jsons"):  # the archives unpack to either
        for name in _names(place) if _is_dir(place) else []:
            ratio = name.removeprefix(REALIAD_SPLIT)
            if ratio != name and ratio.replace(".", "", 1).isdecimal():
                splits.setdefault(float(ratio), place / name)
    for plain in (root / "realiad_jsons" / "realiad_jsons", root / "realiad_jsons"):
        if 0.0 not in splits and _is_dir(plain) and any(name.endswith(".json") for name in _names(plain)):
            splits[0.0] = plain  # Real-IAD's own split has no anomalies in train
    if not splits:
        raise UserError(f"--data {root}: no folder {REALIAD_SPLIT}0.0 (or 0.1, 0.2, 0.4); unpack Real-IAD's JSON files")
    return dict(sorted(splits.items()))


def _realiad(root: Path, category: str, noise_ratio: float) -> tuple[list[Record], list[Record]]:
    splits = _realiad_splits(root)
    folder = next((folder for ratio, folder in splits.items() if math.isclose(ratio, noise_ratio)), None)
    if folder is None:
        there = ", ".join(map(str, splits))
        raise UserError(f"--noise-ratio {noise_ratio}: {root} has no FUIAD split for it; there is {there}")
    images = next((name for name in REALIAD_IMAGES if _is_dir(root, name)), None)
    if images is None:
        raise UserError(f"--data {root}: no image folder {', '.join(REALIAD_IMAGES)}; unpack one beside {folder.name}")

    file = folder / f"{category}.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        base = PurePosixPath(images, content["meta"].get("prefix") or category)
        normal = content["meta"].get("normal_class", "OK")
        train, test = ([_realiad_record(entry, base, normal) for entry in content[part]] for part in ("train", "test"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): unpack the split's JSON files again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise UserError(f"{file} is not as Real-IAD writes it ({reason}): unpack it again") from None
    _check_listed(root, file, [*train, *test])
    return train, test


def _realiad_record(entry: dict[str, Any], base: PurePosixPath, normal: str) -> Record:
    """The class decides, never the path: images below NG/ whose defect this camera does not see are labelled OK."""
    label = int(entry["anomaly_class"] != normal)
    mask = entry.get("mask_path")
    there = label == 1 and mask not in (None, "", "None")  # older copies write null as "None"
    path = (base / entry["image_path"]).as_posix()
    return Record(path, label, (base / mask).as_posix() if there else None, entry["anomaly_class"] if label else "good")


def _check_listed(root: Path, source: Path, records: list[Record]) -> None:
    """Every file that a list names must be there, and every image only once: known before anything is trained."""
    seen = set()
    for record in records:
        if record.path in seen:
            raise UserError(f"{source} lists {record.path} twice: delete one of the two")
        seen.add(record.path)
    listed = [path for record in records for path in (record.path, record.mask) if path is not None]
    missing = [path for path in listed if not os.path.isfile(root / path)]
    if missing:
        count = f"{len(missing)} of {len(listed)} files that {source} names are missing"
        raise UserError(f"{root / missing[0]} is not there ({count}): unpack the images again")


# ---- MVTec AD and VisA ----


def _mvtec(root: Path, category: str) -> tuple[list[Record], list[Record]]:
    base = "" if _is_dir(root, "train/good") else f"{category}/"
    train = [Record(path, 0, None, "good") for path in _images(root, f"{base}train/good")]
    test = []
    for kind in _names(root / base / "test") if _is_dir(root, base, "test") else []:
        masks = {PurePosixPath(path).stem: path for path in _images(root, f"{base}ground_truth/{kind}")}
        for path in _images(root, f"{base}test/{kind}"):
            stem = PurePosixPath(path).stem
            mask = masks.get(f"{stem}_mask", masks.get(stem))  # MVTec AD: 000_mask.png; VisA: the same name
            test.append(Record(path, 0, None, "good") if kind == "good" else Record(path, 1, mask, kind))
    return train, test


def _visa_rows(root: Path) -> list[dict[str, str]]:
    file = root / VISA_SPLIT
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except OSError:
        mend = "put VisA's split_csv beside the categories, and give the folder that holds both"
        raise UserError(f"{file} is not there: {mend}") from None
    except (csv.Error, UnicodeDecodeError):
        rows = []
    columns = {"object", "split", "label", "image", "mask"}
    if not rows or any(None in row.values() or not columns <= row.keys() for row in rows):
        raise UserError(f"{file} has not VisA's columns object,split,label,image,mask: unpack it again")
    return rows


def _visa(root: Path, category: str) -> tuple[list[Record], list[Record]]:
    parts = {"train": [], "test": []}
    for row in _visa_rows(root):
        if row["object"] == category and row["split"] in parts:
            label = int(row["label"] != "normal")
            parts[row["split"]].append(
                Record(row["image"], label, row["mask"] or None if label else None, "anomaly" if label else "good")
            )
    _check_listed(root, root / VISA_SPLIT, [*parts["train"], *parts["test"]])
    return parts["train"], parts["test"]


def _mix_noise(
    train: list[Record], test: list[Record], noise_ratio: float, category: str, seed: int
) -> tuple[list[Record], list[Record]]:
    """Move randomly drawn anomalies from test to train until they are the share `noise_ratio` of train.

    A larger ratio moves the same images and more. Train is shuffled: a position must not tell what was moved.
    """
    if noise_ratio == 0:
        return train, test
    anomalies = [record for record in test if record.label == 1]
    wanted = round(noise_ratio * len(train) / (1 - noise_ratio))
    if wanted > len(anomalies):
        most = math.floor(1000 * len(anomalies) / (len(train) + len(anomalies))) / 1000
        raise UserError(
            f"--noise-ratio {noise_ratio}: {category} would need {wanted} test anomalies and has {len(anomalies)}; "
            f"give at most {most}"
        )
    random = np.random.default_rng([seed % 2**32, zlib.crc32(category.encode())])
    moved = [anomalies[i] for i in random.permutation(len(anomalies))[:wanted]]
    mixed = [*train, *moved]
    left = set(moved)
    return [mixed[i] for i in random.permutation(len(mixed))], [record for record in test if record not in left]


# ---- folders; every listing is sorted by name, as systems and disks differ ----


def _names(folder: Path) -> list[str]:
    """Sorted names in a folder, without hidden ones."""
    try:
        names = os.listdir(folder)
        if not os.access(folder, os.X_OK):  # names without files
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): grant access to it, or move it away") from None
    return sorted(name for name in names if not name.startswith("."))


def _is_dir(*parts: Path | str) -> bool:
    """Whether there is such a folder; no exception where a folder above it may not be entered, unlike Path.is_dir."""
    return os.path.isdir(os.path.join(*parts))


def _images(root: Path, folder: str) -> list[str]:
    """Images directly in root/folder, relative to root; none if there is no such folder."""
    if not _is_dir(root, folder):
        return []
    return [f"{folder}/{name}" for name in _names(root / folder) if _is_image(root / folder / name)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(file)


def _walk(root: Path, folder: str = "", above: Iterable[str] = ()) -> Iterator[str]:
    """All images below root, relative to it; links are followed, unless they lead back to a folder above."""
    here = os.path.realpath(root / folder)
    if here in above:
        return
    for name in _names(root / folder):
        path = f"{folder}/{name}" if folder else name
        if _is_image(root / path):
            yield path
        elif _is_dir(root, path) and not _is_run(root / path):
            yield from _walk(root, path, (*above, here))


def _is_run(folder: Path) -> bool:
    """Whether llb made it: with `--data .` the run lies among the images, and its own pictures must not join them."""
    config = folder / "config.json"
    return os.path.isfile(config) and b'"submodels"' in config.read_bytes()


# ---- images and masks ----


def load_image(path: Path | str, size: int) -> np.ndarray:
    """Read any image as RGB and resize it: uint8 (size, size, 3), Pillow's bilinear filter (averaging as it shrinks).

    EXIF rotation is applied. Greyscale is repeated in the three channels; 16 bits are divided by 257, and so are 32,
    which must not hold more; floating-point images are taken as 0…1, 0…255 or 0…65535, the smallest that holds them but
    for one per cent, by which resampling may overshoot; transparent images lie on white.

    Raises:
        UserError: the file is missing, truncated, no image, or of a range or size that is not meant for viewing.
    """
    image = _open(path)
    if _is_deep(image):
        image = Image.fromarray(_to_8_bits(np.asarray(image), path))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))  # (S, S, 3)


def load_mask(path: Path | str, size: int) -> np.ndarray:
    """Read a defect mask: bool (size, size), True where at least half of the pixel's surroundings are defective.

    In the file, every pixel that is neither black nor transparent is defective (in a JPEG from 128 on: it rings), and
    EXIF rotation is applied; the size may differ from the image's. The defective share of a pixel's surroundings comes
    from the bilinear filter. Where nothing in the image reaches one half, the pixels that are covered most stay, so
    that a defective image keeps a mask; a small defect beside a larger one may go.

    Raises:
        UserError: the file is missing, truncated or no image.
    """
    image = _open(path)
    floor = 127 if image.format == "JPEG" else 0  # JPEG's ringing is not a defect
    if not _is_deep(image):
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        image = image.convert("RGB")
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
                file_format = image.format
                image = ImageOps.exif_transpose(image)
                image.format = file_format
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
