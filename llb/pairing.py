"""What names say: which mask belongs to which image, what is normal and what defective, what is no folder of images."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import PurePosixPath

from llb.files import UserError
from llb.tree import fold, fold_path

ENDINGS = ("_mask", "_gt", "_label", "_seg", "_ground_truth", "_annotation")  # of a mask's name, after its image's
FRONT = re.compile(r"((?:.*/)?)mask_([^/]+)")
NUMBERED = re.compile(r"(.+)_(?:mask|gt|label)_?\d+")  # several masks of one image
BESIDE = re.compile(r"(.+)_(?:mask|gt|label|ground_truth|seg|segmentation)")
VIEWS = {"rgb", "img", "imgs", "image", "images"}  # where a kind's folder has one, only the images in it are read

Named = Sequence[tuple[str, str]]  # of each file: its path below the folder of its kind, and below the root


def pair(images: Named, masks: Named) -> dict[str, tuple[str, ...]]:
    """Image → its masks, by name, without case. An image without a mask is not in it.

    Of the ways to name a mask the one that fits most images comes first: with 1.png, 1_mask.png and masks for both,
    "1_mask" alone may belong to either. A UserError is raised if a mask fits two images.
    """
    names = ("_mask", "", *ENDINGS[1:], "front", "numbered", "folder")
    owners, ways = defaultdict(list), {way: defaultdict(list) for way in names}
    for below, path in images:
        owners[stem(below)].append(path)
    for below, path in masks:
        ways[""][stem(below)].append(path)
        name = _underscored(stem(below))
        for ending in ENDINGS:
            if name.endswith(ending):
                ways[ending][name.removesuffix(ending)].append(path)
        if match := FRONT.fullmatch(name):
            ways["front"][match[1] + match[2]].append(path)
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
    if len(images) == 1:
        return images[0]
    place = PurePosixPath(mask)
    images = [image for image in images if place.name.startswith(PurePosixPath(image).stem)] or images
    return next((image for image in images if place.suffix == PurePosixPath(image).suffix), images[0])


def split_beside(members: Named, paired: Sequence[str] = ()) -> tuple[Named, Named]:
    """Images, and the masks that lie beside them: x_mask.png beside x.png. Images in `paired` are none, by any name."""
    names = [stem(below) for below, _ in members]
    stems, images, masks = set(names), [], []
    for name, member in zip(names, members, strict=True):
        is_mask = (image := image_of(name)) != name and image in stems and member[1] not in paired
        (masks if is_mask else images).append(member)
    return images, masks


def image_of(name: str) -> str:
    """A mask's stem without what its image's has not, x of x_mask; another stem as it is."""
    match = BESIDE.fullmatch(_underscored(name)) or FRONT.fullmatch(name)
    return "".join(match.groups()) if match else name


def _underscored(name: str) -> str:
    """1-mask and "1 mask" as 1_mask; without the ending alone they would be names of their own."""
    return re.sub(r"[ -](mask|gt|label|seg)$", r"_\1", name)


def split_views(members: Named) -> tuple[Named, Named]:
    """Images of a kind as in MVTec 3D: what lies in rgb/, with the paths without that, and the rest, such as depth."""
    inner, outer = [], []
    for below, path in members:
        above = below.split("/")[:-1]
        kept = [folder for folder in above if fold(folder) not in VIEWS]
        if len(kept) < len(above):
            inner.append(("/".join([*kept, below.rpartition("/")[2]]), path))
        else:
            outer.append((below, path))
    return (inner, outer) if inner else (outer, [])


def stem(path: str) -> str:
    """A path for comparing, without its ending."""
    name = fold_path(path)
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") + 1 else name


# ---- what names say of the images: the one list of words for it ----

TRAIN_WORDS = {"train", "training"}
TEST_WORDS = {"test", "testing", "validation", "valid", "val", "eval", "dev", "holdout"}
MASK = re.compile(
    r"gts?|masks?|msks?|label(?:map)?s?|lbls?|groundtruths?|\w*annot(?:ation)?s?|ann[os]?|segm?|segmentations?"
    r"|masken?|masques?|mascaras?|掩码|掩膜|标签"
)
SURE_MASK = re.compile(r"gts?|ma?sks?|groundtruths?|masken?|masques?|mascaras?|掩码|掩膜")  # no thing, as a label is
LABELS = re.compile(r"labels?|lbls?|ann[os]?|标签")  # where they are no images they may be of objects
DRAWN = re.compile(r"heatmaps?|overlays?")  # over an image: it is no mask, and nothing to learn from
NORMAL = re.compile(
    r"goods?|ok|okay|normals?|negatives?|io|gut|gutteile?|intact|healthy|perfect|buen[oa]s?|bons?|buon[oi]|conform\w*"
    r"|regular|golden|良|良好|合格|正常|양품|정상|годн\w+|хорош\w+"
)
DEFECT = re.compile(
    r"ng|nok|ko|nio|bad|bads|def|defe[ck]t\w*|anomal\w*|fault\w*|fail\w*|reject\w*|positives?|scrap|damag\w*|broken"
    r"|crack(?:s|ed)?|scratch\w*|dents?|dented|blowholes?|contaminat\w*|flaw\w*|dirty|invalid|wrong|incorrect|diseased"
    r"|irregular|fehler\w*|schlecht\w*|ausschuss\w*|mal[oa]s?|mauvais|d[eé]faut\w*|d[eé]fectu\w*|difett\w*|scart[io]"
    r"|缺陷|瑕疵|异常|異常|불량품?|брак|дефект\w*"
)
THINGS = re.compile(r"(?:parts?|pieces?|images?|imgs?|samples?|品|件|样本|样品|图片|图像|图)$")  # goodparts, NG品
FLIP = re.compile(r"(?:no[nt]?|un|in|ab|不|非|无)[ _-]?(.+)|(.+)(?:free|frei|less)")  # nondefective, 不良品, flawless
NEGATIONS = {"no", "not", "non", "free", "frei", "without", "ohne", "sans", "sin", "senza"}
NO_DIGITS = dict.fromkeys(map(ord, "0123456789"), "_")  # few names are left to look at
OPPOSITES = [{"yes", "no"}, {"pos", "neg"}, {"true", "false"}]  # which of them is normal depends
SDNET = {"d": {"cd", "ud"}, "p": {"cp", "up"}, "w": {"cw", "uw"}}  # cracked and uncracked decks, pavements, walls
MAPS = {"depth", "normals", "xyz", "disparity", "pointcloud", "pointclouds"}  # of a scan: to be seen, no image
COLOURS = VIEWS | {"color", "colour"}
SIZES = {"width", "height", "length"}  # beside them depth is one, too
BETWEEN = "_. -"  # the words of a file's name
OF_SCAN = re.compile(rf"(.+)[{BETWEEN}](?:{'|'.join(MAPS | COLOURS | {'gray', 'grey', 'ir', 'infrared'})})(?:_?\d+)?")
MAP_ENDINGS = tuple(f"{sign}{word}" for sign in BETWEEN for word in sorted(MAPS))
FEW = 12  # folders of one parent whose files are compared
NEUTRAL = set("image images img imgs class part parts sample samples set data only test train".split())


def words(name: str) -> list[str]:
    """The words of a name, folded, without numbers and signs; notOK and JPEGImages are two each."""
    return _words(name.translate(NO_DIGITS))


@lru_cache(maxsize=2**16)
def _words(name: str) -> list[str]:
    name = re.sub(r"ground[ _-]?truth", "groundtruth", unicodedata.normalize("NFC", name), flags=re.IGNORECASE)
    name = re.sub(r"\b(n?)\.?i\.?o\b", r"\1io", name, flags=re.IGNORECASE)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[^\W\d_]+", name.casefold())


def kind_of(name: str) -> str:
    """What the name of a folder or an image says: train, test, normal, defect, or "" for nothing."""
    return _kind_of(name.translate(NO_DIGITS))


@lru_cache(maxsize=2**16)
def _kind_of(name: str) -> str:
    said = words(name)
    of_words = {says for word in said if (says := _says(word))}
    if not NEGATIONS.isdisjoint(said):  # not_ok, no_defect
        of_words = {_flipped(says) for says in of_words}
    parts = {"train": TRAIN_WORDS, "test": TEST_WORDS}
    of_words |= {part for part, its_words in parts.items() if not its_words.isdisjoint(said)}
    return next((kind for kind in ("train", "test", "defect", "normal") if kind in of_words), "")


def quality_of(name: str) -> str:
    """normal, defect or "": what a name says besides the part, as train_ng does."""
    return _quality_of(name.translate(NO_DIGITS))


@lru_cache(maxsize=2**16)
def _quality_of(name: str) -> str:
    return kind_of(" ".join(set(words(name)) - TRAIN_WORDS - TEST_WORDS))


def _says(word: str) -> str:
    """normal, defect or ""."""
    word = THINGS.sub("", word)
    if NORMAL.fullmatch(word):
        return "normal"
    if (match := FLIP.fullmatch(word)) and (rest := _says(match[1] or match[2])):
        return _flipped(rest)
    return "defect" if DEFECT.fullmatch(word) else ""


def _flipped(says: str) -> str:
    return {"normal": "defect", "defect": "normal"}.get(says, says)


@lru_cache(maxsize=2**16)
def is_normal(name: str) -> bool:
    """Whether a name says that something is normal, and nothing else: good, Normal_01, no defects, but not ok_cam1."""
    said = {word for word in words(name) if word not in NEUTRAL}
    return bool(said) and kind_of(" ".join(said)) == "normal" and all(_says(w) or w in NEGATIONS for w in said)


@lru_cache(maxsize=2**16)
def is_masks(name: str) -> bool:
    """Whether a folder of this name holds masks, and nothing else."""
    said = words(name)
    if said[-1:] in (["mask"], ["masks"], ["gt"]):  # anomaly_mask, but not bad_label
        said = [word for word in said if _says(word) != "defect"]
    return bool(said) and all(map(MASK.fullmatch, said))


# ---- a folder of images that is more than that ----


def suspicions(images: Sequence[str], known: str = "", own_name: str = "") -> tuple[list[str], str]:
    """What hints at masks or at known defects among the images of a folder: phrases for a message.

    And the folder below it that seems to hold the images for training, "" for none. known: "normal" or "defect" if a
    folder's name says what all of them are. own_name: the folder's.
    """
    inside, children = defaultdict(list), defaultdict(dict)  # folder → images in it and below; folder → folders in it
    in_folder = defaultdict(list)
    for path in images:
        *parts, name = path.split("/")
        in_folder["/".join(parts)].append(name)
        for depth, part in enumerate(parts):
            folder = "/".join(parts[: depth + 1])
            inside[folder].append(path[len(folder) + 1 :])
            children["/".join(parts[:depth])][fold(part)] = folder
    counts = {folder: len(below) for folder, below in inside.items()}
    masks = [folder for folder in counts if any(map(_says_mask, words(folder.rpartition("/")[2])))]
    hints = [f"masks in {folder}/ ({counts[folder]} of the images)" for folder in masks[:1]]
    stems = {path: path.rpartition("/")[2].rpartition(".")[0] for path in images}
    beside = [path for path, name in stems.items() if _is_mask_by_name(name)]
    if beside and not masks:
        hints.append(f"masks beside images ({beside[0]}; {len(beside)} of the images)")
    maps = {path for path, name in stems.items() if name.casefold().endswith(MAP_ENDINGS)}
    if of_image := _with_image(maps, images):
        hints.append(f"maps of depth or normals beside images ({of_image}; {len(maps)} of the images)")
    better = ""
    cracked = [two for two in SDNET.values() if any(two <= below.keys() for below in children.values())]
    for folder, below in children.items():
        if scans := _scans({name: inside[path] for name, path in below.items()}, in_folder[folder]):
            scans = [below[name] for name in scans]
            below = {name: path for name, path in below.items() if path not in scans}
            rest = [f"{path}/" for path in below.values()] + [f"{folder}/{name}" for name in in_folder[folder][:1]]
            hints += [f"maps in {scans[0]}/ beside {rest[0].lstrip('/')}"] if rest else []
        kinds = {name: kind_of(below[name].rpartition("/")[2]) for name in sorted(below)}
        here = fold(folder.rpartition("/")[2] or own_name)
        of_sdnet = [two for parent, two in SDNET.items() if len(cracked) > 1 or parent == here]
        found = [two for two in OPPOSITES + of_sdnet if two <= kinds.keys()]
        if kinds.keys() == {"0", "1"} and not in_folder[folder] and not known:  # classes by number
            found.append(kinds.keys())
        hints += [" beside ".join(f"{below[name]}/" for name in sorted(pair)) for pair in found]
        for one, others in (("train", {"test"}), ("normal", {"defect", "", "test"})):
            if one == "normal":  # train_ok beside train_ng
                kinds = {name: quality_of(below[name].rpartition("/")[2]) or kind for name, kind in kinds.items()}
            ones = [f"{below[name]}/" for name, kind in kinds.items() if kind == one]
            rest = [f"{below[name]}/" for name, kind in kinds.items() if kind in others]
            if one == "normal":
                rest += [f"{folder}/{name}".lstrip("/") for name in in_folder[folder][:1]]
            if ones and rest:
                hints.append(f"{ones[0]} beside {rest[0]}")
                inner = not better or ones[0].startswith(better)  # train/ok is better than train
                if inner and not ones[0].startswith(tuple(f"{folder}/" for folder in masks)):
                    better = ones[0]
                break
    named = [folder for folder in counts if quality_of(folder.rpartition("/")[2]) == "defect"]
    defects = [folder for folder in named if counts[folder] < len(images)]  # not a folder around everything
    if defects and not better:
        hints.append(f"defects in {defects[0]}/ ({counts[defects[0]]} of the images)")
    qualities = {path: quality_of(name) for path, name in stems.items()}
    bad = [path for path, quality in qualities.items() if quality == "defect"]
    labelled = {quality: path for path, quality in qualities.items()}
    if {"normal", "defect"} <= labelled.keys():
        hints.append(f"{labelled['normal']} and {labelled['defect']}")
    elif known != "defect" and 0 < len(bad) < len(images):
        hints.append(f"defects by name ({bad[0]}; {len(bad)} of {len(images)})")
    tested = [path for path in images if "_test." in path and path.replace("_test.", "_temp.") in stems]
    if tested:
        hints.append(f"templates beside {tested[0]}")
    twins = [path for folder, names in in_folder.items() for path in _twins(folder, names)]
    if len(twins) > 1:
        hints.append(f"two files of one name, as image and mask ({twins[0]}.*; {len(twins)} pairs)")
    if not hints:
        pairs = [pair for below in children.values() for pair in _counterparts({f: inside[f] for f in below.values()})]
        hints += [f"two files of one name, as image and mask ({pair})" for pair in pairs[:1]]
    return hints, better


def _says_mask(word: str) -> bool:
    return bool(MASK.fullmatch(word) or DRAWN.fullmatch(word))


def _is_mask_by_name(name: str) -> bool:
    said = words(name)
    return bool(said) and (_says_mask(said[-1]) or name.casefold().startswith("mask_"))


def _with_image(maps: Collection[str], images: Sequence[str]) -> str:
    """The first of a scan's maps, 0_depth.png, if most have their image beside them, 0_rgb.png or 0.png; else ""."""
    scans = {_scan_of(image) for image in images if image not in maps} if maps else set()
    shown = [path for path in maps if _scan_of(path) in scans]
    return min(shown, default="") if 2 * len(shown) >= len(maps) else ""


