"""The short forms of `python -m tests.faults` and `python -m tests.fuzz`."""

import sys

import pytest
from helpers import child

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks with limits and audit hooks")


@linux
@pytest.mark.slow
def test_disturbed_runs_end_with_the_files_of_an_undisturbed_one():
    """Two faults of each stage; `python -m tests.faults` tries every one many times."""
    kinds = [word for kind in ("kill", "interrupt", "full") for word in ("--only", kind)]
    few = ("--kills", 1, "--most", 2, "--detector", "simplenet")  # dinomaly's commands trace for three times as long
    done = child("-m", "tests.faults", *kinds, *few, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in ("kill -9 at a write", "Ctrl-C, in training", "full disk (cache)", "full disk (tables)"):
        assert fault in done.stdout, done.stdout


@linux
def test_damaged_and_hostile_files_are_read_or_refused_in_one_line(tmp_path):
    done = child("-m", "tests.fuzz", "--count", 150, "--keep", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stdout + done.stderr
