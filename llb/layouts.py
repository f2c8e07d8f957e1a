"""The layouts of public image sets: how each is recognised, how its images are labelled and paired with masks.

    real-iad    realiad_jsons_fuiad_0.1/<category>.json beside realiad_1024/<category>/…   Real-IAD (llb.lists)
    real-iad-sv realiad_jsons_sv/<category>.json, likewise                                 Real-IAD, single view
    visa        [<category>/]Data/{Images,Masks}/{Normal,Anomaly}; split_csv/1cls.csv      VisA (llb.lists)
    mvtec       [<category>/[<category>/]]train/good, test/<kind>; good may be ok, gut, …  MVTec AD, ImageFolder, VAD
                masks in  ground_truth/<kind>/<name>[_mask].png                            MPDD, BTAD, VisA for PyTorch
                          ground_truth/<kind>/<name>/000.png, several united               MVTec LOCO, AutoVI
                          test_public/ground_truth/<kind>/<name>_mask.png                  MVTec AD 2
                          test/<kind>/{gt,label}/<name>.png, images in rgb/, img/          MVTec 3D-AD, BMAD
                                    ground_truth/<name>.png, test/<kind>/<name>_mask.png beside <name>.png
                images in train/good/<any>/…, and in test/<any>/{good,<kind>}/…            AeBAD
                {train,test,ground_truth}/<category>/<kind>/…, too
    ksdd2       {train,test}/<name>.png beside <name>_GT.png; a black mask is normal       KolektorSDD2
    ksdd        kos01/<name>.jpg beside <name>_label.bmp; all for training                 KolektorSDD
    dagm        [Class1/]{Train,Test}/<name>.PNG; defective: Label/<name>_label.PNG        DAGM 2007
    folder      any other images, in any subfolders: all for training, no labels

Names are compared without case and with composed unicode; masks are paired by name, never by position. A reader is a
function of paths: it opens no file. A record holds label and masks for reports. No training may use them.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llb.files import UserError, some, typed
from llb.pairing import is_masks, is_normal, pair, quality_of, split_beside, split_views, suspicions
from llb.recognise import NO_KINDS, annotations, places_below, recognise
from llb.tree import AGAIN, OTHER, UNREAD, Tree, by_folder, count, fold, fold_path, summary, walk

LAYOUTS = ("real-iad", "real-iad-sv", "visa", "mvtec", "ksdd2", "ksdd", "dagm", "folder")
KNOWN = "a Real-IAD root, an MVTec-AD or VisA root, or a folder with images"

VALIDATION, PRIVATE, OUTSIDE = "for validation", "for test without labels", "outside the layout"
IN_TRAIN, UNKNOWN = "in train, defective by their folder", "without a mask that gives the label"
NO_IMAGE, OF_NORMAL = "masks without an image", "masks of normal images"
PARTS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing", "test_public"), "test")
PARTS |= dict.fromkeys(("test_private", "test_private_mixed"), PRIVATE)
PARTS |= dict.fromkeys(("validation", "valid", "val"), VALIDATION)


@dataclass(frozen=True)
class Record:
    """One image. Paths are POSIX and relative to the data root."""

    path: str
    label: int | None  # 0 normal, 1 defective, None unknown
    masks: tuple[str, ...]  # of a defective image, if it has some; several are united
    kind: str  # "good", "scratch", …; "" when unknown


Split = tuple[list[Record], list[Record]]  # train, test


@dataclass(frozen=True)
class Root:
    """A data root, read: what it holds, or for a layout with lists where to look."""

    path: Path
    layout: str
    tree: Tree
    sets: Mapping[str, Split] | None  # category → records; None: llb.lists reads them
    homes: Mapping[str, str]  # category → the folder that it lies in, with a slash; "" for the root itself
    left_out: Mapping[str, Sequence[str]]  # reason → files and folders
    notes: tuple[str, ...]  # to be said of how the root was read
    doubts: Mapping[str, str] = field(default_factory=dict)  # category → its folder that may hold several kinds


@dataclass
class Found:
    """What a reader has found so far."""

    sets: dict[str, Split] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: tuple[str, ...] = ()
    doubts: dict[str, str] = field(default_factory=dict)  # as of Root

    def add(self, folder: str, own_name: str, split: Split) -> None:
        """Add the category that lies in `folder`, "" for the root itself."""
        name = folder.rpartition("/")[2] or own_name
        if name in self.sets:
            raise UserError(f"--data: {self.homes[name]} and {folder}/ are one category by name: rename one of them")
        self.sets[name], self.homes[name] = split, f"{folder}/" if folder else ""


def read_root(path: Path | str, layout: str | None = None) -> Root:
    """Read a data root. layout: one of `LAYOUTS`; None recognises it by content.

    A UserError is raised without a folder or images, or if the tree looks like a data set, but as none that is known.
    """
    if not str(path).strip():
        raise UserError("--data: the value is empty (an unset variable?); give the folder that holds the images")
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"--data {path}: there is no such folder; give {KNOWN}")
    if not os.path.isdir(path):
        raise UserError(f"--data {path} is a file: give the folder that holds the images")
    tree = walk(path)
    again = tree.linked_twice()
    files = [*tree.images, *again, *tree.left_out.get(OTHER, ())]
    unread = [*tree.left_out.get(OTHER, ()), *tree.left_out.get(UNREAD, ())]
    given, layout = layout, layout or recognise(path, files, tree.images, unread)
    if not tree.images and not layout.startswith("real-iad"):
        rest = f" ({summary(count(tree.left_out))})" if tree.left_out else ""
        raise UserError(f"--data {path} holds no images{rest}: give {KNOWN}")
    if layout.startswith("real-iad") or (layout == "visa" and visa_csv(files)):
        return Root(path, layout, tree, None, {}, tree.left_out, ())
    full = path.absolute()
    if layout == "visa" and os.path.isfile(full.parent / "split_csv" / "1cls.csv"):
        above = f"--data {typed(full.parent)} --category {typed(full.name)}"
        raise UserError(f"--data {path}: split_csv lies beside it; give {above}")
    again = again if layout == "mvtec" else ()
    images = by_folder((*tree.images, *again)) if again else tree.images
    found = READERS[layout](images, Path(os.path.abspath(path)).name.lstrip(".") or "images")
    records = [record for split in found.sets.values() for part in split for record in part]
    used = {path for record in records for path in (record.path, *record.masks)}.union(*found.left_out.values())
    found.left_out[NO_IMAGE] += [image for image in images if image not in used]
    if not any(train for train, _ in found.sets.values()):
        rest = summary(count(found.left_out))
        raise UserError(f"--layout {layout}: {path} has no training images in this layout ({rest})")
    left_out = {reason: paths for reason, paths in tree.left_out.items() if not (again and reason == AGAIN)}
    homes = tuple(home for home in found.homes.values() if home)
    outside = [path for path in found.left_out.get(OUTSIDE, ()) if not path.startswith(homes)]
    below = some(places_below(path, outside, [*map(fold_path, outside)]))
    notes = (*found.notes, f"not read: {below}") if below else found.notes
    told = some(annotations(images, unread, of_objects=True)) if layout == "folder" and not given else ""
    notes += (f"not read: {told}",) if told else ()
    doubts = {} if given else found.doubts
    return Root(path, layout, tree, found.sets, found.homes, left_out | found.left_out, notes, doubts)


def visa_csv(files: Iterable[str]) -> str | None:
    """The path of VisA's CSV."""
    return next((file for file in files if fold_path(file) == "split_csv/1cls.csv"), None)


