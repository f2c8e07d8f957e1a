"""Image sets on the disk: the records of a category, with defective images mixed into its training set on demand.

`llb.layouts` reads the root's folders, `llb.lists` the lists that some layouts have. A record holds the label and the
masks of an image for reports. No training may use them.
"""

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llb import lists
from llb.files import UserError, some
from llb.layouts import Record, Root, Split, read_root
from llb.masks import is_black
from llb.tree import OTHER, count, fold, summary

HALF = "half"  # of the defective test images: a size of the noise pool
RESERVE = "the rest of the noise pool"


@dataclass(frozen=True)
class Dataset:
    """One category: every path occurs once, in train or in test."""

    root: Path
    layout: str  # one of llb.layouts.LAYOUTS
    category: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    white: Mapping[str, float] = field(
        default_factory=dict
    )  # kind of deep image → the value shown as white (llb.images)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by the category's list: reason → paths
    resize: int | None = None  # side of the square of which the centre is shown
    reserve: tuple[Record, ...] = ()  # what the noise ratio leaves of the noise pool: neither in train nor in test


def categories(root: Root | Path | str) -> list[str]:
    """The categories below `root`, sorted; a plain folder and a single category's folder are called by their own name.

    A UserError is raised as by `read_root`, or if a list cannot be read.
    """
    root = _read(root)
    if root.sets is not None:
        return sorted(root.sets)
    if root.layout == "visa":
        return sorted({row.object for row in lists.visa_rows(root)})
    return lists.realiad_categories(root)


def choose_categories(root: Root | Path | str, wanted: str | None) -> list[str]:
    """The categories for `--category`, sorted: one name, several with commas, "all", or None if there is only one.

    Case does not matter where it does not tell two of them apart. A UserError that lists them is raised if one is not
    there, or none is given where there are several; and if images of one may be of several kinds.
    """
    root = _read(root)
    there = categories(root)
    if wanted is None and len(there) != 1:
        raise UserError(f"--category: {root.path} holds several, give one or more of {', '.join(there)}, or all")
    folded = {}
    for name in there:
        folded[fold(name)] = None if fold(name) in folded else name
    if wanted in (None, "all") and wanted not in there:
        chosen = there
    elif wanted in there:  # also a name with a comma in it, or one that is "all"
        chosen = [wanted]
    else:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        chosen = sorted({name if name in there else folded.get(fold(name)) or name for name in names})
    for name in chosen or [wanted]:
        _require_category(root, name, there)
    return chosen


def load_category(
    root: Root | Path | str, category: str, noise_ratio: float = 0.0, seed: int = 0, noise_pool: int | str | None = None
) -> Dataset:
    """The records of one category, in an order that depends on the files and the seed only.

    Args:
        root, category: the data root, of any layout, and one of `categories(root)`.
        noise_ratio: share of defective images in train, 0 ≤ α < 1. Real-IAD: which FUIAD split is read. Else, if train
            holds normal images only: round(α·n / (1 − α)) defective test images move to the n training images.
        seed: decides which test images move; no effect on Real-IAD.
        noise_pool: how many defective test images are set aside at every ratio, for noise alone, so that the test set
            does not depend on the ratio; "half" of them. None: half with a ratio above 0, else 0.

    Raises:
        UserError: the category or the ratio cannot be had, or a listed file is missing or listed twice.
    """
    root = _read(root)
    if not 0 <= noise_ratio < 1:
        raise UserError(f"--noise-ratio {noise_ratio}: give a share from 0 to below 1")
    _require_category(root, category, categories(root))
    left_out, reserve = {}, []
    noise_pool = (HALF if noise_ratio else 0) if noise_pool is None else noise_pool
    if root.layout.startswith("real-iad"):
        if noise_pool not in (HALF, 0):
            raise UserError(f"--noise-pool {noise_pool}: Real-IAD has splits of its own; leave the flag out")
        (train, test), left_out = lists.read_realiad(root, category, noise_ratio)
    else:
        if root.sets is None:
            (train, test), left_out = lists.read_visa(root, category)
        else:
            train, test = root.sets[category]
        if root.layout.startswith("ksdd"):
            train, test = (_label_by_masks(root.path, records) for records in (train, test))
        (train, test), reserve = _mix_noise((train, test), noise_ratio, noise_pool, category, seed)
    for record in (*train, *test):
        # a list with one path a line, blanks around it stripped, must give the path back
        if record.path.encode(errors="replace").decode().strip().splitlines() != [record.path]:
            raise UserError(f"{root.path}: {record.path!r} does not fit a list with one path a line; rename the file")
    parts = tuple(train), tuple(test)
    return Dataset(root.path, root.layout, category, *parts, left_out=left_out, reserve=tuple(reserve))


