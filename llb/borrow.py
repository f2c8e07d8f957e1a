"""What a new run takes over from finished ones, instead of training it again: copies, so each run stays whole."""

import dataclasses
import filecmp
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llb.config import SELECTING, Evaluate, Stage1, Stage2
from llb.device import default_precision
from llb.encoders import load_encoder
from llb.files import write_json, writing
from llb.head import head_file
from llb.manifest import evaluation_files
from llb.marks import MARKS_FILE, review_file
from llb.processes import process_0_first
from llb.review import Review
from llb.run import check_list, clear_own, command_line, load_datasets
from llb.runfiles import IMAGES_FILE, final_name, read_config, read_manifest, stage2_folder, write_config
from llb.tables import METRICS_FILE, read_metrics, stage1_finished
from llb.tiles import tiles_file

STAGE1_FILES = (
    IMAGES_FILE,
    "scores.csv",
    "learning.csv",
    "suspects.png",
    tiles_file("suspects"),
    "purified.txt",
    "stage1",
)
OF_SUBMODELS = ("submodels", "folds", "steps")  # and SELECTING: final detectors depend on them by the list alone
ALIKE = ("sources", "weights_digest", "precision", "white")  # not by the settings alone, and detectors depend on them
DELETE = "delete the folder"


@dataclass(frozen=True)
class Cell:
    """A run of the grid: the settings of its commands."""

    stage1: Stage1
    finals: list[Stage2]
    evaluate: Evaluate
    review: Review | None = None  # a simulated look between the stages

    @property
    def run(self) -> Path:
        return Path(self.stage1.out)


def finished(cell: Cell) -> bool:
    """Whether the same commands have made all of a run. A UserError is raised if its images have changed since then, or
    the list that a final detector was trained on: its metrics belong to another selection.

    Its weights are not compared: that reads the whole file. Before anything is borrowed they are.
    """
    if not (cell.run / "config.json").is_file():
        return False
    config = read_config(cell.run, str(cell.run), DELETE)
    finals = {final_name(final.train_on, final.detector or config["detector"], config) for final in cell.finals}
    evaluated = finals <= read_metrics(cell.run).get("mean", {}).keys()
    selected = all(stage1_finished(cell.run / name) for name in config["categories"])
    if not (evaluated and selected and config["command"] == command_line(cell.stage1)):
        return False
    for dataset, final in itertools.product(load_datasets(cell.run, config, cell.evaluate), finals):
        check_list(cell.run, dataset, final)
    return True


def lenders(cell: Cell, done: Sequence[Cell], apart: Sequence[str]) -> list[Cell]:
    """The finished runs whose stage 1 has the same settings, those named `apart` aside."""
    rest = {"out": ""} | dict.fromkeys((*apart, *SELECTING))
    return [o for o in done if dataclasses.replace(o.stage1, **rest) == dataclasses.replace(cell.stage1, **rest)]


def same_encoder(cell: Cell, config: dict[str, Any]) -> bool:
    """Whether a run that begins now would have the encoder of another one: another device has another precision, and a
    file of weights may have been replaced. config: the other one's; it has the same settings."""
    encoder = load_encoder(config["encoder"], cell.stage1.weights, config["image_size"])
    precision = cell.stage1.precision or default_precision()
    return (config["weights_digest"], config["precision"]) == (encoder.weights_digest, precision)


@process_0_first("borrowed sub-models")
def borrow_submodels(cell: Cell, done: Sequence[Cell], overwrite: bool = False) -> bool:
    """Begin a run, with `overwrite` again, as a copy of one whose selection alone differs; stage 1 then selects anew.
    Whether there is such a run. Its images are as on the disk: see `finished`.

    As stage 1's --overwrite does, it refuses to delete a person's marks.
    """
    begun = os.path.lexists(cell.run / "config.json")
    for lender in [] if begun and not overwrite else lenders(cell, done, ())[:1]:
        config = read_config(lender.run, str(lender.run), DELETE)
        if not same_encoder(cell, config):
            return False
        if begun:
            clear_own(cell.run, config["categories"])
        config.pop("review", None)  # its marks are not copied
        # first: a copy that is interrupted is a run that stage 1 continues
        write_config(cell.run, config | {"stage2": {}, "command": command_line(cell.stage1)})
        for name in itertools.product(config["categories"], STAGE1_FILES):
            copy(lender.run.joinpath(*name), cell.run.joinpath(*name))
        return True
    return False


@process_0_first("borrowed detector")
def borrow_detector(cell: Cell, final: Stage2, done: Sequence[Cell]) -> None:
    """Copy a final detector that a finished run has trained with the same settings on the same images.

    So with its head, if that is learned alike; and so with its evaluation, if the run has the same stage 1.
    """
    config = read_config(cell.run, str(cell.run), DELETE)
    name = final_name(final.train_on, final.detector or config["detector"], config)
    for lender in lenders(cell, done, OF_SUBMODELS):
        places = [(lender.run / category, cell.run / category) for category in config["categories"]]
        theirs = read_config(lender.run, str(lender.run), DELETE)
        same = all(config[fact] == theirs[fact] for fact in ALIKE)
        same = same and all(list_of(final, source) == list_of(final, target) for source, target in places)
        own = [other for other in lender.finals if trained(other) == trained(final)]
        if own and same and all(digests_of(source) == digests_of(target) for source, target in places):
            whole = final.train_on != "reviewed" or own[0].head == final.head
            files = (f"loss-{name}.csv", stage2_folder(name), *(whole * (head_file(name), review_file(name))))
            for (source, target), each in itertools.product(places, files):
                copy(source / each, target / each)
            if whole and dataclasses.replace(lender.stage1, out="") == dataclasses.replace(cell.stage1, out=""):
                borrow_evaluation(places, name)


def trained(final: Stage2) -> Stage2:
    """The settings that a final detector is trained with, apart from its head."""
    return dataclasses.replace(final, run="", head="")


def borrow_evaluation(places: Sequence[tuple[Path, Path]], name: str) -> None:
    """Copy what evaluate.py wrote of a final detector. places: RUN/<category> of the lender, and of the new run."""
    for source, target in places:
        theirs, own = read_metrics(source.parent).get(source.name, {}), read_metrics(target.parent)
        threshold_of = [folder / "purified.txt" for folder in (source, target)]
        if name in theirs and name not in own.get(target.name, {}) and filecmp.cmp(*threshold_of, shallow=False):
            for each in evaluation_files(name):
                copy(source / each, target / each)
            entry = {each: theirs[each] for each in (name, "missing_masks") if each in theirs}
            write_json(target.parent / METRICS_FILE, own | {target.name: own.get(target.name, {}) | entry})


def list_of(final: Stage2, folder: Path) -> list[bytes | None]:
    """What the list of a final detector, and its head, depend on besides settings. folder: RUN/<category>."""
    names = {"purified": ["purified.txt"], "reviewed": [MARKS_FILE, "scores.csv"]}.get(final.train_on, [])
    return [(folder / name).read_bytes() if (folder / name).exists() else None for name in names]


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each image and mask by its path, by images.csv. folder: RUN/<category>."""
    return {path: digest for path, (_, _, digest) in read_manifest(folder).items()}


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder, whole or not at all, if it is there and the target is not."""
    if source.exists() and not target.exists():
        new = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(new, ignore_errors=True)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, new)
            os.replace(new, target)
