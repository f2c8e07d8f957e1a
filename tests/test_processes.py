"""Several processes that work as one give the results of one."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from helpers import ROOT, TILE, child, contents, refuse, rows_of, succeed

from llb import processes

# each of two processes runs this; arguments: a folder, and the flags of several processes
TALK = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from llb.console import say
from llb.files import atomic, discard, is_writer, write_text
from llb.processes import agreed, join, joined, part_of, process_0_first
folder, number = Path(sys.argv[1]), int(sys.argv[7])
join(SimpleNamespace(coordinator=sys.argv[3], processes=2, process_id=number))
with process_0_first("block"):
    time.sleep(1 - number)
    seen = (folder / "text 0").exists()
    write_text(folder / f"text {number}", "")
(folder / f"kept {number}").touch()
discard(folder / f"kept {number}")
say(f"line of {number}")
together = {count: joined(10 * part_of(count), count).tolist() for count in (1, 4, 5)}
same = [bool(agreed(number == 0)), agreed(np.arange(2) == number).tolist()]
facts = json.dumps([seen, is_writer(), same, together])
atomic(folder / f"facts {number}", lambda file: file.write_text(facts), by_any_process=True)
"""

# likewise, a grid; process 0 is slow to write
GRID = """
import os, sys, time
from llb import ablate
write = os.fsync
if sys.argv[-1] == "0":
    os.fsync = lambda file: (time.sleep(0.1), write(file))
ablate.run_script(ablate.main)
"""


def in_two_processes(*line, status: int = 0):
    """Run Python twice at once, with the flags of several processes; each process has two CPU devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        line += ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--processes", 2, "--process-id")
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(partial(child, *line, JAX_NUM_CPU_DEVICES=2), range(2))
    assert first.returncode == status and (second.returncode == 0) == (status == 0), first.stderr + second.stderr
    return first, second


def test_process_0_writes_and_prints_and_both_join_their_parts(tmp_path):
    first, second = in_two_processes("-c", TALK, tmp_path)
    assert "line of 0" in first.stdout and "line of" not in second.stdout  # but JAX's Gloo prints lines of its own
    assert {file.name for file in tmp_path.iterdir()} == {"text 0", "kept 1", "facts 0", "facts 1"}
    together = {str(count): [10 * i for i in range(count)] for count in (1, 4, 5)}
    for number in range(2):
        assert json.loads((tmp_path / f"facts {number}").read_text()) == [
            number == 1,
            number == 0,
            [True, [True, False]],
            together,
        ]


@pytest.mark.slow
def test_two_processes_with_two_devices_each_give_the_results_of_one(finished, data, tmp_path):
    """K = 3 on four devices, then K = 1 in stage 2: the other devices train copies."""
    cache = ("--cache", tmp_path / "cache")
    first, second = in_two_processes(ROOT / "stage1_partition.py", "--data", data, "--out", tmp_path, *TILE, *cache)
    assert "seen as 4 devices, in 2 processes" in first.stdout
    assert "device" not in second.stdout and "tile" not in second.stdout and "Traceback" not in second.stderr
    assert contents(tmp_path).items() <= contents(finished).items()
    in_two_processes(ROOT / "stage2_train.py", "--run", tmp_path, "--steps", 3, *cache)
    succeed("evaluate", "--run", tmp_path)
    tables = [rows_of(run / "tile" / "predictions-purified.csv") for run in (tmp_path, finished)]
    for both, one in zip(*tables):  # by XLA's usual emitters to 1e-5; by the quick ones of conftest.py rounding differs
        assert both["path"] == one["path"] and float(both["score"]) == pytest.approx(float(one["score"]), rel=5e-3)


@pytest.mark.slow
def test_a_grid_in_two_processes_reads_what_process_0_has_written(data, tmp_path):
    line = ["--data", data, *TILE[:-2], "--detector", "padim", "--seeds", 1, "--vary", "keep=0.5,0.8"]
    line += ["--out", tmp_path / "grid", "--cache", tmp_path / "cache"]
    first, second = in_two_processes("-c", GRID, *line)
    assert "left out" not in first.stdout and len(rows_of(tmp_path / "grid" / "compare.csv")) == 2
    assert "Traceback" not in second.stderr


def test_bad_input_ends_all_processes_with_one_line(tmp_path):
    flags = ("--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    first, _ = in_two_processes(ROOT / "stage1_partition.py", *flags, status=2)
    assert "nowhere" in first.stderr and len(first.stderr.splitlines()) == 1


def test_of_several_launched_processes_only_process_0_evaluates(monkeypatch, tmp_path):
    for tasks, number in ((1, 0), (2, 0), (2, 1)):  # one task: of a job array
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(tasks))
        monkeypatch.setenv("SLURM_PROCID", str(number))
        assert processes.launched() == (tasks, number)
        if number == 0:
            assert "there is no run" in refuse("evaluate", "--run", tmp_path / "nothing")
    assert succeed("evaluate", "--run", tmp_path / "nothing") == ""
