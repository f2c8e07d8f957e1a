"""Layouts whose files are listed: VisA's CSV and Real-IAD's JSON.

Lists are written by many tools, so what is plain is read: any encoding with a mark, semicolons and tabs, capitals,
blanks, backslashes, paths from a folder above. What could be read two ways is refused, with the line or the entry.
"""

import csv
import io
import json
import math
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llb.files import UserError, delimiter_of
from llb.layouts import PARTS, VALIDATION, Record, Root, Split, visa_csv
from llb.pairing import is_normal
from llb.tree import OTHER, fold, fold_path

VISA_COLUMNS = ("object", "split", "label", "image", "mask")
REALIAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the first that is there is read
FOLDERS = ("split_csv/", "realiad_jsons")  # of the lists
ABSOLUTE = re.compile(r"/|[A-Za-z]:/")
REALIAD_SPLIT = "realiad_jsons_fuiad_"
# names of a run's own files, and of metrics.json
RESERVED = {"cache", "mean", "config.json", "metrics.json", "metrics.csv", "report.html", "quarantine.csv"}
NOTHING = set(
    "none null nan nat n/a na unknown undefined unclear undecided maybe unlabeled unlabelled ignore todo tbd true false"
    " y n -".split()
) | {"", "not labeled", "not labelled"}
SPLITS = {name: part for name, part in PARTS.items() if part in ("train", "test", VALIDATION)}


def check_name(name: str, where: str) -> None:
    """Raise a UserError if a category may not have this name: it is a folder of the run, and never a path."""
    if not name or name in (".", "..") or name.startswith(".") or any(sign in name for sign in "/\\\0"):
        raise UserError(f"{where}: {name!r} is no name of a category; give a name without /, \\ and a dot in front")
    if name.encode(errors="replace").decode().splitlines() != [name] or len(name.encode()) > 200:
        raise UserError(f"{where}: {name[:50]!r} is no name of a category; rename it: one line, at most 200 bytes")
    if fold(name) in RESERVED:
        raise UserError(f"{where}: a run has a {name} of its own, so no category may have this name; rename it")


# ---- VisA: split_csv/1cls.csv, object,split,label,image,mask ----


@dataclass(frozen=True)
class Row:
    """A line of VisA's CSV: cells without blanks around them."""

    line: int
    object: str
    split: str  # of SPLITS' values
    label: int
    image: str
    mask: str  # "" for none


def visa_rows(root: Root) -> list[Row]:
    """VisA's CSV. A UserError names the line that cannot be read."""
    file = root.path / visa_csv(root.tree.left_out.get(OTHER, ()))
    try:
        data = file.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        return _parse_visa(text, str(file))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): grant access to it") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file} is no CSV ({error}): unpack it again") from None


def _parse_visa(text: str, file: str) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), skipinitialspace=True)
    lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    lines = [(line, cells) for line, cells in lines if any(cells) and not cells[0].startswith("sep=")]
    columns = [cell.casefold() for cell in lines[0][1]] if lines else []
    if not set(VISA_COLUMNS) <= set(columns):
        raise UserError(f"{file} has not VisA's columns {','.join(VISA_COLUMNS)}: unpack it again")
    rows = []
    for line, cells in lines[1:]:
        where = f"{file}, line {line}"
        if any(cells[len(columns) :]):
            raise UserError(f"{where} has more cells than the first line: put a cell with commas in quotes")
        row = dict(zip(columns, cells + [""] * len(columns), strict=False))
        part, mask = SPLITS.get(row["split"].casefold()), row["mask"]
        check_name(row["object"], where)
        if part is None:
            raise UserError(f"{where}: the split is {row['split'] or 'empty'}; give train or test")
        if not row["image"]:
            raise UserError(f"{where} names no image: delete the line")
        label = _label(row["label"], "normal", where)
        rows.append(Row(line, row["object"], part, label, row["image"], "" if _says_nothing(mask) else mask))
    if not rows:
        raise UserError(f"{file} lists no images: unpack it again")
    return rows


