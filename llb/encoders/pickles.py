"""The tensors of a .pth file, which PyTorch wrote with torch.save.

A .pth file is a pickle, and a pickle is a program for a stack machine. This reader has a machine of its own, with only
the opcodes that torch.save writes. It can put a tensor together from a storage, knows by name what else stands in
training checkpoints, and refuses every other name. It calls nothing and needs no PyTorch.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llb.files import UserError

STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.storage.UntypedStorage": np.uint8,  # of dtypes that are refused below
}
TENSORS = {f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")}
# What training checkpoints hold beside tensors. An empty dictionary stands for each.
OTHERS = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)|argparse\.Namespace|pathlib\.(_local\.)?\w+Path|_codecs\.encode"
    r"|__builtin__\.(set|dict|list|int|float)|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))"
    r"|torch\.(Size|device|bool|(bf|f|ui|i)(loat|nt)\d+(_\w+)?)"
)
CHECKPOINT = ("teacher", "state_dict", "model")  # where it holds the weights; of DINO's own the teacher is released
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}  # into the memo, by index
GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
ZIP_START = b"PK\x03\x04"  # torch.save since version 1.6
PICKLE_START = b"\x80"  # before
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MOST_BYTES = 2**20  # of what describes the tensors (a ViT-L has 0.1 MB), so that time and memory have a bound
NOT_PLAIN = "holds no plain dictionary of tensors; give the released backbone, not a training checkpoint"


def read_pickle(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a .pth file of either format, by the file's own names.

    Of a training checkpoint only the weights are read, by names like "teacher.backbone.cls_token". A UserError, which
    does not name the file, is raised if the pickle asks for more. For a damaged file many types are raised.
    """
    with _Stream(io.FileIO(file)) as stream:
        is_zip = stream.read(len(ZIP_START)) == ZIP_START
        stream.seek(0)
        content, load = (_open_zip if is_zip else _open_legacy)(stream)
        load = cache(load)
        return {name: _array(tensor, load(tensor.storage.key)) for name, tensor in _weights(content).items()}


class _Stream(io.BufferedReader):
    """An archive's file. zipfile reads the list of entries at once, and needs a multiple of its size in memory."""

    def read(self, size: int = -1) -> bytes:
        if size > MOST_BYTES:
            raise UserError("has too long a list of entries; give the original release's .pth")
        return super().read(size)


@dataclass(frozen=True)
class _Name:
    """Stands for what a pickle asks for by name: torch.FloatStorage and the like. It cannot be called."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The numbers that tensors are views of, `count` as the pickle says."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage, all in numbers."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _weights(content: Any) -> dict[str, _Tensor]:
    for part in CHECKPOINT if isinstance(content, dict) else ():
        if isinstance(content.get(part), dict):
            content = {f"{part}.{name}": value for name, value in content[part].items()}
            break
    items = content.items() if isinstance(content, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(value, _Tensor) for name, value in items):
        raise UserError(NOT_PLAIN)
    return content


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """The view of the storage's bytes. It copies nothing."""
    storage, item = tensor.storage, tensor.storage.dtype.itemsize
    if len(data) != storage.count * item:
        raise UserError(f"storage {storage.key} has {len(data)} bytes, not {storage.count * item}")
    # np.ndarray checks the bounds once more
    strides = tuple(step * item for step in tensor.stride)
    return np.ndarray(tensor.size, storage.dtype, data, tensor.offset * item, strides)


