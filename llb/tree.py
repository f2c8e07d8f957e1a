"""The walk over a data root: every image below it, and every file and folder that is left out, by reason.

It ends quickly on any tree: each real folder is read once, by the path with the fewest links, so that links which form
a circle or a mesh lead nowhere twice; it goes 64 folders deep; only links and folders cost a system call each.
"""

import errno
import heapq
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from llb.files import UserError, is_marked

# what Pillow reads (llb.images): .jfif and .jpe are JPEG, .j2k and its kin JPEG 2000, .dib is BMP, .pnm and its kin PPM
IMAGE_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm .pgm .png .pnm .ppm .tga .tif"
    " .tiff .webp".split()
)
UNREAD_SUFFIXES = frozenset(
    ".arw .cr2 .cr3 .dcm .dng .exr .hdr .heic .heif .jxl .mat .nef .npy .npz .orf .pcx .pfm .psd .raf .raw .svg".split()
)
SYSTEM_FOLDERS = frozenset(
    ("@eadir", "$recycle.bin", "#recycle", "#snapshot", "lost+found", "__macosx", "system volume information")
    + ("thumbnails", "thumbs", "__pycache__")
)
DEEPEST = 64  # folders
RUN_TABLES = {"scores.csv", "suspects.png"}  # of a run's category

# reasons for which the walk leaves something out
OTHER, UNREAD, HIDDEN, SYSTEM = "not images", "in a format that is not read", "hidden", "system folders"
BROKEN, SPECIAL, RUN = "broken links", "neither files nor folders", "runs of llb"
AGAIN, DEEP = "links to folders that are read already", f"deeper than {DEEPEST} folders"


@dataclass(frozen=True)
class Tree:
    """Relative POSIX paths below `root`, in the order of a walk: sorted by name in each folder."""

    root: Path
    images: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]  # reason → files and folders
    again: Mapping[str, str] = field(default_factory=dict)  # link to a folder that is read already → that folder

    def linked_twice(self) -> tuple[str, ...]:
        """The images below such links, one link deep: two categories may share their training images."""
        found = []
        for link, folder in self.again.items():
            if folder and not link.startswith(f"{folder}/") and len(found) <= len(self.images):
                found += [link + path[len(folder) :] for path in self.images if path.startswith(f"{folder}/")]
        return by_folder(found)


@lru_cache(maxsize=2**20)
def fold(name: str) -> str:
    """A name for comparing: without case and blanks around it, with unicode composed."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def fold_path(path: str) -> str:
    """A path for comparing; it keeps its parts."""
    return "/".join(map(fold, path.split("/")))


def by_folder(paths: Iterable[str]) -> tuple[str, ...]:
    """Paths in the order of a walk that takes each folder's names sorted."""
    return tuple(sorted(paths, key=lambda path: path.split("/")))


def walk(root: Path, flag: str = "--data") -> Tree:
    """Everything below the folder `root`, named by `flag`. A UserError is raised if it, or a folder below it, cannot be
    read."""
    images, left_out = [], defaultdict(list)
    waiting = [(0, [])]  # links on the way to a folder, parts of its path
    seen = {}  # real folder → its path
    while waiting:
        links, parts = heapq.heappop(waiting)
        folder = "/".join(parts)
        identity = _identity(root / folder) if len(parts) <= DEEPEST else None
        if identity is None or identity in seen:
            left_out[AGAIN if identity else DEEP].append(folder)
            continue
        seen[identity] = folder
        entries = _entries(root / folder)
        if _is_run(root / folder, entries):
            if not parts:
                raise UserError(f"{flag} {root} is a run of llb, not a folder of images: give the one it was made from")
            left_out[RUN].append(folder)
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if parts else entry.name
            reason = _reason(entry)
            if reason == "folder":
                heapq.heappush(waiting, (links + entry.is_symlink(), [*parts, entry.name]))
            elif reason:
                left_out[reason].append(path)
            else:
                images.append(path)
    again = {folder: seen[_identity(root / folder)] for folder in left_out.get(AGAIN, ())}
    return Tree(root, by_folder(images), {reason: by_folder(paths) for reason, paths in left_out.items()}, again)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells real folders apart. None: the path is longer than the system allows."""
    try:
        status = os.stat(folder)
        return status.st_dev, status.st_ino
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise _unreadable(folder, error) from None


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
        if not os.access(folder, os.X_OK):  # names without files
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return found
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be read ({error.strerror}): grant access to it, or move it away")


def _reason(entry: os.DirEntry) -> str:
    """Why an entry of a folder is left out; "folder" for one that is to be read, "" for an image."""
    if entry.name.startswith("."):
        return HIDDEN
    try:
        if entry.is_dir():
            return SYSTEM if fold(entry.name) in SYSTEM_FOLDERS else "folder"
        if not entry.is_file():
            return BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL
    except OSError:  # a link that leads to itself, or into a folder that may not be entered
        return BROKEN
    suffix = os.path.splitext(entry.name)[1].lower()
    return "" if suffix in IMAGE_SUFFIXES else UNREAD if suffix in UNREAD_SUFFIXES else OTHER


def _is_run(folder: Path, entries: Iterable[os.DirEntry]) -> bool:
    """Whether llb made the folder: with `--data .` a run lies among the images, and its own pictures are not data."""
    names = {entry.name for entry in entries}
    return ("config.json" in names and is_marked(folder)) or names >= RUN_TABLES


def count(left_out: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Reason → how many files and folders, and the first of them: as JSON can hold it."""
    return {
        reason: {"count": len(paths), "first": [_shown(path) for path in paths[:3]]}
        for reason, paths in left_out.items()
        if paths
    }


def _shown(path: str) -> str:
    """A path for a line of text: unprintable signs escaped, the front of a long one cut."""
    text = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in path)
    return text if len(text) <= 80 else f"…{text[-79:]}"


def summary(counted: Mapping[str, Mapping[str, Any]]) -> str:
    """What `count` gives, in one line; "" for nothing."""
    parts = []
    for reason, of_reason in counted.items():
        more = ", …" if of_reason["count"] > len(of_reason["first"]) else ""
        parts.append(f"{reason}: {of_reason['count']} ({', '.join(of_reason['first'])}{more})")
    return ", ".join(parts)
