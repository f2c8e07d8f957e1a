"""Files appear whole or not at all, and bad input is one helpful line.

The files of a run go through `atomic`: a temporary file beside the target, flushed to the disk, then renamed over it.
Whoever kills the program finds the old file or the new one, never half of one. (Folders of many files, such as
checkpoints, the embedded set and --save-maps, are renamed as a whole.)
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input: one line that names the file or flag and the mend. The scripts print it and exit with status 2."""


def atomic(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Let `write(temporary_path)` make a file, then rename it to `path`.

    The temporary name keeps the ending, because image writers choose the format by it; and it is the same each time, so
    what a killed program has left is written over.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text with \\n line ends on every system."""
    atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")))


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON; not-a-number is refused, since JSON has no word for it (an undefined metric is null)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path | str, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV table, RFC 4180 quoting, \\n line ends. Floats are written by repr: they read back bit for bit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def discard(folder: Path) -> None:
    """Delete a folder. It is renamed first: whoever is interrupted while deleting leaves none that looks whole."""
    rest = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(rest, ignore_errors=True)
    if folder.is_dir():
        folder.rename(rest)
        shutil.rmtree(rest, ignore_errors=True)


def writable(folder: Path, flag: str = "--out") -> list[str]:
    """Make a folder that can be written, if it is not there; the names in it, sorted.

    Raises:
        UserError: it cannot be written, or read; `flag` is what it was given by.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): give a folder of your own") from None


def writable_file(file: str, flag: str) -> None:
    """Raise a UserError if `file`, given by `flag`, could not be written at the end."""
    writable(Path(file).parent, flag)
    if Path(file).is_dir():
        raise UserError(f"{flag} {file} is a folder: name a file in it")


def read_json(path: Path | str, mend: str) -> Any:
    """Read JSON that llb wrote; a file that was damaged by hand is a UserError that names it, and the mend."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {mend}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
