"""A script ends with one line: on bad input, on what the machine cannot do, and on a signal."""

import errno
import os
import signal
import sys

import pytest

from llb.console import handled_signals, run_script, say, stop_later
from llb.files import UserError

# exception → what its line must mention
LINES = {
    "user": (UserError("--seed: wrong"), "error: --seed: wrong"),
    "full": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.csv"), "a.csv: No space left on device; make room"),
    "read-only": (OSError(errno.EROFS, os.strerror(errno.EROFS), "a.csv"), "a.csv: Read-only file system; put it"),
    "memory": (MemoryError(), "not enough memory: give a smaller --batch-size"),
    "device": (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile"), "not enough memory: give a smaller"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "the standard output is closed"),
    "deep": (RecursionError(), "nested too deeply"),
}


@pytest.fixture(autouse=True)
def streams(capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **options: None, raising=False)


@pytest.mark.parametrize("name", LINES)
def test_what_the_machine_cannot_do_is_one_line_and_status_2(name, capsys):
    error, mention = LINES[name]

    def main():
        raise error

    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert mention in line


def test_a_script_works_with_closed_streams(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_script(lambda: say("done"))
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_waits_for_the_end_of_a_step(number, request):
    inherited = signal.signal(number, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(number, inherited))
    before, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), handled_signals():
        with stop_later():
            signal.raise_signal(number)
            signal.raise_signal(number)  # as by `timeout`: at the same moment
            done.append("step")
        done.append("next step")
    with pytest.raises(KeyboardInterrupt), handled_signals():
        signal.raise_signal(number)
        done.append("never")
    assert done == ["step"] and signal.getsignal(number) == before