# ---- readers: paths of the images, sorted, and the root's own name → what they are ----


def _mvtec(images: Iterable[str], own_name: str) -> Found:
    found, kinds, masks, titles = Found(), defaultdict(list), defaultdict(list), {}
    readings = {place: _parts(place) for place in {path.rpartition("/")[0] for path in images}}
    train = {reading for of_place in readings.values() for reading in of_place if reading[1] == "train"}
    folders = {folder for folder, _, rest in train if rest and is_normal(fold(rest[0]))}
    chosen = {place: _choose(of_place, folders) for place, of_place in readings.items()}
    turned = dict(zip(chosen, _kinds_first([*chosen.values()]), strict=True))
    videos = [place for place, (_, part, rest) in turned.items() if part == "test" and rest != chosen[place][2]]
    videos = sorted({"/".join(place.split("/")[: 1 - len(turned[place][2])]) for place in videos})
    found.notes += (f"read as a video or camera, its folders as kinds: {some(videos)}",) if videos else ()
    chosen = turned
    for path in images:
        place, _, name = path.rpartition("/")
        folder, part, rest = chosen[place]
        kind, below = fold(rest[0]) if rest else "", "/".join((*rest[1:], name))
        if part in (VALIDATION, PRIVATE):
            found.left_out[part].append(path)
        elif part == "mask":
            masks[folder, kind].append((below, path))
        elif part and rest and kind not in NO_KINDS:
            kinds[folder, part, kind].append((below, path))
            titles.setdefault((folder, kind), rest[0])
        else:
            found.left_out[OUTSIDE].append(path)
    for folder in sorted(folders):
        outer = next((outer for outer in ("", folder.split("/")[0]) if outer in folders and outer != folder), None)
        if outer is not None:
            both = f"{outer}/train and {folder}/train".lstrip("/")
            raise UserError(f"--data: {both} make one category lie in another: move one away")
        found.add(folder, own_name, ([], []))
    splits = dict(zip(sorted(folders), found.sets.values(), strict=True))
    loose = {}  # image → its masks in ground_truth/ itself, without a kind
    for folder in sorted({folder for folder, kind in masks if not kind}):
        tests = [key for key in kinds if key[:2] == (folder, "test") and not is_normal(key[2])]
        loose |= pair([member for key in tests for member in kinds[key]], masks[folder, ""])
    for (folder, part, kind), members in kinds.items():
        if part == "train" and not is_normal(kind):
            found.left_out[IN_TRAIN] += [path for _, path in members]
            continue
        inner, outer = split_views(members)
        found.left_out[OUTSIDE] += [path for _, path in outer]
        of_kind, label = masks[folder, kind], int(not is_normal(kind))
        paired = pair(inner, of_kind) | {path: loose[path] for _, path in inner if path in loose} if label else {}
        images, beside = split_beside(inner, paired)
        if label:
            paired |= pair([image for image in images if image[1] not in paired], beside)
        of_kind += beside
        title = titles[folder, kind] if label else "good"
        names = [below if part == "train" else below.replace("/", " ") for below, path in images if path not in paired]
        if hints := suspicions(names, "defect" if label else "normal")[0]:
            category = folder.rpartition("/")[2] or own_name
            found.doubts.setdefault(category, f"{os.path.dirname(images[0][1])}: {', '.join(hints[:3])}")
        splits[folder][part == "test"].extend(Record(path, label, paired.get(path, ()), title) for _, path in images)
    for (_, kind), of_kind in masks.items():
        found.left_out[OF_NORMAL] += [path for _, path in of_kind if is_normal(kind)]
    return found


