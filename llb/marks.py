"""What a person said of training images: RUN/<category>/marks.csv. No JAX.

path, verdict (defect, fine); in the order of the training images; an image that is not there was not looked at.
"""

from pathlib import Path

import numpy as np

from llb.data import Dataset
from llb.files import UserError, write_csv
from llb.tables import read_table

MARKS_FILE = "marks.csv"
UNSAID, FINE, DEFECT = -1, 0, 1
VERDICTS = {"fine": FINE, "defect": DEFECT}
ADVICE = "delete it and give llb.review the saved marks again"


def read_marks(folder: Path, dataset: Dataset) -> np.ndarray:
    """int8 (N,): DEFECT, FINE or UNSAID for each training image; all UNSAID without the file.

    A UserError is raised if the file is damaged, or names an image that is not a training image, or one twice.
    """
    file, marks = folder / MARKS_FILE, np.full(len(dataset.train), UNSAID, np.int8)
    place = {record.path: index for index, record in enumerate(dataset.train)}
    for row in read_table(file, ("path", "verdict"), advice=ADVICE):
        index = place.get(row["path"])
        if index is None or marks[index] != UNSAID:
            problem = "is not a training image" if index is None else "stands there twice"
            raise UserError(f"{file} is damaged ({row['path']} {problem}): {ADVICE}")
        marks[index] = row["verdict"]
    return marks


def write_marks(folder: Path, dataset: Dataset, marks: np.ndarray) -> None:
    """marks.csv. marks: int8 (N,), as `read_marks` gives them."""
    word = {verdict: name for name, verdict in VERDICTS.items()}
    said = [[record.path, word[mark]] for record, mark in zip(dataset.train, marks.tolist()) if mark != UNSAID]
    write_csv(folder / MARKS_FILE, ["path", "verdict"], said)