def describe(root: Root, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """How the root was read, as JSON can hold it: what there is for train and test, and what is left out, by reason.

    What lies in the folder of a category that was not chosen is not counted.
    """
    chosen = [dataset.category for dataset in datasets]
    others = tuple(home for name in categories(root) if name not in chosen for home in _homes(root, name))
    left_out = {
        reason: [path for path in paths if not path.startswith(others)] for reason, paths in root.left_out.items()
    }
    for dataset in datasets:
        for reason, paths in dataset.left_out.items():
            left_out[reason] = [*left_out.get(reason, ()), *paths]
    reserve = [record for dataset in datasets for record in dataset.reserve]
    left_out[RESERVE] = [record.path for record in reserve]
    records = [record for dataset in datasets for record in (*dataset.train, *dataset.test)]
    masks = [mask for record in records for mask in record.masks]
    if root.sets is None:
        used = {*(record.path for record in records), *masks, *(path for paths in left_out.values() for path in paths)}
        used |= {mask for record in reserve for mask in record.masks}
        rest = [path for path in root.tree.images if path not in used and not path.startswith(others)]
        left_out["images and masks not on the list"] = rest
        left_out[OTHER] = [path for path in left_out.get(OTHER, ()) if not fold(path).startswith(lists.FOLDERS)]
    known = sum(record.label is not None for record in records)
    return {
        "data": os.path.abspath(root.path),
        "layout": root.layout,
        "categories": chosen,
        "train": sum(len(dataset.train) for dataset in datasets),
        "test": sum(len(dataset.test) for dataset in datasets),
        "labels": "known" if known == len(records) else "none" if known == 0 else f"of {known} images",
        "masks": len(masks),
        "left_out": count(left_out),
        "notes": list(root.notes),
    }


def reading_line(reading: dict[str, Any]) -> str:
    """What `describe` gives, in one line."""
    names = reading["categories"]
    parts = [
        f"data: {reading['data']}, layout {reading['layout']}, "
        f"{_number(len(names), 'categor', 'y', 'ies')} ({some(names, 5)}): "
        f"{_number(reading['train'], 'training image')}, {_number(reading['test'], 'test image')}, "
        f"labels {reading['labels']}, {_number(reading['masks'], 'mask')}",
        *reading["notes"],
        f"left out: {summary(reading['left_out']) or 'nothing'}",
    ]
    return "; ".join(parts)


def _number(number: int, noun: str, one: str = "", several: str = "s") -> str:
    return f"{number} {noun}{one if number == 1 else several}"


def _homes(root: Root, category: str) -> list[str]:
    """The folders of a category, with a slash at the end."""
    if root.sets is not None:
        return [root.homes[category]]
    return [f"{above}{category}/" for above in ("", *(f"{name}/" for name in lists.REALIAD_IMAGES))]


def _read(root: Root | Path | str) -> Root:
    return root if isinstance(root, Root) else read_root(root)


def _require_category(root: Root, name: str, there: list[str]) -> None:
    if name not in there:
        raise UserError(f"--category {name} is not in {root.path}; it has {', '.join(there) or 'none'}")
    lists.check_name(name, f"--data {root.path}")
    if name in root.doubts:
        others = f", or leave {name} out with --category" if len(there) > 1 else ""
        raise UserError(
            f"--data {root.path}: there seem to be masks, maps or defects among the images in {root.doubts[name]}. "
            f"Move them away{others}; --layout {root.layout} takes them for images of that folder's kind"
        )


def _label_by_masks(root: Path, records: Sequence[Record]) -> list[Record]:
    """Records whose label their masks give: an image is normal if they are black."""

    def label(record: Record) -> Record:
        if all(is_black(root / mask) for mask in record.masks):
            return replace(record, label=0, masks=(), kind="good")
        return replace(record, label=1, kind="defect")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(label, records))


def _mix_noise(
    split: Split, noise_ratio: float, noise_pool: int | str, category: str, seed: int
) -> tuple[Split, Sequence[Record]]:
    """Set `noise_pool` defective test images aside and move some of them to train, until they are the share
    `noise_ratio` of it. Returns the new split and the rest of the pool.

    The pool depends neither on the ratio nor the noise on the pool: both are the beginning of one order, in which every
    part holds the kinds of defect in proportion. Train is shuffled, so that its order does not tell which were moved.
    """
    train, test = split
    if noise_ratio > 0 and any(record.label != 0 for record in train):
        has = "has no labels" if train[0].label is None else "has defective training images of its own"
        raise UserError(f"--noise-ratio {noise_ratio}: {category} {has}; leave the flag out")
    anomalies = [record for record in test if record.label == 1]
    size = len(anomalies) // 2 if noise_pool == HALF else noise_pool
    if size > len(anomalies):
        raise UserError(
            f"--noise-pool {size}: {category} has {len(anomalies)} defective test images; give at most that"
        )
    wanted = round(noise_ratio * len(train) / (1 - noise_ratio))
    if wanted > size:
        most = math.floor(1000 * size / (len(train) + size)) / 1000
        larger = f"--noise-pool {wanted}, or " if wanted <= len(anomalies) else ""
        need = f"{category} needs {wanted} defective images, its noise pool holds {size} of {len(anomalies)}"
        raise UserError(f"--noise-ratio {noise_ratio}: {need}; give {larger}at most {most}")
    random = np.random.default_rng([seed % 2**32, zlib.crc32(category.encode())])
    shuffled = [anomalies[i] for i in random.permutation(len(anomalies))]
    places = {}  # record → 0…1: the images of a kind lie at equal distances
    for kind in sorted({record.kind for record in anomalies}):
        alike = [record for record in shuffled if record.kind == kind]
        places |= dict(zip(alike, (np.arange(len(alike)) + random.uniform()) / len(alike)))
    pool = sorted(shuffled, key=places.get)[:size]
    if noise_ratio > 0:
        mixed = [*train, *pool[:wanted]]
        train = [mixed[i] for i in random.permutation(len(mixed))]
    aside = set(pool)
    return (train, [record for record in test if record not in aside]), pool[wanted:]
