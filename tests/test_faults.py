"""The short forms of `python -m tests.faults` and `python -m tests.fuzz`."""

import sys

import pytest
from helpers import child

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks with limits and audit hooks")


@linux
@pytest.mark.slow
def test_disturbed_runs_end_with_the_files_of_an_undisturbed_one():
    """Both training stages are killed, and the disk is full in the evaluation."""
    one_each = ("--kills", 1, "--most", 1)
    done = child("-m", "tests.faults", "--only", "kill", "--only", "full", *one_each, timeout=600)
    assert done.returncode == 0 and "full disk (" in done.stdout, done.stdout + done.stderr


@linux
def test_damaged_and_hostile_files_are_read_or_refused_in_one_line(tmp_path):
    done = child("-m", "tests.fuzz", "--count", 150, "--keep", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stdout + done.stderr
