"""Weight files: what is read, what is refused and how, and that reading one runs nothing.

tests/reference/make_encoder.py made the .pth files with PyTorch; those that are refused are assembled here.
"""

import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from reference.encoder_weights import FAMILIES, original, saved

from llb import weights_io
from llb.encoder import SPECS, Spec, parameter_shapes
from llb.files import UserError
from llb.weights_io import LEGACY_MAGIC, fetch, read_tensors, read_tree, to_params, write_tree

REFERENCE = Path(__file__).parent / "reference"
SPEC = Spec("stored", **FAMILIES["stored"], antialias=True, image_size=28, groups=())


def refusal(read, *arguments) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    line = str(caught.value)
    assert line.startswith("--") and "\n" not in line
    return line


# ---- a small assembler of pickles ----


def number(n: int) -> bytes:
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def known(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


ORDERED = known("collections", "OrderedDict")
REBUILD = known("torch._utils", "_rebuild_tensor_v2")
PARAMETER = known("torch._utils", "_rebuild_parameter")
FLOATS = known("torch", "FloatStorage")


def storage(count: int = 4, key: bytes = text("0"), kind: bytes = FLOATS, *more: bytes) -> bytes:
    return together(text("storage"), kind, key, text("cpu"), number(count), *more) + b"Q"


def tensor(size=(4,), stride=(1,), offset: int = 0, of: bytes | None = None) -> bytes:
    size, stride = (together(*map(number, part)) for part in (size, stride))
    return call(REBUILD, of or storage(), number(offset), size, stride, b"\x89", call(ORDERED))


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(file: Path, body: bytes, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    """A .pth of the new format; storage "0" holds 0, 1, 2, 3."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", whole(body))
        for key, data in ({"0": np.arange(4, dtype="<f4").tobytes()} | storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return file


def legacy(file: Path, body: bytes, keys: bytes | None = None, count: int = 4) -> Path:
    """A .pth of the old format with the same storage."""
    parts = [number(LEGACY_MAGIC), number(1001), mapping(little_endian=b"\x88"), body, keys or b"](" + text("0") + b"e"]
    data = struct.pack("<q", count) + np.arange(4, dtype="<f4").tobytes()
    file.write_bytes(b"".join(map(whole, parts)) + data)
    return file


FORMATS = pytest.mark.parametrize("write", (zipped, legacy))


@FORMATS
def test_the_assembler_makes_files_that_are_read(tmp_path, write):
    # else a refusal below might have another reason than the one that the test is about
    body = mapping(a=tensor((2, 2), (2, 1)), b=call(PARAMETER, tensor((2, 2), (1, 2)), b"\x88", call(ORDERED)))
    a, b = read_tensors(write(tmp_path / "a", body)).values()
    np.testing.assert_array_equal(a, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(b, a.T)


# ---- what is read ----


@pytest.mark.parametrize("file", ("tensors_zip.pth", "tensors_legacy.pth"))
def test_every_kind_of_tensor_that_pytorch_saved_is_read(file):
    tensors = read_tensors(REFERENCE / file)
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"plain": base, "tied": base, "transposed": base.T, "sliced": base[1:, ::2]}
    expected |= {"parameter": np.float32([0.5, -1.5]), "scalar": np.float32(3), "empty": np.zeros((0, 3), np.float32)}
    for kind in (ml_dtypes.bfloat16, np.float16, np.float64, np.int64, np.int32, np.int16, np.int8):
        expected[np.dtype(kind).name] = np.array([[1, -2, 3]], kind)
    expected |= {"uint8": np.uint8([255, 1]), "bool": np.array([True, False])}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype, name
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_half_precision_safetensors_are_read(tmp_path):
    values = {"bfloat16": np.array([1, 2.5], ml_dtypes.bfloat16), "float16": np.float16([1, 2.5])}
    safetensors.numpy.save_file(values, tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    for name, value in values.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("kind", (ml_dtypes.bfloat16, np.float16))
def test_parameters_are_float32_whatever_the_file_has(kind):
    half = {name: value.astype(kind) for name, value in saved("stored").items()}
    params = to_params(half, SPEC, "f")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact = to_params(saved("stored"), SPEC, "f")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-6), params, exact)


# ---- what is not a weight file ----


def test_a_path_that_is_no_file_is_refused(tmp_path):
    assert "is a folder: give the file in it" in refusal(read_tensors, tmp_path)
    assert "cannot be read (No such file or directory)" in refusal(read_tensors, tmp_path / "absent.pth")


@pytest.mark.parametrize("content", (b"", b"PK", b"version https://git-lfs.github.com/spec/v1", b"<!DOCTYPE html>"))
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    line = refusal(read_tensors, tmp_path / "model.safetensors")
    assert line.endswith("is not a weight file: give model.safetensors or the original release's .pth")


def test_an_archive_without_tensors_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("encoder.pth", b"")
    assert "is an archive without data.pkl" in refusal(read_tensors, tmp_path / "a.zip")


def test_weights_of_a_big_endian_machine_are_refused(tmp_path):
    file = zipped(tmp_path / "a", mapping(a=tensor()))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert "big-endian" in refusal(read_tensors, file)


def test_a_plain_pickle_is_refused(tmp_path):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a").write_bytes(pickle.dumps({"a": [1.0]}, protocol))
        assert "give the original release's .pth" in refusal(read_tensors, tmp_path / "a")


@pytest.mark.parametrize("name", ("encoder_zip.pth", "encoder_legacy.pth", "safetensors"))
def test_a_file_cut_off_anywhere_is_refused(tmp_path, name):
    if name == "safetensors":
        safetensors.numpy.save_file(saved("stored"), tmp_path / "whole")
        content = (tmp_path / "whole").read_bytes()
    else:
        content = (REFERENCE / name).read_bytes()
    for length in (*range(0, len(content), 211), len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        refusal(read_tensors, tmp_path / "cut")


@FORMATS
@pytest.mark.parametrize(
    "body",
    (
        mapping(model=mapping(a=tensor())),
        mapping(a=tensor(), epoch=number(3)),
        mapping(a=storage()),
        b"}" + number(1) + tensor() + b"s",
        b"](" + tensor() + b"e",
        tensor(),
    ),
    ids=("nested", "with a number", "a storage", "named by a number", "a list", "one tensor"),
)
def test_what_is_no_plain_dictionary_of_tensors_is_refused(tmp_path, body, write):
    line = refusal(read_tensors, write(tmp_path / "a", body))
    assert line.endswith("holds no plain dictionary of tensors: give the released backbone, not a training checkpoint")


# ---- what a pickle could do ----


class Evil:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", (os.mkdir, os.system, eval, exec), ids=lambda function: function.__name__)
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path, function, protocol):
    trace = tmp_path / "trace"
    python = f"__import__('os').mkdir({str(trace)!r})"
    code = {os.mkdir: str(trace), os.system: f'mkdir "{trace}"', eval: python, exec: python}[function]
    content = pickle.dumps({"a": Evil(function, code)}, protocol)
    pickle.loads(content)
    assert trace.exists()  # it is dangerous
    trace.rmdir()

    (tmp_path / "raw.pth").write_bytes(content)
    (tmp_path / "legacy.pth").write_bytes(whole(number(LEGACY_MAGIC)) + 2 * whole(b"}") + content)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    for file in ("raw.pth", "legacy.pth", "zip.pth"):
        line = refusal(read_tensors, tmp_path / file)
        if protocol == 2:
            name = f"{'__builtin__' if function in (eval, exec) else os.mkdir.__module__}.{function.__name__}"
            assert f"asks for {name}, which is not a tensor; nothing in it was run: do not trust" in line
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    ("torch.load", "torch.storage._load_from_bytes", "torch._utils._rebuild_tensor", "collections.Counter", "torch.os"),
)
@FORMATS
def test_no_other_function_can_be_called_not_even_pytorchs(tmp_path, name, write):
    body = mapping(a=call(known(*name.rsplit(".", 1)), text("/etc/passwd")))
    assert f"asks for {name}, which" in refusal(read_tensors, write(tmp_path / "a", body))


def test_attributes_of_the_readers_own_functions_cannot_be_set(tmp_path):
    hostile = b"N" + mapping(__doc__=text("hostile"), __defaults__=together()) + b"\x86b"  # BUILD with (None, slots)
    for function in (REBUILD, ORDERED, FLOATS):
        body = mapping(a=tensor(of=storage()), b=function + hostile)
        refusal(read_tensors, zipped(tmp_path / "a", body))
    body = mapping(a=call(REBUILD + hostile, storage(), number(0), together(number(4)), together(number(1))))
    read_tensors(zipped(tmp_path / "a", body))
    assert weights_io._rebuild_tensor.__doc__ != "hostile"


def test_the_metadata_of_a_state_dict_is_passed_over(tmp_path):
    body = call(ORDERED) + text("a") + tensor() + b"s" + mapping(_metadata=mapping(version=number(1))) + b"b"
    assert list(read_tensors(zipped(tmp_path / "a", body))) == ["a"]


IMPOSSIBLE, BEYOND, STRANGE = "impossible strides", "reaches beyond its storage", "not a storage"
CANNOT_BE = {
    "offset": (tensor(offset=1), BEYOND),
    "length": (tensor((5,)), BEYOND),
    "stride": (tensor((2, 2), (4, 1)), BEYOND),
    "repeated": (tensor((5,), (0,)), BEYOND),
    "overflowing length": (tensor((2**62, 4), (0, 0)), BEYOND),
    "overflowing offset": (tensor((1,), (1,), 2**70), BEYOND),
    "backwards": (tensor(stride=(-1,), offset=3), IMPOSSIBLE),
    "negative offset": (tensor(offset=-1), IMPOSSIBLE),
    "negative length": (tensor((-4,)), IMPOSSIBLE),
    "more lengths than strides": (tensor((2, 2), (1,)), IMPOSSIBLE),
    "of a tensor": (tensor(of=tensor()), STRANGE),
    "of a text": (tensor(of=text("0123")), STRANGE),
    "of a key that is no text": (tensor(of=storage(key=number(0))), STRANGE),
    "of another kind": (tensor(of=storage(4, text("0"), ORDERED)), STRANGE),
    "of a storage's view": (
        tensor(of=storage(4, text("0"), FLOATS, together(text("1"), number(0), number(4)))),
        STRANGE,
    ),
    "a reference that is no tuple": (text("storage") + b"Q", STRANGE),
    "a copied dictionary": (call(ORDERED, mapping(a=tensor())), "is damaged"),
}


@FORMATS
@pytest.mark.parametrize("body, reason", CANNOT_BE.values(), ids=CANNOT_BE)
def test_a_tensor_that_cannot_be_is_refused(tmp_path, body, reason, write):
    assert reason in refusal(read_tensors, write(tmp_path / "a", mapping(a=body)))


def test_a_storage_of_another_size_than_told_is_refused(tmp_path):
    for count in (3, 5, -4, 2**40):
        body = mapping(a=tensor((2,), of=storage(count)))
        assert f"has 16 bytes where {4 * count} are due" in refusal(read_tensors, zipped(tmp_path / "a", body))
        refusal(read_tensors, legacy(tmp_path / "a", body))
    assert "another size" in refusal(read_tensors, legacy(tmp_path / "a", mapping(a=tensor()), count=5))


def test_a_storage_without_numbers_is_refused(tmp_path):
    missing = storage(4, text("1"))
    assert "'archive/data/1'" in refusal(read_tensors, zipped(tmp_path / "a", mapping(a=tensor(of=missing))))
    for keys in (b"]", b"](" + text("1") + b"e", b"](" + text("0") + text("0") + b"e"):
        file = legacy(tmp_path / "a", mapping(a=tensor()), keys)
        assert "lists other storages than its tensors use" in refusal(read_tensors, file)


def peak(function, *arguments) -> int:
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@FORMATS
@pytest.mark.parametrize(
    "body, reason",
    (
        (mapping(a=tensor((2**26,), (0,))), BEYOND),  # 256 MB, all in one place
        (mapping(a=tensor((2**26,), of=storage(2**26))), "storage 0"),
        # an entry of the memo: the unpickler in C also makes those before it
        (mapping(a=tensor()) + b"r" + struct.pack("<I", 2**24), None),
    ),
    ids=("expanded", "claimed", "memo"),
)
def test_a_small_file_cannot_fill_the_memory(tmp_path, body, reason, write):
    file = write(tmp_path / "a", body)

    def attempt():
        if reason:
            assert reason in refusal(read_tensors, file)
        else:
            read_tensors(file)

    assert peak(attempt) < 2**24


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    file = zipped(tmp_path / "a", mapping(a=tensor()), zipfile.ZIP_DEFLATED, **{"1": bytes(2**26)})
    assert "is compressed" in refusal(read_tensors, file)


def test_tensors_that_share_a_storage_share_its_memory(tmp_path):
    shared = storage(2**18, text("1"))
    many = mapping(**{f"t{i}": tensor((2**18,), of=shared) for i in range(100)})  # 100 MB if each had its own
    file = zipped(tmp_path / "a", many, **{"1": bytes(2**20)})
    assert peak(read_tensors, file) < 2**24


# ---- names ----


def stored_weights(names: str) -> dict[str, np.ndarray]:
    return original(saved("stored")) if names == "original" else saved("stored")


def test_both_sets_of_names_give_the_same_parameters():
    jax.tree.map(
        np.testing.assert_array_equal,
        to_params(stored_weights("original"), SPEC, "f"),
        to_params(stored_weights("transformers"), SPEC, "f"),
    )


def test_the_parameters_are_all_that_the_model_has():
    params = to_params(stored_weights("original"), SPEC, "f")
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, parameter_shapes(SPEC))


@pytest.mark.parametrize("names", ("original", "transformers"))
def test_each_weight_that_is_missing_left_over_or_of_another_shape_is_named(names):
    unused = {"original": ("mask_token", "norm."), "transformers": ("embeddings.mask_token", "layernorm.")}[names]
    for name, value in stored_weights(names).items():
        rest = stored_weights(names)
        if name.startswith(unused):
            rest.pop(name)
            to_params(rest, SPEC, "f")
            continue
        rest[name] = np.concatenate([value, value])
        line = refusal(to_params, rest, SPEC, "f")
        assert line == f"--weights f: {name} has shape {rest[name].shape} where stored has {value.shape}"
        del rest[name]
        # without its class token a file cannot be told from one of transformers
        missing = "embeddings.cls_token" if name == "cls_token" else name
        line = refusal(to_params, rest, SPEC, "f")
        assert line == f"--weights f: {missing} is missing, so these are not weights of stored"


@pytest.mark.parametrize("names, stranger", (("original", "head.weight"), ("transformers", "classifier.weight")))
def test_what_is_left_over_is_named(names, stranger):
    tensors = stored_weights(names) | {stranger: np.zeros(3)}
    assert f"--weights f: {stranger} is left over" in refusal(to_params, tensors, SPEC, "f")
    tensors |= {"z": np.zeros(3)}
    assert f"--weights f: {stranger} and 1 more is left over" in refusal(to_params, tensors, SPEC, "f")


def test_a_deeper_model_is_not_taken_for_a_shallower_one():
    tensors = stored_weights("original")
    tensors |= {name.replace("blocks.1", "blocks.2"): value for name, value in tensors.items() if "blocks.1" in name}
    assert "blocks.2.attn.proj.bias and 13 more is left over" in refusal(to_params, tensors, SPEC, "f")


def test_prefixes_of_transformers_classes_and_the_pooler_make_no_difference():
    for family, prefix in (
        ("dino16", "vit."),
        ("dinov2", "dinov2."),
        ("dinov2_reg", "dinov2_with_registers."),
        ("dinov2_reg", "dinov2."),
    ):
        registers = FAMILIES[family]["registers"]
        spec = Spec(family, **FAMILIES[family], antialias=registers > 0, image_size=0, groups=())
        tensors = saved(family)
        expected = to_params(tensors, spec, "f")
        tensors = {prefix + name: value for name, value in tensors.items()}
        tensors |= {prefix + "pooler.dense.weight": np.zeros((2, 2)), prefix + "pooler.dense.bias": np.zeros(2)}
        jax.tree.map(np.testing.assert_array_equal, to_params(tensors, spec, "f"), expected)


# ---- tiny's own format ----


def tiny_tree() -> dict:
    random = np.random.default_rng(0)
    shapes = parameter_shapes(SPECS["tiny"])
    return jax.tree.map(lambda leaf: random.normal(0, 1, leaf.shape).astype(np.float16), shapes)


def test_a_tree_reads_back_as_it_was_written_in_float32(tmp_path):
    tree = tiny_tree()
    write_tree(tree, tmp_path / "tiny.safetensors", {"made": "here"})
    read = read_tree(tmp_path / "tiny.safetensors", parameter_shapes(SPECS["tiny"]))
    assert jax.tree.structure(read) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}
    assert {value.dtype for value in read_tensors(tmp_path / "tiny.safetensors").values()} == {np.dtype(np.float16)}
    assert os.listdir(tmp_path) == ["tiny.safetensors"]


def test_a_tree_that_does_not_fit_names_the_weight(tmp_path):
    file, shapes = tmp_path / "a", parameter_shapes(SPECS["tiny"])
    for change, told in (
        (lambda tree: tree.pop("cls_token"), "cls_token is missing"),
        (lambda tree: tree["block_0"].update(extra=np.zeros(2)), "block_0/extra is left over"),
        (lambda tree: tree.update(cls_token=np.zeros(2)), r"cls_token has shape (2,), not (192,)"),
    ):
        tree = tiny_tree()
        change(tree)
        write_tree(tree, file, {})
        assert refusal(read_tree, file, shapes) == f"--weights {file}: {told}"


# ---- fetching ----

GONE = EntryNotFoundError("404")


@pytest.mark.parametrize("error", (ConnectionError("a\nb"), LocalEntryNotFoundError("offline"), GONE, OSError()))
def test_offline_the_error_names_the_file_and_how_to_pass_it(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    line = refusal(fetch, SPECS["dinov2_vitb14_reg"])
    assert line.startswith("--encoder dinov2_vitb14_reg: its weights could not be fetched (")
    assert line.endswith(
        "download model.safetensors (or, where there is none, pytorch_model.bin) from "
        "https://huggingface.co/facebook/dinov2-with-registers-base and pass it with --weights FILE"
    )


def test_a_repository_without_safetensors_gives_its_pytorch_file(monkeypatch):
    def download(repository, name):
        if name == "model.safetensors":
            raise GONE
        return f"/cache/{repository}/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch(SPECS["dino_vits16"]) == Path("/cache/facebook/dino-vits16/pytorch_model.bin")
