"""Images of industrial parts in the layouts that people have: Real-IAD, MVTec AD, VisA, or any folder.

A `Record` names one image by its path below the data root; that path is its identity from here to the report. Labels
and masks travel with the record and are read by reports alone.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from llb.files import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
RESOLUTIONS = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first that is there is used
SPLITS = "realiad_jsons_fuiad_"
Image.MAX_IMAGE_PIXELS = None  # a line-scan camera's picture is no decompression bomb


@dataclass(frozen=True)
class Record:
    """One image."""

    path: str  # relative to the data root, with forward slashes
    label: int | None  # 0 normal, 1 defective, None unknown
    mask: str | None  # relative to the data root
    kind: str  # "good", "scratch", …; "" when unknown


@dataclass(frozen=True)
class Dataset:
    """One category."""

    root: Path
    layout: str  # "real-iad", "mvtec", "visa" or "folder"
    category: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]


# ---- layouts ----


def recognise(root: Path) -> str:
    """Which layout `root` has: "real-iad", "mvtec", "visa" or "folder".

    Raises:
        UserError: no folder, or no image in it.
    """
    try:
        if not root.exists():
            raise UserError(f"--data {root} does not exist: give an existing folder")
        if not root.is_dir():
            raise UserError(f"--data {root} is a file: give the folder that holds the images")
        if any(_split_folders(root)):
            return "real-iad"
        if any(_mvtec_categories(root)):
            return "mvtec"
        if (root / "split_csv").is_dir() or any(folder.is_dir() for folder in root.glob("*/Data/Images")):
            return "visa"
        if any(_images_below(root)):
            return "folder"
    except OSError as error:
        raise UserError(f"--data: {error.filename or root} cannot be read ({error.strerror})") from None
    raise UserError(
        f"--data {root} holds no images: expected a Real-IAD root (realiad_jsons_*), an MVTec-AD root "
        "(category/train/good), a VisA root (split_csv) or any folder of images"
    )


def categories(root: Path) -> list[str]:
    """The categories below `root`, sorted; a plain folder is one category with the folder's name."""
    layout = recognise(root)
    if layout == "real-iad":
        return sorted({file.stem for folder in _split_folders(root).values() for file in folder.glob("*.json")})
    if layout == "mvtec":
        return sorted(_mvtec_categories(root))
    if layout == "visa":
        return sorted({row["object"] for row in _visa_rows(root)})
    return [root.resolve().name or "images"]


def choose_categories(root: Path, wanted: str | None) -> list[str]:
    """What --category means: one name, several with commas, "all", or nothing if there is only one.

    Raises:
        UserError: a name that is not there, or none given where there are several; the line lists them.
    """
    there = categories(root)
    if wanted is None:
        if len(there) > 1:
            raise UserError(f"--category is needed: one of {', '.join(there)}, several with commas, or all")
        return there
    if wanted == "all":
        return there
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names or [wanted]:
        if name not in there:
            raise UserError(f"--category {name} is not in {root}: there are {', '.join(there)}")
    return names


def load_category(root: Path, category: str, noise_ratio: float, seed: int) -> Dataset:
    """The records of one category, with `noise_ratio` of defective images in train.

    Args:
        noise_ratio: in [0, 1). Real-IAD: the split of that name. MVTec and VisA: so many test anomalies, drawn by
            `seed`, move to train and leave test. A plain folder has no labels to do that with.

    Raises:
        UserError: a ratio that cannot be had, files that are missing.
    """
    layout = recognise(root)
    if not 0 <= noise_ratio < 1:
        raise UserError(f"--noise-ratio {noise_ratio} is not a share from 0 to below 1")
    if layout == "real-iad":
        train, test = _real_iad(root, category, noise_ratio)
    elif layout == "folder":
        if noise_ratio:
            raise UserError(
                f"--noise-ratio {noise_ratio:g}: {root} has no labels, so defects cannot be added: leave it out"
            )
        train, test = [Record(path, None, None, "") for path in _relative(_images_below(root), root)], []
    else:
        train, test = (_mvtec if layout == "mvtec" else _visa)(root, category)
        train, test = _mix(train, test, noise_ratio, seed, category)
    return Dataset(root, layout, category, tuple(train), tuple(test))


