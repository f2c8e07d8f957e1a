"""Encoder weights from a file: Hugging Face's safetensors, the original release's .pth, and `tiny`'s own.

A .pth file is a pickle, and a pickle is a program. This reader runs none of it: its unpickler knows how a tensor is put
together from a storage and refuses every other name, and it needs no PyTorch.
"""

import hashlib
import io
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from llb.files import UserError, atomic

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
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before version 1.6
ZIP_MAGIC = b"PK\x03\x04"

Tensors = dict[str, np.ndarray]


def read_tensors(file: Path | str) -> Tensors:
    """All tensors of a weight file by the file's own names. The content decides about the format, not the ending.

    Raises:
        UserError: no file, not a weight file, or a pickle that asks for more than tensors.
    """
    file = Path(file)
    try:
        if file.is_dir():
            raise UserError(f"--weights {file} is a folder: give the file in it (model.safetensors or the .pth)")
        with open(file, "rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise UserError(f"--weights {file} cannot be read ({error.strerror}): give an existing file") from None
    try:
        if head.startswith(ZIP_MAGIC):
            return _flat(_read_zip(file))
        if len(head) >= 9 and head[8:9] == b"{":  # eight bytes of length, then JSON
            return _read_safetensors(file)
        if head[:1] == b"\x80":
            return _flat(_read_legacy(file))
    except UserError as error:
        raise UserError(f"--weights {file}: {error}") from None
    except Exception as error:  # whatever a damaged file provokes in a parser is the file's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--weights {file} is damaged ({reason}): download it again") from None
    raise UserError(f"--weights {file} is not a weight file: give model.safetensors or the original release's .pth")


def _read_safetensors(file: Path) -> Tensors:
    with safetensors.safe_open(file, framework="numpy") as opened:
        return {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}


def _flat(content: Any) -> Tensors:
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in content.items()
    )
    if not plain:
        raise UserError("holds no plain dictionary of tensors: give the released backbone, not a training checkpoint")
    return content


# ---- PyTorch's pickles ----


class _StorageType:
    """Stands for torch.FloatStorage and the like: an inert name with a dtype."""

    def __init__(self, dtype: type):
        self.dtype = np.dtype(dtype)


class _Storage:
    """The bytes that tensors are views of."""

    def __init__(self, data: bytes | np.ndarray, dtype: np.dtype):
        self.data, self.dtype = data, dtype

    def __len__(self) -> int:
        return len(self.data) // self.dtype.itemsize


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_unused) -> np.ndarray:
    """torch._utils._rebuild_tensor_v2: a strided view of a storage; what reaches beyond the storage is refused.

    Neither a copy nor more numbers than the storage has: a small file must not fill the memory.
    """
    if not isinstance(storage, _Storage):
        raise UserError("builds a tensor on something that is not a storage")
    if any(n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise UserError("holds a tensor with impossible strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and (last >= len(storage) or math.prod(size) > len(storage)):
        raise UserError("holds a tensor that reaches beyond its storage")
    item = storage.dtype.itemsize  # np.ndarray checks the bounds once more
    return np.ndarray(size, storage.dtype, storage.data, offset * item, tuple(step * item for step in stride))


def _rebuild_parameter(tensor: np.ndarray, *_unused) -> np.ndarray:
    return tensor


def _refuse(_unpickler) -> None:
    raise UserError("is a pickle of more than tensors; nothing in it was run: give the original release's .pth")


class _Unpickler(pickle._Unpickler):
    """Knows tensors and dictionaries, and nothing else that could be called.

    The unpickler in Python, not the one in C, because its opcodes can be chosen: that one gives attributes to whatever
    the file says (BUILD) and lets five bytes claim tens of GB (LONG_BINPUT with a high index).
    """

    dispatch = {code: run if code in OPCODES else _refuse for code, run in pickle._Unpickler.dispatch.items()}
    # the attributes of a dictionary (a state_dict has _metadata) are of no use here
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()

    ALLOWED = {
        ("collections", "OrderedDict"): lambda: {},  # without arguments: the items follow
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }

    def __init__(self, stream, storage_of):
        super().__init__(stream)
        self._storage_of = storage_of

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        raise UserError(
            f"asks for {module}.{name}, which is not a tensor; nothing in it was run: do not trust this file"
        )

    def persistent_load(self, reference):
        match reference:
            # one more part, if any, is the view of a storage, which only versions before 0.4 wrote
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count), *view) if not any(view):
                return self._storage_of(key, dtype, count)
        raise UserError("refers to something that is not a storage")


def _read_zip(file: Path) -> Any:
    """The format since PyTorch 1.6: an archive with data.pkl and one entry for each storage."""
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
            raise UserError("is compressed or its entries overlap, which torch.save never does: unpack it first")
        names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if not names:
            raise UserError("is an archive without data.pkl, so not a weight file: give the original release's .pth")
        prefix = names[0].removesuffix("data.pkl")
        if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
            raise UserError("was saved on a big-endian machine, which is not supported")
        storages: dict[str, _Storage] = {}

        def storage_of(key: str, dtype: np.dtype, count: int) -> _Storage:
            if key not in storages:
                data = archive.read(f"{prefix}data/{key}")
                if len(data) != count * dtype.itemsize:
                    raise UserError(f"storage {key} has {len(data)} bytes where {count * dtype.itemsize} are due")
                storages[key] = _Storage(data, dtype)
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage_of).load()


