"""What the sub-models saw while they trained: learning bias, in numbers. No JAX.

RUN/<category>/learning.csv          step, submodel, path, distance: an image's highest distances in a step
RUN/<category>/loss-<final>.csv      step, loss of a final detector

A long training is thinned (`llb.train.seen_steps`). A detector in closed form takes no steps and has no such files.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llb.data import Record
from llb.files import UserError, write_csv
from llb.tables import UNDEFINED, read_table

LEARNING_FILE = "learning.csv"
COLUMNS = {"step": int, "submodel": int, "distance": float}
ADVICE = "delete it; results do not depend on it"
PART = 0.1  # of the steps, at both ends, that `learning_line` compares

Seen = tuple[int, int, int, float]  # step, sub-model, image index, its distance


def loss_file(final: str) -> str:
    return f"loss-{final}.csv"


def write_learning(folder: Path, records: Sequence[Record], seen: Iterable[Seen]) -> None:
    """learning.csv, by step and sub-model. seen: of `llb.train.seen_images`; records: the training images."""
    rows = [[step, model, records[image].path, f"{distance:.6g}"] for step, model, image, distance in seen]
    write_csv(folder / LEARNING_FILE, ["step", "submodel", "path", "distance"], rows)


def read_learning(folder: Path) -> dict[str, np.ndarray] | None:
    """learning.csv by column, each row with what scores.csv says of its image; None without one of the files.

    Returns:
        step, submodel: int (n,); distance: float (n,); kept: bool (n,); label: int (n,), −1 if it is unknown.
    """
    file, images = folder / LEARNING_FILE, read_table(folder / "scores.csv", ("path", "kept", "label"))
    if not file.is_file() or not images:
        return None
    about = {row["path"]: (row["kept"], -1 if row["label"] is None else row["label"]) for row in images}
    rows = read_table(file, ("step", "submodel", "path", "distance"), advice=ADVICE)
    if not about.keys() >= {row["path"] for row in rows}:
        raise UserError(f"{file} is damaged (its images are not those of scores.csv): {ADVICE}")
    table = {name: np.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
    kept, label = ([about[row["path"]][place] for row in rows] for place in (0, 1))
    return table | {"kept": np.array(kept, bool), "label": np.array(label, int)}


def learning_line(seen: Sequence[Seen], kept: np.ndarray) -> str:
    """Learning bias in words: the median distance of the images that are kept and dropped later, at both ends of the
    training. kept: bool (N,)."""
    step, image, distance = (np.array([entry[place] for entry in seen]) for place in (0, 2, 3))
    steps = np.unique(step)
    ends = step <= np.quantile(steps, PART), step >= np.quantile(steps, 1 - PART)

    def change(those: np.ndarray) -> str:
        return " → ".join(
            f"{np.median(distance[those & end]):.3g}" if (those & end).any() else UNDEFINED for end in ends
        )

    ours = kept[image]
    when = f"median distance in the first and last {PART:.0%} of the steps"
    return f"while training: kept images {change(ours)}, dropped images {change(~ours)} ({when})"


def write_losses(folder: Path, final: str, steps: Iterable[int], losses: np.ndarray) -> None:
    """loss-<final>.csv. steps: those that are kept; losses: float32, one of each."""
    rows = [[step, f"{loss:.6g}"] for step, loss in zip(steps, losses)]
    write_csv(folder / loss_file(final), ["step", "loss"], rows)


def read_losses(folder: Path, final: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The steps and losses of a final detector, int and float (n,); None without the file."""
    file = folder / loss_file(final)
    if not file.is_file():
        return None
    rows = read_table(file, ("step", "loss"), advice=ADVICE)
    return np.array([row["step"] for row in rows], int), np.array([row["loss"] for row in rows], float)
