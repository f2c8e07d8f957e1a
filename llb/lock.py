"""One command at a time in a run: a lock that the system releases when its process ends, however it ends.

RUN/.lock-<stage>    says who works in the run. Its holder deletes it at the end; what a killed one leaves locks nothing

Windows has no such lock here, nor have some disks of networks: there nothing is held, and nothing is refused.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llb.files import UserError, is_writer, writing

try:
    import fcntl
except ImportError:
    fcntl = None

PREFIX = ".lock-"
CHANGERS = ("stage1", "quarantine", "review")  # of the images, or of what is known of them: nobody reads meanwhile


@contextmanager
def hold(run: Path, stage: str, against: tuple[str, ...] = ()) -> Iterator[None]:
    """Work in a run as `stage`. A UserError that names the other process is raised if there is one of the same stage.

    against: no other whose stage begins with one of these may work there either. Of several processes (llb.processes)
        process 0 holds the lock for all.
    """
    file, others = None, []
    if fcntl and is_writer():
        file = _take(run / (PREFIX + stage))
        if file is None:
            others = [stage]
        else:
            _note(file)
            names = (name.removeprefix(PREFIX) for name in sorted(os.listdir(run)) if name.startswith(PREFIX))
            others = [name for name in names if name.startswith(against) and name != stage and _is_held(run, name)]
    try:
        free = not others
        if "jax" in sys.modules:  # else this is the only process
            from llb.processes import agreed

            free = agreed(free)
        if not free:
            who = f" ({others[0]}, {_holder(run, others[0])})" if others else ""
            raise UserError(f"{run}: another command works in this run{who}; wait for its end, or stop it")
        yield
    finally:
        _release(run / (PREFIX + stage), file)


@contextmanager
def turn(run: Path) -> Iterator[None]:
    """Change a file that several stages change, such as config.json: waits for whoever is just doing so."""
    path = run / (PREFIX + "turn")
    file = _take(path, wait=True) if fcntl and is_writer() else None
    try:
        yield
    finally:
        _release(path, file)


def _take(path: Path, wait: bool = False) -> int | None:
    """Lock a file, which is made if it is not there, and return its descriptor; None if another process holds it."""
    while True:
        with writing(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            return file  # this disk has no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # its holder has deleted it in this moment


def _release(path: Path, file: int | None) -> None:
    if file is not None:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _is_held(run: Path, stage: str) -> bool:
    try:
        file = os.open(run / (PREFIX + stage), os.O_RDONLY)
    except OSError:
        return False  # its holder has deleted it in this moment
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(file)
    return False


def _note(file: int) -> None:
    """Write into a lock who holds it."""
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": platform.node(), "began": began}).encode())


def _holder(run: Path, stage: str) -> str:
    try:
        about = json.loads((run / (PREFIX + stage)).read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']}, since {about['began']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it does not say which"
