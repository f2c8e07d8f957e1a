"""Image sets on the disk: recognise the layout, list the images, mix defective ones into the training set.

Four layouts, recognised by the names in the folder:

    "real-iad"  realiad_jsons_fuiad_0.1/<category>.json beside realiad_1024/<category>/…   (Real-IAD, CVPR 2024)
    "mvtec"     <category>/train/good, test/<kind>, ground_truth/<kind>                    (MVTec AD, CVPR 2019)
    "visa"      <category>/Data/Images/{Normal,Anomaly} beside split_csv/1cls.csv          (VisA, ECCV 2022)
    "folder"    any images, in any subfolders: all are for training; no labels, no test set

A record holds the label and the mask of an image for reports. No training may use them.
"""

import csv
import errno
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from llb.files import UserError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
REALIAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first of these that exists is read
REALIAD_SPLIT = "realiad_jsons_fuiad_"
VISA_SPLIT, VISA_COLUMNS = "split_csv/1cls.csv", {"object", "split", "label", "image", "mask"}
RESERVED = ("cache", "mean")  # of RUN/ and of metrics.json, where each category has an entry
LAYOUTS = "a Real-IAD root, an MVTec-AD or VisA root, or a folder with images"


@dataclass(frozen=True)
class Record:
    """One image. Paths are POSIX and relative to the data root."""

    path: str
    label: int | None  # 0 normal, 1 defective, None unknown
    mask: str | None  # of a defective image, if it has one
    kind: str  # "good", "scratch", …; "" when unknown


@dataclass(frozen=True)
class Dataset:
    """One category: every path occurs once, in train or in test."""

    root: Path
    layout: str  # "real-iad", "mvtec", "visa" or "folder"
    category: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]


Split = tuple[list[Record], list[Record]]  # train, test


def recognise(root: Path | str) -> str:
    """The layout of `root` by its content: "real-iad", "mvtec", "visa" or "folder". No images raise a UserError."""
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

    A UserError is raised as by `recognise`, or if part of a layout is missing.
    """
    root, layout = Path(root), recognise(root)
    if layout == "real-iad":
        files = [Path(name) for split in _realiad_splits(root).values() for name in _names(split)]
        return sorted({file.stem for file in files if file.suffix == ".json"})
    if layout == "mvtec" and not _is_dir(root, "train/good"):
        return [name for name in _names(root) if _is_dir(root, name, "train/good")]
    if layout == "visa":
        return sorted({row["object"] for row in _visa_rows(root)})
    return [Path(os.path.abspath(root)).name or "images"]


def choose_categories(root: Path | str, wanted: str | None) -> list[str]:
    """The categories for `--category`: one name, several with commas, "all", or None if there is only one.

    A UserError that lists them is raised if one is not there, or none is given where there are several.
    """
    there = categories(root)
    if wanted is None and len(there) != 1:
        raise UserError(f"--category: {root} holds several, give one or more of {', '.join(there)}, or all")
    chosen = there
    if wanted not in (None, "all"):
        chosen = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in chosen or [wanted]:
        _require_category(root, name, there)
        if name in RESERVED:
            where = f"--data {root}: a run has a {name} of its own"
            raise UserError(f"{where}, so no category may have this name; rename it")
    return chosen


def load_category(root: Path | str, category: str, noise_ratio: float = 0.0, seed: int = 0) -> Dataset:
    """The records of one category, in an order that depends on the files and the seed only.

    Args:
        root, category: the data root, of any layout, and one of `categories(root)`.
        noise_ratio: share of defective images in train, 0 ≤ α < 1. Real-IAD: which FUIAD split is read. MVTec and VisA:
            round(α·n / (1 − α)) defective test images move to the n normal training images. Plain folder: 0.
        seed: decides which test images move; no effect on Real-IAD.

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
        # a list with one path a line, blanks around it stripped, must give the path back
        if record.path.encode(errors="replace").decode().strip().splitlines() != [record.path]:
            raise UserError(f"{root}: {record.path!r} does not fit a list with one path a line; rename the file")
        if PurePosixPath(record.path).is_absolute() or ".." in PurePosixPath(record.path).parts:
            raise UserError(f"{root}: {record.path} is listed, but lies elsewhere; list paths relative to the root")
    return Dataset(root, layout, category, tuple(train), tuple(test))


