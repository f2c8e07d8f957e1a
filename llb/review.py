"""What a person said of the suspects goes into the run, and what it tells about the images that are unseen. No JAX.

    python -m llb.review --run RUN marks.csv …          checks saved marks and merges them into RUN/<category>/marks.csv
    python -m llb.review --run RUN                      what the merged marks say, and what is next
    python -m llb.review --run RUN --simulate 96        marks by the labels, to try out what a look is worth

RUN/report.html shows the suspects and saves marks.csv: category, path, verdict (defect, fine).

Labels decide in --simulate, as in `--train-on clean` and in the figures of llb.dropping. config.json says so of the run
("review").
"""

import csv
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llb.console import run_script, say
from llb.data import Dataset
from llb.files import UserError, delimiter_of, read_cell, some, typed
from llb.flags import MAYBE_WORDS, flag, parse_flags, real, whole
from llb.lock import hold, turn
from llb.marks import DEFECT, FINE, MARKS_FILE, UNSAID, VERDICTS, read_marks, training_set, write_marks
from llb.metrics import ranks
from llb.pages import Page, suspect_pages
from llb.pictures import printable
from llb.runfiles import read_config, stage1_command, stage2_command, write_config
from llb.tables import forget_metrics, read_metrics, read_table, stage1_finished
from llb.unseen import unseen_defects

COLUMNS = ["category", "path", "verdict"]
FEW, MANY = 1, 0.1  # defects on the last page, and share of the unseen images: with no more a look is enough
AGAIN = "make the run again"
SIMULATED = 1  # a stream of random numbers: the pages draw from another one


@dataclass
class Review:
    """Check and merge marks, and say how many defects are left."""

    file: Any = flag(
        MAYBE_WORDS, "files of marks, as the report's page saves them; without them it says what is merged"
    )
    run: str = flag("runs/demo", "folder of the run")
    simulate: int | None = flag(None, "mark the first N images of the pages by their labels", whole(1), shown="no")
    errors: float = flag(0.0, "with --simulate: this share of the verdicts is wrong", real(0, 1))


def main() -> None:
    settings = parse_flags(Review)
    if settings.errors and settings.simulate is None:
        raise UserError("--errors belongs to --simulate: give both")
    if settings.simulate is not None and settings.file:
        raise UserError("--simulate and files of marks exclude each other: give one")
    run = Path(settings.run)
    config = read_config(run, f"--run {run}", AGAIN)
    changes = settings.simulate is not None or settings.file
    with hold(run, "review", against=("",)) if changes else nullcontext():
        run_review(run, config, settings)


def run_review(run: Path, config: dict[str, Any], settings: Review) -> None:
    """Take marks if there are any, and say what all of them say. A UserError is raised before stage 1 is finished."""
    for name in config["categories"]:
        if not stage1_finished(run / name):
            raise UserError(f"stage 1 is not finished for {name}; continue with: {stage1_command(run, config)}")
    datasets = [training_set(run / name) for name in config["categories"]]
    if settings.simulate is not None:
        simulate(run, config, datasets, settings)
    elif settings.file:
        merge(run, config, datasets, settings.file)
    if about := read_config(run, f"--run {run}", AGAIN).get("review"):
        say(simulated_line(about))
    for dataset in datasets:
        for line in findings(run / dataset.category, dataset, config["seed"]):
            say(f"{dataset.category}: {line}")
    marked = any((run / dataset.category / MARKS_FILE).is_file() for dataset in datasets)
    look = f"open {run / 'report.html'}, mark and save, then: python -m llb.review --run {typed(run)} marks.csv"
    trained = [final for final in config.get("stage2", {}) if final.startswith("reviewed")]  # by other marks
    train = [f"{stage2_command(run, final)} --overwrite" for final in trained] or [stage2_command(run, "reviewed")]
    for command in train if marked else [look]:
        say(f"next: {command}")


# ---- marks ----


