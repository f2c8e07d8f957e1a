"""The folder that all runs share: features of image files, found by the contents of the files. No JAX.

CACHE/features/<kind>/<list>.npy   a shard: an array (n, …); behind it the SHA-256 of the n files, n, and a CRC-32
CACHE/demo/<digest>/               a demo set (llb.demo)

A kind is all that features depend on besides the file (llb.features); <list> is a digest of the n SHA-256. A shard is
written whole and never changed, so several commands may work here at once: at worst two compute the same one. Its date
is when it was used last. Only files of these names are deleted.
"""

import hashlib
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from llb.console import say
from llb.files import atomic, writing

SHARD = re.compile(r"[0-9a-f]{32}\.npy")
OWN = re.compile(rf"{SHARD.pattern}|\.[0-9a-f]{{32}}\.tmp-[0-9a-f]{{32}}\.npy")  # or what a killed command has left
IN_USE = time.time() - 60  # younger files stay: this command has used them, or another is writing them


def write_shard(folder: Path, digests: Sequence[str], features: np.ndarray, size: int) -> None:
    """Write a shard. digests: SHA-256 of n files, hexadecimal; features: (n, …); size: as `llb.files.writing`."""
    names = bytes.fromhex("".join(digests))

    def write(file: Path) -> None:
        np.save(file, features)
        end = names + len(digests).to_bytes(4, "big")
        checksum = zlib.crc32(end, zlib.crc32(file.read_bytes()))
        with open(file, "ab") as shard:
            shard.write(end + checksum.to_bytes(4, "big"))

    shard = folder / f"{_name(names)}.npy"
    if not shard.exists():  # else another command has computed the same meanwhile
        atomic(shard, write, by_any_process=True, size=size)


def find_rows(folder: Path, wanted: Set[str]) -> dict[str, tuple[Path, int]]:
    """Where the features of one kind lie: SHA-256 of a file → shard, and row in it.

    Shards that hold what is wanted are read whole and count as used. Damaged ones are deleted.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    shards = [folder / name for name in names if SHARD.fullmatch(name)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        lists = dict(zip(shards, pool.map(_rows_of, shards)))
        used = [shard for shard, rows in lists.items() if not rows or not rows.keys().isdisjoint(wanted)]
        whole = dict(zip(used, pool.map(_is_whole, used)))
    if damaged := [shard for shard in used if not whole[shard] and shard.exists()]:  # else another command made room
        say(f"{folder}: {len(damaged)} of {len(shards)} shards are damaged and computed again, first {damaged[0].name}")
        for shard in damaged:
            with suppress(OSError):
                shard.unlink()
    places = {}
    for shard in filter(whole.get, used):
        _touch(shard)
        places |= {digest: (shard, row) for digest, row in lists[shard].items()}
    return places


def load_shard(shard: Path) -> np.ndarray:
    """The array of a shard, memory-mapped, which counts as used. An OSError is raised if it is not there any more."""
    _touch(shard)
    return np.load(shard, mmap_mode="r")


def make_room(cache: Path, needed: int, limit: float) -> bool:
    """Whether `needed` more bytes of features fit on the disk. What was used longest ago is deleted first, until all
    would lie within `limit` bytes and fit; what this command uses stays."""
    folder, held, old = cache / "features", 0, []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*/*.npy"):
        with suppress(FileNotFoundError):
            status = file.stat()
            if OWN.fullmatch(file.name):
                held += status.st_size
                old += [(status.st_mtime, status.st_size, file)] if status.st_mtime < IN_USE else []
    free = shutil.disk_usage(folder).free
    if needed <= free + sum(size for _, size, _ in old):
        for _, size, file in sorted(old):
            if held + needed > limit or needed > free:
                with suppress(OSError):  # of another user, or open on Windows
                    file.unlink()
                    held, free = held - size, free + size
    return needed <= free


def _name(names: bytes) -> str:
    return hashlib.sha256(names).hexdigest()[:32]


def _touch(shard: Path) -> None:
    with suppress(OSError):  # of another user, or read-only
        os.utime(shard)


def _rows_of(shard: Path) -> dict[str, int]:
    """SHA-256 of each file of a shard → row; empty if they do not fit the shard's name."""
    with suppress(OSError), open(shard, "rb") as file:
        file.seek(-8, os.SEEK_END)
        count = int.from_bytes(file.read(4), "big")
        file.seek(-8 - 32 * count, os.SEEK_END)
        names = file.read(32 * count)
        if _name(names) == shard.stem:
            return {names[32 * row : 32 * (row + 1)].hex(): row for row in range(count)}
    return {}


def _is_whole(shard: Path) -> bool:
    """Whether a shard is there, with the content that was written."""
    with suppress(OSError):
        content = memoryview(shard.read_bytes())
        return len(content) > 4 and zlib.crc32(content[:-4]).to_bytes(4, "big") == content[-4:]
    return False
