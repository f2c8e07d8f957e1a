"""Dinomaly's released checkpoints (.pth, a state_dict of its `ViTill`) as parameters of llb.detectors.dinomaly.

    encoder.*                                            the frozen DINOv2: not read, --encoder has the same weights
    bottleneck.0.{fc1,fc2}.{weight,bias}                 → bottleneck/{fc1,fc2}/dense/{kernel,bias}
    decoder.i.{norm1,norm2}.{weight,bias}                → block_i/{norm1,norm2}/{scale,bias}
    decoder.i.{attn.qkv,attn.proj,mlp.fc1,mlp.fc2}.…     → block_i/…/dense/{kernel,bias}

A kernel is the transposed weight. The release adds nothing to the attention's denominator, llb 1e-6. Its encoder's
position embeddings are interpolated in a way of their own (`Spec.release`).
"""

import re
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llb.detectors import dinomaly
from llb.detectors.common import Setup
from llb.encoders.weights import read_tensors
from llb.files import UserError

FROZEN = re.compile(r"encoder\.")


def read_released(file: Path | str, setup: Setup) -> dict:
    """{"params": …} of Dinomaly in float32.

    A UserError names a weight that is missing, left over, of another shape or not finite.
    """
    if setup.detector != "dinomaly":
        raise UserError(f"--released {file}: is a checkpoint of Dinomaly; leave --detector {setup.detector} out")
    key = jax.random.key(0)
    expected = flatten_dict(jax.eval_shape(lambda: dinomaly.init(setup, key))["params"], sep="/")
    advice = f"is it Dinomaly's, for --encoder {setup.spec.name}?"
    tensors = {name: value for name, value in read_tensors(file).items() if not FROZEN.match(name)}
    names = {released_name(path): path for path in expected}
    if unmatched := sorted(names.keys() ^ tensors.keys()):
        problem = "is left over" if unmatched[0] in tensors else "is missing"
        raise UserError(f"--released {file}: {unmatched[0]} {problem}; {advice}")
    params = {}
    for name, path in names.items():
        value = np.asarray(tensors[name], np.float32)
        params[path] = value.T if path.endswith("kernel") else value
        if params[path].shape != expected[path].shape:
            raise UserError(f"--released {file}: {name} has shape {value.shape}; {advice}")
        if not np.isfinite(value).all():
            raise UserError(f"--released {file}: {name} is not finite, so these weights are damaged")
    return {"params": unflatten_dict(params, sep="/")}


def released_name(path: str) -> str:
    """The release's name of a parameter: "block_3/attn/qkv/dense/kernel" → "decoder.3.attn.qkv.weight"."""
    path = re.sub(r"/(dense/)?(kernel|scale)$", "/weight", path).replace("/dense/bias", "/bias")
    return path.replace("bottleneck/", "bottleneck/0/").replace("block_", "decoder/").replace("/", ".")
