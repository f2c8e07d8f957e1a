"""From suspects to a clean folder: take the images that stage 1 dropped out of it, or put them back. No JAX.

    python -m llb.quarantine --run runs/mine            says what would be moved, and where to; changes nothing
    python -m llb.quarantine --run runs/mine --go       moves it
    python -m llb.quarantine --run runs/mine --undo     puts it back

RUN/quarantine.csv    category, path, from, to, bytes, sha256, modified_ns; written before anything is moved

What is done, the disk says: an image lies at its old place, at its new one or, if a copy to another disk was killed, at
both. So a killed command is given again, or undone. Nothing is overwritten. Masks stay.
"""

import os
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llb.console import progress, run_script, say
from llb.demo import MARKER
from llb.files import UserError, check_writable, digest_of_file, discard_files, move_file, some, typed, write_csv
from llb.flags import flag, parse_flags, typed_flags, whole
from llb.lock import hold
from llb.marks import DEFECT, listed_as_purified, read_marks, training_set
from llb.metrics import ranks
from llb.pictures import printable
from llb.runfiles import data_of, read_config, read_manifest, stage1_command
from llb.tables import read_table, stage1_finished

MANIFEST, COLUMNS = "quarantine.csv", ["category", "path", "from", "to", "bytes", "sha256", "modified_ns"]
MEND = "it says where the images lie: mend it by hand"


@dataclass
class Quarantine:
    """Take the images that stage 1 dropped out of the folder of images. Without --go it says what it would do."""

    run: str = flag("runs/demo", "folder of the run")
    category: str | None = flag(None, "one category", shown="all of the run")
    dropped: bool = flag(False, "the images that purified.txt does not list; so it is without any of these")
    reviewed: bool = flag(False, "the images that a person marked as defects (llb.review)")
    top: int | None = flag(None, "of each category the N images that rank highest", whole(1), shown="--dropped")
    to: str | None = flag(None, "folder for the images", shown="beside the run, with -quarantine behind its name")
    copy: bool = flag(False, "copy the images: they stay where they are, too")
    go: bool = flag(False, "do it")
    undo: bool = flag(False, "put back what was moved, and delete what was copied (needs no --go)")


def main() -> None:
    settings = parse_flags(Quarantine)
    run = Path(settings.run)
    config = read_config(run, f"--run {run}", "make the run again")
    names = config["categories"]
    if settings.undo and (run / MANIFEST).is_file():  # a run that began anew may have other categories
        names = list(dict.fromkeys(row["category"] for row in read_table(run / MANIFEST, COLUMNS, advice=MEND)))
    if settings.category not in (None, *names):
        raise UserError(f"--category {settings.category}: {run} has {', '.join(names)}")
    if settings.undo + settings.dropped + settings.reviewed + (settings.top is not None) > 1:
        raise UserError("--dropped, --reviewed, --top and --undo exclude each other: give one")
    if settings.undo and (given := typed_flags(settings, ("to", "copy"))):
        raise UserError(f"{given[0]} says how images are taken out, and --undo puts them back: leave one of them out")
    names = [settings.category] if settings.category else names
    with hold(run, "quarantine", against=("",)) if settings.go or settings.undo else nullcontext():
        undo(run, names) if settings.undo else take_out(run, config, settings, names)


def take_out(run: Path, config: dict[str, Any], settings: Quarantine, names: list[str]) -> None:
    """Move or copy the wanted images, or say which. All are looked at before the first is moved."""
    root = Path(os.path.abspath(data_of(config) or ""))
    to = os.path.abspath(settings.to or f"{run.absolute()}-quarantine")
    if config["data"] is None or (root.parent.name in ("cache", "demo") and (root / "part" / MARKER).is_file()):
        raise UserError(f"--run {run}: its images are the demo set, which llb draws; give a run on your own images")
    if not root.is_dir():
        raise UserError(f"--run {run}: its images, {root}, are not there: put them back")
    if Path(os.path.realpath(to)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"--to {to} lies in the folder of images, {root}: give one outside")
    old, rows = {row["from"]: row for row in read_table(run / MANIFEST, COLUMNS, advice=MEND)}, []
    for name in names:
        if not stage1_finished(run / name):
            raise UserError(f"stage 1 is not finished for {name}; continue with: {stage1_command(run, config)}")
        states = read_manifest(run / name)
        for path in wanted(run / name, settings):
            source, (size, modified, digest) = root / path, states.get(path, (0, 0, ""))
            modified = source.stat().st_mtime_ns if source.exists() else modified  # it may be touched since stage 1
            row = dict(zip(COLUMNS, (name, path, str(source), os.path.join(to, path), size, digest, modified)))
            known = old.get(row["from"], row)
            if known["sha256"] != digest:  # the manifest's had this name before
                if os.path.lexists(known["to"]):
                    there = f"another image of this name is in quarantine at {known['to']}"
                    raise UserError(f"{path}: {there}: rename one of the two")
                known = row
            if known is row and os.path.lexists(row["to"]):
                raise UserError(f"{row['to']} is there already, and nothing is overwritten: give another --to")
            if known is not row and is_lost(known):  # it was taken out, and deleted there
                continue
            if settings.to and os.path.realpath(known["to"]) != os.path.realpath(row["to"]):
                raise UserError(f"{path} is in quarantine at {top(known, 'to')}: --undo first, or leave --to out")
            rows.append(known)
    work = [row for row in rows if is_at(row["from"], row["to"], row)]
    if len({os.path.realpath(row["from"]) for row in work}) < len(work):
        raise UserError(f"{root}: two of these images are one file, by a link; put a copy in the place of the link")
    folders = {folder for row in work for folder in Path(row["path"]).parents} if not settings.copy else ()
    outside = [
        each for each in folders if not Path(os.path.realpath(root / each)).is_relative_to(os.path.realpath(root))
    ]
    if outside:
        raise UserError(f"{root}: images lie outside this folder, by the link {min(outside)}/: give --copy")
    shut = [] if settings.copy else [row["from"] for row in work if not os.access(Path(row["from"]).parent, os.W_OK)]
    if shut:
        raise UserError(f"{Path(shut[0]).parent} cannot be written: grant access to it, or give --copy")

    verb, first = "copy" if settings.copy else "move", some([printable(row["path"]) for row in work])
    places = sorted({top(row, "to") for row in rows}) or [Path(to)]  # those in the manifest may have another one
    say(f"{len(work)} of {len(rows)} images to {verb} from {root} to {', '.join(map(str, places))}: {first or 'none'}")
    if settings.go:
        for place in places:
            check_writable(place, "--to")
        write_csv(
            run / MANIFEST, COLUMNS, [[*row.values()] for row in (old | {row["from"]: row for row in rows}).values()]
        )
        for row in progress(work, desc="quarantine", unit="image"):
            move_file(Path(row["from"]), Path(row["to"]), row["sha256"], row["modified_ns"], settings.copy)
        say(f"done; back: python -m llb.quarantine --run {typed(run)} --undo")
    else:
        say(f"nothing is changed yet; do it: python -m llb.quarantine {shlex.join(typed_flags(settings))} --go")
    if not settings.copy:
        need = "stage 2 and evaluation need every image in its place: do them before, or undo, or begin anew:"
        say(f"{run}: {need} {stage1_command(Path('NEW'), config)}")


