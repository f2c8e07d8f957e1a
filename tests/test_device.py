"""How JAX starts: silent, with compiled programs kept; and encoding that ends."""

from types import SimpleNamespace

import jax
import pytest
from helpers import child

from llb import load_encoder
from llb.device import MATMUL, start_jax
from llb.features import feature_kind, make_source
from llb.images import ImageFiles

# compiles one program that takes long enough to be kept
COMPILE = """
import jax, jax.numpy as jnp, llb.device
llb.device.start_jax()
x = jnp.ones((8, 8))
jax.jit(lambda x: sum(jnp.linalg.svd(x + i)[0] @ jnp.sort(x * i) for i in range(12)))(x).block_until_ready()
"""
ENCODE = """
from concurrent.futures import ThreadPoolExecutor
import jax, numpy as np
from llb import load_encoder
from llb.features import make_encode
assert jax.device_count() == 3
encode = make_encode(load_encoder("tiny"))
with ThreadPoolExecutor(4) as pool:
    list(pool.map(encode, np.zeros((8, 16, 112, 112, 3), np.uint8)))
"""


@pytest.mark.slow
def test_compiled_programs_are_kept_and_read_back_silently_where_a_folder_can_be_written(tmp_path):
    kept = []
    (tmp_path / "a file").touch()
    for folder in (tmp_path, tmp_path, tmp_path / "a file"):
        process = child("-W", "error", "-c", COMPILE, JAX_COMPILATION_CACHE_DIR=None, XDG_CACHE_HOME=folder)
        assert process.returncode == 0 and process.stderr == ""
        kept.append({file.name for file in (tmp_path / "llb" / "jax").iterdir()})
    assert kept[0] and kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("platform, precision", (("gpu", "highest"), ("cpu", None)))
def test_float32_means_float32_on_a_gpu(platform, precision, monkeypatch):
    monkeypatch.delenv(MATMUL, raising=False)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, device_kind="one")])
    changes = {}
    monkeypatch.setattr(jax.config, "update", changes.__setitem__)
    start_jax()
    assert changes.get("jax_default_matmul_precision") == precision
    assert changes["jax_enable_x64"] is False, "whatever JAX_ENABLE_X64 says"


def test_another_precision_by_a_variable_is_recorded_and_has_features_of_its_own(monkeypatch):
    source, files = make_source(load_encoder("tiny")), ImageFiles((), {})
    monkeypatch.delenv(MATMUL, raising=False)
    device, kind = start_jax(), feature_kind(source, files)
    monkeypatch.setenv(MATMUL, "tensorfloat32")
    assert start_jax() == f"{device}, JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32" and kind != feature_kind(
        source, files
    )


def test_an_encoder_loads_silently_even_if_jax_has_a_cuda_plug_in_without_a_driver():
    process = child("-c", "from llb import load_encoder; load_encoder('tiny')", JAX_PLATFORMS=None)
    assert process.returncode == 0 and process.stderr == ""


@pytest.mark.slow
def test_encoding_in_four_threads_on_three_devices_ends():
    """It would not if XLA's FFTs waited for threads that wait for them."""
    process = child("-c", ENCODE, timeout=120, JAX_NUM_CPU_DEVICES=3)
    assert process.returncode == 0, process.stderr
