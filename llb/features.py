"""Frozen features, computed once: neither stage augments, so an image's encoder features never change.

    image     uint8   (S, S, 3)
    tokens    float32 (B, T, D) from every block of the encoder
    features  float16 (N, 2, T, D): the means of the two groups of blocks that Dinomaly reconstructs (Encoder.features)

Whoever trains or scores holds a function `fetch(indices) → features`: `cached` looks the rows up, `streamed` computes
them anew each time. Both round to float16 (half the disk and traffic; its step of 2⁻¹¹ moves a cosine distance by about
1e-7), so both give the same scores.
"""

import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb.console import progress, say
from llb.data import load_image
from llb.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from llb.files import UserError, read_json, write_json

ENCODE_BATCH = 16  # images per call of the encoder: one fixed shape, compiled once
GIB = 2**30

Encode = Callable[[np.ndarray], np.ndarray]
Fetch = Callable[[np.ndarray], np.ndarray]


def make_encode(encoder: Encoder) -> Encode:
    """The compiled map from images to features: uint8 (b, S, S, 3), b ≤ ENCODE_BATCH → float16 (b, 2, T, D).

    Blocks beyond the last group are never computed: XLA drops what nothing reads.

    Raises:
        UserError: a feature is not finite in float16.
    """

    @jax.jit
    def encode(params, images: jax.Array) -> jax.Array:
        images = (images.astype(jnp.float32) / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
        return by_image(partial(encoder.features, params))(images).astype(jnp.float16)  # (b, 2, T, D)

    def encode_batch(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((ENCODE_BATCH, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        features = np.asarray(encode(encoder.params, padded))[: len(images)]
        if not np.isfinite(features).all():
            raise UserError(
                f"--encoder {encoder.spec.name}: features are not finite; are these --weights the right ones?"
            )
        return features

    return encode_batch


def by_image(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """The same function of a batch, to be compiled: on a CPU it goes image by image, since one image's activations stay
    in the cache (llb.BENCHMARKS: 1.5 to 2 times as fast on two cores); on an accelerator all at once.

    function: (b, …) → a tree of (b, …), each image's result its own.
    """
    if jax.default_backend() != "cpu":
        return function
    return partial(jax.lax.map, lambda image: jax.tree.map(lambda leaf: leaf[0], function(image[None])))


def load_batches(paths: Sequence[Path], size: int) -> Iterator[np.ndarray]:
    """Decode and resize in worker threads, two batches ahead of whoever reads: uint8 (≤ ENCODE_BATCH, S, S, 3)."""
    load = partial(load_image, size=size)
    images = (image for _, image in ahead(load, paths, min(8, os.cpu_count() or 1), 2 * ENCODE_BATCH))
    while batch := list(islice(images, ENCODE_BATCH)):
        yield np.stack(batch)


def ahead(
    prepare: Callable[[Any], Any], items: Iterable, workers: int = 1, depth: int = 1
) -> Iterator[tuple[Any, Any]]:
    """(item, prepare(item)) for each item in order; background threads prepare the next `depth` while the caller works
    on this one."""
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            pending.append((item, pool.submit(prepare, item)))
            if len(pending) > depth:
                item, prepared = pending.popleft()
                yield item, prepared.result()
        for item, prepared in pending:
            yield item, prepared.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def feature_shape(encoder: Encoder) -> tuple[int, int, int]:
    """(2, T, D) of one image."""
    return (2, encoder.tokens_per_image, encoder.spec.width)


def streamed(encoder: Encoder, encode: Encode, paths: Sequence[Path]) -> Fetch:
    """`--no-cache`: every row is decoded and encoded each time that it is asked for."""

    def fetch(indices: np.ndarray) -> np.ndarray:
        wanted = [paths[index] for index in indices.ravel()]
        rows = np.concatenate([encode(images) for images in load_batches(wanted, encoder.image_size)])
        return rows.reshape(*indices.shape, *feature_shape(encoder))

    return fetch


def cached(encoder: Encoder, encode: Encode, paths: Sequence[Path], file: Path, memory_gib: float, title: str) -> Fetch:
    """Features of all `paths`, computed at most once per run and shared by its stages.

    They lie in `file` (.npy, float16 (N, 2, T, D)); up to `memory_gib` they are read into memory, beyond it the file
    is memory-mapped. An interrupted computation goes on where it was.

    Raises:
        UserError: an image cannot be read, or the disk is too small.
    """
    shape = (len(paths), *feature_shape(encoder))
    size = int(np.prod(shape)) * 2
    place = "in memory" if size <= memory_gib * GIB else "read from disk"
    fingerprint = _fingerprint(encoder, paths)
    state_file = file.with_suffix(".json")
    state = read_json(state_file) if state_file.exists() else {}
    if state.get("fingerprint") != fingerprint:
        state = {"fingerprint": fingerprint, "done": 0}

    if file.exists() and state["done"] == len(paths):
        say(f"{title}: features of {len(paths)} images found, {size / GIB:.2f} GiB, {place}")
    else:
        say(f"{title}: features of {len(paths)} images, {size / GIB:.2f} GiB, {place}")
        _compute(encoder, encode, paths, file, shape, state, state_file, title)
    array = np.load(file, mmap_mode=None if size <= memory_gib * GIB else "r")
    return array.__getitem__


def _compute(encoder, encode, paths, file, shape, state, state_file, title) -> None:
    """Fill `file` from row state["done"] on, by way of a partial file whose progress is recorded every few seconds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    if not partial.exists():
        state["done"] = 0
    done = state["done"]
    if done == 0:
        needed, free = int(np.prod(shape)) * 2, shutil.disk_usage(file.parent).free
        if needed > free:
            raise UserError(
                f"--out: the features need {needed / GIB:.1f} GiB in {file.parent}, {free / GIB:.1f} are free; "
                "add --no-cache, or give an --out on a larger disk"
            )
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    else:
        array = np.lib.format.open_memmap(partial, mode="r+")
    last_record = time.monotonic()
    with progress(total=len(paths), initial=done, desc=title, unit="image") as bar:
        for images in load_batches(paths[done:], encoder.image_size):
            array[done : done + len(images)] = encode(images)
            done += len(images)
            bar.update(len(images))
            if time.monotonic() - last_record > 5 or done == len(paths):
                array.flush()  # the rows first, then the record that they are there
                write_json(state_file, {**state, "done": done})
                last_record = time.monotonic()
    del array  # Windows does not rename a mapped file
    os.replace(partial, file)


def _fingerprint(encoder: Encoder, paths: Sequence[Path]) -> str:
    """A digest of what the features depend on: the encoder, its weights, and every image's path, size and date."""
    about = f"{encoder.spec} {encoder.image_size} {encoder.weights_digest} {encoder.precision}"
    digest = hashlib.sha256(about.encode())
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): put it back, or --overwrite the run") from None
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