def read_visa(root: Root, category: str) -> tuple[Split, dict[str, list[str]]]:
    """Records of a category in the order of the CSV, and what the CSV leaves out."""
    file = root.path / visa_csv(root.tree.left_out[OTHER])
    find, parts = Finder(root), {"train": [], "test": [], VALIDATION: []}
    for row in visa_rows(root):
        if row.object == category:
            where = f"{file}, line {row.line}"
            path, mask = (name and find(_visa_places(name, category), where) for name in (row.image, row.mask))
            masks = (mask,) if mask and row.label else ()
            parts[row.split].append(Record(path, row.label, masks, "anomaly" if row.label else "good"))
    _check_listed(root, file, [record for part in parts.values() for record in part])
    return (parts["train"], parts["test"]), {VALIDATION: [record.path for record in parts[VALIDATION]]}


def _visa_places(path: str, category: str) -> list[str]:
    """Where a path of the CSV may lead: from the root, from the category, or from a folder above the root."""
    places = []
    for way in (path.replace("\\", "/"), path):  # backslashes may also be part of a name
        places += [way, f"{category}/{way}", *_ends(way)]
    return places


# ---- Real-IAD: <split>/<category>.json with the keys meta, train, test ----


def realiad_splits(root: Root) -> dict[float, str]:
    """Noise ratio → the folder with the JSON files of that split, below the root."""
    folders = {}
    for file in root.tree.left_out.get(OTHER, ()):
        if file.lower().endswith(".json"):
            folders.setdefault(fold_path(file.rpartition("/")[0]), file.rpartition("/")[0])
    splits, plain, single = {}, None, None
    for name in sorted(folders, key=lambda name: (name.count("/"), name)):  # the archives unpack to either
        inner = name.removeprefix("realiad_jsons/")
        ratio = inner.removeprefix(REALIAD_SPLIT)
        if inner == "realiad_jsons":
            plain = folders[name]  # the deeper one, if there are two
        elif inner == "realiad_jsons_sv":
            single = single or folders[name]
        elif ratio != inner and ratio.replace(".", "", 1).isdecimal():
            splits.setdefault(float(ratio), folders[name])
    if root.layout == "real-iad-sv":
        splits, plain = {}, single
    if plain is not None:
        splits.setdefault(0.0, plain)  # Real-IAD's own split has no anomalies in train
    if not splits:
        need = "realiad_jsons_sv" if root.layout == "real-iad-sv" else f"{REALIAD_SPLIT}0.0 (or 0.1, 0.2, 0.4)"
        raise UserError(f"--data {root.path}: no folder {need} with JSON files; unpack Real-IAD's")
    return dict(sorted(splits.items()))


def realiad_categories(root: Root) -> list[str]:
    folders = set(realiad_splits(root).values())
    files = [file.rpartition("/") for file in root.tree.left_out[OTHER] if file.lower().endswith(".json")]
    return sorted({name[: -len(".json")] for folder, _, name in files if folder in folders})


def read_realiad(root: Root, category: str, noise_ratio: float) -> tuple[Split, dict[str, list[str]]]:
    """Records of a category in the order of its JSON file, and what the file leaves out."""
    splits = realiad_splits(root)
    folder = next((folder for ratio, folder in splits.items() if math.isclose(ratio, noise_ratio)), None)
    if folder is None:
        there = ", ".join(map(str, splits))
        raise UserError(f"--noise-ratio {noise_ratio}: {root.path} has no FUIAD split for it; it has {there}")
    tops = {fold(name): name for name in sorted({path.split("/")[0] for path in root.tree.images}, reverse=True)}
    images = next((tops[name] for name in REALIAD_IMAGES if name in tops), None)
    if images is None:
        copies = [name for name in root.tree.left_out[OTHER] if fold(name) in REALIAD_IMAGES]  # git's text of a link
        if copies:
            found = f"{copies[0]} is a file of {os.path.getsize(root.path / copies[0])} bytes and no folder"
            raise UserError(f"--data {root.path}: {found}; put the folder of the images in its place")
        raise UserError(f"--data {root.path}: no image folder {', '.join(REALIAD_IMAGES)}; unpack one beside {folder}")
    there = [name for name in root.tree.left_out[OTHER] if name.lower().endswith(".json")]
    named = [name for name in there if name[: -len(".json")] == f"{folder}/{category}"]
    file = root.path / (named or [f"{folder}/{category}.json"])[0]
    find = Finder(root)
    try:
        content = json.loads(file.read_bytes())
        meta = content["meta"]
        prefix, normal = str(meta.get("prefix") or category), str(meta.get("normal_class", "OK"))
        parts = {}
        for part, entries in content.items():
            if part in ("train", "test") or (part.casefold() in SPLITS and isinstance(entries, list)):
                where = f"{file}, {part}"
                homes = (f"{images}/{prefix}", f"{images}/{category}", images, "")
                read = [
                    _realiad_record(entry, homes, normal, (find, f"{where} {i}")) for i, entry in enumerate(entries)
                ]
                parts.setdefault(SPLITS[part.casefold()], []).extend(read)
        train, test = parts["train"], parts["test"]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): unpack the split's JSON files again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{file} is not as Real-IAD writes it ({reason}): unpack it again") from None
    _check_listed(root, file, [record for part in parts.values() for record in part])
    return (train, test), {VALIDATION: [record.path for record in parts.get(VALIDATION, ())]}