def _build_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple) -> _Tensor:
    """torch._utils._rebuild_tensor_v2, which has further arguments. A view that reaches beyond its storage, or has more
    numbers than it, is refused: a small file must not fill the memory."""
    if not isinstance(storage, _Storage):
        raise UserError("builds a tensor on something that is not a storage")
    if not len(size) == len(stride) <= 64 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UserError("holds a tensor with impossible strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and (last >= storage.count or math.prod(size) > storage.count):
        raise UserError("holds a tensor that reaches beyond its storage")
    return _Tensor(storage, offset, size, stride)


def _find(name: str) -> _Name:
    if name in STORAGES or name in TENSORS or OTHERS.fullmatch(name):
        return _Name(name)
    if name.startswith("torch.nn.modules."):
        raise UserError("is a whole model, which only its own code can read; save its state_dict() instead")
    problem = f"asks for {name}, which is not a tensor"
    raise UserError(f"{problem}, and nothing in it was run; do not trust this file")


def _call(function: Any, arguments: Any) -> Any:
    """What a call that torch.save writes would return, without any call. Only the needed arguments are looked at."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise UserError("calls something that has no name, and nothing in it was run; do not trust this file")
    match function.name.removeprefix("torch._utils._rebuild_"):
        case "tensor_v2":
            return _build_tensor(*arguments[:4])
        case "tensor_v3":  # of dtypes without a storage type of their own
            kind = arguments[6].name.removeprefix("torch.").partition("_")[0]
            raise UserError(f"is saved in {kind}; convert to float16, bfloat16 or float32")
        case "parameter":
            return arguments[0]
    return {}


def _find_storage(reference: Any) -> _Storage:
    match reference[:6] if isinstance(reference, tuple) else None:
        # a sixth part is the view of a storage, which only versions before 0.4 wrote; None is none
        case ("storage", _Name(kind), str(key), str(), int(count), *view) if kind in STORAGES and not any(view):
            if count >= 0:
                return _Storage(key, np.dtype(STORAGES[kind]), count)
    raise UserError("refers to something that is not a storage")


def _set_items(target: Any, keys: tuple, values: tuple) -> None:
    """Keys are texts and numbers below Python's hash modulus: the hash of a deep tuple ends the process, and larger
    numbers can be chosen to have equal hashes."""
    if not isinstance(target, dict) or not all(type(k) is str or (type(k) is int and abs(k) < 2**60) for k in keys):
        raise UserError(NOT_PLAIN)
    target.update(zip(keys, values))


def _run(data: bytes, at: int, storages: dict[str, _Storage]) -> tuple[Any, int]:
    """The value of the pickle that starts at `at`, and where it ends. Its storages are added to `storages`.

    Each opcode takes time and memory for its own bytes only. Nothing here looks into a value that is nested more
    deeply than a tensor's arguments, so no depth of nesting matters.
    """
    stack, memo, marks = [], {}, []

    def take(count: int) -> bytes:
        nonlocal at
        if at + count > len(data):
            raise UserError(f"has no list of tensors that ends within {MOST_BYTES} bytes; download it again")
        at += count
        return data[at - count : at]

    def number(form: str) -> Any:
        return struct.unpack(form, take(struct.calcsize(form)))[0]

    def line() -> str:
        return take(data.index(b"\n", at) + 1 - at)[:-1].decode()

    def pop(count: int) -> tuple:
        return tuple([stack.pop() for _ in range(count)][::-1])

    def since_mark() -> tuple:
        return pop(len(stack) - marks.pop())

    while (code := take(1)) != pickle.STOP:
        if code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in NUMBERS:
            stack.append(number(NUMBERS[code]))
        elif code in TUPLES:
            stack.append(pop(TUPLES[code]))
        elif code in GETS:
            stack.append(memo[number(GETS[code])])
        elif code in PUTS:
            memo[number(PUTS[code])] = stack[-1]
        elif code == pickle.PROTO:
            take(1)
        elif code == pickle.LONG1:
            stack.append(pickle.decode_long(take(number("<B"))))
        elif code == pickle.BINUNICODE:
            stack.append(take(number("<I")).decode())
        elif code == pickle.MARK:
            marks.append(len(stack))
        elif code == pickle.TUPLE:
            stack.append(since_mark())
        elif code == pickle.EMPTY_LIST:
            stack.append([])
        elif code in (pickle.APPEND, pickle.APPENDS):
            values = pop(1) if code == pickle.APPEND else since_mark()
            stack[-1].extend(values)
        elif code == pickle.EMPTY_DICT:
            stack.append({})
        elif code in (pickle.SETITEM, pickle.SETITEMS):
            items = pop(2) if code == pickle.SETITEM else since_mark()
            _set_items(stack[-1], items[::2], items[1::2])
        elif code == pickle.GLOBAL:
            stack.append(_find(f"{line()}.{line()}"))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            stack.append(_call(*pop(2)))
        elif code == pickle.BUILD:
            stack.pop()  # attributes (a state_dict has _metadata): of no use here
        elif code == pickle.BINPERSID:
            storage = _find_storage(stack.pop())
            storages[storage.key] = storage
            stack.append(storage)
        else:
            problem = "is a pickle of more than tensors, and nothing in it was run"
            raise UserError(f"{problem}; give the original release's .pth")
    return stack.pop(), at


def _open_zip(stream: _Stream) -> tuple[Any, Callable[[str], bytes]]:
    """The format since PyTorch 1.6: an archive with data.pkl and one entry for each storage.

    Returns the content, and a function from a storage's key to its bytes.
    """
    archive = zipfile.ZipFile(stream)
    entries = {entry.filename: entry for entry in archive.infolist()}
    # what an entry claims is not what unpacking gives: 3 GB from 1 kB
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values())
    if not stored or sum(entry.file_size for entry in archive.infolist()) > stream.seek(0, io.SEEK_END):
        raise UserError("is compressed or its entries overlap, which torch.save never does; unpack it first")
    described = next((name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")), None)
    if described is None:
        raise UserError("is an archive without data.pkl, so not a weight file; give the original release's .pth")
    if entries[described].file_size > MOST_BYTES:
        raise UserError(f"has a data.pkl of over {MOST_BYTES} bytes; give the original release's .pth")

    def read(name: str) -> bytes:
        with archive.open(name) as entry:
            return b"".join(iter(partial(entry.read, 2**20), b""))

    prefix = described.removesuffix("data.pkl")
    if prefix + "byteorder" in entries and read(prefix + "byteorder") != b"little":
        raise UserError("was saved on a big-endian machine, which is not supported")
    return _run(read(described), 0, {})[0], lambda key: read(f"{prefix}data/{key}")


def _open_legacy(stream: _Stream) -> tuple[Any, Callable[[str], bytes]]:
    """The format before: five pickles (magic, protocol, system, content, storage keys), then for each key the number of
    its numbers, and these. Returns the same two as `_open_zip`."""
    size, storages, starts = stream.seek(0, io.SEEK_END), {}, {}
    stream.seek(0)
    described = stream.read(MOST_BYTES)
    magic, at = _run(described, 0, {})
    if magic != LEGACY_MAGIC:
        raise UserError("is a pickle, but not a weight file; give the original release's .pth")
    _protocol, at = _run(described, at, {})
    _system, at = _run(described, at, {})
    content, at = _run(described, at, storages)
    keys, at = _run(described, at, {})
    if not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise UserError("lists other storages than its tensors use")
    for key in keys:
        stream.seek(at)
        if struct.unpack("<q", stream.read(8)) != (storages[key].count,):
            raise UserError(f"storage {key} has another size than the tensors say")
        starts[key] = at + 8
        at += 8 + storages[key].count * storages[key].dtype.itemsize
        if at > size:
            raise UserError(f"ends within storage {key}; download it again")

    def read(key: str) -> bytes:
        stream.seek(starts[key])
        data = bytearray(storages[key].count * storages[key].dtype.itemsize)
        stream.readinto(data)
        return data

    return content, read
