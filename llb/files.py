"""Files appear whole or not at all, and bad input is one helpful line.

`atomic` writes a temporary file beside the target, flushes it to the disk and renames it over the target. A killed
program leaves the old file or the new one, never half of one. Of several processes (llb.processes) only process 0
writes: that is decided here, so that no script has to.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: NumPy's and Pillow's errors have no number
NOT_IN_A_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line ends and control characters, in names of files
RUN_MARKER = re.compile(rb'"(llb|submodels)"\s*:')  # in the config.json of a run
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for a formula
PATHS = ("path", "from", "to")  # columns of tables
LONGEST_NAME = 255  # bytes, of a file on nearly every disk
LONGEST_LINE = 4000  # characters of a message, which may quote a damaged file


class UserError(Exception):
    """Bad input: one line that names the file or flag and the fix. The scripts print it and exit with status 2."""

    def __str__(self) -> str:
        line = NOT_IN_A_LINE.sub(lambda found: ascii(found[0])[1:-1], super().__str__())
        return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"


def is_writer() -> bool:
    """Whether this process writes files and prints lines: process 0, or the only one."""
    jax = sys.modules.get("jax")  # not imported: whoever has not started JAX is the only process
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


@contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Turn the system's refusal to write, rename or delete `path` into a UserError.

    size: the bytes of the file if they are known: a full disk is answered with what is needed.
    """
    try:
        yield
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror or error})"
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{problem}: give the file a shorter name") from None
        if error.errno not in FULL:
            raise UserError(f"{problem}: grant access to it, or give another folder") from None
        folder = next((folder for folder in path.absolute().parents if folder.exists()), None)
        free = shutil.disk_usage(folder).free if folder else 0
        needs = f"it needs {size:,} bytes, and {free:,} are free" if size else f"{free:,} bytes are free, too few"
        raise UserError(f"{problem}: {needs}; make room and give the same command again") from None


