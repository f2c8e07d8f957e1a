"""A checkpoint with the names of Dinomaly's release is read into the parameters that give the reference's output."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from llb.detectors import dinomaly
from llb.detectors.common import Setup
from llb.detectors.released import read_released
from llb.encoders.specs import Spec
from llb.files import UserError

STORED = dict(np.load(Path(__file__).parent / "reference" / "dinomaly.npz"))
SIZES = dict(width=16, depth=4, heads=2, registers=4, groups=((0, 1), (2, 3)))
SPEC = Spec(name="stored", patch=1, image_size=4, native_grid=4, layer_scale=False, antialias=True, **SIZES)
SETUP = Setup(SPEC, (), 4, dinomaly.Settings(), detector="dinomaly")


def released() -> dict[str, np.ndarray]:
    """The reference's parameters as Dinomaly's ViTill saves them, with a tensor of the encoder."""
    names = {f"bottleneck.0.{layer}": (f"bottleneck/{layer}/dense", "kernel") for layer in ("fc1", "fc2")}
    for block in range(SIZES["depth"]):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            names[f"decoder.{block}.{layer}"] = f"block_{block}/{layer.replace('.', '/')}/dense", "kernel"
        for norm in ("norm1", "norm2"):
            names[f"decoder.{block}.{norm}"] = f"block_{block}/{norm}", "scale"
    tensors = {"encoder.blocks.0.attn.qkv.weight": np.ones((48, 16), np.float32)}
    for name, (path, weight) in names.items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(STORED[f"params/{path}/{weight}"].T)
        tensors[f"{name}.bias"] = STORED[f"params/{path}/bias"]
    return tensors


def test_a_released_checkpoint_decodes_as_the_reference_does(tmp_path):
    safetensors.numpy.save_file(released(), tmp_path / "model.pth")
    params = read_released(tmp_path / "model.pth", SETUP)
    decoded = jax.jit(dinomaly.network(SETUP).apply)(params, STORED["features"])
    np.testing.assert_allclose(decoded, STORED["decoded"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.3.norm1.bias": None}, "decoder.3.norm1.bias is missing; is it Dinomaly's, for --encoder stored"),
        ({"decoder.4.norm1.bias": np.ones(16)}, "decoder.4.norm1.bias is left over"),
        ({"bottleneck.0.fc1.bias": np.ones(65)}, "bottleneck.0.fc1.bias has shape"),
        ({"decoder.0.attn.proj.bias": np.full(16, np.nan)}, "decoder.0.attn.proj.bias is not finite"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_the_name_of_a_weight(change, message, tmp_path):
    tensors = {name: value for name, value in (released() | change).items() if value is not None}
    safetensors.numpy.save_file(tensors, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        read_released(tmp_path / "model.pth", SETUP)
