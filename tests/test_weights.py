"""Weight files: the names of all weights, and a refusal in one line of every file that does not fit."""

import os
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from reference.encoder_weights import FAMILIES, original, saved

from llb.encoders import parameter_shapes
from llb.encoders.specs import SPECS, Spec
from llb.encoders.weights import download_weights, read_tensors, read_tree, to_params, weights_digest, write_tree
from llb.files import UserError


def spec_of(family: str) -> Spec:
    sizes = FAMILIES[family]
    return Spec(family, **sizes, antialias=sizes["registers"] > 0, image_size=28, groups=())


SPEC = spec_of("stored")


def refusal(read, *arguments) -> str:
    """The line with which something is refused."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    line = str(caught.value)
    assert line.startswith("--") and "\n" not in line
    return line


def test_a_path_that_is_no_weight_file_is_refused(tmp_path):
    assert "is a folder; give the file in it" in refusal(read_tensors, tmp_path)
    assert "cannot be read (No such file or directory)" in refusal(read_tensors, tmp_path / "absent.pth")
    assert "cannot be read (embedded null byte)" in refusal(read_tensors, "\0")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
        assert "is a pipe or a device; give a file" in refusal(read_tensors, tmp_path / "pipe")
    for content in (b"", b"PK", b"version https://git-lfs.github.com/spec/v1", b"<!DOCTYPE html>"):
        (tmp_path / "model").write_bytes(content)
        line = refusal(read_tensors, tmp_path / "model")
        assert line.endswith("is not a weight file; give model.safetensors or the original release's .pth")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    pth = [
        (Path(__file__).parent / "reference" / name).read_bytes() for name in ("encoder_zip.pth", "encoder_legacy.pth")
    ]
    for content in (*pth, safetensors.numpy.save(saved("stored"))):
        for length in (*range(0, len(content), 211), len(content) - 1):
            (tmp_path / "cut").write_bytes(content[:length])
            refusal(read_tensors, tmp_path / "cut")


A = b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HEADERS = {
    "a length of 2**63": (A, 2**63, "has a header of 9223372036854775808 bytes"),
    "a long header": (A + b" " * 2**20, 0, "has a header of 1048"),
    "deep JSON": (b'"a": ' + b"[" * 100_000, 0, "is damaged"),
    "one name twice": (A + b", " + A, 0, "has a name twice"),
    "one place twice": (A + b", " + A.replace(b"a", b"b", 1), 0, "is damaged"),
    "a far place": (A.replace(b"8", str(2**62).encode()), 0, "is damaged"),
    "a list": (b'"a": []', 0, "is damaged"),
    "float8": (A.replace(b"F32", b"F8_E4M3"), 0, "is saved in float8; convert to float16, bfloat16 or float32"),
    "a long name": (A.replace(b"a", b"a" * 201, 1), 0, "has names that no weight has"),
}


@pytest.mark.parametrize("header, length, reason", HEADERS.values(), ids=HEADERS)
def test_a_header_of_safetensors_that_lies_is_refused(tmp_path, header, length, reason):
    header = b"{" + header + b"}"
    (tmp_path / "a").write_bytes((length or len(header)).to_bytes(8, "little") + header + bytes(8))
    line = refusal(read_tensors, tmp_path / "a")
    assert reason in line and len(line) < 600


@pytest.fixture(params=("original", "transformers"))
def tensors(request) -> dict[str, np.ndarray]:
    """The family "stored" under both sets of names."""
    return original(saved("stored")) if request.param == "original" else saved("stored")


def test_the_parameters_are_float32_and_all_that_the_model_has(tensors):
    params, expected = to_params(tensors, SPEC, "f"), parameter_shapes(SPEC)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", (ml_dtypes.bfloat16, np.float16))
def test_half_precision_weights_become_float32(tmp_path, kind):
    half = {name: value.astype(kind) for name, value in saved("stored").items()}
    safetensors.numpy.save_file(half, tmp_path / "half")
    read = read_tensors(tmp_path / "half")
    assert {name: value.tobytes() for name, value in read.items()} == {n: value.tobytes() for n, value in half.items()}
    params, exact = (to_params(tensors, SPEC, "f") for tensors in (read, saved("stored")))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-6), params, exact)


def test_the_digest_depends_on_the_weights_and_not_on_their_names():
    changed = saved("stored")
    changed["encoder.layer.1.mlp.fc2.bias"][0] += 1e-6
    files = saved("stored"), original(saved("stored")), changed
    first, renamed, other = (weights_digest(to_params(tensors, SPEC, "f")) for tensors in files)
    assert first == renamed != other


def test_each_weight_that_is_missing_or_of_another_shape_is_named(tensors):
    for name, value in tensors.items():
        rest = {other: tensors[other] for other in tensors if other != name}
        if name.startswith(("mask_token", "norm.", "embeddings.mask_token", "layernorm.")):
            to_params(rest, SPEC, "f")  # not part of the blocks
            continue
        doubled = np.concatenate([value, value])
        line = refusal(to_params, rest | {name: doubled}, SPEC, "f")
        assert line == f"--weights f: {name} has shape {doubled.shape}, but stored has {value.shape}"
        # the class token's name tells which set of names the file has
        missing = "embeddings.cls_token" if name == "cls_token" else name
        line = refusal(to_params, rest, SPEC, "f")
        assert line == f"--weights f: {missing} is missing, so these are not weights of stored"


def test_a_weight_that_is_left_over_is_named(tensors):
    tensors["head.weight"] = np.zeros(3)
    assert "--weights f: head.weight is left over" in refusal(to_params, tensors, SPEC, "f")
    tensors["z"] = np.zeros(3)
    assert "--weights f: head.weight (and 1 more) is left over" in refusal(to_params, tensors, SPEC, "f")
    deeper = saved("stored")
    deeper |= {name.replace("layer.1", "layer.2"): value for name, value in deeper.items() if "layer.1" in name}
    assert "encoder.layer.2.attention.attention.key.bias (and 17 more) is left" in refusal(to_params, deeper, SPEC, "f")


@pytest.mark.parametrize("prefix", ("vit", "dinov2", "dinov2_with_registers"))
def test_prefixes_of_transformers_classes_and_the_pooler_make_no_difference(prefix):
    family = {"vit": "dino16", "dinov2": "dinov2", "dinov2_with_registers": "dinov2_reg"}[prefix]
    expected = to_params(saved(family), spec_of(family), "f")
    tensors = {f"{prefix}.{name}": value for name, value in saved(family).items()}
    tensors |= {f"{prefix}.pooler.dense.{name}": np.zeros(2) for name in ("weight", "bias")}
    jax.tree.map(np.testing.assert_array_equal, to_params(tensors, spec_of(family), "f"), expected)


@pytest.mark.parametrize("prefix", ("module.", "backbone.", "teacher.", "module.backbone.", "teacher.backbone."))
def test_prefixes_of_training_and_the_heads_beside_make_no_difference(tmp_path, tensors, prefix):
    prefixed = {prefix + name: value for name, value in tensors.items()} | {f"{prefix}head.mlp.0.weight": np.zeros(2)}
    prefixed |= {f"student.{name}": value + 1 for name, value in tensors.items() if "teacher" in prefix}
    safetensors.numpy.save_file(prefixed, tmp_path / "a")
    read, expected = to_params(read_tensors(tmp_path / "a"), SPEC, "f"), to_params(tensors, SPEC, "f")
    assert weights_digest(read) == weights_digest(expected)


@pytest.mark.parametrize(
    "value, problem", (("int8", "saved in int8; convert"), (np.nan, "not finite"), (1e39, "not fin"))
)
def test_weights_that_are_whole_numbers_or_not_finite_are_named(tmp_path, tensors, value, problem):
    wrong = tensors["cls_token" if "cls_token" in tensors else "embeddings.cls_token"].astype(np.float64)
    wrong = wrong.astype(value) if isinstance(value, str) else np.full_like(wrong, value)
    changed = {name: wrong if "cls_token" in name else tensor for name, tensor in tensors.items()}
    assert f"cls_token is {problem}" in refusal(to_params, changed, SPEC, "f")


TINY = parameter_shapes(SPECS["tiny"])


def tiny_tree() -> dict:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float16), TINY)


def test_a_tree_reads_back_as_it_was_written_in_float32(tmp_path):
    tree = tiny_tree()
    write_tree(tree, tmp_path / "tiny.safetensors", {"made": "here"})
    read = read_tree(tmp_path / "tiny.safetensors", TINY)
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    assert {value.dtype for value in read_tensors(tmp_path / "tiny.safetensors").values()} == {np.dtype(np.float16)}


def test_a_tree_that_does_not_fit_names_the_weight(tmp_path):
    for change, problem in (
        (lambda tree: tree.pop("cls_token"), "cls_token is missing"),
        (lambda tree: tree["block_0"].update(extra=np.zeros(2)), "block_0/extra is left over"),
        (lambda tree: tree.update(cls_token=np.zeros(2)), "cls_token has shape (2,), not (192,)"),
    ):
        tree = tiny_tree()
        change(tree)
        write_tree(tree, tmp_path / "a", {})
        assert refusal(read_tree, tmp_path / "a", TINY) == f"--weights {tmp_path / 'a'}: {problem}"


@pytest.mark.parametrize("error", (ConnectionError("a\nb"), LocalEntryNotFoundError("x"), EntryNotFoundError("404")))
def test_offline_the_error_names_the_file_and_how_to_pass_it(monkeypatch, error):
    download = Mock(side_effect=error)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    line = refusal(download_weights, SPECS["dinov2_vitb14_reg"])
    assert line.startswith("--encoder dinov2_vitb14_reg: its weights could not be downloaded (")
    assert line.endswith(
        "get model.safetensors (if there is none, pytorch_model.bin) from "
        "https://huggingface.co/facebook/dinov2-with-registers-base and pass it with --weights FILE"
    )
    tries = 2 if type(error) is EntryNotFoundError else 1  # each takes half a minute without a network
    assert download.call_count == tries


def test_weights_that_were_fetched_are_taken_without_a_network(monkeypatch, tmp_path):
    at = tmp_path / "models--facebook--dino-vits16"
    file = at / "snapshots" / "abc" / "pytorch_model.bin"
    for path, text in ((at / "refs" / "main", "abc"), (file, "weights")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=AssertionError))
    assert download_weights(SPECS["dino_vits16"]) == file


def test_a_repository_without_safetensors_gives_its_pytorch_file(monkeypatch):
    download = Mock(side_effect=[EntryNotFoundError("404"), "/cache/file"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert download_weights(SPECS["dino_vits16"]) == Path("/cache/file")
    assert download.call_args.args == ("facebook/dino-vits16", "pytorch_model.bin")
