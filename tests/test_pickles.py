""".pth files (PyTorch's own from reference/make_encoder.py): tensors are read, all else is refused, nothing is run."""

import os
import pickle
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llb.encoders import pickles
from llb.encoders.weights import read_tensors
from llb.files import UserError

REFERENCE = Path(__file__).parent / "reference"


def refusal(file: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        read_tensors(file)
    line = str(caught.value)
    assert line.startswith(f"--weights {file}: ") and "\n" not in line
    return line


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# A small assembler of pickles: each function returns opcodes that leave one value on the stack.


def number(n: int) -> bytes:
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def known(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


ORDERED, FLOATS = known("collections.OrderedDict"), known("torch.FloatStorage")
REBUILD = known("torch._utils._rebuild_tensor_v2")


def storage(count: int = 4, key: bytes = text("0"), kind: bytes = FLOATS, *more: bytes) -> bytes:
    return together(text("storage"), kind, key, text("cpu"), number(count), *more) + b"Q"


def tensor(size=(4,), stride=(1,), offset: int = 0, of: bytes | None = None) -> bytes:
    size, stride = (together(*map(number, part)) for part in (size, stride))
    return call(REBUILD, of or storage(), number(offset), size, stride, b"\x89", call(ORDERED))


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(file: Path, body: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A .pth of the newer format; storage "0" holds 0, 1, 2, 3."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", whole(body))
        for name, data in ({"data/0": np.arange(4, dtype="<f4").tobytes()} | entries).items():
            archive.writestr(f"archive/{name}", data)
    return file


def legacy(file: Path, body: bytes, keys: bytes = b"](" + text("0") + b"e", count: int = 4) -> Path:
    """A .pth of the older format with the same storage."""
    parts = [number(pickles.LEGACY_MAGIC), number(1001), mapping(little_endian=b"\x88"), body, keys]
    data = struct.pack("<q", count) + np.arange(4, dtype="<f4").tobytes()
    file.write_bytes(b"".join(map(whole, parts)) + data)
    return file


FORMATS = pytest.mark.parametrize("write", (zipped, legacy))


@pytest.mark.parametrize("file", ("tensors_zip.pth", "tensors_legacy.pth"))
def test_every_kind_of_tensor_that_pytorch_saves_is_read(file):
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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", (os.mkdir, os.system, eval, exec), ids=lambda function: function.__name__)
def test_a_pickle_that_would_run_something_is_refused_and_nothing_runs(tmp_path, function, protocol):
    trace = tmp_path / "trace"
    python = f"__import__('os').mkdir({str(trace)!r})"
    code = {os.mkdir: str(trace), os.system: f'mkdir "{trace}"', eval: python, exec: python}[function]

    class Evil:
        def __reduce__(self):
            return function, (code,)

    content = pickle.dumps({"a": Evil()}, protocol)
    pickle.loads(content)
    assert trace.exists()  # it is dangerous
    trace.rmdir()
    (tmp_path / "raw.pth").write_bytes(content)
    (tmp_path / "legacy.pth").write_bytes(whole(number(pickles.LEGACY_MAGIC)) + 2 * whole(b"}") + content)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    for file in ("raw.pth", "legacy.pth", "zip.pth"):
        refusal(tmp_path / file)
    assert not trace.exists()


ATTRIBUTES = b"N" + mapping(__doc__=text("hostile"), __defaults__=together()) + b"\x86b"  # BUILD with (None, slots)


def test_attributes_of_the_readers_own_functions_cannot_be_set(tmp_path):
    body = call(REBUILD + ATTRIBUTES, storage(), number(0), together(number(4)), together(number(1)))
    assert list(read_tensors(zipped(tmp_path / "a", mapping(a=body)))) == ["a"]
    assert pickles._rebuild_tensor.__doc__ != "hostile"


OTHER = "torch.load torch.storage._load_from_bytes torch._utils._rebuild_tensor torch.os collections.Counter os.mkdir"
NOT_PLAIN = "holds no plain dictionary of tensors; give the released backbone, not a training checkpoint"
IMPOSSIBLE, BEYOND, STRANGE = "impossible strides", "reaches beyond its storage", "not a storage"
TENSORS = {
    "offset": (tensor(offset=1), BEYOND),
    "length": (tensor((5,)), BEYOND),
    "stride": (tensor((2, 2), (4, 1)), BEYOND),
    "repeated": (tensor((2**26,), (0,)), BEYOND),  # 256 MB
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
    "of a storage's view": (tensor(of=storage(4, text("0"), FLOATS, together(text("1")))), STRANGE),
    "a reference that is no tuple": (text("storage") + b"Q", STRANGE),
    "an opcode that torch.save does not write": (tensor() + b"0" + tensor(), "is a pickle of more than tensors"),
    "a copied dictionary": (call(ORDERED, mapping(a=tensor())), "is damaged"),
    "nested": (mapping(a=tensor()), NOT_PLAIN),
    "a storage": (storage(), NOT_PLAIN),
    **{f"storage of {n}": (tensor((2,), of=storage(n)), "storage 0") for n in (3, 5, -4, 2**26, 2**40)},
    **{name: (call(known(name), text("/tmp/x")), f"asks for {name}, which is not a tensor") for name in OTHER.split()},
}
REFUSED = {name: (mapping(a=body), reason) for name, (body, reason) in TENSORS.items()} | {
    **{f"attributes {f}": (mapping(a=tensor(), b=f + ATTRIBUTES), NOT_PLAIN) for f in (REBUILD, ORDERED, FLOATS)},
    "with a number": (mapping(a=tensor(), epoch=number(3)), NOT_PLAIN),
    "named by a number": (b"}" + number(1) + tensor() + b"s", NOT_PLAIN),
    "a list": (b"](" + tensor() + b"e", NOT_PLAIN),
    "one tensor": (tensor(), NOT_PLAIN),
}


@FORMATS
@pytest.mark.parametrize("body, reason", REFUSED.values(), ids=REFUSED)
def test_anything_but_a_plain_dictionary_of_tensors_is_refused_in_little_memory(tmp_path, body, reason, write):
    file = write(tmp_path / "a", body)
    with little_memory():
        assert reason in refusal(file)


def test_a_storage_that_is_missing_or_of_another_size_is_refused(tmp_path):
    missing = mapping(a=tensor(of=storage(4, text("1"))))
    assert "'archive/data/1'" in refusal(zipped(tmp_path / "a", missing))
    for keys in (b"]", b"](" + text("1") + b"e", b"](" + text("0") + text("0") + b"e"):
        file = legacy(tmp_path / "a", mapping(a=tensor()), keys)
        assert "lists other storages than its tensors use" in refusal(file)
    assert "another size" in refusal(legacy(tmp_path / "a", mapping(a=tensor()), count=5))


def test_other_pickles_and_archives_are_refused_in_little_memory(tmp_path):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a").write_bytes(pickle.dumps({"a": [1.0]}, protocol))
        assert "give the original release's .pth" in refusal(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("encoder.pth", b"")
    assert "is an archive without data.pkl" in refusal(tmp_path / "a")
    assert "big-endian" in refusal(zipped(tmp_path / "a", mapping(a=tensor()), byteorder=b"big"))
    file = zipped(tmp_path / "a", mapping(a=tensor()), zipfile.ZIP_DEFLATED, **{"data/1": bytes(2**26)})
    with little_memory():
        assert "is compressed" in refusal(file)


@FORMATS
def test_a_high_index_of_the_memo_needs_no_memory(tmp_path, write):
    # the unpickler in C also allocates the entries below the index
    file = write(tmp_path / "a", mapping(a=tensor()) + b"r" + struct.pack("<I", 2**24))
    with little_memory():
        read_tensors(file)


def test_tensors_that_share_a_storage_share_its_memory(tmp_path):
    shared = storage(2**18, text("1"))
    many = mapping(**{f"t{i}": tensor((2**18,), of=shared) for i in range(100)})  # 100 MB if each had its own
    file = zipped(tmp_path / "a", many, **{"data/1": bytes(2**20)})
    with little_memory():
        read_tensors(file)
