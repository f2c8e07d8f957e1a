"""Three CPU devices for every test in this process, so that sharding over sub-models is really exercised."""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# All processes of a suite share compiled programs, in a new folder: no test sees those of an earlier suite.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits both variables
    COMPILED = tempfile.TemporaryDirectory(prefix="llb-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    # Most of the suite's time is XLA compiling programs that then run for milliseconds.
    quick = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # halves it once more; jaxlib 0.11 does not know the flag, and aborts
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

import jax  # noqa: E402 (reads the variables)
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the three scripts, also when only `pytest` is typed

from helpers import ROOT, TILE, draw_mvtec, succeed  # noqa: E402

# A worker takes a whole file: one of minutes that begins last would leave the other workers idle.
LONGEST = ("test_faults.py", "test_detectors.py", "test_whole_run.py", "test_processes.py", "test_bench.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def elsewhere():
    """The scripts' defaults, runs/demo and runs/cache, lie in a folder of the suite, which all its processes share."""
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "work"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    yield
    os.chdir(ROOT)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """An MVTec-style root with one category, "tile"."""
    return draw_mvtec(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data) -> Path:
    """A whole run: stage 1, stage 2 on purified and on all, evaluation with maps. Whoever changes it copies it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    succeed("stage1_partition", "--data", data, "--out", run, *TILE)
    for train_on in ("purified", "all"):
        succeed("stage2_train", "--run", run, "--steps", 3, "--train-on", train_on)
    succeed("evaluate", "--run", run, "--save-maps")
    return run
