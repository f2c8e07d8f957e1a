"""Lines for the person who runs a script: one for each stage, a progress bar, one when something is wrong.

Of several processes (llb.processes) only process 0 prints.

Ctrl-C and SIGTERM raise KeyboardInterrupt, so that a training can save its state; a second signal ends the script.
"""

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from llb.files import FULL, UserError, is_writer


def say(text: str) -> None:
    """Print one line on standard output at once, so that a redirected log keeps its order."""
    if is_writer():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(iterable: Iterable | None = None, **settings) -> tqdm:
    """A bar with rate and time left on standard error; redirected to a file, a line every half minute at most."""
    settings["disable"] = not is_writer()
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, leave=False, **settings)
    return tqdm(iterable, ascii=True, ncols=100, leave=False, mininterval=30, delay=15, **settings)


@dataclass
class Stop:
    """The signal that has asked the script to stop."""

    number: int | None = None
    at: float = 0.0  # when it came, in seconds
    later: bool = False  # see `stop_later`


STOP = Stop()


@contextmanager
def stop_later() -> Iterator[None]:
    """A signal raises its KeyboardInterrupt at the end of the block."""
    STOP.later = True
    try:
        yield
    finally:
        STOP.later = False
    if STOP.number is not None:
        raise KeyboardInterrupt


def on_signal(number: int, frame) -> None:
    """Stop now or, in `stop_later`, at its end."""
    if STOP.number is None:
        STOP.number, STOP.at = number, time.monotonic()
        if not STOP.later:
            raise KeyboardInterrupt
    elif time.monotonic() - STOP.at > 1:  # `timeout` sends its signal twice
        os._exit(128 + number)


@contextmanager
def handled_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM come to `on_signal`, unless they are ignored, as they are in a shell's background job."""
    STOP.number = None
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def full(error: Exception) -> str | None:
    """The system's words, if an exception says that a disk, a quota or a limit on files is used up; else None."""
    words = [os.strerror(code) for code in FULL if code]
    return next((word for word in words if word in str(error)), None)


def in_one_line(error: Exception) -> str | None:
    """What the machine or the file system cannot do, and what helps; None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "not enough memory: give a smaller --batch-size, --image-size, --submodels or --cache-gib"
    if isinstance(error, BrokenPipeError):
        return "the standard output is closed: read it to the end, or send it to a file"
    if isinstance(error, RecursionError):
        return "a file or folder is nested too deeply to be read: leave it out"
    if isinstance(error, OSError) and error.errno is not None:
        advice = "make room" if full(error) else "put it right"
        return f"{error.filename or 'a file'}: {error.strerror}; {advice} and give the same command again"
    return None


def run_script(main: Callable[[], None], resumable: bool = True) -> None:
    """Run a script's main. Bad input, a full disk and the like end with one line and status 2, Ctrl-C with one line and
    status 130, SIGTERM with one line and status 143.

    resumable: whether the same command continues an interrupted run.
    """
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed: None
    for stream in (sys.stdout, sys.stderr):
        # the old code page of a Windows console has no "→" or "×": print a substitute instead of failing
        stream.reconfigure(errors="replace")
    try:
        with handled_signals():
            main()
    except KeyboardInterrupt as stop:
        # the end below skips clean-up, so release now what the interrupted calls hold: worker processes' semaphores
        traceback.clear_frames(stop.__traceback__)
        gc.collect()
        number = STOP.number or signal.SIGINT
        line = "\ninterrupted" if number == signal.SIGINT else "\nterminated"
        if resumable:
            without = ", without --overwrite," if "--overwrite" in sys.argv else ""
            line += f": the same command{without} continues from here"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(128 + number)  # JAX's threads still work and can crash an interpreter that sys.exit takes down
    except Exception as error:
        line = in_one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        jax = sys.modules.get("jax")
        if jax is not None and jax.distributed.is_initialized():
            os._exit(2)  # sys.exit would wait for the other processes to end
        sys.exit(2)
