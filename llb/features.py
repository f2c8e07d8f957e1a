"""Features of the frozen encoder, computed once: neither stage augments, so an image's features never change.

    image     uint8   (S, S, 3)
    features  float16 (N, G, T, D) of a ViT: the means of G groups of its blocks, two by default; (N, L) of a CNN: its
              stages in a row

A detector that damages images gets them in place of features; they lie in the cache alike.

Training and scoring get a function `fetch(indices) → features`. `cached_features` looks them up, `streamed_features`
computes them each time. Both round to float16, so both give the same scores. (float16 halves disk and traffic; it
rounds a number by at most 2⁻¹¹ of it, which changes a cosine distance of 0.04 to 0.3 by 2e-6 to 1e-5.)
"""

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb import processes
from llb.cache import find_rows, load_shard, make_room, write_shard
from llb.console import progress, say
from llb.device import MATMUL
from llb.encoders import Encoder
from llb.files import UserError, digest_of_files, is_writer, size_and_time
from llb.images import IMAGENET_MEAN, IMAGENET_STD, ImageFiles, load_image

ENCODE_BATCH = 16  # images per call of the encoder: one fixed shape, compiled once
GIB = 2**30
SHARD_BYTES = 2**24  # of features in one file: an interruption costs at most this much work
OPEN_SHARDS = 64  # a process may have few files open

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 (b, S, S, 3) → float16 (b, …)
Fetch = Callable[[np.ndarray], np.ndarray]  # image indices int (…) → float16 (…, …)


@dataclasses.dataclass(frozen=True)
class Features:
    """What a detector gets of a list of images."""

    fetch: Fetch
    shape: tuple[int, ...]  # of one image's features
    frozen: Any = None  # the encoder's parameters, for a detector that gets images


@dataclasses.dataclass(frozen=True)
class Source:
    """How images become features."""

    encoder: Encoder
    encode: Encode
    images: bool = False  # they stay images

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's features."""
        side = self.encoder.image_size
        return (side, side, 3) if self.images else self.encoder.feature_shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.images else np.float16)

    def features(self, fetch: Fetch) -> Features:
        return Features(fetch, self.shape, self.encoder.params if self.images else None)


def make_source(encoder: Encoder, images: bool = False) -> Source:
    """images: for a detector that gets images, which it encodes itself."""
    return Source(encoder, np.asarray if images else make_encode(encoder), images)