def _read_legacy(file: Path) -> Any:
    """The format before: five pickles (magic, protocol, system, content, storage keys), then the storages' bytes.

    The content comes before its numbers, so tensors are built on storages that are filled afterwards.
    """
    with open(file, "rb") as stream:
        storages: dict[str, _Storage] = {}
        left = file.stat().st_size

        def reserve(key: str, dtype: np.dtype, count: int) -> _Storage:
            nonlocal left
            if key not in storages:
                left -= count * dtype.itemsize
                if left < 0:
                    raise UserError(f"storage {key} is larger than the file")
                storages[key] = _Storage(np.zeros(count * dtype.itemsize, np.uint8), dtype)
            return storages[key]

        def load() -> Any:
            return _Unpickler(stream, reserve).load()

        if load() != LEGACY_MAGIC:
            raise UserError("is a pickle, but not a weight file: give the original release's .pth")
        _protocol, _system, content, keys = load(), load(), load(), load()
        if sorted(keys) != sorted(storages):
            raise UserError("lists other storages than its tensors use")
        for key in keys:
            (count,) = struct.unpack("<q", stream.read(8))
            if count != len(storages[key]):
                raise UserError(f"storage {key} has another size than the tensors say")
            if stream.readinto(storages[key].data) != len(storages[key].data):
                raise UserError(f"ends within storage {key}: download it again")
        return content


# ---- names ----

# What each part of a ViT is called: in the original releases, in transformers' Dinov2(WithRegisters) and in its ViT.
_V2 = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm1": "encoder.layer.{}.norm1",
    "qkv": tuple("encoder.layer.{}.attention.attention." + part for part in ("query", "key", "value")),
    "proj": "encoder.layer.{}.attention.output.dense",
    "ls1": "encoder.layer.{}.layer_scale1.lambda1",
    "norm2": "encoder.layer.{}.norm2",
    "fc1": "encoder.layer.{}.mlp.fc1",
    "fc2": "encoder.layer.{}.mlp.fc2",
    "ls2": "encoder.layer.{}.layer_scale2.lambda1",
}
NAMES = {
    "original": {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "register_tokens": "register_tokens",
        "patch_embed": "patch_embed.proj",
        "norm1": "blocks.{}.norm1",
        "qkv": "blocks.{}.attn.qkv",
        "proj": "blocks.{}.attn.proj",
        "ls1": "blocks.{}.ls1.gamma",
        "norm2": "blocks.{}.norm2",
        "fc1": "blocks.{}.mlp.fc1",
        "fc2": "blocks.{}.mlp.fc2",
        "ls2": "blocks.{}.ls2.gamma",
    },
    "dinov2": _V2,
    "vit": _V2
    | {
        "norm1": "encoder.layer.{}.layernorm_before",
        "norm2": "encoder.layer.{}.layernorm_after",
        "fc1": "encoder.layer.{}.intermediate.dense",
        "fc2": "encoder.layer.{}.output.dense",
    },
}
# In the files, but not part of a block's output: the final norm, the pooler, the mask token of pre-training.
UNUSED = re.compile(r"(embeddings\.)?mask_token|(norm|layernorm|pooler\.dense)\.(weight|bias)")
# transformers 5 renamed its modules in memory; files on the hub, and those that it saves, have the older names.
RENAMED = (
    (re.compile(r"^(dinov2_with_registers|dinov2|vit)\."), ""),
    (re.compile(r"^layers\."), "encoder.layer."),
    (re.compile(r"\.attention\.q_proj\."), ".attention.attention.query."),
    (re.compile(r"\.attention\.k_proj\."), ".attention.attention.key."),
    (re.compile(r"\.attention\.v_proj\."), ".attention.attention.value."),
    (re.compile(r"\.attention\.o_proj\."), ".attention.output.dense."),
)
RENAMED_VIT = ((re.compile(r"\.mlp\.fc1\."), ".intermediate.dense."), (re.compile(r"\.mlp\.fc2\."), ".output.dense."))


def _hub_name(name: str, vit: bool) -> str:
    for pattern, replacement in RENAMED + (RENAMED_VIT if vit else ()):
        name = pattern.sub(replacement, name)
    return name