def merge(run: Path, config: dict[str, Any], datasets: Sequence[Dataset], files: Sequence[str]) -> None:
    """Merge files of marks, the later over the earlier. A UserError is raised, and nothing changed, if one is wrong."""
    places = {d.category: {record.path: i for i, record in enumerate(d.train)} for d in datasets}
    marks = {d.category: read_marks(run / d.category, d) for d in datasets}
    if "review" in config and any((m != UNSAID).any() for m in marks.values()):
        drop = " ".join(typed(run / name / MARKS_FILE) for name in marks)
        raise UserError(f"--run {run}: its marks are simulated; a person's do not mix with them: first delete {drop}")
    new, changed = 0, []
    for file in files:
        for name, path, verdict in read_file(Path(file), places):
            before = marks[name][places[name][path]]
            new += before == UNSAID
            changed += [printable(path)] * (before not in (UNSAID, verdict))
            marks[name][places[name][path]] = verdict
    record(run, None)
    for dataset in datasets:
        if (marks[dataset.category] != UNSAID).any():
            replace_marks(run, dataset, marks[dataset.category])
    say(f"{new} new marks" + f", and {len(changed)} others have changed: {some(changed)}" * bool(changed))


def read_file(file: Path, places: dict[str, dict[str, int]]) -> list[tuple[str, str, int]]:
    """Category, path and verdict for each row of a training image; says which rows are of images that are none.

    places: the indices of the training images by path, by category. A UserError that names the line is raised for
    whatever is wrong, and one if every row is of another image.
    """
    lines, give = {}, "give the file that the page has saved"
    if not file.is_file():
        raise UserError(f"{file} is {'a folder' if file.is_dir() else 'not there'}: {give}")
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:  # spreadsheets write a byte-order mark
            rows = csv.DictReader(opened, delimiter=delimiter_of(opened.read()))
            opened.seek(0)
            if "".join(rows.fieldnames or ()).startswith("sep="):
                rows.fieldnames = None  # they come in the next line
            own = set(rows.fieldnames or ()) == set(COLUMNS[1:])  # RUN/<category>/marks.csv, which was moved away
            if not own and not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise UserError(f"{file} has no columns {', '.join(COLUMNS)}: {give}")
            for row in rows:
                name, path, word = (read_cell(column, row.get(column) or "") for column in COLUMNS)
                name = next((name for name in places if path in places[name]), min(places)) if own else name
                word, problem = word.strip().lower(), None  # whoever types it means the same
                if name not in places:
                    problem = f"category {name!r} is not of this run, which has {', '.join(places)}"
                elif word not in VERDICTS:
                    problem = f"verdict {word!r} is neither {' nor '.join(sorted(VERDICTS))}"
                elif (name, path) in lines:
                    line, before = lines[name, path]
                    problem = f"{printable(path)} stands in line {line} already, as {before}"
                if problem:
                    raise UserError(f"{file}, line {rows.line_num}: {problem}; nothing is changed")
                lines[name, path] = rows.line_num, word
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{file} cannot be read as a table ({error}): {give}") from None
    gone = [printable(path) for name, path in lines if path not in places[name]]
    if len(gone) == len(lines) > 0:
        raise UserError(f"{file}: none of its images is a training image ({some(gone)}); give the marks of this run")
    if gone:
        say(f"{file}: {len(gone)} of the marks are left out: the category has no such training image ({some(gone)})")
    return [(name, path, VERDICTS[word]) for (name, path), (_, word) in lines.items() if path in places[name]]


def simulate(run: Path, config: dict[str, Any], datasets: Sequence[Dataset], settings: Review) -> None:
    """Mark by the labels, as one who looks at the first images of the pages and errs in some, drawn by the run's seed.

    A UserError is raised if labels are unknown, or a person's marks are there.
    """
    for dataset in datasets:
        if any(record.label is None for record in dataset.train):
            raise UserError(f"--simulate needs labels, and the images of {dataset.category} have none")
        file = run / dataset.category / MARKS_FILE
        if file.exists() and "review" not in config:
            raise UserError(f"--simulate: {file} is a person's, and is not overwritten: move it away first")
    record(run, {"simulate": settings.simulate, "errors": settings.errors})
    for dataset in datasets:
        _, pages = pages_of(run / dataset.category, config["seed"])
        seen = np.concatenate([page.images for page in pages])[: settings.simulate]
        generator = np.random.default_rng((config["seed"], SIMULATED))
        wrong = generator.choice(len(seen), round(settings.errors * len(seen)), replace=False)
        said = np.array([record.label for record in dataset.train])[seen]
        said[wrong] = 1 - said[wrong]
        marks = np.full(len(dataset.train), UNSAID, np.int8)
        marks[seen] = np.where(said == 1, DEFECT, FINE)
        replace_marks(run, dataset, marks)


