"""Several processes that work as one end as one alone would."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_commands import SMALL, draw_mvtec, rows_of

from llb import processes
from llb.checkpoint import open_checkpoints, restore_params
from llb.files import UserError

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(count: int, script: str, *arguments, devices: int = 2) -> list[subprocess.CompletedProcess]:
    """`count` processes, each with some CPU devices; with one, no flags of several are given."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    coordinator = f"127.0.0.1:{free_port()}"
    lines = [[sys.executable, ROOT / f"{script}.py", *map(str, arguments)] for _ in range(count)]
    if count > 1:
        for number, line in enumerate(lines):
            line += ["--coordinator", coordinator, "--processes", str(count), "--process-id", str(number)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(line, env=environment, **pipes) for line in lines]
    try:
        outputs = [one.communicate(timeout=300) for one in started]
        return [subprocess.CompletedProcess(one.args, one.returncode, *output) for one, output in zip(started, outputs)]
    finally:
        for one in started:
            one.kill()


@pytest.mark.slow  # starts five processes
def test_two_processes_with_two_devices_each_score_as_one_does(tmp_path):
    """K = 3 on four devices, then stage 2, whose single sub-model's batch is shared out to all four."""
    data = draw_mvtec(tmp_path / "data", good=17)
    arguments = ("--data", data, "--noise-ratio", 0.25, "--steps", 4, *SMALL[:-1], 4)
    alone, both = tmp_path / "alone", tmp_path / "both"
    (one,) = together(1, "stage1_partition", *arguments, "--out", alone, devices=1)
    first, second = together(2, "stage1_partition", *arguments, "--out", both)
    assert (one.returncode, first.returncode, second.returncode) == (0, 0, 0), first.stderr + second.stderr
    assert "seen as 4 devices, in 2 processes" in first.stdout
    # Gloo, the library that CPUs talk by, speaks for itself
    assert "device" not in second.stdout and "tile" not in second.stdout
    assert "Traceback" not in first.stderr + second.stderr
    expected, found = (rows_of(run / "tile" / "scores.csv") for run in (alone, both))
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for name in ("model_0", "model_1", "model_2", "score"):
        a, b = ([float(row[name]) for row in rows] for rows in (found, expected))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert (both / "tile" / "purified.txt").read_text() == (alone / "tile" / "purified.txt").read_text()

    first, second = together(2, "stage2_train", "--run", both, "--steps", 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    (one,) = together(1, "stage2_train", "--run", alone, "--steps", 2, devices=1)
    assert one.returncode == 0, one.stderr

    def trained(run: Path) -> np.ndarray:
        with open_checkpoints(run / "tile" / "stage2-purified") as checkpoints:
            return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(restore_params(checkpoints))])

    # Gradients were summed over both processes. Where one is zero but for rounding, its sign decides a whole update.
    found, expected = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(trained(run))]) for run in (both, alone)
    )
    assert (np.abs(found - expected) > 1e-6 + 1e-4 * np.abs(expected)).mean() < 1e-3


@pytest.mark.slow
def test_what_is_wrong_ends_all_processes_with_one_line(tmp_path):
    found = together(2, "stage1_partition", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert found[0].returncode == 2 and "nowhere" in found[0].stderr and len(found[0].stderr.splitlines()) == 1
    assert found[1].returncode != 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), "belong together"),
        (("host:1", 2, 2), "--process-id 2"),
        (("host", 2, 0), "--coordinator host"),
        ((":1", 2, 0), "--coordinator :1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    settings = SimpleNamespace(**dict(zip(("coordinator", "processes", "process_id"), given)))
    with pytest.raises(UserError, match=message):
        processes.join(settings)


def test_a_launchers_word_is_taken_only_when_it_has_started_several(monkeypatch):
    for name in [*processes.LAUNCHERS, *processes.LAUNCHERS.values()]:
        monkeypatch.delenv(name, raising=False)
    assert processes.launched() == (1, 0)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one task of a job array
    assert processes.launched() == (1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert processes.launched() == (4, 3)


@pytest.mark.parametrize("count", (1, 5, 6, 7))
def test_shares_are_all_rows_once_in_order(monkeypatch, count):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for number in range(3):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        shares.append(processes.share(count))
    assert np.concatenate(shares).tolist() == list(range(count))
