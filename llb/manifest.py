"""What belongs to a run: its images, by their contents, and the files that llb wrote, by their names.

RUN/<category>/images.csv    path, bytes, modified_ns, sha256 of every image and mask; stage 1 writes it first

A copied folder is the same data, a changed image is not. Nothing is deleted but what the second part names.
"""

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from llb.console import progress
from llb.data import Dataset
from llb.features import prefetch
from llb.files import UserError, discard, discard_files, is_writer, write_csv, write_json
from llb.processes import agreed
from llb.tables import METRICS_FILE, TRAIN_ON, read_metrics, read_table

IMAGES_FILE = "images.csv"
COLUMNS = ["path", "bytes", "modified_ns", "sha256"]
READERS, AHEAD = 8, 256  # threads, and files that wait for their turn
SHOWN = 3  # paths that a message names

State = tuple[int, int, str]  # size in bytes, time of change in ns, SHA-256; "" if the size alone shows the change


# ---- the images ----


def record_images(run: Path, datasets: Sequence[Dataset], verify: bool, command: str) -> None:
    """Write images.csv of each category that has not begun, and compare the images of all with it."""
    for dataset in datasets:
        folder = run / dataset.category
        if not any((folder / name).exists() for name in (IMAGES_FILE, "stage1", "scores.csv")):
            write_manifest(folder, dataset)
    check_manifest(run, datasets, verify, command)


def write_manifest(folder: Path, dataset: Dataset) -> None:
    """Write images.csv for a category: reads every file. One that cannot be read raises a UserError."""
    if is_writer():
        paths = listed(dataset)
        states = _states(dataset, paths, {}, verify=True)
        write_csv(folder / IMAGES_FILE, COLUMNS, [[path, *states[path]] for path in paths])


def read_manifest(folder: Path) -> dict[str, State]:
    """images.csv: path → size, time, digest. A missing or damaged file raises a UserError."""
    file = folder / IMAGES_FILE
    try:
        with open(file, newline="", encoding="utf-8") as text:
            rows = csv.DictReader(text)
            states = {row["path"]: (int(row["bytes"]), int(row["modified_ns"]), row["sha256"]) for row in rows}
            if rows.fieldnames == COLUMNS and all(len(digest) == 64 for _, _, digest in states.values()):
                return states
    except FileNotFoundError:
        raise UserError(f"{file} is not there, so nobody knows which images these results belong to") from None
    except (OSError, csv.Error, ValueError, TypeError):
        pass
    raise UserError(f"{file} is damaged, so nobody knows which images these results belong to")


def check_manifest(run: Path, datasets: Sequence[Dataset], verify: bool, command: str) -> None:
    """Raise a UserError that names what was replaced, added or removed in any category since stage 1.

    A file with the old size and time counts as the same, unless `verify` compares its contents; one with another time
    is the same if it has the same contents, and gets its new time in images.csv. command: of stage 1, for the message.
    """
    problems = [_problem(run / dataset.category, dataset, verify) for dataset in datasets] if is_writer() else []
    if not agreed(not any(problems)):
        problem = "; ".join(filter(None, problems)) or "process 0 sees other images"
        raise UserError(f"{problem}; put the old files back, or begin again: {command} --overwrite")


def listed(dataset: Dataset) -> list[str]:
    """Every image and mask of a category, once, by its path relative to the root."""
    records = (*dataset.train, *dataset.test)
    paths = list(dict.fromkeys(path for record in records for path in (record.path, *record.masks)))
    for path in paths:
        if path.encode(errors="replace").decode() != path:
            raise UserError(f"{dataset.root}: {ascii(path)} is not UTF-8; rename the file")
    return paths


