"""The tensors of a .pth file, which PyTorch wrote with torch.save.

A .pth file is a pickle, and a pickle is a program. This reader runs none of it: its unpickler can only put a tensor
together from a storage, and refuses every other name. It needs no PyTorch.
"""

import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llb.files import UserError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
OPCODES = {  # of pickles: all that torch.save writes
    getattr(pickle, name)[0]
    for name in (
        "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
        "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
        "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
    ).split()
}
ZIP_START = b"PK\x03\x04"  # torch.save since version 1.6
PICKLE_START = b"\x80"  # before
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_pickle(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a .pth file of either format, by the file's own names.

    A UserError, which does not name the file, is raised if the pickle asks for more than tensors. For a damaged file
    zipfile and pickle raise many types.
    """
    with open(file, "rb") as stream:
        is_zip = stream.read(len(ZIP_START)) == ZIP_START
    content = _read_zip(file) if is_zip else _read_legacy(file)
    items = content.items() if isinstance(content, dict) else [(None, content)]
    if not all(isinstance(name, str) and isinstance(value, np.ndarray) for name, value in items):
        raise UserError("holds no plain dictionary of tensors; give the released backbone, not a training checkpoint")
    return content


@dataclass(frozen=True)
class _StorageType:
    """Stands for torch.FloatStorage and the like: a dtype, and nothing that could be called."""

    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class _Storage:
    """The bytes that tensors are views of."""

    data: bytes | np.ndarray
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.data) // self.dtype.itemsize


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_unused) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2: a strided view of a storage; one that reaches beyond the storage is refused.

    The view copies nothing and has at most as many numbers as the storage: a small file must not fill the memory.
    """
    if not isinstance(storage, _Storage):
        raise UserError("builds a tensor on something that is not a storage")
    if any(n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise UserError("holds a tensor with impossible strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and (last >= len(storage) or math.prod(size) > len(storage)):
        raise UserError("holds a tensor that reaches beyond its storage")
    item = storage.dtype.itemsize
    # np.ndarray checks the bounds once more
    return np.ndarray(size, storage.dtype, storage.data, offset * item, tuple(step * item for step in stride))


def _refuse_opcode(_unpickler) -> None:
    raise UserError("is a pickle of more than tensors, and nothing in it was run; give the original release's .pth")


def _drop_attributes(unpickler) -> None:
    """BUILD: the attributes of a dictionary (a state_dict has _metadata) are of no use here."""
    unpickler.stack.pop()


class _Unpickler(pickle._Unpickler):
    """Knows tensors and dictionaries, and nothing else that could be called.

    This is the unpickler written in Python, because its opcodes can be chosen. The one in C gives attributes to
    anything that the file names (BUILD), and lets five bytes claim tens of GB (LONG_BINPUT with a high index).
    """

    dispatch = {code: op if code in OPCODES else _refuse_opcode for code, op in pickle._Unpickler.dispatch.items()}
    dispatch[pickle.BUILD[0]] = _drop_attributes
    ALLOWED = {
        ("collections", "OrderedDict"): lambda: {},  # without arguments: the items follow
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_unused: tensor,
    }

    def __init__(self, stream, storage_of):
        super().__init__(stream)
        self._storage_of = storage_of

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return _StorageType(np.dtype(STORAGES[name]))
        problem = f"asks for {module}.{name}, which is not a tensor"
        raise UserError(f"{problem}, and nothing in it was run; do not trust this file")

    def persistent_load(self, reference):
        match reference:
            # a sixth part is the view of a storage, which only versions before 0.4 wrote; None is none
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count), *view) if not any(view):
                return self._storage_of(key, dtype, count)
        raise UserError("refers to something that is not a storage")


def _read_zip(file: Path) -> Any:
    """The format since PyTorch 1.6: an archive with data.pkl and one entry for each storage."""
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise UserError("is compressed or its entries overlap, which torch.save never does; unpack it first")
        names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if not names:
            raise UserError("is an archive without data.pkl, so not a weight file; give the original release's .pth")
        prefix = names[0].removesuffix("data.pkl")
        if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
            raise UserError("was saved on a big-endian machine, which is not supported")
        storages: dict[str, _Storage] = {}

        def storage_of(key: str, dtype: np.dtype, count: int) -> _Storage:
            if key not in storages:
                data = archive.read(f"{prefix}data/{key}")
                if len(data) != count * dtype.itemsize:
                    raise UserError(f"storage {key} has {len(data)} bytes, not {count * dtype.itemsize}")
                storages[key] = _Storage(data, dtype)
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage_of).load()


def _read_legacy(file: Path) -> Any:
    """The format before: five pickles (magic, protocol, system, content, storage keys), then the storages' bytes, which
    fill the storages that the content's tensors are views of."""
    with open(file, "rb") as stream:
        storages: dict[str, _Storage] = {}
        bytes_left = file.stat().st_size

        def reserve(key: str, dtype: np.dtype, count: int) -> _Storage:
            nonlocal bytes_left
            if key not in storages:
                bytes_left -= count * dtype.itemsize
                if count < 0 or bytes_left < 0:
                    raise UserError(f"storage {key} has {count} numbers, which the file cannot hold")
                storages[key] = _Storage(np.zeros(count * dtype.itemsize, np.uint8), dtype)
            return storages[key]

        if _Unpickler(stream, reserve).load() != LEGACY_MAGIC:
            raise UserError("is a pickle, but not a weight file; give the original release's .pth")
        _protocol, _system, content, keys = (_Unpickler(stream, reserve).load() for _ in range(4))
        if sorted(keys) != sorted(storages):
            raise UserError("lists other storages than its tensors use")
        for key in keys:
            (count,) = struct.unpack("<q", stream.read(8))
            if count != len(storages[key]):
                raise UserError(f"storage {key} has another size than the tensors say")
            if stream.readinto(storages[key].data) != len(storages[key].data):
                raise UserError(f"ends within storage {key}; download it again")
        return content
