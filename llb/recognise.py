"""Which layout a data root has (llb.layouts), by its names; one that is more than a folder of images is refused."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from llb.files import UserError, typed
from llb.pairing import (
    LABELS,
    NEGATIONS,
    NEUTRAL,
    SURE_MASK,
    TEST_WORDS,
    TRAIN_WORDS,
    VIEWS,
    image_of,
    is_masks,
    is_normal,
    quality_of,
    stem,
    suspicions,
    words,
)
from llb.tree import IMAGE_SUFFIXES, fold, fold_path

# How a path below the root, folded, tells the layout.
SIGNS = {
    "real-iad": r"realiad_(?:1024|512|256|raw)/|realiad_jsons",
    "visa": r"split_csv/1cls\.csv$|(?:[^/]+/)?data/images/(?:normal|anomaly)/",
    "ksdd2": r"(?:train|test)/[^/]+_gt\.\w+$",
    "ksdd": r"kos\d+/[^/]+_label\.\w+$",
    "dagm": r"(?:[^/]+/)?(?:train|test)/label/[^/]+_label\.\w+$",
    # the last, as it is one only if the kind is normal
    "mvtec": r"(?:(?P<box>[^/]+)/(?:(?P=box)/)?)?train(?:ing)?/(?P<kind>[^/]+)/(?P<inner>[^/]+/)?",
}
REALIAD_NAME = re.compile(r"_\d{4}_(?:ok|ng)_(?:\w+_)?c\d_\d+\.\w+$")
SIGN = re.compile("|".join(f"(?P<{name.replace('-', '_')}>{sign})" for name, sign in SIGNS.items()))
NO_KINDS = VIEWS | {"data"}
TESTS = TEST_WORDS - {"dev"}  # a folder's name for what is under development, too
MOST = 10**5  # files and folders that are looked at below a folder beside the root
ALL_THE_SAME = "--layout folder takes it all the same"


def recognise(root: Path, files: Sequence[str], images: Sequence[str], unread: Sequence[str] = ()) -> str:
    """The layout that the files' paths show; images: those among them; unread: all files of other formats.

    A UserError is raised if it is not clear.
    """
    _refuse_half_of_realiad(root)
    folded = [fold_path(file) for file in files]
    there = {}
    for file in folded:
        if sign := _sign(file):
            there.setdefault(sign, file)
    if len(there) > 1:
        seen = " and ".join(f"{layout} ({first})" for layout, first in there.items())
        raise UserError(f"--data {root} holds several layouts, {seen}: choose with --layout {' or '.join(there)}")
    if there:
        layout = next(iter(there))
        jsons = [file for file in folded if file.startswith("realiad_jsons") and file.endswith(".json")]
        single = layout == "real-iad" and jsons and all("realiad_jsons_sv/" in file for file in jsons)
        return "real-iad-sv" if single else layout
    if places := places_below(root, files, folded):
        raise UserError(f"--data {root}: the image set lies deeper; give {' or '.join(places[:3])}")
    if any(REALIAD_NAME.search(file) for file in folded):
        raise UserError(
            f"--data {root} holds Real-IAD's images without its JSON files: unpack realiad_jsons beside realiad_1024, "
            "which holds a folder for each category, and give the folder of both; --layout folder trains on every image"
        )
    _refuse_part(root, images)
    full = Path(os.path.abspath(root))
    hints, better = suspicions(images, own_name=full.name)
    hints += annotations(images, unread)
    if hints:
        clean = better and not suspicions([path[len(better) :] for path in images if path.startswith(better)])[0]
        alone = f", as --data {typed(root / better)}" if clean else ""
        if any(_sign(f"{fold(full.name)}/{file}") for file in folded):
            raise UserError(
                f"--data {root} is a part of an image set: give --data {typed(full.parent)}, "
                f"or the folder of the training images alone{alone}; {ALL_THE_SAME}"
            )
        raise UserError(
            f"--data {root} looks like a labelled image set, but is none that llb knows: {', '.join(hints[:3])}. "
            f"Give the folder of the training images alone{alone}, or arrange them as train/good, test/<kind>, "
            "ground_truth/<kind>; --layout folder trains on every image, masks and defects included"
        )
    return "folder"


def places_below(root: Path, files: Sequence[str], folded: Sequence[str]) -> list[str]:
    """The image sets one or two folders below the root, by the files that lie there: a flag for each."""
    for depth in (1, 2):
        below = {}
        for real, file in zip(files, folded, strict=True):
            rest = file.split("/", depth)[depth:]
            if rest and (layout := _sign(rest[0])):
                below.setdefault("/".join(real.split("/")[:depth]), layout)
        if below:
            return [f"--data {typed(root / folder)} ({layout})" for folder, layout in below.items()]
    return []


def _refuse_half_of_realiad(root: Path) -> None:
    """Raise a UserError if the root is, or lies in, Real-IAD's images or lists, and the other lies beside them."""
    full = Path(os.path.abspath(root))
    for place in (full, full.parent):
        if _sign(f"{fold(place.name)}/") == "real-iad":
            names = [name for name in map(fold, [place.name, *_beside(place)]) if _sign(f"{name}/") == "real-iad"]
            if len({name.startswith("realiad_jsons") for name in names}) == 2:
                raise UserError(f"--data {root} is a part of Real-IAD: give --data {typed(place.parent)}")


