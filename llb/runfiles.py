"""What a run says of itself, read without JAX: settings and facts, and the images that it belongs to.

RUN/config.json              settings and facts, see llb.run; "llb" marks a run, "checksum" is of all else
RUN/<category>/images.csv    path, bytes, modified_ns, sha256 of every image and mask; llb.manifest compares them
"""

import csv
import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

from llb.console import say
from llb.files import UserError, read_cell, read_json, typed, write_json
from llb.flags import flag_of, typed_flags

VERSION = 3  # of the files of a run: config.json's "llb"
CARRIED = ("cache", "cache_limit", "cache_gib", "no_cache", "verify")  # flags that each stage has to be given
IMAGES_FILE = "images.csv"
COLUMNS = ["path", "bytes", "modified_ns", "sha256"]

State = tuple[int, int, str]  # size in bytes, time of change in ns, SHA-256; "" if the size alone shows the change


def own_config(run: Path, where: str) -> dict[str, Any]:
    """RUN/config.json if llb wrote it, as far as it is whole. A UserError is raised if it is another program's or of
    another version of llb. where: names the run in messages."""
    try:
        text = (run / "config.json").read_bytes()
    except OSError as error:
        raise UserError(f"{where}: config.json cannot be read ({error.strerror}): give another folder") from None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = {"llb": VERSION} if b'"llb": ' in text else None
    if isinstance(config, dict) and config.get("llb") == VERSION:
        return config
    if isinstance(config, dict) and ("llb" in config or {"submodels", "sources"} <= config.keys()):
        raise UserError(f"{where} was made by another version of llb: make it again with another --out")
    raise UserError(f"{where} holds other files (config.json is not llb's, or empty): give another folder")


def read_config(run: Path, where: str, advice: str) -> dict[str, Any]:
    """RUN/config.json of a run. A UserError is raised as by `own_config`, or if it is not what `write_config` wrote.

    where: names the run in messages; advice: ends the one on a damaged file.
    """
    own_config(run, where)
    config = read_json(run / "config.json", advice)
    if config.get("checksum") != _checksum(config):
        raise UserError(f"{where}: config.json is damaged, edited or of another version of llb; {advice}")
    return config


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Write config.json with a checksum: with one digit changed, it would be of another run."""
    write_json(run / "config.json", config | {"checksum": _checksum(config)})


def _checksum(config: dict[str, Any]) -> str:
    rest = {name: value for name, value in config.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def note_sources(config: dict[str, Any], run: Path, now: str) -> bool:
    """Say if a run continues with other sources than it began with; whether their digest was added to `config`.

    now: digest of these sources.
    """
    if {now} != set(config["sources"]):
        say(f"note: the sources of llb have changed since {run} began; its results may mix old and new code")
    new = now not in config["sources"]
    config["sources"] += [now] * new
    return new


def note_machine(config: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether the run has not been on this machine so far; then it is added to `config`. here: of `llb.run.machine`."""
    known = [{name: config.get(name) for name in here}, *config.get("continued_on", [])]
    if new := here not in known:
        config["continued_on"] = [*known[1:], here]
    return new


def data_of(config: dict[str, Any]) -> str | None:
    """Where the images of a run are; None for the demo set."""
    given = config.get("data_given")  # in this folder: if all was moved to another place, images.csv decides
    return given if given and os.path.exists(given) and not os.path.exists(config["data"]) else config["data"]


def stage1_command(run: Path, config: dict[str, Any]) -> str:
    """The command of stage 1 of a run. The run, its images and its weights may have moved since it was given."""
    places = {"--data": config["data"], "--weights": config["weights"], "--out": run}
    words, kept = iter(shlex.split(config["command"])), []
    for word in words:
        if word.partition("=")[0] not in places:
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return " ".join([shlex.join(kept), *(f"{flag} {typed(place)}" for flag, place in places.items() if place)])


def stage2_command(run: Path, final: str) -> str:
    """The command of stage 2 that trains a final detector, by its name: of its list, and of a detector that is not
    stage 1's."""
    train_on, _, detector = final.partition("-")
    other = f" --detector {detector}" if detector else ""
    return f"python stage2_train.py --run {typed(run)} --train-on {train_on}{other}"


def review_command(run: Path, simulated: dict[str, Any] | None = None) -> str:
    """The command that takes the marks; simulated: what config.json says of marks by the labels."""
    marks = " ".join(f"--{name} {value}" for name, value in simulated.items()) if simulated else "marks.csv"
    return f"python -m llb.review --run {shlex.quote(run.as_posix())} {marks}"


def commands(run: Path, config: dict[str, Any], evaluated: bool) -> list[str]:
    """The commands that make this run again; the settings of stage 2 are written out."""
    place = shlex.quote(run.as_posix())
    lines = [config["command"]] if config.get("command") else []
    for final, stage2 in (config.get("stage2") or {}).items():
        fitted = ("steps", "learning_rate") if stage2.get("learning_rate") == 0 else ()  # it has none
        fitted += ("batch_size",) if stage2.get("released") else ()  # nothing is trained
        fitted += () if final.startswith("reviewed") else ("head",)
        unset = ("category_steps", "released_digest", *fitted)
        given = {name: value for name, value in stage2.items() if name not in unset}
        given = {"train_on": final} | given
        given["set"] = ",".join(f"{name}={value}" for name, value in given.get("set", {}).items() if value is not None)
        flags = (f"{flag_of(name)} {shlex.quote(str(value))}" for name, value in given.items() if value)
        if final.startswith("reviewed"):
            lines.append(review_command(run, config.get("review")))
        lines.append(f"python stage2_train.py --run {place} {' '.join(flags)}")
    return lines + [f"python evaluate.py --run {place}"] * evaluated


def final_name(train_on: str, detector: str, config: dict[str, Any]) -> str:
    """The name of a final detector in a run's files and tables: "purified"; "purified-padim" if it is not stage 1's."""
    return train_on if detector == config["detector"] else f"{train_on}-{detector}"


def stage2_folder(final: str) -> str:
    return f"stage2-{final}"


def steps_in(settings: dict[str, Any], category: str) -> int:
    """The steps of a final detector. settings: in config.json; with --passes each category has its own number."""
    return settings["steps"] or settings["category_steps"][category]


def next_command(script: str, run: Path, settings) -> str:
    """The command of the next stage, with those flags of this one that it needs again: else it would encode anew."""
    return " ".join([f"python {script} --run {typed(run)}", shlex.join(typed_flags(settings, CARRIED))]).rstrip()


def read_manifest(folder: Path) -> dict[str, State]:
    """images.csv: path → size, time, digest. A missing or damaged file raises a UserError."""
    file = folder / IMAGES_FILE
    try:
        with open(file, newline="", encoding="utf-8") as text:
            rows = csv.DictReader(text)
            states = {
                read_cell("path", row["path"]): (int(row["bytes"]), int(row["modified_ns"]), row["sha256"])
                for row in rows
            }
            if rows.fieldnames == COLUMNS and all(len(digest) == 64 for _, _, digest in states.values()):
                return states
    except FileNotFoundError:
        raise UserError(f"{file} is not there, so nobody knows which images these results belong to") from None
    except (OSError, csv.Error, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{file} is damaged, so nobody knows which images these results belong to")