def to_params(tensors: Tensors, spec, file: Path | str) -> dict:
    """The file's tensors as the parameter tree of `llb.encoder.ViT` with this spec, in float32.

    Raises:
        UserError: a weight is missing, left over or of another shape; the line names it.
    """
    # DINOv2 has LayerScale, DINO v1 (transformers' ViT) has not
    style = "original" if "cls_token" in tensors else "dinov2" if spec.layer_scale else "vit"
    names, left = NAMES[style], dict(tensors)
    if style != "original":
        left = {_hub_name(name, style == "vit"): value for name, value in tensors.items()}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise UserError(f"--weights {file}: {name} is missing, so these are not weights of {spec.name}")
        value = left.pop(name)
        if value.shape != shape:
            raise UserError(f"--weights {file}: {name} has shape {value.shape} where {spec.name} has {shape}")
        return value.astype(np.float32)

    def linear(name: str | tuple[str, ...], outputs: int, inputs: int) -> dict:
        parts = name if isinstance(name, tuple) else (name,)
        each = outputs // len(parts)  # PyTorch keeps (out, in), Flax (in, out)
        kernel = np.concatenate([take(f"{part}.weight", (each, inputs)) for part in parts]).T
        return {"kernel": kernel, "bias": np.concatenate([take(f"{part}.bias", (each,)) for part in parts])}

    def norm(name: str) -> dict:
        return {"scale": take(f"{name}.weight", (width,)), "bias": take(f"{name}.bias", (width,))}

    width, patch = spec.width, spec.patch
    positions = 1 + spec.native_grid**2
    params = {
        "cls_token": take(names["cls_token"], (1, 1, width))[0, 0],
        "pos_embed": take(names["pos_embed"], (1, positions, width))[0],
        "patch_embed": {
            "kernel": take(f"{names['patch_embed']}.weight", (width, 3, patch, patch)).transpose(2, 3, 1, 0),
            "bias": take(f"{names['patch_embed']}.bias", (width,)),
        },
    }
    if spec.registers:
        params["register_tokens"] = take(names["register_tokens"], (1, spec.registers, width))[0]
    for index in range(spec.depth):
        part = {
            key: tuple(n.format(index) for n in name) if isinstance(name, tuple) else name.format(index)
            for key, name in names.items()
        }
        block = {
            "norm1": norm(part["norm1"]),
            "attn": {"qkv": linear(part["qkv"], 3 * width, width), "proj": linear(part["proj"], width, width)},
            "norm2": norm(part["norm2"]),
            "mlp": {"fc1": linear(part["fc1"], 4 * width, width), "fc2": linear(part["fc2"], width, 4 * width)},
        }
        if spec.layer_scale:
            block |= {scale: take(part[scale], (width,)) for scale in ("ls1", "ls2")}
        params[f"block_{index}"] = block
    strangers = sorted(name for name in left if not UNUSED.fullmatch(name))
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise UserError(f"--weights {file}: {strangers[0]}{more} is left over, so these are not weights of {spec.name}")
    return params


def fetch(spec) -> Path:
    """The encoder's weights from the Hugging Face hub, downloaded once and cached by huggingface_hub.

    Raises:
        UserError: it cannot be reached; the line says which file to get and how to pass it.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    last = None
    for name in ("model.safetensors", "pytorch_model.bin"):  # some of the DINO v1 repositories have only the latter
        try:
            return Path(huggingface_hub.hf_hub_download(spec.repository, name))
        except huggingface_hub.errors.EntryNotFoundError as error:
            last = error
        except Exception as error:  # offline: hub, HTTP library and operating system each have their own exceptions
            last = error
            break
    raise UserError(
        f"--encoder {spec.name}: its weights could not be fetched ({type(last).__name__}); download model.safetensors "
        f"(or, where there is none, pytorch_model.bin) from https://huggingface.co/{spec.repository} and pass it with "
        "--weights FILE"
    )


# ---- tiny's own format: the parameter tree, flat, in float16 ----


def write_tree(params: dict, file: Path | str, metadata: dict[str, str]) -> None:
    """Write a tree of arrays as float16 safetensors with names joined by "/".

    Raises:
        UserError: a weight is beyond float16's range.
    """
    with np.errstate(over="ignore"):
        flat = {name: np.asarray(value).astype(np.float16) for name, value in _flatten(params)}
    for name, value in flat.items():
        if not np.isfinite(value).all():
            raise UserError(f"{file}: {name} is not finite in float16, so nothing is written")
    atomic(file, lambda temporary: safetensors.numpy.save_file(flat, temporary, metadata))


def read_tree(file: Path | str, shapes: dict) -> dict:
    """Read what `write_tree` wrote, in float32; `shapes` is a tree of arrays or shapes that it must match exactly.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    tensors = read_tensors(file)
    expected = dict(_flatten(shapes))
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise UserError(f"--weights {file}: {name} is {'left over' if name in tensors else 'missing'}")
    tree: dict = {}
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise UserError(f"--weights {file}: {name} has shape {value.shape}, not {expected[name].shape}")
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value.astype(np.float32)
    return tree


def _flatten(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        yield from _flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


def digest(params: dict) -> str:
    """A digest of all weights: two encoders with the same one compute the same features."""
    total = hashlib.sha256()
    for name, value in sorted(_flatten(params), key=lambda item: item[0]):
        total.update(name.encode())
        total.update(np.ascontiguousarray(value))
    return total.hexdigest()
