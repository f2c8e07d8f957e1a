"""Shared by all parts of the benchmark: sizes, turns, counted multiply-adds, drawn inputs, facts on the machine."""

import datetime
import hashlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llb.console import say
from llb.demo import draw
from llb.detectors import dinomaly
from llb.detectors.common import Setup, map_matrix
from llb.detectors.decoder import Dinomaly
from llb.detectors.recipes import Recipe, hard_positions
from llb.encoders import Encoder, parameter_shapes
from llb.encoders.specs import Spec
from llb.features import Source, make_source
from llb.files import size_and_time
from llb.images import ImageFiles, load_image
from llb.run import environment

OURS, EXACT, JAX = "llb", "llb exact", "reference"  # names of ways
EAGER, FUSED, COMPILED = TORCH = ("PyTorch eager", "PyTorch fused", "PyTorch compiled")


@dataclass(frozen=True)
class Sizes:
    """How large the compared work is."""

    spec: Spec
    image_size: int
    images: int
    submodels: int  # K
    batch_size: int
    steps: int
    maps: int = 0  # for the pixel metrics,
    reference_maps: int = 0  # and those of them that the reference's way gets
    photo: int = 1024  # side of the image files, pixels: Real-IAD's
    product: int = 2048  # side of the matrices whose product gives the machine's arithmetic rate

    def settings(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self) | {"spec": self.spec.name}


# ---- taking turns ----


