"""Orbax checkpoints of a training. They hold host trees, so any number of devices can continue from them.

A checkpoint holds "state" (while training {"params", "opt", "seen"}; at the end {"params", "seen"}) and "meta"
({"digest", "checksum"}); "seen" is llb.train's. Orbax does not notice every damaged array, so the checksum of the state
is compared after reading. A killed save leaves a temporary folder. Orbax ignores it, and the next training deletes it.
"""

import errno
import hashlib
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llb.console import full
from llb.files import UserError, typed
from llb.runfiles import stage2_command

Params = dict[str, Any]  # a host tree of parameters; for K sub-models every leaf is (K, …)
MIB = 2**20
# In a path Orbax takes "[3]" and "*" for patterns, a backslash for "/", and "gs:" for another machine.
PLAIN = r"[\w /.,=@+~-]*"


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a training saves, and which images it is trained on."""

    folder: Path
    digest: str  # see `paths_digest`; a checkpoint with another digest is refused


def paths_digest(paths: Sequence[str]) -> str:
    """Identifies a list of training images: the same paths in the same order give the same digest."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


@dataclass
class Checkpoints:
    """The checkpoints in a folder, while they are open."""

    folder: Path
    manager: ocp.CheckpointManager
    needed: int = 0  # bytes of the last one that was saved

    def latest_step(self) -> int | None:
        return self.manager.latest_step()


@contextmanager
def open_checkpoints(folder: Path, tidy: bool = False) -> Iterator[Checkpoints]:
    """The checkpoints in `folder`, which keeps the newest; leaving the context finishes all saves. A UserError is
    raised if a save fails. tidy: delete what killed saves have left."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=tidy)
    with _plainly_named(Path(folder).resolve()) as plain:
        checkpoints = Checkpoints(folder, ocp.CheckpointManager(plain, options=options))
        try:
            yield checkpoints
        finally:
            with _saving(checkpoints):
                checkpoints.manager.close()


@contextmanager
def _plainly_named(folder: Path) -> Iterator[Path]:
    """The folder itself, or a link to it if its name is none for Orbax."""
    if re.fullmatch(PLAIN, folder.relative_to(folder.anchor).as_posix()):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="llb-") as top:
        link = Path(top).resolve() / "checkpoints"
        try:
            link.symlink_to(folder, target_is_directory=True)
        except OSError:  # Windows
            raise UserError(f"{folder}: checkpoints need a plain name here; give an --out without [ ] : \\") from None
        yield link


@contextmanager
def _saving(checkpoints: Checkpoints) -> Iterator[None]:
    """Turns what Orbax and its threads raise while they save into a UserError."""
    try:
        yield
    except Exception as error:  # by place and cause OSError, ValueError, RuntimeError, …
        if words := full(error):
            raise _no_room(checkpoints, words) from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoints.folder}: a checkpoint cannot be saved ({reason})") from None


def _no_room(checkpoints: Checkpoints, words: str) -> UserError:
    needed, free = (size / MIB for size in (checkpoints.needed, shutil.disk_usage(checkpoints.folder).free))
    room = f"a checkpoint needs {needed:.1f} MiB, and {free:.1f} are free ({words})"
    return UserError(f"{checkpoints.folder}: {room}; make room and give the same command again")


def save(checkpoints: Checkpoints, step: int, state: Params, digest: str) -> None:
    """Save a host tree in the background as the state after `step` steps. A UserError is raised if the disk has no room
    for it, or the save before this one has failed."""
    checkpoints.needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if checkpoints.needed > shutil.disk_usage(checkpoints.folder).free:
        raise _no_room(checkpoints, os.strerror(errno.ENOSPC))
    meta = {"digest": digest, "checksum": checksum(state)}
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(meta)}
    with _saving(checkpoints):
        checkpoints.manager.save(step, args=ocp.args.Composite(**items))


def checksum(tree: Params) -> int:
    """CRC-32 of a host tree: names, shapes, dtypes and values."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        total = zlib.crc32(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), total)
    return total


def _restore(checkpoints: Checkpoints, **items) -> dict[str, Any]:
    """Items of the newest checkpoint, and its "meta". A checkpoint that is damaged raises a UserError."""
    try:
        items["meta"] = ocp.args.JsonRestore()
        restored = checkpoints.manager.restore(checkpoints.latest_step(), args=ocp.args.Composite(**items))
        meta = restored["meta"]
        whole = "digest" in meta and ("state" not in items or meta["checksum"] == checksum(restored["state"]))
    except (MemoryError, PermissionError):
        raise
    except Exception:  # by file and damage it is nearly any
        # of what Orbax has begun and leaves undone Python would warn
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        whole = False
    if not whole:
        raise UserError(f"{checkpoints.folder}: the checkpoint is damaged or not whole; train again with --overwrite")
    return restored


def save_finished(at: CheckpointFolder, steps: int, params: Params) -> None:
    """Save parameters that come from elsewhere as a finished training."""
    with open_checkpoints(at.folder, tidy=True) as checkpoints:
        save(checkpoints, steps, {"params": params}, at.digest)


class ListChanged(UserError):
    """Other training images than a checkpoint's, or other verdicts on them."""


def check_digest(checkpoints: Checkpoints, at: CheckpointFolder) -> None:
    """Raise a UserError if the newest checkpoint is damaged, a ListChanged if it belongs to other training images."""
    if _restore(checkpoints)["meta"]["digest"] != at.digest:
        what, (stage, _, final) = "the list of training images", at.folder.name.partition("-")
        run = at.folder.parent.parent
        command = f"python stage1_partition.py --out {typed(run)} --overwrite, with the flags it had"
        if stage == "stage2":
            command = f"{stage2_command(run, final)} --overwrite"
            what += ", or what a person said of them," * final.startswith("reviewed")
        advice = f"train again with {command}"
        raise ListChanged(f"{at.folder}: {what} has changed since this was trained; {advice}")


def check_params(params: Params, step: int) -> None:
    """Raise a UserError if a parameter is not finite: the last step's loss is finite even if its update is not."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"--learning-rate: the parameters are not finite after step {step}; lower the rate")


def check_finished(at: CheckpointFolder, steps: int) -> bool:
    """Whether the folder holds a finished training of `steps` steps. One on other images raises a UserError."""
    if not at.folder.is_dir():
        return False
    with open_checkpoints(at.folder) as checkpoints:
        if checkpoints.latest_step() is None:
            return False
        check_digest(checkpoints, at)
        return checkpoints.latest_step() == steps


def restore_state(checkpoints: Checkpoints, shapes: Params) -> Params:
    """The newest state as a host tree; the leaves of `shapes` have a shape and a dtype."""
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    return _restore(checkpoints, state=ocp.args.StandardRestore(template))["state"]


def restore_params(checkpoints: Checkpoints) -> Params:
    """The parameters of a finished training as a host tree."""
    return restore_finished(checkpoints)[0]


def restore_finished(checkpoints: Checkpoints) -> tuple[Params, np.ndarray | None]:
    """The parameters of a finished training, and what it has seen (llb.train) or None: dicts of arrays, so no template
    is needed."""
    state = _restore(checkpoints, state=ocp.args.StandardRestore())["state"]
    return state["params"], state.get("seen")