def normalise(images: jax.Array) -> jax.Array:
    """ImageNet's normalisation: uint8 (…, 3) → float32, each colour with about mean 0 and standard deviation 1."""
    return (images.astype(jnp.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD


def make_encode(encoder: Encoder) -> Encode:
    """The compiled map from images to features: uint8 (b, S, S, 3), b ≤ ENCODE_BATCH → float16 (b, …).

    Blocks after the last group are not computed, since nothing reads them.

    A UserError is raised if a feature is not finite in float16.

    On a CPU one batch is encoded at a time, see `encoding_devices`.
    """
    mesh = image_mesh(encoding_devices(jax.local_devices()))
    size = -(-ENCODE_BATCH // mesh.size) * mesh.size
    params = jax.device_put(encoder.params, jax.NamedSharding(mesh, jax.P()))
    one_at_a_time = Lock()  # two threads may ask: --no-cache encodes while the next batch is prepared

    def features_of(params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = by_image(partial(encoder.features, params))(normalise(images)).astype(jnp.float16)  # (b, …)
        finite = jnp.isfinite(features).reshape(len(features), -1).all(axis=1)
        return features, finite  # on the device: NumPy is slow in float16

    compiled = jax.jit(on_devices(features_of, mesh))

    def encode(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        with one_at_a_time:
            placed = jax.device_put(padded, jax.NamedSharding(mesh, jax.P("images")))
            features, finite = (np.asarray(part)[: len(images)] for part in compiled(params, placed))
        if not finite.all():
            name = encoder.spec.name
            raise UserError(f"--encoder {name}: features are not finite; are these --weights the right ones?")
        return features

    return encode


def encoding_devices(devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """The devices that may run an encoder: of CPU devices one in each process.

    XLA's FFT (the stem of `tiny`) waits for tasks in the same thread pool that runs the program. If as many such
    programs run at once as the pool has threads, they wait for ever: seen with JAX 0.11.2, three CPU devices and two
    cores. More CPU devices would share the same cores in any case.
    """
    if devices[0].platform != "cpu":
        return devices
    return list({device.process_index: device for device in reversed(devices)}.values())[::-1]


def image_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh with one axis, "images", along which a batch is shared out."""
    return jax.make_mesh((len(devices),), ("images",), (jax.sharding.AxisType.Auto,), devices=devices)


def on_devices(function: Callable[[Any, jax.Array], Any], mesh: jax.sharding.Mesh) -> Callable[[Any, jax.Array], Any]:
    """The same function (parameters, images) → results, where each device of the mesh does its part of the images.

    Unchecked: a loop that begins with a constant, which JAX takes for equal on all devices, would be refused.
    """
    specs = {"in_specs": (jax.P(), jax.P("images")), "out_specs": jax.P("images"), "check_vma": False}
    return jax.shard_map(function, mesh=mesh, **specs)


def by_image(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """The same function of a batch, for use in a compiled function. On a CPU it works image by image, since one image's
    activations stay in the processor's cache (1.5 to 2 times as fast, llb/bench/README.md); elsewhere all at once.

    function: (b, …) → a tree of (b, …), each image's result independent of the others.
    """
    if jax.default_backend() != "cpu":
        return function
    return partial(jax.lax.map, lambda image: jax.tree.map(lambda leaf: leaf[0], function(image[None])))


def load_batches(files: ImageFiles, size: int) -> Iterator[np.ndarray]:
    """Decode and resize in worker threads, two batches ahead of the reader: uint8 (≤ ENCODE_BATCH, S, S, 3)."""
    load = partial(load_image, size=size, white=files.white, resize=files.resize)
    images = (image for _, image in prefetch(load, files.paths, min(8, os.cpu_count() or 1), 2 * ENCODE_BATCH))
    while batch := list(islice(images, ENCODE_BATCH)):
        yield np.stack(batch)


def prefetch(
    prepare: Callable[[Any], Any], items: Iterable, workers: int = 1, depth: int = 1
) -> Iterator[tuple[Any, Any]]:
    """(item, prepare(item)) for each item in order. Background threads prepare the next `depth` items meanwhile."""
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


def streamed_features(source: Source, files: ImageFiles) -> Features:
    """`--no-cache`: decode and encode the images each time they are asked for."""

    def fetch(indices: np.ndarray) -> np.ndarray:
        wanted = dataclasses.replace(files, paths=tuple(files.paths[index] for index in indices.ravel()))
        batches = load_batches(wanted, source.encoder.image_size)
        return np.concatenate([source.encode(images) for images in batches]).reshape(*indices.shape, *source.shape)

    return source.features(fetch)


def cached_features(
    source: Source, files: ImageFiles, cache: Path, memory_gib: float, limit_gib: float, title: str
) -> Features:
    """Features of all files, of the same content computed at most once for all runs that share the folder `cache`.

    Up to `memory_gib` they are read into memory; beyond that the shards (llb.cache) are memory-mapped. `limit_gib`: of
    the cache. If the disk has no room for them, they are computed each time, as by `streamed_features`; so are those
    whose shard another command deletes meanwhile. A shard is complete or absent, so an interrupted computation
    continues with the next one; a damaged one is computed again. Several processes compute every P-th shard each. A
    UserError is raised if an image cannot be read, or has changed meanwhile, or a shard cannot be written.
    """
    folder = cache / "features" / feature_kind(source, files)
    image_bytes = int(np.prod(source.shape)) * source.dtype.itemsize
    size = len(files.paths) * image_bytes
    in_shard = max(1, SHARD_BYTES // image_bytes // ENCODE_BATCH) * ENCODE_BATCH  # images
    streamed = streamed_features(source, files)

    # ---- what is there, as process 0 sees it ----
    digests_of = [digest for *_, digest in files.states]
    path_of = dict(zip(digests_of, files.paths))
    places = find_rows(folder, path_of.keys())
    lost = processes.agreed(np.array([digest not in places for digest in path_of]))
    missing = [digest for digest, is_lost in zip(path_of, lost) if is_lost]
    needed = len(missing) * image_bytes
    if not processes.agreed(not is_writer() or make_room(cache, needed, limit_gib * GIB)):
        space = f"{needed / GIB:.1f} GiB more do not fit on the disk of {cache}"
        say(f"{title}: features of {len(files.paths)} images are computed each time they are needed: {space}")
        return streamed
    state = "already computed" if not missing else f"{len(missing)} to compute"
    place = "in memory" if size <= memory_gib * GIB else "read from disk"
    say(f"{title}: features of {len(files.paths)} images, {state}, {size / GIB:.2f} GiB, {place}")

    # ---- what is not ----
    lists = [missing[start : start + in_shard] for start in range(0, len(missing), in_shard)]
    own = lists[jax.process_index() :: jax.process_count()]
    wanted = dataclasses.replace(files, paths=tuple(path_of[digest] for digests in own for digest in digests))
    with progress(total=len(wanted.paths), desc=title, unit="image") as bar:
        batches = load_batches(wanted, source.encoder.image_size)
        for digests in own:
            parts = []
            for images in islice(batches, -(-len(digests) // ENCODE_BATCH)):
                parts.append(source.encode(images))
                bar.update(len(images))
            check_unchanged(files, [path_of[digest] for digest in digests])
            write_shard(folder, digests, np.concatenate(parts), needed)
    processes.wait(f"{title}: shards")
    if unseen := path_of.keys() - places.keys():
        places |= find_rows(folder, unseen)

    # ---- rows of one shard are read together; what is in none is encoded ----
    found = [places.get(digest, (folder / "nowhere", 0)) for digest in digests_of]
    shards = list(dict.fromkeys(shard for shard, _ in found))
    number = dict(zip(shards, range(len(shards))))
    shard_of, row_of = np.array([(number[shard], row) for shard, row in found]).T  # (N,) each
    opened = lru_cache(maxsize=OPEN_SHARDS)(load_shard)

    def fetch(indices: np.ndarray) -> np.ndarray:
        features = np.empty((*indices.shape, *source.shape), source.dtype)
        numbers, rows = shard_of[indices], row_of[indices]
        for number in np.unique(numbers):
            here = numbers == number
            try:
                features[here] = opened(shards[number])[rows[here]]
            except OSError:
                features[here] = streamed.fetch(indices[here])
        return features

    if size > memory_gib * GIB:
        return source.features(fetch)
    return source.features(fetch(np.arange(len(files.paths))).__getitem__)


def check_unchanged(files: ImageFiles, paths: Sequence[Path]) -> None:
    """Raise a UserError if an image is not the file any more that its digest is of: its features would stand in the
    cache under the digest of the old one, for all runs.

    By size and time: a second digest would read every file once more, and a file that is replaced gets another time.
    One with the old size and time counts as the same in every command (llb.manifest).
    """
    states = dict(zip(files.paths, files.states))
    for path in paths:
        if size_and_time(path) != states[path][:2]:
            raise UserError(f"{path} was changed while it was read: give the same command again")


def feature_kind(source: Source, files: ImageFiles) -> str:
    """A name for all that features depend on besides the image: the encoder, its weights and code, how images are
    shown, and the kind of device, whose arithmetic may differ in the last digits."""
    encoder, here = source.encoder, Path(__file__).parent
    code = digest_of_files([Path(__file__), here / "images.py", *sorted((here / "encoders").glob("*.py"))], here)
    about = f"{encoder.image_size} {files.resize} {json.dumps(dict(files.white), sort_keys=True)} {code}"
    if source.images:
        name = "images"
    else:
        name = encoder.spec.name
        about += f" {encoder.spec} {encoder.strides} {encoder.weights_digest} {encoder.precision}"
        about += f" {jax.devices()[0].device_kind} {jax.__version__}"
        about += f" {os.environ[MATMUL]}" if MATMUL in os.environ else ""
    return f"{name}-{encoder.image_size}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