def _realiad_record(entry: dict[str, Any], homes: tuple[str, ...], normal: str, look: tuple["Finder", str]) -> Record:
    """The class decides, not the path: images below NG/ whose defect this camera does not see are labelled OK."""
    find, where = look
    path, mask, kind = entry["image_path"], entry.get("mask_path"), entry["anomaly_class"]
    where = f"{where} ({path})"
    label = _label("" if kind is None else str(kind).strip(), normal, where)

    def place(name: str) -> str:
        ways = (name.replace("\\", "/"), name)  # backslashes may also be part of a name
        if ABSOLUTE.match(ways[0]):  # its end names the category
            return find([ways[0], *(f"{home}{end}" for end in _ends(ways[0]) for home in ("", f"{homes[2]}/"))], where)
        return find([f"{home}/{way}".lstrip("/") for way in ways for home in homes], where)

    there = label == 1 and not (mask is None or _says_nothing(str(mask)))
    return Record(place(path), label, (place(mask),) if there else (), str(kind).strip() if label else "good")


# ---- both ----


def _says_nothing(word: str) -> bool:
    return fold(word).strip("<>#[]{}()? ") in NOTHING


def _label(word: str, normal: str, where: str) -> int:
    """0 for a normal class, 1 for a defect's name. normal: the list's own word for it."""
    try:
        number = float(word)  # nan, and a number below 0, say nothing
    except ValueError:
        number = 1
    if fold(word) == fold(normal) or number == 0 or (is_normal(word) and "?" not in word):
        return 0
    if not number > 0 or _says_nothing(word) or "?" in word:
        raise UserError(f"{where}: the class is {word or 'empty'}, neither normal nor a defect; correct it")
    return 1


def _ends(path: str) -> list[str]:
    """What is left of a path from other folders above: its ends of two names and more."""
    steps = posixpath.normpath(path).split("/")
    return ["/".join(steps[above:]) for above in range(1, len(steps) - 1)]


class Finder:
    """Which file of the root a listed path means: exactly, or else without case, if that is one file."""

    def __init__(self, root: Root):
        self.root, self.exact, self.folded = root.path, set(root.tree.images), None
        self.images = root.tree.images

    def __call__(self, places: list[str], where: str) -> str:
        """The first of the places that is there, else the first. If that leads out of the root: a UserError."""
        places = [posixpath.normpath(place) for place in places]
        inside = [
            place for place in places if not (place.startswith("../") or ABSOLUTE.match(place) or Path(place).drive)
        ]
        if places[0].startswith("../"):
            inside = []
        for place in inside:
            if place in self.exact:
                return place
        if self.folded is None:
            self.folded = {}
            for image in self.images:
                self.folded[fold_path(image)] = None if fold_path(image) in self.folded else image
        for place in inside:
            if found := self.folded.get(fold_path(place)):
                return found
        if places[0] not in inside:
            raise UserError(f"{where}: {places[0]} is listed, but lies elsewhere; list paths relative to the root")
        return next((place for place in inside if os.path.isfile(self.root / place)), inside[0])


def _check_listed(root: Root, source: Path, records: list[Record]) -> None:
    """Every listed file must exist, and no image may be listed twice. This is checked before any training."""
    seen, there = set(), set(root.tree.images)
    for record in records:
        if record.path in seen:
            raise UserError(f"{source} lists {record.path} twice: delete one of the two")
        seen.add(record.path)
    listed = [path for record in records for path in (record.path, *record.masks)]
    missing = [path for path in listed if path not in there and not os.path.isfile(root.path / path)]
    if missing:
        count = f"{len(missing)} of {len(listed)} files that {source} names are missing"
        raise UserError(f"{root.path / missing[0]} is not there ({count}): unpack the images again")
