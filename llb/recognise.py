"""Which layout a data root has (llb.layouts), by its names; one that is more than a folder of images is refused."""

import re
from collections.abc import Sequence
from pathlib import Path

from llb.files import UserError, typed
from llb.pairing import VIEWS, is_normal, suspicions
from llb.tree import fold_path

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


def recognise(root: Path, files: Sequence[str], images: Sequence[str]) -> str:
    """The layout that the files' paths show; images: those among them. A UserError is raised if it is not clear."""
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
    for depth in (1, 2):
        below = {}
        for real, file in zip(files, folded, strict=True):
            rest = file.split("/", depth)[depth:]
            if rest and (layout := _sign(rest[0])):
                below.setdefault("/".join(real.split("/")[:depth]), layout)
        if below:
            places = " or ".join(f"--data {typed(root / folder)} ({layout})" for folder, layout in [*below.items()][:3])
            raise UserError(f"--data {root}: the image set lies deeper; give {places}")
    if any(REALIAD_NAME.search(file) for file in folded):
        raise UserError(
            f"--data {root} holds Real-IAD's images without its JSON files: unpack realiad_jsons beside realiad_1024, "
            "which holds a folder for each category, and give the folder of both; --layout folder trains on every image"
        )
    hints, better = suspicions(images)
    if hints:
        alone = f", as --data {typed(root / better)}" if better else ""
        raise UserError(
            f"--data {root} looks like a labelled image set, but is none that llb knows: {', '.join(hints[:3])}. "
            f"Give the folder of the training images alone{alone}, or arrange them as train/good, test/<kind>, "
            "ground_truth/<kind>; --layout folder trains on every image, masks and defects included"
        )
    return "folder"


def _sign(path: str) -> str:
    """The layout that a path shows, "" for none."""
    if not (match := SIGN.match(path)):
        return ""
    kind, inner = match["kind"] or "good", match["inner"] or ""
    swapped = not match["box"] and kind not in NO_KINDS and is_normal(inner)  # train/<category>/good
    return match.lastgroup.replace("_", "-") if is_normal(kind) or swapped else ""