def atomic(path: Path | str, write: Callable[[Path], Any], by_any_process: bool = False, size: int = 0) -> None:
    """Let `write(temporary_path)` make a file, then rename it to `path`. A refusal raises a UserError, see `writing`.

    The temporary name keeps the ending, because image writers choose the format by it. It is the same each time, so the
    next call overwrites what a killed program has left. by_any_process: written even if this is not process 0, and
    under a temporary name of this call's own, since other commands may write the same file.
    """
    if not (by_any_process or is_writer()):
        return
    path = Path(path)
    temporary = temporary_of(path)
    if by_any_process:
        temporary = temporary.with_stem(f"{temporary.stem}-{uuid.uuid4().hex}")
    with writing(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    name = f".{path.stem}.tmp{path.suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME - 33:  # `atomic` may add a number
        name = f".{hashlib.sha256(os.fsencode(name)).hexdigest()}.tmp{path.suffix[:9]}"
    return path.with_name(name)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text with \\n line ends on every system."""
    content = text.encode("utf-8")
    atomic(path, lambda temporary: temporary.write_bytes(content), size=len(content))


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON. Not-a-number is refused, since JSON cannot hold it (an undefined metric is null)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_csv(path: Path | str, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV table, RFC 4180 quoting, \\n line ends. Floats are written by repr: they read back bit for bit.

    No cell is a formula to a spreadsheet: a path that begins like one gets "./" before it, which names the same file,
    other text an apostrophe (`read_cell` takes each away).
    """
    inert = [[_inert(name, cell) for name, cell in zip(header, row, strict=True)] for row in rows]
    write_text(path, "".join(map(_line, [header, *inert])))


def move_file(start: Path, end: Path, digest: str, modified_ns: int, copy: bool = False) -> None:
    """Move or copy a file with its rights; its time becomes `modified_ns`. Nothing is overwritten. To another disk it
    is copied, and deleted when the new one is whole and has the SHA-256 `digest`: killed between, call it again."""
    with writing(end):
        end.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not copy and not os.path.lexists(end):
                return start.rename(end)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        if not os.path.lexists(end):
            atomic(end, lambda temporary: _copy(start, temporary), size=start.stat().st_size)
            with suppress(PermissionError):
                shutil.copymode(start, end)
        if digest_of_file(end) != digest:
            raise UserError(f"{end} has other contents, and nothing is overwritten: move it away")
        os.utime(end, ns=(modified_ns, modified_ns))
        if not copy:
            start.unlink()


def _copy(start: Path, temporary: Path) -> None:
    shutil.copyfile(start, temporary)
    with suppress(PermissionError):  # of a disk that knows no rights
        shutil.copystat(start, temporary)
        temporary.chmod(temporary.stat().st_mode | stat.S_IWUSR)  # `atomic` opens it


def _line(row: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(row)  # its own line end, \r\n, makes it quote a \r in a cell, too
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _inert(column: str, cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(FORMULA):
        return cell
    if column in PATHS:
        return f"./{cell}"
    with suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"


def read_cell(column: str, cell: str) -> str:
    """A path or another text from a table that `write_csv` wrote."""
    mark = "./" if column in PATHS else "'"
    formula = cell.startswith(mark) and cell[len(mark) :].startswith(FORMULA)
    return cell[len(mark) :] if formula else cell


def delimiter_of(text: str) -> str:
    """What stands between the cells of a table that any program saved: a comma, a semicolon or a tab, by its first line
    of names. A line "sep=;" before it, as spreadsheets want one, is left out."""
    head = next((line for line in text.splitlines() if line.strip() and not line.startswith("sep=")), "")
    return max(",;\t", key=head.count)


def discard(*paths: Path) -> None:
    """Delete files and folders with all they hold, if they are there. A folder is renamed first, so half of one never
    looks whole. Of a link only the link is deleted."""
    for path in paths if is_writer() else ():
        remains = path.with_name(f".{path.name}.old")
        shutil.rmtree(remains, ignore_errors=True)
        with writing(path):
            if path.is_dir() and not path.is_symlink():
                path.rename(remains)
                shutil.rmtree(remains, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def discard_files(folder: Path, names: Iterable[str]) -> None:
    """Delete files by their names below a folder, and what a killed program has left of them; then the folders of these
    names, and `folder` itself, if they are empty. All else stays, and a name that leads elsewhere is left out."""
    folders = {folder}
    for name in names if is_writer() and folder.is_dir() else ():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            continue
        file = folder / name
        for path in (file, temporary_of(file)):
            with writing(path):
                try:
                    if path.is_symlink() or path.is_file():
                        path.unlink()
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:  # else nothing of this name is there
                        raise
        folders |= set(file.parents) - set(folder.parents)
    for path in sorted(folders, reverse=True) if is_writer() else ():  # those below others first
        with suppress(OSError):  # not there, or not empty
            path.rmdir()


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:most]) + ", …" * (len(names) > most)


def typed(path: Path | str) -> str:
    """A path as a person would type it after a flag."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def digest_of_files(files: Iterable[Path], top: Path) -> str:
    """SHA-256 over the contents of files, and over their names relative to the folder `top`."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(top).as_posix()}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def digest_of_file(file: Path | str) -> str:
    """SHA-256 of the contents."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def size_and_time(file: Path | str) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns: by these a file counts as the same."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def check_writable(folder: Path, flag: str = "--out") -> list[str]:
    """Make a folder if it is not there, and return the sorted names in it. If that fails, a UserError names `flag`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): give a folder of your own") from None


def check_writable_file(file: str, flag: str) -> None:
    """Raise a UserError if `file`, named by `flag`, could not be written, or is one of a run's own."""
    check_writable(Path(file).parent, flag)
    real = Path(os.path.realpath(file))
    if real.is_file() and (is_marked(real.parent) or (real.parent / "scores.csv").is_file()):
        raise UserError(f"{flag} {file} belongs to a run: name another file")
    if Path(file).is_dir():
        raise UserError(f"{flag} {file} is a folder: name a file in it")


def is_marked(folder: Path) -> bool:
    """Whether the config.json in a folder is a run's."""
    with suppress(OSError):  # it may not be read: no run of this user
        if (folder / "config.json").is_file():
            return bool(RUN_MARKER.search((folder / "config.json").read_bytes()))
    return False


def read_json(path: Path | str, advice: str) -> Any:
    """Read JSON that llb wrote. A damaged file raises a UserError that ends with `advice`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {advice}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
