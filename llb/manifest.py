"""What belongs to a run: its images, by their contents, and the files that llb wrote, by their names.

Stage 1 writes RUN/<category>/images.csv first (llb.runfiles), anew as long as nothing is learned; every later command
compares the images with it. A copied folder is the same data, a changed image is not. Nothing is deleted but what the
last part names.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from llb.console import progress
from llb.data import Dataset, Record
from llb.detectors import DETECTORS
from llb.features import prefetch
from llb.files import UserError, digest_of_file, discard, discard_files, is_writer, size_and_time, some, write_csv
from llb.head import head_file
from llb.images import load_image
from llb.learning import LEARNING_FILE, loss_file
from llb.marks import MARKS_FILE, review_file
from llb.masks import load_masks
from llb.processes import agreed
from llb.runfiles import COLUMNS, IMAGES_FILE, State, read_manifest, stage2_folder
from llb.tables import METRICS_FILE, TRAIN_ON, forget_metrics, kinds_file, read_table, threshold_file
from llb.tiles import next_tiles_file, tiles_file
from llb.times import TIMES_FILE

READERS, AHEAD = 8, 256  # threads, and files that wait for their turn
MOST_NAMED = 20  # unreadable files that a message names
ABOUT = "folder.txt"  # in a folder of scores, see llb/new_images.py


# ---- the images ----


def record_images(run: Path, datasets: Sequence[Dataset], verify: bool, command: str) -> None:
    """Write images.csv of each category of which nothing is learned yet, and compare the images of all with it."""
    for dataset in datasets:
        folder = run / dataset.category
        if checkpoints_in(folder / "stage1") or (folder / "scores.csv").exists():
            continue
        # an image that could not be read was removed or replaced, as the message had asked for
        if not (folder / IMAGES_FILE).exists() or _problem(folder, dataset, verify):
            check_readable(dataset, dataset.test)  # only the evaluation reads them, and then it is too late
            write_manifest(folder, dataset)
    check_manifest(run, datasets, verify, command)


def check_readable(dataset: Dataset, records: Sequence[Record]) -> None:
    """Decode images and their masks. A UserError is raised that names all that cannot be read, so that they are mended
    at once."""

    def problem_of(record: Record) -> str | None:
        try:
            load_image(dataset.root / record.path, 1, dataset.white)
            load_masks(dataset.root, [record], 1)
        except UserError as error:
            return str(error)

    problems = []
    with progress(total=len(records), desc=f"{dataset.category}, images", unit="image") as bar:
        for record, problem in prefetch(problem_of, records, READERS, AHEAD):
            problems += [(record.path, problem)] if problem else []
            bar.update()
    if problems:
        others = [path for path, _ in problems[1:]]
        raise UserError(problems[0][1] + f"; {len(others)} others, too: {some(others, MOST_NAMED)}" * bool(others))


def write_manifest(folder: Path, dataset: Dataset) -> None:
    """Write images.csv for a category: reads every file. One that cannot be read raises a UserError."""
    if is_writer():
        paths = listed(dataset)
        states = _states(dataset, paths, {}, verify=True)
        write_csv(folder / IMAGES_FILE, COLUMNS, [[path, *states[path]] for path in paths])


def image_states(folder: Path, root: Path, paths: Sequence[str]) -> tuple[State, ...]:
    """Size, time and SHA-256 of images, from images.csv. A UserError is raised if one has changed in this moment, or if
    this is one of several processes, and sees other files than process 0."""
    states = read_manifest(folder)
    for path in paths:
        if size_and_time(root / path) != states[path][:2]:
            raise UserError(f"{root / path} is not the file that {folder / IMAGES_FILE} lists: share the images")
    return tuple(states[path] for path in paths)


def copies_line(folder: Path, dataset: Dataset) -> str:
    """A line on images of the same contents, "" if there are none. A copy in another subset makes an out-of-fold score
    in-fold; a test image in training was learned. By images.csv."""
    states, first, twice, tested = read_manifest(folder), {}, [], []
    for records, found in ((dataset.train, twice), (dataset.test, tested)):
        for record in records:
            path, digest = record.path, states[record.path][2]
            if digest in first:
                found.append(f"{path} is {first[digest]}")
            elif records is dataset.train:
                first[digest] = path
    told = []
    for found, what in ((twice, "training images"), (tested, "training images among the test images")):
        told += [f"{len(found)} of {what} ({some(found)})"] * bool(found)
    return "; ".join(told)


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
        parts += [f"{change} ({len(paths)}: {some(paths)})"] if paths else []
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
        now, before = size_and_time(root / path), old.get(path)
        if before is not None:
            if now[0] != before[0]:
                return *now, ""
            if now == before[:2] and not verify:
                return before
        return *now, digest_of_file(root / path)
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
    folders = [run / name for name in categories]
    check_checkpoints([folder / part for folder in folders for part in ("stage1", *map(stage2_folder, finals()))])
    for folder in folders:
        lists = ("scores.csv", "suspects.png", tiles_file("suspects"), "purified.txt")
        discard_files(folder, (*lists, LEARNING_FILE, MARKS_FILE))
        clear_checkpoints(folder / "stage1")
        for final in finals():
            clear_detector(folder, final)
        discard_files(folder, [IMAGES_FILE])
    discard_files(run, (METRICS_FILE, "metrics.csv", "report.html", TIMES_FILE, "config.json"))


def clear_stage2(run: Path, categories: Sequence[str], final: str) -> None:
    """Delete a final detector and its evaluation."""
    check_checkpoints([run / name / stage2_folder(final) for name in categories])
    forget_metrics(run, (*categories, "mean"), [final])  # llb.compare and llb.ablate read the mean
    for name in categories:
        clear_detector(run / name, final)


def clear_detector(folder: Path, final: str) -> None:
    """Delete a final detector of one category, its maps and its tables. folder: RUN/<category>."""
    clear_checkpoints(folder / stage2_folder(final))
    clear_evaluation(folder, final)
    discard_files(folder, [loss_file(final)])


def clear_evaluation(folder: Path, final: str) -> None:
    """Delete the head of a final detector of one category, and what evaluate.py wrote, but for the metrics."""
    paths = set()
    with suppress(UserError):  # damaged or not there
        paths |= read_manifest(folder).keys()
    with suppress(UserError):
        paths |= {row["path"] for row in read_table(folder / f"predictions-{final}.csv", ["path"])}
    for maps in (f"maps-{final}", f".maps-{final}.tmp"):
        discard_files(folder / maps, (f"{path}.png" for path in paths))
    discard_files(folder, (*evaluation_files(final), head_file(final), review_file(final)))
    for about in folder.glob(f"images-*/{ABOUT}"):
        clear_new_images(about.parent, final)


def clear_new_images(folder: Path, final: str) -> None:
    """Delete what `evaluate.py --images` wrote with a final detector into `folder`."""
    for listing in (f"scores-{final}.csv", f"begun-{final}.csv"):
        with suppress(UserError):  # damaged
            pictures = [f"{row['path']}.png" for row in read_table(folder / listing, ["path"])]
            for kind in ("maps", "overlays"):
                discard_files(folder / f"{kind}-{final}", pictures)
        discard_files(folder, [listing])


def evaluation_files(final: str) -> tuple[str, ...]:
    """What evaluate.py writes of a final detector into RUN/<category>, without its maps."""
    tables = (f"predictions-{final}.csv", threshold_file(final), kinds_file(final))
    return (*tables, f"examples-{final}.png", tiles_file(final), next_tiles_file(final))


def finals() -> list[str]:
    """The names that final detectors may have."""
    return [*TRAIN_ON, *(f"{train_on}-{detector}" for train_on in TRAIN_ON for detector in DETECTORS)]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, finished or not: their names are steps, or of Orbax's temporary folders."""
    names = os.listdir(folder) if folder.is_dir() else []
    # see `discard`
    steps = {name: name.removeprefix(".").removesuffix(".old").split(".orbax-checkpoint-tmp")[0] for name in names}
    return [folder / name for name, step in steps.items() if step.isdecimal()]


def check_checkpoints(folders: Iterable[Path]) -> None:
    """Raise a UserError if something that Orbax has not written would be deleted with a finished checkpoint."""
    everything = (checkpoint for folder in folders for checkpoint in checkpoints_in(folder))
    for checkpoint in (checkpoint for checkpoint in everything if checkpoint.name.isdecimal()):
        inner = os.listdir(checkpoint) if checkpoint.is_dir() else [""]
        strange = [name for name in inner if not re.match(r"_|(state|meta|commit_success)\b", name)]
        if strange:
            raise UserError(f"{checkpoint / strange[0]} is not llb's: move it away and give the same command again")


def clear_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a folder, and the folder if nothing else is left in it."""
    discard(*checkpoints_in(folder))
    discard_files(folder, ())
