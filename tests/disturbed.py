"""A run whose commands are disturbed: each is a fork of this process, and what is done to it begins in the fork.

This process has imported llb, but has not started JAX: a fork saves the seconds of importing. As root the run lies on
a small file system of its own (tmpfs), which can be filled and made read-only; else RLIMIT_FSIZE and chmod do it.
"""

import atexit
import contextlib
import fcntl
import itertools
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evaluate  # noqa: F401 (imported before the fork)
import llb.train
import stage1_partition  # noqa: F401
import stage2_train  # noqa: F401
from tests.helpers import ROOT, SMALL, TILE, draw, draw_mvtec

CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")  # audit events, see PEP 578
SCRIPTS = ("stage1_partition", "stage2_train", "evaluate")
STEPS = int(SMALL[SMALL.index("--steps") + 1])  # of a training
SIZE = "1500m"  # of the small file system
KINDS = (("/cache/", "cache"), ("/stage", "checkpoint"), ("report", "report"), (".png", "pictures"), ("", "tables"))
Install = Callable[[], object]  # called in the fork before the command begins


class Wrong(Exception):
    """The run has other files than an undisturbed one, or a command ended in another way than it should."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. status below 0: the signal that ended it."""

    status: int
    out: str
    err: str
    seconds: float

    def refused(self) -> bool:
        """Whether it ended as llb refuses: status 2 and one line."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return self.status == 2 and len(lines) == 1 and lines[0].startswith("error: ")

    def require(self, right: bool, problem: str) -> None:
        if not right or "Traceback" in self.err:
            raise Wrong(f"{problem}: status {self.status}: {(self.err.strip() or self.out.strip())[-1500:]}")


def on_changes(folder: Path, act: Callable[[str], object]) -> Install:
    """Call act(path) before each change of a file below the folder, as far as Python sees it: what the C++ part
    of Orbax writes lies between two of these."""

    def install() -> None:
        prefix = str(folder)

        def hook(event: str, arguments: tuple) -> None:
            if event in CHANGES and str(arguments[0]).startswith(prefix):
                if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    act(str(arguments[1] if event == "os.rename" else arguments[0]))

        sys.addaudithook(hook)

    return install


def kind_of(path: str) -> str:
    return next(kind for part, kind in KINDS if part in path)


def at_change(folder: Path, number: int, act: Callable[[], object], kind: str = "") -> Install:
    """Call act() before the number-th change of a file below the folder, or of a file of one kind."""
    numbers = itertools.count(1)
    return on_changes(folder, lambda path: act() if kind in ("", kind_of(path)) and next(numbers) == number else None)


def at_step(number: int, act: Callable[[], object]) -> Install:
    """Call act() after the number-th step that the command trains."""

    def install() -> None:
        step, numbers = llb.train.train_step, itertools.count(1)

        def counted(*arguments, **options):
            result = step(*arguments, **options)
            if next(numbers) == number:
                act()
            return result

        llb.train.train_step = counted

    return install


def send(number: signal.Signals, delay: float = 0.0) -> Callable[[], object]:
    """A function that sends this process a signal, at once or after a delay in seconds."""
    if not delay:
        return lambda: os.kill(os.getpid(), number)
    return lambda: threading.Timer(delay, os.kill, (os.getpid(), number)).start()


def save_each_step() -> None:
    """Let a training write a checkpoint after each step."""
    llb.train.SAVE_SECONDS, llb.train.SAVE_FRACTION = 0.0, 1e9


def together(*installs: Install) -> Install:
    return lambda: [install() for install in installs]


class Bench:
    """A folder with two data roots and a run, which is disturbed, and what an undisturbed run has.

    Attributes:
        places: script → the paths that it changes, in order.
        seconds: script → how long it takes.
        expected: root → the files of an undisturbed run.
    """

    def __init__(self, folder: Path, detector: str):
        self.folder, self.disk, self.detector = folder, folder / "disk", detector
        self.run, self.ballast = self.disk / "run", self.disk / "ballast"
        self.places, self.seconds, self.expected, self.outputs = {}, {}, {}, {}
        self.roots = {"mvtec": draw_mvtec(folder / "mvtec"), "folder": folder / "parts"}
        for i in range(8):
            draw(self.roots["folder"] / f"{i}.png", i, defect=i == 5)
        self.disk.mkdir()
        self.mounted = self._mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")

    def _mount(self, *options: str) -> bool:
        return subprocess.run(["mount", *options, str(self.disk)], capture_output=True).returncode == 0

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.disk)], check=True)
        shutil.rmtree(self.folder)

    def prepare(self, root: str) -> None:
        """An undisturbed run of a root; places and a snapshot after each command are those of "mvtec"."""
        if root in self.expected:
            return
        self.clear()
        for script in SCRIPTS:
            log = self.folder / f"places of {script}"
            with open(log, "w") as file:
                record = on_changes(self.run, lambda path, file=file: print(path, file=file, flush=True))
                ended = self.must_end(root, script, together(save_each_step, record))
            # the first run compiles, which takes about half of its time, and later ones do not
            self.seconds[script] = ended.seconds if self.expected else ended.seconds / 2
            if root == "mvtec":
                self.places[script] = log.read_text().splitlines()
                self.snapshot(script)
        self.expected[root] = self.results()

    def changes(self, script: str, kind: str = "") -> int:
        """How many changes a script makes, in files of a kind or in all."""
        return sum(kind in ("", kind_of(path)) for path in self.places[script])

    # ---- commands ----

    def start(self, root: str, script: str, install: Install = lambda: None) -> int:
        """Begin a command in a process of its own: its process id."""
        flags = ("--run", self.run, *{"stage2_train": ("--steps", STEPS), "evaluate": ("--save-maps",)}.get(script, ()))
        if script == SCRIPTS[0]:  # noise is for labelled roots
            flags = ("--data", self.roots[root], "--out", self.run, *(TILE if root == "mvtec" else SMALL))
            flags += ("--detector", self.detector)
        flags += ("--cache", self.run / "cache")
        pipes = [os.pipe(), os.pipe()]  # of standard output and error
        pid = os.fork()
        if pid:
            for _, end in pipes:
                os.close(end)
            self.outputs[pid] = [end for end, _ in pipes]
            return pid
        status = 1
        try:
            for number, (_, end) in enumerate(pipes, 1):
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 2**20)  # nobody reads before the command has ended
                os.dup2(end, number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
            sys.argv = [f"{script}.py", *map(str, flags)]
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            install()
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def finish(self, pid: int, began: float) -> Ended:
        """Wait for a command."""
        _, status = os.waitpid(pid, 0)
        seconds, texts = time.monotonic() - began, []
        for end in self.outputs.pop(pid):
            with open(end, errors="replace") as pipe:
                texts.append(pipe.read())
        return Ended(os.waitstatus_to_exitcode(status), *texts, seconds)

    def command(self, root: str, script: str, install: Install = lambda: None) -> Ended:
        began = time.monotonic()
        return self.finish(self.start(root, script, install), began)

    def must_end(self, root: str, script: str, install: Install = lambda: None) -> Ended:
        ended = self.command(root, script, install)
        ended.require(ended.status == 0, f"{script}, undisturbed")
        return ended

    # ---- the files of the run ----

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.ballast.unlink(missing_ok=True)

    def snapshot(self, name: str) -> None:
        shutil.copytree(self.run, self.folder / f"snapshot {name}")

    def restore(self, name: str) -> None:
        self.clear()
        shutil.copytree(self.folder / f"snapshot {name}", self.run)

    def results(self) -> dict[str, bytes]:
        """What must be the same: tables, lists, pictures, maps and metrics."""
        files = {str(file.relative_to(self.run)): file for file in self.run.rglob("*") if file.is_file()}
        wanted = re.compile(r"[^/]+/([\w-]+\.(csv|txt|png)|maps-.*)|metrics\.(json|csv)")
        # the manifest of the images holds their dates
        return {n: f.read_bytes() for n, f in files.items() if wanted.fullmatch(n) and f.name != "images.csv"}

    def compare(self, root: str) -> None:
        """Raise Wrong unless the run has the files of an undisturbed one and no remains of an interrupted one."""
        results, expected = self.results(), self.expected[root]
        different = sorted(name for name in results.keys() | expected if results.get(name) != expected.get(name))
        if different:
            raise Wrong(f"{len(different)} files differ from an undisturbed run's: {', '.join(different[:5])}")
        remains = [str(file) for file in self.run.rglob("*") if file.name.startswith(".") or ".orbax-" in file.name]
        remains = [name for name in remains if "/.lock" not in name and "/cache/" not in name]  # those go with time
        if remains:
            raise Wrong(f"remains of an interrupted command: {remains[:5]}")

    # ---- the disk ----

    def fill(self) -> None:
        """Leave the run's file system no room, or let this process make no file longer."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with open(self.ballast, "ab", buffering=0) as file:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    @contextlib.contextmanager
    def read_only(self):
        """The run may not be written meanwhile; gives whether that is so (root writes everywhere)."""
        if self.mounted:
            self._mount("-o", "remount,ro")
        else:
            self.disk.chmod(0o555), self.run.exists() and self.run.chmod(0o555)
        try:
            yield self.mounted or os.geteuid() != 0
        finally:
            if self.mounted:
                self._mount("-o", "remount,rw")
            else:
                self.disk.chmod(0o755), self.run.exists() and self.run.chmod(0o755)
