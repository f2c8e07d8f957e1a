"""Orbax checkpoints of a training. They hold host trees, so any number of devices can continue from them.

A checkpoint holds "state" (while training {"params", "opt"}; at the end {"params"} only) and "meta" ({"digest"}).
A killed save leaves a temporary folder. Orbax ignores it, and the next training deletes it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llb.files import UserError

Params = dict[str, Any]  # a host tree of parameters; for K sub-models every leaf is (K, …)


@dataclass(frozen=True)
class CheckpointFolder:
    """Where a training saves, and which images it is trained on."""

    folder: Path
    digest: str  # see `paths_digest`; a checkpoint with another digest is refused


def paths_digest(paths: Sequence[str]) -> str:
    """Identifies a list of training images: the same paths in the same order give the same digest."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


def open_checkpoints(folder: Path, tidy: bool = False) -> ocp.CheckpointManager:
    """A context manager of the checkpoints in `folder`, which keeps the newest; leaving it finishes all saves. tidy:
    delete what killed saves have left."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=tidy)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Params, digest: str) -> None:
    """Save a host tree in the background as the state after `step` steps."""
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave({"digest": digest})}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def check_digest(checkpoints: ocp.CheckpointManager, at: CheckpointFolder) -> None:
    """Raise a UserError if the newest checkpoint belongs to other training images."""
    step = checkpoints.latest_step()
    meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta["digest"] != at.digest:
        change = "the list of training images has changed since this was trained"
        raise UserError(f"{at.folder}: {change}; train again with --overwrite")


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


def restore_state(checkpoints: ocp.CheckpointManager, shapes: Params) -> Params:
    """The newest state as a host tree; the leaves of `shapes` have a shape and a dtype."""
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
    return checkpoints.restore(checkpoints.latest_step(), args=items)["state"]


def restore_params(checkpoints: ocp.CheckpointManager) -> Params:
    """The parameters of a finished training as a host tree (dicts of arrays, so no template is needed)."""
    items = ocp.args.Composite(state=ocp.args.StandardRestore())
    return checkpoints.restore(checkpoints.latest_step(), args=items)["state"]["params"]
