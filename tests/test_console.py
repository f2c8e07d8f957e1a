"""What is compiled is kept, and where it cannot be kept a run goes on without."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llb.console import choose_device, keep_compiled

ROOT = Path(__file__).resolve().parent.parent
# compiles one program that takes long enough to be kept
COMPILE = """
import jax, jax.numpy as jnp
from llb.console import choose_device
choose_device()
x = jnp.ones((8, 8))
jax.jit(lambda x: sum(jnp.linalg.svd(x + i)[0] @ jnp.sort(x * i) for i in range(12)))(x).block_until_ready()
"""
# the fewest page faults of a call in twelve to a program whose buffers are 64 MB each: 16,384 pages of 4 KiB. The first
# calls may still add such a block: threads allocate in an order of their own, until the heap has room for every order
FAULTS = """
import resource, jax, jax.numpy as jnp
from llb.console import choose_device
choose_device()
work = jax.jit(lambda x: jnp.sin(x)[::-1].cumsum(0))
x = jnp.ones((16, 1 << 20))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_buffers_of_a_repeated_program_are_not_fetched_from_the_kernel_again():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", FAULTS]
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 2000


def test_compiled_programs_are_kept_and_read_back_without_a_word(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = clean | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    line = [sys.executable, "-W", "error", "-c", COMPILE]
    for _ in range(2):
        result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and result.stderr == ""
    assert list((tmp_path / "llb" / "jax").glob("*"))


@pytest.fixture
def no_cache_chosen():
    chosen = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", chosen)


def test_the_cache_folder_of_the_users_choice_is_left_alone(monkeypatch, tmp_path):
    chosen = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == chosen and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path, no_cache_chosen):
    blocked = tmp_path / "a file where a folder should be"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("platform, precision", (("gpu", "highest"), ("cpu", None)))
def test_float32_means_float32_on_a_gpu(platform, precision, monkeypatch):
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, device_kind="one")])
    before = jax.config.jax_default_matmul_precision
    try:
        choose_device()
        assert jax.config.jax_default_matmul_precision == precision
    finally:
        jax.config.update("jax_default_matmul_precision", before)
