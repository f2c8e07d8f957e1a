"""Orbax checkpoints of a training: host trees, so that any number of devices can go on from them.

A checkpoint holds "state" (while training {"params", "opt"}; at the end {"params"} alone) and "meta" ({"digest"}).
A save that was killed leaves a temporary folder, which Orbax ignores, and which goes when the training goes on.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llb.files import UserError


def digest_of(paths: Sequence[str]) -> str:
    """Names a list of training images: the same paths in the same order give the same digest."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


def open_checkpoints(folder: Path, tidy: bool = False) -> ocp.CheckpointManager:
    """The checkpoints in `folder` (only the newest is kept). A context manager: leaving it waits for pending saves.

    tidy: delete what killed saves have left.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=tidy)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state, digest: str) -> None:
    """Save a host tree in the background as the state after `step` steps."""
    items = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave({"digest": digest})}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def check_digest(checkpoints: ocp.CheckpointManager, digest: str, folder: Path) -> None:
    """Refuse to go on from a training on other images."""
    step = checkpoints.latest_step()
    meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta["digest"] != digest:
        raise UserError(
            f"{folder}: the list of training images has changed since this was trained; train anew, with --overwrite"
        )


def check_params(params, step: int) -> None:
    """params: host tree. The last step's loss is finite even when its update is not."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"--learning-rate: the parameters are not finite after step {step}; lower the rate")


def finished(folder: Path, digest: str, steps: int) -> bool:
    """Whether `folder` holds a finished training on these images.

    Raises:
        UserError: it holds one on other images.
    """
    if not folder.is_dir():
        return False
    with open_checkpoints(folder) as checkpoints:
        if checkpoints.latest_step() is None:
            return False
        check_digest(checkpoints, digest, folder)
        return checkpoints.latest_step() == steps


def restore_state(checkpoints: ocp.CheckpointManager, shapes):
    """The newest state as a host tree; `shapes` has its structure, with leaves that have a shape and a dtype."""
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
    return checkpoints.restore(checkpoints.latest_step(), args=items)["state"]


def restore_params(checkpoints: ocp.CheckpointManager):
    """The parameters of a finished training as a host tree (dicts of arrays, so no template is needed)."""
    items = ocp.args.Composite(state=ocp.args.StandardRestore())
    return checkpoints.restore(checkpoints.latest_step(), args=items)["state"]["params"]