# the folder of a category, the part ("train", "test", "mask" or a reason), the folders below that
Reading = tuple[str, str, tuple[str, ...]]


def _parts(place: str) -> list[Reading]:
    """The ways to read a folder that holds images."""
    parts = tuple(place.split("/")) if place else ()
    names = [fold(name) for name in parts[:3]]
    deepest = 2 if len(parts) > 2 and names[0] == names[1] else 1  # MVTec AD 2 has can/can/train
    there = [(i, _part(name)) for i, name in enumerate(names[: deepest + 1])]
    readings = [("/".join(parts[:i]), part, parts[i + 1 :]) for i, part in there if part]
    if len(parts) > 1 and there[0][1] and not (there[1][1] or names[1] in NO_KINDS or is_normal(names[1])):
        readings.append((parts[1], there[0][1], parts[2:]))  # train/<category>/good
    return readings


def _choose(readings: Sequence[Reading], folders: Collection[str]) -> Reading:
    """The first reading in one of the categories' folders; below test/, too, there may be folders of masks."""
    folder, part, rest = next((reading for reading in readings if reading[0] in folders), ("", "", ()))
    masks = next((i for i, name in enumerate(rest) if is_masks(name)), None)
    if masks is not None and part in ("train", "test"):
        return folder, "mask", rest[:masks] + rest[masks + 1 :]
    return folder, part, rest