def timed(work: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds of `work`, and this process's peak memory meanwhile in MiB."""
    reset_peak_memory()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began, peak_memory()


@dataclass
class Way:
    """One way to do a part of the work. `work` does `units` units; `warm` makes it compile (None: `work` does)."""

    work: Callable[[], Any]
    units: float
    warm: Callable[[], Any] | None = None
    measure: Callable[[Callable[[], Any]], tuple[float, float | None]] = timed  # another process measures by itself


@dataclass
class Timing:
    """Seconds per unit, one number for each round, and the process's peak memory during the work."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None


Parts = dict[str, dict[str, Way]]  # part → name of the way → way
Timings = dict[str, dict[str, Timing]]


def take_turns(parts: Parts, rounds: int) -> Timings:
    """Do every part in every way `rounds` times, in turn. A first time before that, for compiling, is not counted."""
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
    """The process's highest resident memory in MiB since the reset; None on systems that do not tell it."""
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


# ---- drawn inputs ----


def random_weights(shapes: dict, seed: int) -> dict:
    """A host tree: kernels and tokens are normal with σ = 0.02. Unlike the models' own initialisation nothing is
    compiled."""
    random = np.random.default_rng(seed)

    def leaf(path, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean, spread = {"bias": (0.0, 0.0), "scale": (1.0, 0.0)}.get(path[-1].key, (0.0, 0.02))
        return random.normal(mean, spread, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_encoder(spec: Spec, size: int, precision: str = "float32") -> Encoder:
    params = jax.tree.map(jnp.asarray, random_weights(parameter_shapes(spec), 0))
    return Encoder(spec, params, size, "random", precision)


def random_submodels(setup: Setup, count: int) -> list[dict]:
    shapes = jax.eval_shape(partial(dinomaly.init, setup), jax.random.key(0))["params"]
    return [random_weights(shapes, 1 + k) for k in range(count)]


def draw_photos(folder: Path, count: int, side: int) -> list[Path]:
    """Write JPEG files, side × side: enlarged pictures of the demo set."""
    paths = [folder / f"{index:04}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        picture = Image.fromarray(draw([0, index])[0])
        picture.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=95)
    return paths


def draw_maps(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool and maps float32, both (count, size, size): every second image has one to four round defects."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[:size, :size]
    matrix = map_matrix(size, 28, dinomaly.MAP)
    masks, maps = np.zeros((count, size, size), bool), np.empty((count, size, size), np.float32)
    for index in range(count):
        for _ in range(random.integers(1, 5) * (index % 2)):
            y, x, radius = random.uniform(0, size, 2).tolist() + [random.uniform(0.01, 0.08) * size]
            masks[index] |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        maps[index] = matrix @ random.gamma(2, 0.05, (28, 28)).astype(np.float32) @ matrix.T + 0.05 * masks[index]
    return masks, maps


@dataclass
class Stage:
    """The input of stage 1, equal for all ways."""

    source: Source  # of llb's features
    setup: Setup
    paths: list[Path]
    images: np.ndarray  # uint8 (N, S, S, 3), the content of `paths`: the reference gets the images decoded
    subsets: list[np.ndarray]  # K arrays of indices
    params: list[dict]  # K new sub-models, host trees

    @property
    def encoder(self) -> Encoder:
        return self.source.encoder

    @property
    def model(self) -> Dinomaly:
        return dinomaly.network(self.setup)

    @property
    def recipe(self) -> Recipe:
        return dinomaly.recipe_of(self.setup)

    @property
    def hard(self) -> int:
        """How many positions of a batch keep their gradient at the first step."""
        return hard_positions(self.recipe, 0, self.setup.batch_size * self.model.patches)

    @property
    def files(self) -> ImageFiles:
        names = [hashlib.sha256(bytes(path)).hexdigest() for path in self.paths]  # for a cache of this command alone
        return ImageFiles(
            tuple(self.paths), states=tuple((*size_and_time(p), name) for p, name in zip(self.paths, names))
        )


def prepare(sizes: Sizes, encoder: Encoder, paths: list[Path]) -> Stage:
    """The same in every process: weights are drawn from fixed seeds."""
    setup = make_setup(encoder, sizes.steps, sizes.batch_size)
    images = np.stack([load_image(path, sizes.image_size) for path in paths])
    params = random_submodels(setup, sizes.submodels)
    return Stage(make_source(encoder), setup, paths, images, deal(sizes.images, sizes.submodels), params)


def make_setup(encoder: Encoder, steps: int, batch_size: int, **settings) -> Setup:
    """Of Dinomaly. settings: those of its Settings that differ from the published ones."""
    own = dinomaly.Settings(**settings)
    training = {"learning_rate": own.learning_rate, "steps": steps, "batch_size": batch_size}
    named = {"detector": "dinomaly", "score": dinomaly.SCORE, "map_rule": dinomaly.MAP}
    return Setup(encoder.spec, (), encoder.image_size, own, encoder.precision, **training, **named)


def deal(images: int, submodels: int) -> list[np.ndarray]:
    """K subsets of image indices, int (images / K,) each."""
    return [np.arange(k, images, submodels) for k in range(submodels)]


def random_distances(stage: Stage) -> np.ndarray:
    """Distances of every image in K sub-models, not yet maps: float32 (N · K, 2, P)."""
    shape = (len(stage.paths) * len(stage.subsets), 2, stage.model.patches)
    return np.random.default_rng(3).random(shape, np.float32)


def stack(trees: Sequence[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to b's largest number."""
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


# ---- the machine, and what all tables share ----


def about(device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The first entries of --json."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m llb.bench", *sys.argv[1:]]),
        "machine": machine(device),
        "settings": settings,
    }


def machine(device: str) -> dict[str, Any]:
    """The facts that figures depend on besides the settings."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.platform()} | environment(device)


def judge(reached: Iterable[tuple[str, float, float]]) -> dict[str, dict[str, Any]]:
    """Name, ratio and target of each → {name: {ratio, target, met}}."""
    return {name: {"ratio": r, "target": target, "met": bool(r >= target)} for name, r, target in reached}


def conclusion(targets: dict[str, dict[str, Any]], seconds: float) -> list[str]:
    """The last lines of a table: which targets are met, and how long the benchmark took."""
    lines = ["", f"{'target':34} {'measured':>9} {'wanted':>7}"]
    for name, target in targets.items():
        verdict = "met" if target["met"] else "not met"
        lines.append(f"{name:34} {target['ratio']:9.2f} {target['target']:7.2f}  {verdict}")
    return [*lines, "", f"took {seconds / 60:.1f} minutes"]
