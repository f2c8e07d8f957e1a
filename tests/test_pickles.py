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
    return b"\x8a" + bytes([len(data := pickle.encode_long(n))]) + data


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def known(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def mapping(items: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in ((items or {}) | more).items()) + b"u"


ORDERED, FLOATS = known("collections.OrderedDict"), known("torch.FloatStorage")
REBUILD, V3 = known("torch._utils._rebuild_tensor_v2"), known("torch._utils._rebuild_tensor_v3")


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


def legacy(file: Path, body: bytes, keys: str | None = None, count: int = 4) -> Path:
    """A .pth of the older format with the same storage."""
    keys = b"](" + b"".join(map(text, keys if keys is not None else "0" * (b"FloatStorage" in body))) + b"e"
    parts = [number(pickles.LEGACY_MAGIC), number(1001), mapping(little_endian=b"\x88"), body, keys]
    data = struct.pack("<q", count) + np.arange(4, dtype="<f4").tobytes()
    file.write_bytes(b"".join(map(whole, parts)) + data)
    return file


FORMATS = pytest.mark.parametrize("write", (zipped, legacy))


@pytest.mark.parametrize("file", ("tensors_zip.pth", "tensors_legacy.pth"))
def test_every_kind_of_tensor_that_pytorch_saves_is_read(file):
    tensors = read_tensors(Path(__file__).parent / "reference" / file)
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
    Evil = type("Evil", (), {"__reduce__": lambda self: (function, (code,))})
    content = pickle.dumps({"a": Evil()}, protocol)
    pickle.loads(content)
    trace.rmdir()  # it is dangerous: the folder was there
    (tmp_path / "raw.pth").write_bytes(content)
    (tmp_path / "legacy.pth").write_bytes(whole(number(pickles.LEGACY_MAGIC)) + 2 * whole(b"}") + content)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    for file in ("raw.pth", "legacy.pth", "zip.pth"):
        refusal(tmp_path / file)
    assert not trace.exists()


ATTRIBUTES = b"N" + mapping(__doc__=text("hostile")) + b"\x86b"  # BUILD with (None, slots)
OTHER = "torch.load torch.storage._load_from_bytes torch._utils._rebuild_tensor torch.os os.mkdir os.system"
NOT_PLAIN = "holds no plain dictionary of tensors; give the released backbone, not a training checkpoint"
IMPOSSIBLE, BEYOND, STRANGE = "impossible strides", "reaches beyond its storage", "not a storage"
DEEP = b")" + b"\x85" * 200_000  # the hash of such a tuple ends the process
LONG = ((4,), (1,), 1), ((5,),), ((2, 2), (4, 1)), ((2**26,), (0,)), ((2**62, 4), (0, 0)), ((1,), (1,), 2**70)
WRONG = ((4,), (-1,), 3), ((4,), (1,), -1), ((-4,),), ((2, 2), (1,)), ((1,) * 9000, (1,) * 9000)
VIEW = storage(4, text("0"), FLOATS, together(text("1")))
NO_STORAGE = tensor(), text("0123"), storage(key=number(0)), storage(kind=ORDERED), storage(-4), VIEW
TENSORS = {
    BEYOND: [tensor(*about) for about in LONG],
    IMPOSSIBLE: [tensor(*about) for about in WRONG] + [call(REBUILD, storage(), b"K\0", *[together(b")")] * 2)],
    STRANGE: [tensor(of=of) for of in NO_STORAGE] + [text("storage") + b"Q", DEEP[:40_000] + b"Q"],
    "storage 0": [tensor((2,), of=storage(count)) for count in (3, 5, 2**26, 2**40)],
    NOT_PLAIN: [mapping(a=tensor()), storage(), call(ORDERED, mapping(a=tensor())), b"}q\1" + text("a") + b"h\1s"],
    "is a pickle of more than tensors": [tensor() + b"0" + tensor(), b"\x8b\xff\xff\xff\x7f"],
    "has no list of tensors that ends within": [b"X\xff\xff\xff\xff"],  # a text of 4 GB
    "is damaged": [b"h\7", b"cos"],
    r"asks for os.\x1b[31m\r, which": [call(known("os.\x1b[31m\r"))],  # a terminal would obey
    "is a whole model": [known("torch.nn.modules.linear.Linear")],
    "is saved in float8; convert": [call(V3, *[b"N"] * 6, known("torch.float8_e4m3fn"))],
    **{f"asks for {name}, which is not a tensor": [call(known(name), text("/tmp/x"))] for name in OTHER.split()},
}
KEYS = DEEP, b"N".join(number(n * (2**61 - 1)) for n in range(1, 9))  # the last have one hash
OTHERS = [mapping(a=tensor(), b=b) for b in (number(3), *(name + ATTRIBUTES for name in (REBUILD, ORDERED, FLOATS)))]
OTHERS += [mapping(model=mapping(a=tensor()), b=b"}(" + key + b"Nu") for key in KEYS]
OTHERS += [b"}", b"}" + number(1) + tensor() + b"s", b"](" + tensor() + b"e", mapping(student=mapping(a=tensor()))]
CONTENTS = {
    NOT_PLAIN: [tensor(), *OTHERS],
    "xx … x": [known("os." + "x" * 500)],
    "asks for os.system": [mapping(teacher=mapping(a=tensor()), args=known("os.system"))],
    "has a more than once": [mapping({"a": tensor(), "module.a": tensor()})],
    "has names that no weight has": [mapping({"a\nb": tensor()}), mapping({"a" * 201: tensor()})],
}
REFUSED = [(mapping(a=body), reason) for reason, bodies in TENSORS.items() for body in bodies]
REFUSED += [(body, reason) for reason, bodies in CONTENTS.items() for body in bodies]


@FORMATS
@pytest.mark.parametrize("body, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_anything_but_a_plain_dictionary_of_tensors_is_refused_in_little_memory(tmp_path, body, reason, write):
    file = write(tmp_path / "a", body)
    with little_memory():
        assert reason in refusal(file)


SCALAR = call(known("numpy.core.multiarray.scalar"), call(known("numpy.dtype"), text("f8")), text("12345678"))
ARGUMENTS = known("argparse.Namespace") + b")\x81" + mapping(lr=SCALAR, out=call(known("pathlib.PosixPath"))) + b"b"
BESIDE = dict(epoch=number(3), args=ARGUMENTS, optimizer=mapping(state=b"}" + number(0) + tensor((1,)) + b"s"))
HEADS = {"head.mlp.0.weight": tensor((1,)), "head.last_layer.weight_g": tensor((1,))}
SEVERAL = {"student.backbone.a": tensor((1,)), "teacher.backbone.a": tensor(), "teacher.center": tensor()}
PARTS = [dict(student=mapping({"backbone.a": tensor((1,))}), teacher=mapping({"backbone.a": tensor()} | HEADS))]
PARTS += [dict(model=mapping(SEVERAL))]
PARTS += [{part: mapping({"a": tensor()} | HEADS)} for part in ("teacher", "state_dict")]


@FORMATS
@pytest.mark.parametrize("parts", PARTS, ids=("DINO", "DINOv2", "teacher", "state_dict"))
def test_of_a_training_checkpoint_the_backbone_is_read(tmp_path, parts, write):
    tensors = read_tensors(write(tmp_path / "a", mapping(BESIDE | parts)))
    assert {name: value.tolist() for name, value in tensors.items()} == {"a": [0, 1, 2, 3]}


def test_other_pickles_and_archives_are_refused(tmp_path):
    file, plain, missing = tmp_path / "a", mapping(a=tensor()), mapping(a=tensor(of=storage(4, text("1"))))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"a": [1.0]}, protocol))
        assert "give the original release's .pth" in refusal(file)
    for keys in ("", "1", "00"):
        assert "lists other storages than its tensors use" in refusal(legacy(file, plain, keys))
    assert "another size" in refusal(legacy(file, plain, count=5))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("encoder.pth", b"")
    assert "is an archive without data.pkl" in refusal(file)
    assert "'archive/data/1'" in refusal(zipped(file, missing))
    assert "big-endian" in refusal(zipped(file, plain, byteorder=b"big"))
    assert "has a data.pkl of over" in refusal(zipped(file, b"}" * 2**21))
    assert "too long a list" in refusal(zipped(file, plain, **{f"{n}{'x' * 60000}": b"" for n in range(20)}))


@pytest.mark.parametrize("method", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
def test_an_archive_that_lies_is_refused_in_little_memory(tmp_path, method):
    file = zipped(tmp_path / "a", mapping(a=tensor()), method, **{"data/0": bytes(2**26 if method else 16)})
    *start, entry = file.read_bytes().split(b"PK\1\2")
    sizes_places_encryption = (24, 2**31), (24, 2**32 - 1), (42, 0), (42, 2**31), (8, 1)
    for at, value in [(24, 16)] if method else sizes_places_encryption:  # 64 MB that claim to be the tensor's 16 bytes
        file.write_bytes(b"PK\1\2".join([*start, entry[: at - 4] + struct.pack("<I", value) + entry[at:]]))
        with little_memory():
            assert ("is compressed or its entries overlap" if at == 24 else "is damaged") in refusal(file)


def test_an_index_of_the_memo_and_tensors_that_share_a_storage_need_little_memory(tmp_path):
    shared = tensor((2**18,), of=storage(2**18, text("1")))  # 100 MB if each had its own
    body = mapping({f"t{i}": shared for i in range(100)}) + b"r" + struct.pack("<I", 2**24)
    with little_memory():
        read_tensors(zipped(tmp_path / "a", body, **{"data/1": bytes(2**20)}))
