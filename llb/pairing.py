"""Which mask belongs to which image, by name; and what hints at masks and defects among the images of a folder."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from llb.files import UserError
from llb.tree import fold, fold_path

ENDINGS = ("_mask", "", "_gt", "_label", "_seg", "_ground_truth")  # of a mask's name, after its image's
NUMBERED = re.compile(r"(.+)_(?:mask|gt|label)_?\d+")  # several masks of one image
BESIDE = re.compile(r"(.+)_(?:mask|gt|label|ground_truth)")

Named = Sequence[tuple[str, str]]  # of each file: its path below the folder of its kind, and below the root


def pair(images: Named, masks: Named) -> dict[str, tuple[str, ...]]:
    """Image → its masks, by name, without case. An image without a mask is not in it.

    Of the ways to name a mask the one that fits most images comes first: with 1.png, 1_mask.png and masks for both,
    "1_mask" alone may belong to either. A UserError is raised if a mask fits two images.
    """
    owners, ways = defaultdict(list), {way: defaultdict(list) for way in (*ENDINGS, "numbered", "folder")}
    for below, path in images:
        owners[stem(below)].append(path)
    for below, path in masks:
        name = stem(below)
        for ending in ENDINGS:
            if name.endswith(ending):
                ways[ending][name.removesuffix(ending)].append(path)
        if match := NUMBERED.fullmatch(name):
            ways["numbered"][match[1]].append(path)
        ways["folder"][name.rpartition("/")[0]].append(path)
    paired, taken = {}, set()
    for way in sorted(ways.values(), key=lambda way: -len(owners.keys() & way.keys())):
        for key, candidates in owners.items():
            free = [mask for mask in way.get(key, ()) if mask not in taken]
            if not any(image in paired for image in candidates):
                taken.update(free)
                for mask in free:
                    image = _owner(candidates, mask)
                    paired[image] = (*paired.get(image, ()), mask)
                if free and not all(image in paired for image in candidates):
                    two = " and ".join(candidates[:2])
                    raise UserError(f"--data: the mask {free[0]} fits {two}: rename one of the images")
    return paired


def _owner(images: Sequence[str], mask: str) -> str:
    """Which of the images, whose names differ in case or ending only, has this mask."""
    place = PurePosixPath(mask)
    images = [image for image in images if place.name.startswith(PurePosixPath(image).stem)] or images
    return next((image for image in images if place.suffix == PurePosixPath(image).suffix), images[0])


def split_beside(members: Named, paired: Sequence[str] = ()) -> tuple[Named, Named]:
    """Images, and the masks that lie beside them: x_mask.png beside x.png. Images in `paired` are none, by any name."""
    stems = {stem(below) for below, _ in members}
    masks = []
    for below, path in members:
        match = BESIDE.fullmatch(stem(below))
        if match and match[1] in stems and path not in paired:
            masks.append((below, path))
    gone = set(masks)
    return [member for member in members if member not in gone], masks


def stem(path: str) -> str:
    """A path for comparing, without its ending."""
    return os.path.splitext(fold_path(path))[0]


# ---- a folder of images that is more than that ----

MASK_WORDS = {"gt", "mask", "masks", "label", "labels", "groundtruth", "annotation", "annotations", "segmentation"}
TRAIN_WORDS, TEST_WORDS = {"train", "training"}, {"test", "testing", "validation", "valid", "val"}
NORMAL_WORDS = {"good", "ok", "normal", "negative"}
DEFECT_WORDS = {"ng", "nok", "ko", "bad", "ungood", "defect", "defects", "defective", "def", "faulty", "fail", "reject"}
DEFECT_WORDS |= {"abnormal", "anomaly", "anomalies", "anomalous", "positive", "scrap"}
NEGATIONS = {"no", "not", "non", "free", "without"}
LOSSY = {".jpg", ".jpeg", ".jpe", ".jfif", ".webp"}


def suspicions(images: Sequence[str]) -> tuple[list[str], str]:
    """What hints at masks or at known defects among the images of a folder: phrases for a message.

    And the folder below it that seems to hold the images for training, "" for none.
    """
    counts, children = defaultdict(int), defaultdict(dict)  # folder → images in it and below; folder → folders in it
    in_folder = defaultdict(list)
    for path in images:
        *parts, name = path.split("/")
        in_folder["/".join(parts)].append(name)
        for depth, part in enumerate(parts):
            folder = "/".join(parts[: depth + 1])
            counts[folder] += 1
            children["/".join(parts[:depth])][fold(part)] = folder
    masks = [folder for folder in counts if not MASK_WORDS.isdisjoint(_words(folder.rpartition("/")[2]))]
    hints = [f"masks in {folder}/ ({counts[folder]} of the images)" for folder in masks[:1]]
    beside = [path for path in images if {*_words(stem(path.rpartition("/")[2]))[-1:]} & MASK_WORDS]
    if beside and not masks:
        hints.append(f"masks beside images ({beside[0]}; {len(beside)} of the images)")
    better = ""
    for folder, below in children.items():
        kinds = {name: _kind(name) for name in sorted(below)}
        for one, others in (("train", {"test"}), ("normal", {"defect", ""}), ("defect", {""})):
            ones = [f"{below[name]}/" for name, kind in kinds.items() if kind == one]
            rest = [f"{below[name]}/" for name, kind in kinds.items() if kind in others]
            if one != "train":
                rest += [f"{folder}/{name}".lstrip("/") for name in in_folder[folder][:1]]
            if ones and rest:
                hints.append(f"{ones[0]} beside {rest[0]}")
                better = better or (ones[0] if one != "defect" else "")
                break
    twins = [path for folder, names in in_folder.items() for path in _twins(folder, names)]
    if len(twins) > 1:
        hints.append(f"two files of one name, as image and mask ({twins[0]}.*; {len(twins)} pairs)")
    return hints, better


def _kind(name: str) -> str:
    """What the name of a folder says of the images in it; "" for nothing."""
    words = set(_words(name))
    normal, defect = bool(words & NORMAL_WORDS), bool(words & DEFECT_WORDS)
    if words & NEGATIONS:  # not_ok, no_defect
        normal, defect = defect, normal
    kinds = {"train": words & TRAIN_WORDS, "test": words & TEST_WORDS, "normal": normal, "defect": defect}
    return next((kind for kind, holds in kinds.items() if holds), "")


def _words(name: str) -> list[str]:
    """The words of a name, without numbers."""
    name = fold(name).replace("ground truth", "groundtruth").replace("ground_truth", "groundtruth")
    return [word for word in re.split(r"[ _.\-]+", name) if not word.isdecimal()]


def _twins(folder: str, names: Sequence[str]) -> list[str]:
    """Names with two endings, one of a lossy format, as sets have them whose masks lie beside the images."""
    endings = defaultdict(set)
    for name in names:
        endings[os.path.splitext(name)[0]].add(os.path.splitext(name)[1].lower())
    twins = [name for name, two in endings.items() if len(two) == 2 and len(two & LOSSY) == 1]
    return [f"{folder}/{name}".lstrip("/") for name in twins]
