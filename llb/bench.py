"""Time the parts of llb, and beside each the reference's way of doing it, in one run and on the same inputs.

    python -m llb.bench                                     two CPU cores, below 10 minutes
    python -m llb.bench --against torch --json bench.json   the same work in PyTorch too, where it is installed
    python -m llb.bench --gpu                               an accelerator's table (llb.bench_gpu)

The ways take turns, so that a machine that slows down slows all of them; what is reported is the median over the turns
and, in brackets, the lowest and highest. Compiling is not timed. Weights are random: time does not depend on them. The
reference's ways are in llb.bench_reference and llb.bench_torch; both get llb's weights, and how far the results differ
is printed. They run in a process of their own, because llb changes how memory is kept in its own
(`llb.console.keep_memory`), and whoever runs the reference would not have that.
"""

import datetime
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llb import bench_reference as reference
from llb.config import flag, parse, whole
from llb.console import choose_device, keep_compiled, run, say
from llb.data import load_image
from llb.dinomaly import anomaly_map, map_matrix
from llb.encoder import SPECS, Encoder, Spec, parameter_shapes
from llb.features import Encode, cached, load_batches, make_encode
from llb.files import UserError, writable_file, write_json
from llb.metrics import PixelCounts, accumulate, pixel_metrics, pixel_metrics_error, pixel_metrics_of
from llb.optimizer import RECIPES, hard_positions
from llb.run import environment
from llb.textures import draw
from llb.train import (
    SCORE_BATCH,
    Training,
    make_training,
    score,
    score_all,
    submodel_keys,
    train,
)

PHOTO = 1024  # side of the images on the disk, pixels: Real-IAD's
PRODUCT = 2048  # side of the matrices whose product is the machine's arithmetic rate
OURS, EXACT, JAX, EAGER, FUSED, COMPILED = (
    "llb",
    "llb exact",
    "reference",
    "PyTorch eager",
    "PyTorch fused",
    "PyTorch compiled",
)
TORCH = (EAGER, FUSED, COMPILED)
UNITS = {  # what a part's seconds are for
    "decoding": "image",
    "encoder": "image",
    "training step": "step of all K",
    "scoring": "image by all K",
    "maps": "map",
    "pixel metrics": "map",
    "stage 1": "whole",
}


@dataclass
class Bench:
    """Time the parts of llb beside the reference's way of doing them."""

    json: str | None = flag(None, "write everything that was measured to this file", shown="not written")
    against: str | None = flag(None, "do the same work in PyTorch too", choices=("torch",), shown="JAX alone")
    gpu: bool = flag(False, "an accelerator's table: ViT-B/14, batch 16, K = 3 and 8; the sizes below are not used")
    rounds: int = flag(
        2, "how often the ways take turns; the reference's stage 1 is shared out to the rounds", whole(1)
    )
    encoder: str = flag("dinov2_vits14_reg", "whose sizes; weights are random", choices=tuple(SPECS))
    image_size: int = flag(392, "side in pixels, a multiple of the patch size", whole(1))
    images: int = flag(32, "training images", whole(2))
    submodels: int = flag(3, "K", whole(1))
    batch_size: int = flag(4, "images per step, sub-model, and per call of the reference", whole(1))
    steps: int = flag(6, "steps of each sub-model", whole(1))
    maps: int = flag(504, "maps for the pixel metrics", whole(2))
    reference_maps: int = flag(16, "of these for the reference's way, whose time grows with their number", whole(2))


# ---- taking turns ----