def _refuse_part(root: Path, own: Sequence[str]) -> None:
    """Raise a UserError if the root is one with masks, defects or the images for test: by its name, or by that of the
    folder around it, and by the folders beside that. own: the root's images."""
    full = Path(os.path.abspath(root))
    for place in (full.parent, full):
        said, beside = words(place.name), _beside(place)
        train = [name for name in beside if _only(name, TRAIN_WORDS)]
        normal = [name for name in beside if quality_of(name) == "normal"]
        if is_masks(" ".join(word for word in said if word not in NEUTRAL)):
            images = [name for name in beside if fold(name) in NO_KINDS or _only(name, TESTS)]
            around = train + normal + images
            sure = any(map(SURE_MASK.fullmatch, said)) or _named_as(own, [place.parent / name for name in around])
            holds, where = "masks", [f"beside {name}/" for name in around if sure]
        elif not TESTS.isdisjoint(said) and TRAIN_WORDS.isdisjoint(said):
            around = [name for name in train if any(_images_below(place.parent / name))]
            holds, where = "the images for test", [f"beside {name}/" for name in around]
        elif place == full and quality_of(place.name) == "defect":
            rest = _besides_quality(place.name)  # of crack_detector; beside ok_detector it is no other thing
            around = [name for name in normal if not rest or is_normal(name) or _besides_quality(name) == rest]
            around += [] if rest else [name for name in train if any(_images_below(place.parent / name))]
            inside = [f"in {place.parent.name}/"] if _only(place.parent.name, TESTS) else []
            holds, where = "defects", [f"beside {name}/" for name in around] or inside
        else:
            continue
        if where:
            better = _set_around(place) or _for_training(place.parent / name for name in around)
            give = f"--data {typed(better)}" if better else "the folder of the training images"
            seems = f"{place.name}/ seems to hold {holds}, as it lies {where[0]}"
            raise UserError(f"--data {root}: {seems}: give {give}; {ALL_THE_SAME}")


def _set_around(place: Path) -> Path | None:
    """The nearest folder around one that is an image set by what lies in it."""
    for folder in [folder for folder in place.parents if folder.name][:3]:
        paths = map(fold_path, _images_below(folder))
        if any(_sign(path) and not _sign(path.partition("/")[2]) for path in paths):  # no folder of several sets
            return folder
    return None


def _for_training(folders: Iterable[Path]) -> Path | None:
    """The first of the folders that has images and is no part for test, nor lies in one, or in one of defects."""
    for folder in folders:
        names = [folder.name, folder.parent.name, folder.parent.parent.name]
        bad = [name for name in names if quality_of(name) == "defect" and not _besides_quality(name)]
        if not bad and not any(_only(name, TESTS) for name in names) and any(_images_below(folder)):
            return folder
    return None


def annotations(images: Sequence[str], unread: Sequence[str], of_objects: bool = False) -> list[str]:
    """A phrase for each folder of annotations, by its name, whose files are no images but called as images are.

    of_objects: for those that may mark objects instead of defects, as labels/ does.
    """
    names = defaultdict(set)
    for path in unread:
        *above, name = path.split("/")
        of_masks = [folder for folder in above if is_masks(folder)]
        if of_masks and of_objects == all(LABELS.fullmatch(word) for folder in of_masks for word in words(folder)):
            names["/".join(above)].add(stem(name))
    of_images = {stem(path.rpartition("/")[2]) for path in images} if names else set()
    found = {folder: len(inside & of_images) for folder, inside in names.items()}
    return [f"annotations in {folder}/ (of {n} images)" for folder, n in found.items() if 2 * n > len(names[folder])]


def _only(name: str, its_words: Collection[str]) -> bool:
    """Whether a name says this and nothing else, as train_images does for train."""
    said = {word for word in words(name) if word not in NEUTRAL or word in TRAIN_WORDS | TESTS}
    return bool(said) and said <= its_words


def _besides_quality(name: str) -> set[str]:
    """The words of a name that do not say normal or defect: front of ok_front."""
    return {word for word in words(name) if word not in NEUTRAL | NEGATIONS and not quality_of(word)}


def _named_as(own: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether at least half of the root's images are called as images below these folders are."""
    stems = {image_of(stem(path.rpartition("/")[2])) for path in own}
    images = {stem(path.rpartition("/")[2]) for folder in folders for path in _images_below(folder)}
    return 2 * len(stems & images) >= len(stems)


def _images_below(folder: Path) -> Iterator[str]:
    """The relative paths of the images in a folder and below, the outer ones first; of a very large one not all."""
    folders, seen = [""], 0
    for above in folders:
        try:
            with os.scandir(folder / above) as entries:
                inside = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError:
            continue
        folders += [f"{above}{name}/" for name, is_folder in inside if is_folder]
        images = [name for name, is_folder in inside if not is_folder and Path(name).suffix.lower() in IMAGE_SUFFIXES]
        yield from (f"{above}{name}" for name in images)
        seen += len(inside)
        if seen > MOST:
            return


def _beside(folder: Path) -> list[str]:
    """The other folders beside one, none if they may not be seen."""
    try:
        with os.scandir(folder.parent) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return [name for name in names if name != folder.name]


def _sign(path: str) -> str:
    """The layout that a path shows, "" for none."""
    if not (match := SIGN.match(path)):
        return ""
    kind, inner = match["kind"] or "good", match["inner"] or ""
    swapped = not match["box"] and kind not in NO_KINDS and is_normal(inner)  # train/<category>/good
    return match.lastgroup.replace("_", "-") if is_normal(kind) or swapped else ""