def _scan_of(path: str) -> str:
    """x of x_depth.png, x_rgb.png, x_image_0.png and x.png."""
    name = stem(path)
    return match[1] if (match := OF_SCAN.fullmatch(name)) else name


def _scans(folders: Mapping[str, Sequence[str]], beside: Sequence[str]) -> list[str]:
    """Of the folders beside each other, and beside images, those of a scan's maps: called so, with the images' names.
    Beside rgb/ they may have others; normals/ and xyz/ are one beside a folder of images, or of other maps, only."""
    names = folders.keys() & MAPS - ({"depth"} if SIZES & folders.keys() else set())
    if len(names) == 1 and names <= {"normals", "xyz"} and COLOURS.isdisjoint(folders):
        return []
    names |= folders.keys() & {"normal"} if names and not COLOURS.isdisjoint(folders) else set()
    stems = {name: {_scan_of(path.rpartition("/")[2]) for path in folders[name]} for name in folders if names}
    images = set(map(_scan_of, beside if names else ())).union(*(stems[name] for name in stems.keys() - names))
    rgb = not folders.keys().isdisjoint(COLOURS - VIEWS | {"rgb"})
    return [name for name in sorted(names) if rgb or 2 * len(stems[name] & images) > len(stems[name])]


def _twins(folder: str, names: Sequence[str]) -> list[str]:
    """Names with two endings, as sets have them whose masks, or depths, lie beside the images."""
    endings = defaultdict(set)
    for name in names:
        front, _, ending = name.rpartition(".")
        endings[front].add(ending.lower())
    twins = [name for name, of_name in endings.items() if len(of_name) > 1]
    return [f"{folder}/{name}".lstrip("/") for name in twins]


def _counterparts(folders: Mapping[str, Sequence[str]]) -> list[str]:
    """Pairs of folders beside each other with the same names and other endings. folders: the paths below each."""
    stems = {folder: set(map(stem, paths)) for folder, paths in folders.items() if len(folders) <= FEW}
    endings = {folder: {path.rpartition(".")[2].lower() for path in folders[folder]} for folder in stems}
    pairs = []
    for one, other in combinations(stems, 2):
        same, fewer = len(stems[one] & stems[other]), min(len(stems[one]), len(stems[other]))
        if endings[one].isdisjoint(endings[other]) and same > 1 and same >= fewer / 2:
            pairs.append(f"{one}/ and {other}/")
    return pairs