def _problem(folder: Path, dataset: Dataset, verify: bool) -> str | None:
    """What has changed in one category, in words."""
    try:
        paths, old = listed(dataset), read_manifest(folder)
        states = _states(dataset, [path for path in paths if path in old], old, verify)
    except UserError as error:  # all processes end with it
        return str(error)
    changes = {
        "replaced": [path for path, state in states.items() if state[2] != old[path][2]],
        "added": [path for path in paths if path not in old],
        "removed": [path for path in old if path not in states],
    }
    if any(changes.values()):
        return f"{dataset.root}: since stage 1, images of {dataset.category} were {_in_words(changes)}"
    if states != old:  # other times only: a copied folder is not read whole each time
        write_csv(folder / IMAGES_FILE, COLUMNS, [[path, *state] for path, state in states.items()])
    return None


def _in_words(changes: dict[str, list[str]]) -> str:
    parts = []
    for change, paths in changes.items():
        names = ", ".join(paths[:SHOWN]) + (", …" if len(paths) > SHOWN else "")
        parts += [f"{change} ({len(paths)}: {names})"] if paths else []
    return " and ".join(parts)


def _states(dataset: Dataset, paths: Iterable[str], old: dict[str, State], verify: bool) -> dict[str, State]:
    """The files as they are, without those that are not there."""
    paths, states = list(paths), {}
    look = partial(_state, dataset.root, old=old, verify=verify)
    with progress(total=len(paths), desc=f"{dataset.category}, contents", unit="file") as bar:
        for path, state in prefetch(look, paths, READERS, AHEAD):
            if state is not None:
                states[path] = state
            bar.update()
    return states


def _state(root: Path, path: str, old: dict[str, State], verify: bool) -> State | None:
    try:
        status = os.stat(root / path)
        before = old.get(path)
        if before is not None:
            if status.st_size != before[0]:
                return status.st_size, status.st_mtime_ns, ""
            if status.st_mtime_ns == before[1] and not verify:
                return before
        with open(root / path, "rb") as file:
            return status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{root / path} cannot be read ({error.strerror}): grant access to it") from None


# ---- the files that llb wrote ----


def clear_run(run: Path, categories: Sequence[str]) -> None:
    """Delete what the stages wrote. Cached features stay, since they say what they hold.

    The order lets an interrupted deletion be given again: images.csv is the last file of a category, config.json the
    last of all. A category that is a path raises a UserError.
    """
    for name in categories:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(f"{run / 'config.json'}: {name!r} is not the name of a folder; give another --out")
    for folder in (run / name for name in categories):
        discard_files(folder, ("scores.csv", "suspects.png", "purified.txt"))
        clear_checkpoints(folder / "stage1")
        for train_on in TRAIN_ON:
            clear_detector(folder, train_on)
        discard_files(folder, [IMAGES_FILE])
    discard_files(run, (METRICS_FILE, "metrics.csv", "report.html", "config.json"))


def clear_stage2(run: Path, categories: Sequence[str], train_on: str) -> None:
    """Delete a final detector and its evaluation."""
    metrics = read_metrics(run)
    if any([metrics.get(name, {}).pop(train_on, None) is not None for name in categories]):
        write_json(run / METRICS_FILE, metrics)
    for name in categories:
        clear_detector(run / name, train_on)


def clear_detector(folder: Path, train_on: str) -> None:
    """Delete a final detector of one category, its maps and its tables. folder: RUN/<category>."""
    clear_checkpoints(folder / f"stage2-{train_on}")
    paths = set()
    with suppress(UserError):  # damaged or not there
        paths |= read_manifest(folder).keys()
    with suppress(UserError):
        paths |= {row["path"] for row in read_table(folder / f"predictions-{train_on}.csv", ["path"])}
    for maps in (f"maps-{train_on}", f".maps-{train_on}.tmp"):
        discard_files(folder / maps, (f"{path}.png" for path in paths))
    discard_files(folder, (f"predictions-{train_on}.csv", f"examples-{train_on}.png"))


def clear_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a folder, finished or not: their names are steps, or of Orbax's temporary folders."""
    for name in os.listdir(folder) if folder.is_dir() else ():
        step = name.removeprefix(".").removesuffix(".old").split(".orbax-checkpoint-tmp")[0]  # see `discard`
        if step.isdecimal():
            discard(folder / name)
    discard_files(folder, ())