def wanted(folder: Path, settings: Quarantine) -> list[str]:
    """The paths of a category that are to be taken out, the first suspect first. folder: RUN/<category>."""
    order = np.argsort(ranks(np.array([row["score"] for row in read_table(folder / "scores.csv", ["score"])])))
    dataset = training_set(folder)
    stay = np.flatnonzero(read_marks(folder, dataset) != DEFECT) if settings.reviewed else ()
    if not (settings.reviewed or settings.top):  # some of the listed may be in quarantine already
        stay = listed_as_purified(folder, dataset)
    return [dataset.train[i].path for i in order[~np.isin(order, stay)][: settings.top]]


def undo(run: Path, names: list[str]) -> None:
    """Put every image of the manifest back, with its date; then delete its row. The rows of lost images stay, and those
    of images whose place another one has taken."""
    rows = read_table(run / MANIFEST, COLUMNS, advice=MEND)
    own = [row for row in rows if row["category"] in names]
    if not own:
        raise UserError(f"--undo: no image of {run} is in quarantine")
    if missing := [root for row in own if not (root := top(row, "from")).is_dir()]:
        raise UserError(f"{missing[0]}, where the images belong, is not there: put it back")
    lost = [row for row in own if is_lost(row)]
    taken = [row for row in own if all(map(os.path.lexists, (row["from"], row["to"]))) and not is_it(row["from"], row)]
    lines, stay = [], {row["from"] for row in lost + taken}
    if lost:
        first = some([printable(row["path"]) for row in lost])
        forget = f"put them back and undo again; or forget them: delete their lines in {run / MANIFEST}"
        lines += [f"{len(lost)} of {len(own)} images are neither in quarantine nor in their places ({first}): {forget}"]
    if taken:
        holds = "holds another image: move it" if len(taken) == 1 else "hold other images: move them"
        places = some([printable(row["from"]) for row in taken])
        lines += [f"{len(taken)} of {len(own)} images stay in quarantine: {places} {holds} away and undo again"]
    if len(stay) == len(own):
        raise UserError("; ".join(lines))
    work = [row for row in own if row["from"] not in stay and is_at(row["to"], row["from"], row)]
    for row in progress(work, desc="undo", unit="image"):
        move_file(Path(row["to"]), Path(row["from"]), row["sha256"], row["modified_ns"])
    for row in own:
        if row["from"] not in stay:
            discard_files(top(row, "to"), [row["path"]])  # what a killed copy has left, and empty folders
    rest = [[*row.values()] for row in rows if row["category"] not in names or row["from"] in stay]
    write_csv(run / MANIFEST, COLUMNS, rest) if rest else discard_files(run, [MANIFEST])
    say(f"{len(work)} images are back in their places")
    for line in lines:
        say(line)


def top(row: dict[str, Any], end: str) -> Path:
    """The folder of images, or of the quarantine, that an image's path starts from. end: "from" or "to"."""
    return Path(row[end].removesuffix(os.path.normpath(row["path"])))


def is_lost(row: dict[str, Any]) -> bool:
    return not any(os.path.lexists(row[end]) for end in ("from", "to"))


def is_it(place: str, row: dict[str, Any]) -> bool:
    """Whether this file is the image of a row."""
    return not os.path.islink(place) and digest_of_file(place) == row["sha256"]


def is_at(start: str, end: str, row: dict[str, Any]) -> bool:
    """Whether an image is at `start`. One that is at neither place, or has changed, raises a UserError."""
    there = [place for place in (start, end) if os.path.lexists(place)]
    if not there:
        raise UserError(f"{start} is not there: put it back")
    for place in there if start in there else ():
        if not is_it(place, row):
            raise UserError(f"{place} is a link, or not the image that stage 1 saw: put that one in its place")
    return start in there


if __name__ == "__main__":
    run_script(main)