def timed(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds, and this process's peak memory in MiB."""
    reset_peak_memory()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began, peak_memory()


@dataclass
class Way:
    """One way to do a part. `work` does it for `units` units; `warm` makes it compile (default: by working once)."""

    work: Callable[[], Any]
    units: float
    warm: Callable[[], Any] | None = None
    measure: Callable[[Callable[[], Any]], tuple[float, float | None]] = timed  # another process measures by itself


@dataclass
class Timing:
    """Seconds per unit, one number for each round, and the process's peak memory while it worked."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None


Parts = dict[str, dict[str, Way]]  # part → name of the way → way
Timings = dict[str, dict[str, Timing]]


def take_turns(parts: Parts, rounds: int) -> Timings:
    """Run every way of every part `rounds` times, in turn."""
    timings = {part: {name: Timing() for name in ways} for part, ways in parts.items()}
    for part, ways in parts.items():
        for name, way in ways.items():
            say(f"  preparing {part}, {name}")
            (way.warm or way.work)()
    for turn in range(rounds):
        for part, ways in parts.items():
            for name, way in ways.items():
                timing = timings[part][name]
                seconds, peak = way.measure(way.work)
                timing.seconds.append(seconds / way.units)
                timing.peak_mib = max(timing.peak_mib or 0, peak or 0) or None
            say(f"  round {turn + 1} of {rounds}: {part}")
    return timings


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """How many times faster `fast` is: median, lowest and highest over the rounds, each compared within itself."""
    each = [a / b for a, b in zip(slow.seconds, fast.seconds)]
    return statistics.median(each), min(each), max(each)


def reset_peak_memory() -> None:
    """Let the kernel forget this process's highest memory so far (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> float | None:
    """The process's highest resident memory in MiB since it was reset, or None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


# ---- counting ----


def multiply_adds(function: Callable, *arguments) -> int:
    """Multiply-adds of all matrix products and convolutions in a traced function, gradients included."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += equation.outvars[0].aval.size * int(np.prod([shapes[0][axis] for axis in contracted]))
        elif equation.primitive.name == "conv_general_dilated":
            outputs = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * int(np.prod(shapes[1])) // outputs
        inner = sum(_count(getattr(p, "jaxpr", p)) for p in equation.params.values() if hasattr(p, "eqns"))
        total += inner * equation.params.get("length", 1)  # a scan's body runs `length` times
    return total


def count_work(encoder: Encoder, training: Training) -> dict[str, int]:
    """Multiply-adds that stage 1 cannot do without: of the encoder and of one sub-model, for one image each.

    Counted in the reference's programs, so that work which an implementation repeats does not raise its rate.
    """
    spec, model, size = encoder.spec, training.model, encoder.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    features = jax.eval_shape(partial(reference.encode, spec=spec), encoder.params, image)
    params = jax.eval_shape(model.init, jax.random.key(0), features)["params"]
    hard = jax.ShapeDtypeStruct((), jnp.int32)

    def gradient(params, features, hard):
        return jax.value_and_grad(reference.loss)(params, features, model, hard, 0.1, jax.random.key(0))

    return {
        "encoder": multiply_adds(partial(reference.encode, spec=spec), encoder.params, image),
        "sub-model": multiply_adds(partial(reference.decode, model=model), params, features),
        "sub-model and gradient": multiply_adds(gradient, params, features, hard),
    }


# ---- what is measured on ----


def random_weights(shapes: dict, seed: int) -> dict:
    """A host tree: kernels and tokens normal with σ = 0.02. Nothing is compiled for it, unlike the models' own."""
    random = np.random.default_rng(seed)

    def leaf(path, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean, spread = {"bias": (0.0, 0.0), "scale": (1.0, 0.0)}.get(path[-1].key, (0.0, 0.02))
        return random.normal(mean, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_encoder(spec: Spec, size: int, precision: str = "float32") -> Encoder:
    params = jax.tree.map(jnp.asarray, random_weights(parameter_shapes(spec), 0))
    return Encoder(spec, params, size, "random", precision)


def random_submodels(encoder: Encoder, training: Training, count: int) -> list[dict]:
    sample = jax.ShapeDtypeStruct((1, 2, encoder.tokens_per_image, encoder.spec.width), jnp.float32)
    shapes = jax.eval_shape(training.model.init, jax.random.key(0), sample)["params"]
    return [random_weights(shapes, 1 + k) for k in range(count)]


def draw_photos(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files, side × side."""
    random = np.random.default_rng(0)
    paths = [folder / f"{index:04}.jpg" for index in range(count)]
    for path in paths:
        picture = Image.fromarray(np.asarray(draw(random), np.uint8))
        picture.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=95)
    return paths


def draw_maps(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool and maps float32, both (count, size, size): every second image has one to four round defects."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[:size, :size]
    matrix = map_matrix(size, 28)
    masks, maps = np.zeros((count, size, size), bool), np.empty((count, size, size), np.float32)
    for index in range(count):
        for _ in range(random.integers(1, 5) * (index % 2)):
            y, x, radius = random.uniform(0, size, 2).tolist() + [random.uniform(0.01, 0.08) * size]
            masks[index] |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        maps[index] = matrix @ random.gamma(2, 0.05, (28, 28)).astype(np.float32) @ matrix.T + 0.05 * masks[index]
    return masks, maps


# ---- stage 1 ----


@dataclass
class Stage:
    """What stage 1 works on, in all ways alike."""

    encoder: Encoder
    training: Training
    paths: list[Path]
    images: np.ndarray  # uint8 (N, S, S, 3), what `paths` hold: the reference gets them decoded
    subsets: list[np.ndarray]  # K arrays of indices
    params: list[dict]  # K fresh sub-models, host trees
    encode: Encode  # llb's


def prepare(settings: Bench, encoder: Encoder, paths: list[Path]) -> Stage:
    """The same in every process: weights are drawn from fixed seeds."""
    recipe = RECIPES["dinomaly"]
    training = make_training(encoder, recipe, recipe.learning_rate, recipe.dropout, settings.steps, settings.batch_size)
    images = np.stack([load_image(path, settings.image_size) for path in paths])
    subsets = deal(settings.images, settings.submodels)
    params = random_submodels(encoder, training, settings.submodels)
    return Stage(encoder, training, paths, images, subsets, params, make_encode(encoder))


def deal(images: int, submodels: int) -> list[np.ndarray]:
    """K subsets, int (images / K,) each."""
    return [np.arange(k, images, submodels) for k in range(submodels)]


def stack(trees: Sequence[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def our_ways(stage: Stage, folder: Path) -> dict[str, Way]:
    """Encoder, training and scoring as stage1_partition.py calls them: features to disk, checkpoints and all."""
    encoder, training, count = stage.encoder, stage.training, len(stage.paths)
    keys = submodel_keys(jax.random.key(0), len(stage.subsets))
    made = iter(range(10**6))
    latest = {"params": stack(stage.params)}  # what is scored before anything is trained

    def features() -> None:
        latest["fetch"] = cached(
            encoder, stage.encode, stage.paths, folder / f"features{next(made)}", 64.0, "  features"
        )

    def training_steps() -> None:
        target = folder / f"training{next(made)}"
        latest["params"] = train(training, latest["fetch"], stage.subsets, keys, target, "bench", "  training")

    def scoring(images: int = count) -> None:
        score_all(latest["params"], training.model, latest["fetch"], images, encoder.image_size, "  scoring")

    return {
        "encoder": Way(features, count),
        "training step": Way(training_steps, training.steps),
        "scoring": Way(scoring, count, partial(scoring, 1)),
    }


def reference_ways(stage: Stage, rounds: int) -> dict[str, Way]:
    """The reference's: each round does its share of the steps and of the images, of every sub-model."""
    encoder, training, spec = stage.encoder, stage.training, stage.encoder.spec
    size, random = training.batch_size, np.random.default_rng(2)
    hard = np.int32(hard_positions(training.recipe, 0, size * training.model.patches))
    steps, batches = -(-training.steps // rounds), -(-len(stage.images) // size // rounds)

    def encode(calls: int = batches) -> None:
        for call in range(calls):
            np.asarray(reference.compiled_encode(encoder.params, batch(call), spec=spec))

    def batch(number: int) -> np.ndarray:
        return np.take(stage.images, np.arange(number * size, (number + 1) * size), axis=0, mode="wrap")

    def training_steps(steps: int = steps) -> None:
        for subset, params in zip(stage.subsets, stage.params):
            passes = np.int32(-(-len(subset) // size))
            opt = reference.optimizer(training, passes).init(params)
            state = jax.tree.map(jnp.array, {"params": params, "opt": opt})  # copied: the step takes the memory
            for step in range(steps):
                images = stage.images[random.choice(subset, size)]
                key = jax.random.fold_in(jax.random.key(0), step)
                state, loss = reference.train_step(
                    encoder.params, state, images, key, passes, hard, spec=spec, training=training
                )
                float(loss)  # as the released loop does, for its log

    def scoring(batches: int = batches, submodels: int = len(stage.params)) -> None:
        for params in stage.params[:submodels]:
            for number in range(batches):
                reference.score(encoder.params, params, batch(number), spec, training.model)

    return {
        "encoder": Way(encode, batches * size, partial(encode, 1)),
        "training step": Way(training_steps, steps, partial(training_steps, 1)),
        "scoring": Way(scoring, batches * size, partial(scoring, 1, 1)),
    }


def torch_ways(torch, stage: Stage, name: str) -> tuple[dict[str, Way], dict[str, float]]:
    """PyTorch's, on one sub-model, for the K cost alike; and how far its results are from the reference's in JAX."""
    encoder, training, count = stage.encoder, stage.training, len(stage.subsets)
    one = torch.Stage1(stage, name.split()[1])
    batch = np.arange(training.batch_size) % len(stage.images)
    images = stage.images[batch]
    features = reference.compiled_encode(encoder.params, images, spec=encoder.spec)
    distances = reference.distances(encoder.params, stage.params[0], images, spec=encoder.spec, model=training.model)
    differences = {
        "features": difference(one.features(batch), features),
        "distances": difference(one.distances(batch), distances),
    }
    ways = {
        "encoder": Way(lambda: [one.features(batch) for _ in range(2)], 2 * len(batch)),
        "training step": Way(lambda: one.train(2), 2 / count, lambda: one.train(1)),
        "scoring": Way(lambda: [one.score(batch) for _ in range(2)], 2 * len(batch) / count),
    }
    return ways, differences


def add_whole(timings: Timings, images: int, steps: int) -> None:
    """Stage 1, from its three parts. llb encodes once; the reference's steps and scores contain the encoder."""
    encoder, step, scoring = (timings[part] for part in ("encoder", "training step", "scoring"))
    for way in step:
        alone = encoder[way].seconds if way == OURS else [0.0] * len(step[way].seconds)
        rows = zip(alone, step[way].seconds, scoring[way].seconds)
        seconds = [images * (e + c) + steps * s for e, s, c in rows]
        peaks = [part[way].peak_mib for part in (encoder, step, scoring)]
        timings.setdefault("stage 1", {})[way] = Timing(seconds, max((p for p in peaks if p), default=None))


# ---- the other parts ----


def our_small_ways(stage: Stage, masks: np.ndarray, maps: np.ndarray) -> Parts:
    """Decoding, map post-processing and pixel metrics."""
    size, found = stage.encoder.image_size, random_distances(stage)
    ours = jax.jit(partial(anomaly_map, size=size))
    batches = [found[start : start + SCORE_BATCH] for start in range(0, len(found), SCORE_BATCH)]  # as `score` does
    return {
        "decoding": {OURS: Way(lambda: np.concatenate(list(load_batches(stage.paths, size))), len(stage.paths))},
        "maps": {OURS: Way(lambda: [np.asarray(ours(part)) for part in batches], len(found))},
        "pixel metrics": {
            OURS: Way(lambda: pixel_metrics_of(streamed(masks, maps)), len(maps), lambda: None),
            EXACT: Way(lambda: pixel_metrics(masks, maps), len(maps), lambda: None),
        },
    }


def reference_small_ways(stage: Stage, masks: np.ndarray, maps: np.ndarray) -> dict[str, Way]:
    size, found = stage.encoder.image_size, random_distances(stage)
    return {
        "decoding": Way(lambda: np.stack([load_image(path, size) for path in stage.paths]), len(stage.paths)),
        "maps": Way(lambda: np.stack([reference.heat_map(one, size) for one in found]), len(found)),
        "pixel metrics": Way(lambda: reference.pixel_metrics(masks, maps), len(maps), lambda: None),
    }


def random_distances(stage: Stage) -> np.ndarray:
    """What K sub-models find in every image, before it becomes maps: float32 (N · K, 2, P)."""
    shape = (len(stage.paths) * len(stage.subsets), 2, stage.training.model.patches)
    return np.random.default_rng(3).random(shape, np.float32)


def streamed(masks: np.ndarray, maps: np.ndarray) -> PixelCounts:
    """Batch by batch, as evaluate.py does."""
    counts = PixelCounts()
    for start in range(0, len(maps), SCORE_BATCH):
        counts = accumulate(counts, masks[start : start + SCORE_BATCH], maps[start : start + SCORE_BATCH])
    return counts


def product_ways(side: int) -> dict[str, Way]:
    """The machine's matrix product in float32; a unit is one operation (a multiply-add is two)."""
    random = np.random.default_rng(4)
    a, b = (random.random((side, side), np.float32) for _ in range(2))
    on_device, product = (jnp.asarray(a), jnp.asarray(b)), jax.jit(jnp.matmul)
    operations = 2 * side**3

    def repeatedly(call: Callable[[], Any]) -> Callable[[], None]:
        return lambda: [call() for _ in range(4)] and None

    return {
        "JAX": Way(repeatedly(lambda: product(*on_device).block_until_ready()), 4 * operations),
        "NumPy": Way(repeatedly(lambda: a @ b), 4 * operations),
    }


# ---- the others' process ----


@contextmanager
def others(settings: Bench, spec: Spec, paths: list[Path]) -> Iterator[tuple[Parts, dict[str, dict[str, float]]]]:
    """The reference's and PyTorch's ways, to be called from here but at work in a process of their own.

    Yields the ways, and how far PyTorch's results are from the reference's in JAX: {way: {what: difference}}.
    """
    here, there = multiprocessing.Pipe()
    arguments = (there, settings, spec, paths, jax.config.jax_platforms)
    # spawned, not forked: JAX's threads do not survive a fork
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    process.start()
    there.close()  # so that a process that ends early ends the waiting here too

    def ask(*question) -> Any:
        here.send(question)
        return here.recv()

    def far(part: str, name: str, units: float) -> Way:
        return Way(partial(ask, part, name, True), units, partial(ask, part, name, False), lambda work: work())

    try:
        units, agreements = here.recv()
        yield {part: {name: far(part, name, each) for name, each in units[part].items()} for part in units}, agreements
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("the process that runs the reference's way ended early; its last words are above") from None
    finally:
        here.close()  # tells it to end
        process.join(5)
        process.kill()


def serve(pipe: Connection, settings: Bench, spec: Spec, paths: list[Path], platforms: str | None) -> None:
    """The other end: (part, way, whether to work or to warm up) comes in, (seconds, peak memory) goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which then ends this one
    jax.config.update("jax_platforms", platforms)
    keep_compiled()
    stage = prepare(settings, random_encoder(spec, settings.image_size), paths)
    masks, maps = draw_maps(settings.reference_maps, settings.image_size)
    ways = reference_ways(stage, settings.rounds) | reference_small_ways(stage, masks, maps)
    parts, agreements = {part: {JAX: way} for part, way in ways.items()}, {}
    for name in TORCH if settings.against else ():
        ways, agreements[name] = torch_ways(import_torch(), stage, name)
        for part, way in ways.items():
            parts[part][name] = way
    pipe.send(({part: {name: way.units for name, way in found.items()} for part, found in parts.items()}, agreements))
    while True:
        try:
            part, name, measured = pipe.recv()
        except EOFError:  # the first process is gone
            return
        way = parts[part][name]
        pipe.send(timed(way.work if measured else way.warm or way.work))


# ---- agreement ----


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to b's largest number."""
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


def agreement(settings: Bench, stage: Stage, masks: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    """How far llb's results and the reference's differ on the same input: relative; metrics absolute."""
    encoder, model, size = stage.encoder, stage.training.model, stage.encoder.image_size
    batch = stage.images[: settings.batch_size]
    features = stage.encode(batch)
    plain = np.asarray(reference.compiled_encode(encoder.params, batch, spec=encoder.spec))
    everything = score(stack(stage.params), model, features.__getitem__, np.arange(len(batch)), size, "", True)
    _, our_scores, our_maps = next(iter(everything))
    found = np.asarray(reference.distances(encoder.params, stage.params[0], batch, spec=encoder.spec, model=model))
    their_maps = np.stack([reference.heat_map(one, size) for one in found])
    some = settings.reference_maps
    counts, theirs = streamed(masks[:some], maps[:some]), reference.pixel_metrics(masks[:some], maps[:some])
    ours = pixel_metrics_of(counts)
    return {
        "features": difference(features, plain),
        "maps": difference(our_maps[:, 0], their_maps),
        "scores": difference(our_scores[:, 0], np.array([reference.top_mean(one) for one in their_maps])),
        "bound stated for pixel metrics": max(pixel_metrics_error(counts).values()),
    } | {name: abs(ours[name] - theirs[name]) for name in ours}


# ---- targets ----


def compare(timings: Timings, work: dict[str, int], settings: Bench) -> tuple[dict, dict]:
    """Ratios {part: {way: [median, lowest, highest]}}, and targets {name: {ratio, target, met}}."""
    ratios = {
        part: {way: ratio(timing, ways[OURS]) for way, timing in ways.items() if way != OURS}
        for part, ways in timings.items()
        if OURS in ways
    }
    # Scoring as a target has llb's encoder in it, once for all K sub-models, though training has paid for it already.
    ours = timings["scoring"][OURS].seconds
    with_encoder = Timing([a + b for a, b in zip(ours, timings["encoder"][OURS].seconds)])
    ratios["scoring, encoder included"] = {
        way: ratio(timing, with_encoder) for way, timing in timings["scoring"].items() if way != OURS
    }
    best = min((ratios["encoder"][way] for way in TORCH if way in ratios["encoder"]), default=None)
    share = shares(timings, work, settings)["training step"][OURS]
    wanted = [
        ("stage 1 / reference in JAX", ratios["stage 1"].get(JAX), 1.5),
        ("stage 1 / PyTorch eager", ratios["stage 1"].get(EAGER), 2.0),
        ("scoring / reference in JAX", ratios["scoring, encoder included"].get(JAX), 1.6),
        ("scoring / PyTorch eager", ratios["scoring, encoder included"].get(EAGER), 2.5),
        ("maps / SciPy", ratios["maps"].get(JAX), 50.0),
        ("pixel metrics / reference", ratios["pixel metrics"].get(JAX), 20.0),
        ("training step / matrix product", [share], 0.7),
        ("encoder / PyTorch's best", best, 1.0),
    ]
    return ratios, judge((name, found[0], target) for name, found, target in wanted if found is not None)


def judge(reached: Iterable[tuple[str, float, float]]) -> dict[str, dict[str, Any]]:
    """Name, ratio and target of each → {name: {ratio, target, met}}."""
    return {name: {"ratio": r, "target": target, "met": bool(r >= target)} for name, r, target in reached}


def operations(work: dict[str, int], settings: Bench) -> dict[str, int]:
    """Useful operations per unit of a part, two for a multiply-add; the encoder is in none but its own."""
    return {
        "encoder": 2 * work["encoder"],
        "training step": 2 * work["sub-model and gradient"] * settings.batch_size * settings.submodels,
        "scoring": 2 * work["sub-model"] * settings.submodels,
    }


def shares(timings: Timings, work: dict[str, int], settings: Bench) -> dict[str, dict[str, float]]:
    """Part → way → arithmetic rate as a share of the machine's matrix product, whichever library's is faster."""
    peak = 1 / min(statistics.median(timing.seconds) for timing in timings["matrix product"].values())
    needed = operations(work, settings)
    found = {}
    for part, own in needed.items():
        for way, timing in timings[part].items():
            # every other way encodes each batch of each sub-model again
            repeats = {"encoder": 0, "training step": settings.batch_size * settings.submodels}
            again = 0 if way == OURS else needed["encoder"] * repeats.get(part, settings.submodels)
            found.setdefault(part, {})[way] = (own + again) / statistics.median(timing.seconds) / peak
    return found


# ---- the run ----


def main() -> None:
    settings = parse(Bench)
    device = choose_device()
    say(device)
    if settings.json:
        writable_file(settings.json, "--json")
    if settings.gpu:
        from llb.bench_gpu import measure as measure_gpu

        results = measure_gpu(settings, device)
    else:
        results = measure(settings, SPECS[settings.encoder], device)
    if settings.json:
        write_json(settings.json, results)
        say(f"written: {settings.json}")


def measure(settings: Bench, spec: Spec, device: str, photo: int = PHOTO, product: int = PRODUCT) -> dict[str, Any]:
    """Everything but the accelerator's table; prints it and returns what --json writes.

    photo, product: sides of the images on the disk and of the matrices that are multiplied, for tests.
    """
    check(settings, spec)
    if settings.against:
        import_torch()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = draw_photos(folder, settings.images, photo)
        stage = prepare(settings, random_encoder(spec, settings.image_size), paths)
        masks, maps = draw_maps(settings.maps, settings.image_size)
        work = count_work(stage.encoder, stage.training)
        agreements = {JAX: agreement(settings, stage, masks, maps)}
        large = {part: {OURS: way} for part, way in our_ways(stage, folder).items()}
        small = our_small_ways(stage, masks, maps)
        with others(settings, spec, paths) as (theirs, found):
            agreements |= found
            large, small = ({part: parts[part] | theirs[part] for part in parts} for parts in (large, small))
            timings = take_turns({"matrix product": product_ways(product)} | large, settings.rounds)
            timings |= take_turns(small, max(3, settings.rounds))
        add_whole(timings, settings.images, settings.steps)
    ratios, targets = compare(timings, work, settings)
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m llb.bench", *sys.argv[1:]]),
        "machine": machine(device),
        "settings": {name: value for name, value in vars(settings).items() if name not in ("json", "gpu")},
        "multiply_adds_per_image": work,
        "agreement": agreements,
        "parts": {
            part: {way: {"seconds": timing.seconds, "peak_mib": timing.peak_mib} for way, timing in ways.items()}
            for part, ways in timings.items()
        },
        "ratios": ratios,
        "share_of_matrix_product": shares(timings, work, settings),
        "targets": targets,
        "seconds": time.monotonic() - began,
    }
    say(table(results))
    return results


def check(settings: Bench, spec: Spec) -> None:
    if spec.filter_bank:
        raise UserError("--encoder tiny: the reference's way has no filter bank; choose one of the others")
    if settings.image_size % spec.patch:
        raise UserError(f"--image-size {settings.image_size} is no multiple of {spec.name}'s patch size {spec.patch}")
    if settings.images < settings.submodels:
        raise UserError(f"--images {settings.images}: give at least --submodels, {settings.submodels}")
    if settings.reference_maps > settings.maps:
        raise UserError(f"--reference-maps {settings.reference_maps}: give at most --maps, {settings.maps}")


def import_torch():
    try:
        from llb import bench_torch
    except ImportError:
        raise UserError("--against torch: PyTorch is not installed; pip install torch, or leave the flag out") from None
    return bench_torch


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()} | environment(device)


def table(results: dict[str, Any]) -> str:
    """What a person reads."""
    parts = results["parts"]
    product = {way: 1e-9 / statistics.median(found["seconds"]) for way, found in parts["matrix product"].items()}
    lines = ["", "matrix product: " + ", ".join(f"{way} {rate:.0f} GFLOP/s" for way, rate in product.items())]
    counted = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in results["multiply_adds_per_image"].items())
    lines.append(f"multiply-adds of an image, ·10⁹: {counted}")
    for way, found in results["agreement"].items():
        one = "llb" if way == JAX else "the reference in JAX"
        lines.append(f"{one} and {way} differ by " + ", ".join(f"{name} {value:.1e}" for name, value in found.items()))
    lines += [
        "",
        f"{'part':14} {'way':17} {'time':>10}  {'llb is faster':26} {'of matrix product':>17} {'peak MiB':>9}",
    ]
    for part, unit in UNITS.items():
        for way, found in parts[part].items():
            text = f"{part if way == OURS else '':14} {way:17} {duration(statistics.median(found['seconds'])):>10}  "
            spread = f"per {unit}"
            if way != OURS:
                spread = "{:.2f} × ({:.2f} – {:.2f})".format(*results["ratios"][part][way])
            share = results["share_of_matrix_product"].get(part, {}).get(way)
            share = f"{share:10.0%}" if share else " " * 10
            peak = f"{found['peak_mib']:9.0f}" if found["peak_mib"] else ""
            lines.append(f"{text}{spread:26} {share} {peak}")
    lines += ["", f"{'target':34} {'measured':>9} {'wanted':>7}"]
    return "\n".join([*lines, *conclusion(results)])


def conclusion(results: dict[str, Any]) -> list[str]:
    """The last lines of a table: which targets are met, and how long it took."""
    lines = []
    for name, found in results["targets"].items():
        verdict = "met" if found["met"] else "not met"
        lines.append(f"{name:34} {found['ratio']:9.2f} {found['target']:7.2f}  {verdict}")
    return [*lines, "", f"took {results['seconds'] / 60:.1f} minutes"]


def duration(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"


if __name__ == "__main__":
    run(main, goes_on=False)
