"""What a person said of training images, RUN/<category>/marks.csv, and the images of a final detector. No JAX.

path, verdict (defect, fine); in the order of the training images; an image that is not there was not looked at.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llb.data import Dataset, Record
from llb.files import UserError, read_json, write_csv
from llb.runfiles import read_manifest
from llb.tables import TRAIN_ON, Choice, listed_images, read_purified, read_table, read_threshold
from llb.threshold import list_digest

MARKS_FILE = "marks.csv"
UNSAID, FINE, DEFECT = -1, 0, 1
VERDICTS = {"fine": FINE, "defect": DEFECT}
MARKS = 15  # images of each verdict without which there is no head
EDITABLE = ("purified", "reviewed")  # of TRAIN_ON: a person may change the list, and the detector with it
THRESHOLD_OF = {"purified": "purified images"}
THRESHOLD_OF |= {"reviewed": "images that are called fine, or neither dropped nor called defective"}
WITHOUT_MARKS = tuple(each for each in TRAIN_ON if each != "reviewed")  # for which nobody looks
TRAIN_AGAIN = "delete it and run stage2_train.py again, with --overwrite"
ADVICE = "mend it; or delete it and give llb.review all files of marks that were saved"


def training_set(folder: Path) -> Dataset:
    """The training images by scores.csv alone: paths and labels; none before stage 1. folder: RUN/<category>."""
    rows = read_table(folder / "scores.csv", ("path", "label"))
    return Dataset(Path(), "", folder.name, tuple(Record(row["path"], row["label"], (), "") for row in rows), ())


def read_marks(folder: Path, dataset: Dataset) -> np.ndarray:
    """int8 (N,): DEFECT, FINE or UNSAID for each training image; all UNSAID without the file.

    A UserError is raised if the file is damaged, or names an image that is not a training image, or one twice; or if
    scores.csv, by which `training_set` knows them, lacks an image that the run had.
    """
    file, marks = folder / MARKS_FILE, np.full(len(dataset.train), UNSAID, np.int8)
    place = {record.path: index for index, record in enumerate(dataset.train)}
    for row in read_table(file, ("path", "verdict"), advice=ADVICE):
        index = place.get(row["path"])
        if index is None and in_manifest(folder, row["path"]):
            scores, known = folder / "scores.csv", f"if {row['path']}, which {file} names, is a training image"
            raise UserError(f"{scores} is damaged {known}: delete it and run stage 1 again; else {ADVICE}")
        if index is None or marks[index] != UNSAID:
            problem = "is not a training image" if index is None else "stands there twice"
            raise UserError(f"{file} is damaged ({row['path']} {problem}): {ADVICE}")
        marks[index] = row["verdict"]
    return marks


def in_manifest(folder: Path, path: str) -> bool:
    """Whether images.csv lists an image."""
    with suppress(UserError):  # damaged or not there
        return path in read_manifest(folder)
    return False


def write_marks(folder: Path, dataset: Dataset, marks: np.ndarray) -> None:
    """marks.csv. marks: int8 (N,), as `read_marks` gives them."""
    word = {verdict: name for name, verdict in VERDICTS.items()}
    said = [[record.path, word[mark]] for record, mark in zip(dataset.train, marks.tolist()) if mark != UNSAID]
    write_csv(folder / MARKS_FILE, ["path", "verdict"], said)


def review_file(final: str) -> str:
    return f"review-{final}.json"


def read_review(folder: Path, final: str, advice: str = TRAIN_AGAIN) -> dict[str, Any] | None:
    """What stage 2 wrote of a detector's head: the evidence for its weight λ, and why; None without the file.

    A damaged file raises a UserError that ends with `advice`.
    """
    file = folder / review_file(final)
    if not file.is_file():
        return None
    facts = read_json(file, advice)
    known = isinstance(facts, dict) and {"defect", "fine", "auroc", "lower", "lambda", "why"} <= facts.keys()
    if not known or type(facts["lambda"]) not in (int, float) or not isinstance(facts["why"], str):
        raise UserError(f"{file} is damaged; {advice}")
    return facts


def choose_images(train_on: str, folder: Path, dataset: Dataset) -> Choice:
    """The images for --train-on. "clean" needs labels: they decide nothing else once the set is put together."""
    if train_on == "purified":
        return read_purified(folder, dataset)
    if train_on == "reviewed":
        return reviewed_images(folder, dataset)
    if train_on == "all":
        return Choice(np.arange(len(dataset.train)))
    if any(record.label is None for record in dataset.train):
        raise UserError("--train-on clean needs labels, and these images have none: use purified or all")
    normal = np.array([i for i, record in enumerate(dataset.train) if record.label == 0], int)
    if not len(normal):
        problem = f"no training image of {dataset.category} is labelled normal"
        raise UserError(f"--train-on clean: {problem}; use purified or all")
    return Choice(normal)


def normal_images(train_on: str, folder: Path, dataset: Dataset, purified: np.ndarray) -> np.ndarray:
    """The images that a final detector's threshold is taken from, int (n,): the purified ones; of `reviewed` those that
    a person called fine, too, without those called defective, so that there may be none."""
    if train_on != "reviewed":
        return purified
    marks = read_marks(folder, dataset)
    kept = np.isin(np.arange(len(marks)), purified)
    return np.flatnonzero((kept & (marks != DEFECT)) | (marks == FINE))


def listed_as_purified(folder: Path, dataset: Dataset) -> np.ndarray:
    """The training images that purified.txt lists, int (n,), sorted; by the run's tables alone."""
    return np.unique([index for _, index in listed_images(folder, dataset)])


def threshold_is_old(folder: Path, final: str, train_on: str, also_none: bool = False) -> bool:
    """Whether the list that a final detector's threshold is taken from may have changed since. By the run's tables.

    also_none: also of a detector that is evaluated and has no threshold.
    """
    facts = read_threshold(folder, final, also_none)
    if not facts:
        return False
    training = training_set(folder)
    purified = listed_as_purified(folder, training)
    # an older version of llb wrote no list
    return facts.get("list") != list_digest(normal_images(train_on, folder, training, purified))


def reviewed_images(folder: Path, dataset: Dataset) -> Choice:
    """All images but those that a person called defective. What stage 1 has dropped by itself plays no part."""
    marks = read_marks(folder, dataset)
    kept, defect, fine = (np.flatnonzero(each) for each in (marks != DEFECT, marks == DEFECT, marks == FINE))
    if not len(kept):
        raise UserError(f"{folder / MARKS_FILE} calls every training image defective: {ADVICE}")
    note = f"a person called {len(defect)} images defective and {len(fine)} fine"
    if not len(defect):
        note = f"no image is called defective ({folder / MARKS_FILE}); the report's page of suspects is for that"
    return Choice(kept, note, tuple(dataset.train[index].path for index in fine))