def replace_marks(run: Path, dataset: Dataset, marks: np.ndarray) -> None:
    """Write the marks of a category. If they are others than before, the metrics of `reviewed` are outdated, and go."""
    folder, metrics = run / dataset.category, read_metrics(run)
    if (marks != read_marks(folder, dataset)).any():
        reviewed = [final for final in metrics.get(folder.name, {}) if final.startswith("reviewed")]
        forget_metrics(run, (folder.name, "mean"), reviewed)
    write_marks(folder, dataset, marks)


def record(run: Path, about: dict[str, Any] | None) -> None:
    """Say in config.json that marks are simulated, and how; None: they are a person's."""
    with turn(run):
        config = read_config(run, f"--run {run}", AGAIN)
        if config.get("review") != about:
            config.pop("review", None)
            write_config(run, config | ({"review": about} if about else {}))


# ---- what they say ----


def simulated_line(about: dict[str, Any]) -> str:
    """about: what config.json says of simulated marks."""
    return f"SIMULATED by the labels, as who looks at {about['simulate']} images and errs in {about['errors']:.0%}"


def pages_of(folder: Path, seed: int) -> tuple[np.ndarray, list[Page]]:
    """Ranks of the training images, and the pages of all of them: the report shows the first pages."""
    rows = read_table(folder / "scores.csv", ["score"])
    rank = ranks(np.array([row["score"] for row in rows], np.float32))
    return rank, suspect_pages(rank, seed, len(rank))


def findings(folder: Path, dataset: Dataset, seed: int) -> list[str]:
    """Two lines: what was found and how much is left, and what that means. folder: RUN/<category>."""
    marks = read_marks(folder, dataset)
    if (marks == UNSAID).all():
        return ["no image is marked"]
    rank, pages = pages_of(folder, seed)
    whole = [int((marks[page.images] == DEFECT).sum()) for page in pages if (marks[page.images] != UNSAID).all()]
    defects = int((marks == DEFECT).sum())
    elsewhere = f"; {defects - sum(whole)} elsewhere" * (defects > sum(whole))
    by_page = f" ({', '.join(map(str, whole))} by page{elsewhere})" * bool(whole)
    seen = f"{(marks != UNSAID).sum()} seen, {defects} defects{by_page}"
    left = unseen_defects(pages, rank, marks)
    if left is None:
        advice = "mark all images of the first page: they tell how many defects are left"
        return [f"{seen}; {(marks == UNSAID).sum()} unseen", advice]
    if not left.images:
        advice = "enough: every image is seen"
    elif left.last > FEW:
        advice = f"one more page is worth a look: the last whole one held {left.last} defects"
    elif left.high > MANY * left.images:
        advice = f"one more page is worth a look: what is seen leaves room for {left.high} defects"
    else:
        advice = f"enough: the last whole page held {left.last}, and at most {left.high / left.images:.0%} are left"
    return [f"{seen}; about {left.defects} more among the {left.images} unseen ({left.low} to {left.high})", advice]


def threshold_doubt(folder: Path, dataset: Dataset, seed: int) -> str:
    """A sentence beside the threshold of `reviewed`: the unseen images, from which it is taken but for those that stage
    1 dropped, have defects, too."""
    rank, pages = pages_of(folder, seed)
    left = unseen_defects(pages, rank, read_marks(folder, dataset))
    if left is None or not left.defects:
        return ""
    about = f"about {left.defects} of the {left.images} unseen images are defective ({left.low} to {left.high})"
    return f"; {about}, and it is taken from those that are not dropped: so it may be too high"


if __name__ == "__main__":
    run_script(main)