def _relative(files: Iterable[Path], root: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in files)


def _images_below(folder: Path):
    """Image files in all subfolders; hidden ones are left out, folders that are links are followed."""

    def refuse(error: OSError):
        raise UserError(f"--data: {error.filename} cannot be read ({error.strerror})")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS:
                yield Path(parent) / name


# Real-IAD ----


def _split_folders(root: Path) -> dict[float, Path]:
    """Noise ratio → folder of JSON files. Real-IAD's own split, realiad_jsons, has no noise."""
    found = {}
    for folder in sorted(root.glob(f"{SPLITS}*")):
        try:
            found[float(folder.name.removeprefix(SPLITS))] = folder
        except ValueError:
            continue
    own = root / "realiad_jsons"
    if own.is_dir() and 0.0 not in found:
        found[0.0] = own / own.name if (own / own.name).is_dir() else own
    return found


def _real_iad(root: Path, category: str, noise_ratio: float) -> tuple[list[Record], list[Record]]:
    splits = _split_folders(root)
    if noise_ratio not in splits:
        there = ", ".join(f"{ratio:g}" for ratio in sorted(splits))
        raise UserError(f"--noise-ratio {noise_ratio:g}: {root} has no such split, only {there}")
    file = splits[noise_ratio] / f"{category}.json"
    if not file.is_file():
        raise UserError(f"--category {category}: {file} is not there")
    images = next((root / name for name in RESOLUTIONS if (root / name).is_dir()), None)
    if images is None:
        raise UserError(f"--data {root} has splits but no images: expected a folder {' or '.join(RESOLUTIONS)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        normal = content["meta"]["normal_class"]
        parts = [
            [_real_iad_record(entry, category, images.name, normal) for entry in content[p]] for p in ("train", "test")
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a Real-IAD split ({type(error).__name__}: {error}): get it again") from None
    _check_files(root, [record for part in parts for record in part], file)
    return parts[0], parts[1]


def _real_iad_record(entry: dict, category: str, images: str, normal: str) -> Record:
    """Images below NG/ can be labelled OK (the defect is out of this camera's sight): anomaly_class decides."""
    folder = f"{images}/{category}/"
    kind, mask = entry["anomaly_class"], entry.get("mask_path")
    label = int(kind != normal)
    has_mask = label and mask not in (None, "None", "")
    return Record(folder + entry["image_path"], label, folder + mask if has_mask else None, kind if label else "good")


def _check_files(root: Path, records: list[Record], source: Path) -> None:
    seen = set()
    for record in records:
        if record.path in seen:
            raise UserError(f"{source} lists {record.path} twice: delete one of the entries")
        seen.add(record.path)
    for name in (name for record in records for name in (record.path, record.mask) if name):
        if not (root / name).is_file():
            raise UserError(f"{source} lists {name}, which is not below {root}: complete the download")


# MVTec AD ----


def _mvtec_categories(root: Path) -> dict[str, Path]:
    """Category → its folder; `root` may be the folder of a single category."""
    if (root / "train" / "good").is_dir():
        return {root.resolve().name: root}
    return {folder.parent.parent.name: folder.parent.parent for folder in sorted(root.glob("*/train/good"))}


def _mvtec(root: Path, category: str) -> tuple[list[Record], list[Record]]:
    folder = _mvtec_categories(root)[category]
    train = [Record(path, 0, None, "good") for path in _relative(_images_below(folder / "train" / "good"), root)]
    test = []
    for kind_folder in sorted(path for path in (folder / "test").glob("*") if path.is_dir()):
        kind, truth = kind_folder.name, folder / "ground_truth" / kind_folder.name
        masks = {file.stem.removesuffix("_mask"): file for file in _images_below(truth)} if truth.is_dir() else {}
        for path in _relative(_images_below(kind_folder), root):
            mask = masks.get(Path(path).stem) if kind != "good" else None
            name = mask.relative_to(root).as_posix() if mask else None
            test.append(Record(path, int(kind != "good"), name, kind))
    return train, test


# VisA ----


def _visa_rows(root: Path) -> list[dict[str, str]]:
    file = root / "split_csv" / "1cls.csv"
    if not file.is_file():
        raise UserError(f"--data {root} looks like VisA, but {file} is missing: get it from VisA's repository")
    with open(file, newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    if not rows or not {"object", "split", "label", "image", "mask"} <= rows[0].keys():
        raise UserError(f"{file} has not the columns object, split, label, image, mask: get it again")
    return rows


def _visa(root: Path, category: str) -> tuple[list[Record], list[Record]]:
    parts: dict[str, list[Record]] = {"train": [], "test": []}
    for row in _visa_rows(root):
        if row["object"] == category:
            label = int(row["label"] != "normal")
            kind = row["label"] if label else "good"
            parts[row["split"]].append(Record(row["image"], label, row["mask"] or None if label else None, kind))
    _check_files(root, parts["train"] + parts["test"], root / "split_csv" / "1cls.csv")
    return parts["train"], parts["test"]


# Noise ----


def _mix(
    train: list[Record], test: list[Record], ratio: float, seed: int, category: str
) -> tuple[list[Record], list[Record]]:
    """Move defective test images to train until they are `ratio` of it: m / (n + m) = ratio."""
    if not ratio:
        return train, test
    normal = [record for record in train if record.label == 0]
    defective = [index for index, record in enumerate(test) if record.label == 1]
    count = round(ratio * len(normal) / (1 - ratio))
    if count > len(defective):
        largest = len(defective) / (len(normal) + len(defective))
        raise UserError(
            f"--noise-ratio {ratio:g} takes {count} defective images and {category} has {len(defective)}: "
            f"give at most {np.floor(largest * 100) / 100:g}"
        )
    # The category's name enters the draw by a digest: Python's own hash differs from process to process.
    name = int.from_bytes(hashlib.sha256(category.encode()).digest()[:8], "big")
    moved = set(np.random.default_rng([seed, name]).choice(defective, count, replace=False).tolist())
    mixed = train + [test[index] for index in sorted(moved)]
    return sorted(mixed, key=lambda record: record.path), [r for index, r in enumerate(test) if index not in moved]


# ---- images ----


def _open(path: Path) -> Image.Image:
    """A decoded image with its EXIF rotation applied.

    Raises:
        UserError: missing, truncated or no image; the line names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: put it back, or take it out of the data set") from None
    except Exception as error:  # a damaged file provokes many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as an image ({reason}): repair, replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes → RGB. 16-bit grey values are divided by 257, float ones are taken as 0..1 or 0..255;
    transparent pixels are shown on black."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            values *= 255.0 if values.max(initial=0) <= 1.0 else 1.0
        elif image.mode != "I" or values.max(initial=0) > 255:
            values /= 257.0
        return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")


def load_image(path: Path, size: int) -> np.ndarray:
    """uint8 (size, size, 3): decoded, turned as EXIF says, RGB, resized by Pillow's (antialiased) bilinear filter.

    Raises:
        UserError: the file cannot be read as an image.
    """
    image = to_rgb(_open(path))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def load_mask(path: Path, size: int) -> np.ndarray:
    """bool (size, size): where a defect is. Any value above 0 is defect; resized by the share of a pixel that is
    covered, at least one half; a defect too small for that keeps its most covered pixels, so that no region is lost."""
    image = _open(path)
    values = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "RGBA", "LA", "CMYK") else image)
    binary = (values > 0) if values.ndim == 2 else (values > 0).any(axis=-1)
    covered = Image.fromarray(binary.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BILINEAR)
    share = np.asarray(covered)
    return share >= 128 if (share >= 128).any() or not share.any() else share == share.max()
