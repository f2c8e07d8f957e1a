"""Another selection from the scores of a finished stage 1, by settings that select (`llb.config.SELECTING`)."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llb.checkpoint import ListChanged
from llb.config import SELECTING, Stage1
from llb.console import say
from llb.data import Dataset
from llb.files import UserError, discard_files
from llb.manifest import clear_evaluation
from llb.processes import process_0_first
from llb.run import check_list, differences
from llb.tables import forget_metrics, purified_text, read_scores, read_submodels

RANKING = [name for name in SELECTING if name != "keep"]


def read_submodel_scores(folder: Path, dataset: Dataset, submodels: int) -> np.ndarray:
    """The N × K scores in scores.csv, float32, bit for bit as they were written."""
    read_scores(folder, dataset)  # are its rows the training images?
    _, scores = read_submodels(folder)
    if scores.shape != (len(dataset.train), submodels):
        file = folder / "scores.csv"
        raise UserError(f"{file} is damaged (not of {submodels} sub-models): delete it and run stage 1 again")
    return scores


def purified_is_own(folder: Path, dataset: Dataset) -> bool:
    """Whether purified.txt is what stage 1 wrote, letter by letter, or is not there: so nothing is lost with it."""
    file = folder / "purified.txt"
    if not os.path.lexists(file):
        return True
    try:
        return file.read_bytes() == purified_text(dataset.train, read_scores(folder, dataset)["kept"]).encode()
    except UserError:  # nobody knows
        return False


@process_0_first("selection")
def change_selection(
    run: Path, config: dict[str, Any], settings: Stage1, datasets: list[Dataset], command: str
) -> None:
    """Put other settings that select into `config`, and delete the lists that the old ones made: so stage 1 selects
    again from its N × K scores, and writes the lists last. The metrics of `purified` go, too; another ranking also
    deletes each head, and what it has scored. A list that was edited by hand raises a UserError.

    command: the one that continues the run from now on.
    """
    now = {name: getattr(settings, name) for name in SELECTING}
    changes = "; ".join(differences(config, now))
    if not changes:
        return
    for folder, dataset in ((run / dataset.category, dataset) for dataset in datasets):
        if not purified_is_own(folder, dataset):
            edited = f"{folder / 'purified.txt'} was edited by hand, and other settings make another list ({changes})"
            raise UserError(f"{edited}: delete it for that, or give --overwrite to start again")
    trained = [(final, of["train_on"]) for final, of in config.get("stage2", {}).items()]
    ranked_anew = any(config[name] != now[name] for name in RANKING)  # a head's weight depends on the ranking
    heads = [final for final, train_on in trained if train_on == "reviewed" and ranked_anew]
    of_list = [final for final, train_on in trained if train_on == "purified"]
    forget_metrics(run, (*config["categories"], "mean"), ("purification", *of_list, *heads))
    for folder in (run / dataset.category for dataset in datasets):
        for final in heads:
            clear_evaluation(folder, final)
        discard_files(folder, ["purified.txt"])
    config |= now | {"command": command}
    say(f"another selection ({changes}): what is trained and scored stays")


def outdated_detectors(run: Path, dataset: Dataset, finals: Iterable[str]) -> dict[str, ListChanged]:
    """Of final detectors those whose list has changed since they were trained, each with what `check_list` says."""
    outdated = {}
    for final in finals:
        try:
            check_list(run, dataset, final)
        except ListChanged as error:
            outdated[final] = error
    return outdated