def _kinds_first(readings: Sequence[Reading]) -> list[Reading]:
    """Readings with test/<video>/good as test/good/<video>. A video, or camera, has folders for normal images and for
    others; test/<kind>/{normal,dark}, a kind's lights, may be told by masks of the normal ones."""
    inner, below_normal = defaultdict(set), set()
    masked = {(folder, *map(fold, rest[:2])) for folder, part, rest in readings if part == "mask"}
    for folder, part, rest in readings:
        if len(rest) > 1 and part in ("train", "test"):
            kind, name = map(fold, rest[:2])
            below_normal |= {(folder, name)} if is_normal(kind) else set()
            if part == "test" and not is_normal(kind) and quality_of(kind) != "defect":
                inner[folder, kind].add(name)
    videos, sure = set(), set()
    for (folder, kind), names in inner.items():
        normal = [name for name in names if is_normal(name) and (folder, name) not in below_normal]  # no light's name
        if normal and NO_KINDS.isdisjoint(names) and masked.isdisjoint((folder, kind, name) for name in normal):
            videos.add((folder, kind))
            sure |= {folder} if len(names) > 1 else set()
    videos = {(folder, kind) for folder, kind in videos if folder in sure}  # a camera may have seen no defect

    def turned(folder: str, part: str, rest: tuple[str, ...]) -> Reading:
        swap = part in ("test", "mask") and len(rest) > 1 and (folder, fold(rest[0])) in videos
        return folder, part, (rest[1], rest[0], *rest[2:]) if swap else rest

    return [turned(*reading) for reading in readings]


def _part(name: str) -> str:
    return PARTS.get(name) or ("mask" if is_masks(name) else "")


def _ksdd(images: Iterable[str], own_name: str) -> Found:
    """All of KolektorSDD is for training; its second edition has parts. Labels follow from the masks (llb.data)."""
    found, folders = Found(), defaultdict(list)
    found.add("", own_name, ([], []))
    for path in images:
        folder, _, name = path.rpartition("/")
        folders[folder].append((name, path))
    for folder, members in folders.items():
        if PARTS.get(fold(folder.split("/")[0])) == VALIDATION:
            found.left_out[VALIDATION] += [path for _, path in members]
            continue
        own, masks = split_beside(members)
        paired = pair(own, masks)
        part = found.sets[own_name][fold(folder) == "test"]
        part += [Record(path, None, paired[path], "") for _, path in own if path in paired]
        found.left_out[UNKNOWN] += [path for _, path in own if path not in paired]
    return found


def _dagm(images: Iterable[str], own_name: str) -> Found:
    found, members, masks = Found(), defaultdict(list), defaultdict(list)
    for path in images:
        match = re.fullmatch(r"(?:([^/]+)/)?(train|test)/(label/)?([^/]+)", fold_path(path))
        if not match:
            found.left_out[OUTSIDE].append(path)
            continue
        (masks if match[3] else members)[match[1], match[2]].append((path.rpartition("/")[2], path))
        folder = path.split("/")[0] if match[1] else ""
        if (folder.rpartition("/")[2] or own_name) not in found.sets:
            found.add(folder, own_name, ([], []))
    for (folder, part), of_part in members.items():
        paired = pair(of_part, masks[folder, part])
        name = of_part[0][1].split("/")[0] if folder else own_name
        if part == "test" and masks[folder, "train"] and not masks[folder, "test"]:  # as it was given out at first
            found.left_out[UNKNOWN] += [path for _, path in of_part]
            continue
        for _, path in of_part:
            label = int(path in paired)
            record = Record(path, label, paired.get(path, ()), ("good", "defect")[label])
            found.sets[name][part == "test"].append(record)
    return found


def _visa(images: Iterable[str], own_name: str) -> Found:
    """VisA without its CSV: every tenth normal image is for test."""
    note = "no split_csv/1cls.csv, so every tenth normal image is for test"
    found, members = Found(notes=(note,)), defaultdict(list)
    for path in images:
        match = re.fullmatch(r"(?:([^/]+)/)?data/(images|masks)/(normal|anomaly)/(.+)", fold_path(path))
        if not match:
            found.left_out[OUTSIDE].append(path)
            continue
        folder = path.split("/")[0] if match[1] else ""
        members[folder, match[2], match[3]].append((path.rpartition("/")[2], path))
    for folder in sorted({folder for folder, _, _ in members}):
        normal = [Record(path, 0, (), "good") for _, path in members[folder, "images", "normal"]]
        defective = members[folder, "images", "anomaly"]
        paired = pair(defective, members[folder, "masks", "anomaly"])
        anomalies = [Record(path, 1, paired.get(path, ()), "anomaly") for _, path in defective]
        train = [record for i, record in enumerate(normal) if i % 10]
        found.add(folder, own_name, (train, [*anomalies, *normal[::10]]))
    return found


def _folder(images: Iterable[str], own_name: str) -> Found:
    found = Found()
    found.add("", own_name, ([Record(path, None, (), "") for path in images], []))
    return found


READERS = {"mvtec": _mvtec, "visa": _visa, "ksdd2": _ksdd, "ksdd": _ksdd, "dagm": _dagm, "folder": _folder}
