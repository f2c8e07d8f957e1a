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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb import processes
from llb.console import progress, say
from llb.data import load_image
from llb.encoder import Encoder
from llb.files import UserError, atomic, read_json, write_json
from llb.stem import normalise

ENCODE_BATCH = 16  # images per call of the encoder: one fixed shape, compiled once
GIB = 2**30
SHARD_BYTES = 2**24  # of features in one file: what an interruption may cost
OPEN_SHARDS = 64  # each holds a file open, of which a process may have few
ABOUT = "features.json"

Encode = Callable[[np.ndarray], np.ndarray]
Fetch = Callable[[np.ndarray], np.ndarray]


def make_encode(encoder: Encoder) -> Encode:
    """The compiled map from images to features: uint8 (b, S, S, 3), b ≤ ENCODE_BATCH → float16 (b, 2, T, D).

    Blocks beyond the last group are never computed: XLA drops what nothing reads.

    Raises:
        UserError: a feature is not finite in float16.
    """

    # a batch is shared out to this process's devices
    devices = jax.local_devices()
    size = -(-ENCODE_BATCH // len(devices)) * len(devices)
    mesh = jax.make_mesh((len(devices),), ("data",), (jax.sharding.AxisType.Auto,), devices=devices)
    shares = jax.NamedSharding(mesh, jax.P("data"))
    params = jax.device_put(encoder.params, jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data"))
    def encode(params, images: jax.Array) -> jax.Array:
        features = by_image(partial(encoder.features, params))(normalise(images))
        return features.astype(jnp.float16)  # (b, 2, T, D)

    def encode_batch(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        features = np.asarray(encode(params, jax.device_put(padded, shares)))[: len(images)]
        if not np.isfinite(features).all():
            raise UserError(
                f"--encoder {encoder.spec.name}: features are not finite; are these --weights the right ones?"
            )
        return features

    return encode_batch


def by_image(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """The same function of a batch, to be compiled: on a CPU it goes image by image, since one image's activations stay
    in the cache (llb/BENCHMARKS.md: 1.5 to 2 times as fast); on an accelerator all at once.

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


def cached(
    encoder: Encoder, encode: Encode, paths: Sequence[Path], folder: Path, memory_gib: float, title: str
) -> Fetch:
    """Features of all `paths`, computed at most once per run and shared by its stages.

    They lie in `folder`, cut into shards (00000.npy …, float16 (n, 2, T, D)). Up to `memory_gib` they are read into
    memory; beyond it the shards are memory-mapped, and what is asked for is read. Where the disk has no room for them,
    they are computed anew each time, as with `streamed`. A shard is there whole or not at all, so an interrupted
    computation goes on with the next one; several processes compute every P-th shard each.

    Raises:
        UserError: an image cannot be read.
    """
    shape = (len(paths), *feature_shape(encoder))
    row_bytes = int(np.prod(shape[1:])) * 2
    size = len(paths) * row_bytes
    rows = max(1, SHARD_BYTES // row_bytes // ENCODE_BATCH) * ENCODE_BATCH  # in a shard
    starts = range(0, len(paths), rows)
    shards = [folder / f"{number:05}.npy" for number in range(len(starts))]
    with processes.first_ahead(f"{title}: cache"):
        about = {"fingerprint": _fingerprint(encoder, paths), "images in a shard": rows}
        if _about(folder) != about:
            if not processes.first():
                raise UserError(f"{title}: process 0 sees other images, or another {folder}; share the files")
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / ABOUT, about)
    missing = [number for number, shard in enumerate(shards) if not shard.exists()]
    place = "in memory" if size <= memory_gib * GIB else "read from disk"
    needed, free = size * len(missing) // len(shards), shutil.disk_usage(folder).free
    if processes.agreed(needed > free):
        say(
            f"{title}: features of {len(paths)} images, computed each time they are needed: on the disk of {folder} "
            f"they would take {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free"
        )
        return streamed(encoder, encode, paths)
    say(f"{title}: features of {len(paths)} images{'' if missing else ' found'}, {size / GIB:.2f} GiB, {place}")

    own = [number for number in missing if number % jax.process_count() == jax.process_index()]
    wanted = [path for number in own for path in paths[starts[number] : starts[number] + rows]]
    with progress(total=len(wanted), desc=title, unit="image") as bar:
        batches = load_batches(wanted, encoder.image_size)
        for number in own:
            parts = []
            for images in islice(batches, rows // ENCODE_BATCH):  # fewer in the last shard
                parts.append(encode(images))
                bar.update(len(images))
            atomic(shards[number], partial(np.save, arr=np.concatenate(parts)))
    processes.wait(f"{title}: shards")

    if size <= memory_gib * GIB:
        everything = np.empty(shape, np.float16)
        for start, shard in zip(starts, shards):
            everything[start : start + rows] = np.load(shard)
        return everything.__getitem__
    opened = lru_cache(maxsize=OPEN_SHARDS)(partial(np.load, mmap_mode="r"))

    def fetch(indices: np.ndarray) -> np.ndarray:
        found = np.empty((*indices.shape, *shape[1:]), np.float16)
        for number in np.unique(indices // rows):
            here = indices // rows == number
            found[here] = opened(shards[number])[indices[here] % rows]
        return found

    return fetch


def _about(cache: Path) -> Any:
    """What a cache is of; None where that cannot be told, and it is made anew."""
    try:
        return read_json(cache / ABOUT, "") if (cache / ABOUT).exists() else None
    except UserError:
        return None


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