def _require_category(root: Path | str, name: str, there: list[str]) -> None:
    if name not in there:
        raise UserError(f"--category {name} is not in {root}; it has {', '.join(there) or 'none'}")


def _realiad_splits(root: Path) -> dict[float, Path]:
    """Noise ratio → the folder with the JSON files of that split."""
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


def _realiad(root: Path, category: str, noise_ratio: float) -> Split:
    splits = _realiad_splits(root)
    folder = next((folder for ratio, folder in splits.items() if math.isclose(ratio, noise_ratio)), None)
    if folder is None:
        there = ", ".join(map(str, splits))
        raise UserError(f"--noise-ratio {noise_ratio}: {root} has no FUIAD split for it; it has {there}")
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
    """The class decides, not the path: images below NG/ whose defect this camera does not see are labelled OK."""
    label = int(entry["anomaly_class"] != normal)
    mask = entry.get("mask_path")
    there = label == 1 and mask not in (None, "", "None")  # older copies write null as "None"
    path = (base / entry["image_path"]).as_posix()
    return Record(path, label, (base / mask).as_posix() if there else None, entry["anomaly_class"] if label else "good")


def _check_listed(root: Path, source: Path, records: list[Record]) -> None:
    """Every listed file must exist, and no image may be listed twice. This is checked before any training."""
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


def _mvtec(root: Path, category: str) -> Split:
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
        advice = "put VisA's split_csv beside the categories, and give the folder that holds both"
        raise UserError(f"{file} is not there: {advice}") from None
    except (csv.Error, UnicodeDecodeError):
        rows = []
    if not rows or any(None in row.values() or not VISA_COLUMNS <= row.keys() for row in rows):
        raise UserError(f"{file} has not VisA's columns object,split,label,image,mask: unpack it again")
    return rows


def _visa(root: Path, category: str) -> Split:
    parts = {"train": [], "test": []}
    for row in _visa_rows(root):
        if row["object"] == category and row["split"] in parts:
            defective = row["label"] != "normal"
            mask, kind = (row["mask"] or None, "anomaly") if defective else (None, "good")
            parts[row["split"]].append(Record(row["image"], int(defective), mask, kind))
    _check_listed(root, root / VISA_SPLIT, [*parts["train"], *parts["test"]])
    return parts["train"], parts["test"]


def _mix_noise(train: list[Record], test: list[Record], noise_ratio: float, category: str, seed: int) -> Split:
    """Move randomly drawn defective images from test to train until they are the share `noise_ratio` of train.

    A larger ratio moves the same images and more. Train is shuffled, so that its order does not tell which were moved.
    """
    if noise_ratio == 0:
        return train, test
    anomalies = [record for record in test if record.label == 1]
    wanted = round(noise_ratio * len(train) / (1 - noise_ratio))
    if wanted > len(anomalies):
        most = math.floor(1000 * len(anomalies) / (len(train) + len(anomalies))) / 1000
        need = f"{category} would need {wanted} defective test images, has {len(anomalies)}"
        raise UserError(f"--noise-ratio {noise_ratio}: {need}; give at most {most}")
    random = np.random.default_rng([seed % 2**32, zlib.crc32(category.encode())])
    moved = [anomalies[i] for i in random.permutation(len(anomalies))[:wanted]]
    mixed, gone = [*train, *moved], set(moved)
    return [mixed[i] for i in random.permutation(len(mixed))], [record for record in test if record not in gone]


# ---- folders; every listing is sorted by name, since systems and disks differ ----


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
    """Whether the folder exists. Unlike Path.is_dir it raises nothing if a folder above may not be entered."""
    return os.path.isdir(os.path.join(*parts))


def _images(root: Path, folder: str) -> list[str]:
    """Images directly in root/folder, relative to root; [] without such a folder."""
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
    """Whether llb made it: with `--data .` the run lies among the images, and its own pictures are not data."""
    config = folder / "config.json"
    return os.path.isfile(config) and b'"submodels"' in config.read_bytes()
