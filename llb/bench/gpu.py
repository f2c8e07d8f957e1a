"""An accelerator's figures: `python -m llb.bench --gpu`.

ViT-B/14 with registers at 392 pixels, batch 16: images per second through the encoder and its share of the bf16 peak; a
step of K sub-models together and one after the other, for K = 3 and 8; the whole of stage 1 beside the reference's way;
and how busy the device is during training, from JAX's profiler.

A line is printed, and --json written, as soon as a part is measured: a run that is stopped has shown the parts before.
Compiling is not timed, but a training step of this size takes half a minute to compile. So every part uses the same
Setup, since another one compiles again, and the step of K = 8 comes last. The reference's steps are alike, so a few
are timed and multiplied by their number; llb's stage 1 really runs.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb.bench import reference
from llb.bench.common import (
    Sizes,
    Stage,
    about,
    conclusion,
    deal,
    draw_photos,
    judge,
    prepare,
    random_encoder,
)
from llb.checkpoint import CheckpointFolder
from llb.console import say
from llb.device import default_precision
from llb.encoders.specs import SPECS
from llb.features import ENCODE_BATCH, cached_features, prefetch, streamed_features
from llb.files import UserError
from llb.placement import place_submodels
from llb.score import score_all
from llb.train import PREPARING, State, Submodels, init_state, submodel_keys, train, train_step

SIZES = Sizes(
    spec=SPECS["dinov2_vitb14_reg"],
    image_size=392,
    images=1000,
    submodels=3,
    batch_size=16,
    steps=300,
    product=8192,
)
LARGEST_K = 8
PHOTOS = 32  # different images; each has several names, since drawing takes long
FEATURES = 64  # images whose random features the timed steps use
REPEATS = 3
STEPS = 10  # in each repeat
REFERENCE_STEPS = 3

# Dense bf16 peak of one device, operations per second, by a part of its name, the longer before the shorter; NVIDIA's
# data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def check(torch) -> None:
    """Raise a UserError if JAX, or the module llb.bench.pytorch, sees no accelerator. torch: None without PyTorch."""
    if jax.default_backend() == "cpu":
        raise UserError("--gpu: JAX sees no accelerator here; leave the flag out")
    if torch and not torch.torch.cuda.is_available():
        raise UserError("--against torch: this PyTorch sees no GPU; install one built for CUDA, or leave the flag out")


def measure(
    sizes: Sizes, device: str, torch=None, keep: Callable[[dict], None] | None = None, largest: int = LARGEST_K
) -> dict[str, Any]:
    """Measure part by part, print a line for each, and return the content of --json.

    Args:
        device: what `llb.device.start_jax` has returned.
        torch: the module llb.bench.pytorch, if the reference's way is PyTorch's; None for JAX's.
        keep: gets all results so far after each part.
        largest: K of the last part.
    """
    began = time.monotonic()
    settings = sizes.settings() | {"largest_submodels": largest, "precision": default_precision()}
    results = about(device, settings) | {"measured": {}}
    say(f"operands of matrix products: llb {settings['precision']}, the reference float32; compiling is not timed")
    with tempfile.TemporaryDirectory() as folder:
        for name, values, line in parts(sizes, device, torch, largest, Path(folder)):
            results["measured"][name] = values
            results["targets"] = compare(results["measured"], largest)
            results["machine"]["peak_mib"] = device_memory()
            results["seconds"] = time.monotonic() - began
            say(line)
            if keep:
                keep(results)
    say("\n".join(conclusion(results["targets"], results["seconds"])))
    return results


def parts(sizes: Sizes, device: str, torch, largest: int, folder: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields of each part, once it is measured: its name, its values, and the line that tells them."""
    product = bf16_rate(sizes.product)
    peak = next((value for part, value in PEAKS.items() if part in device), product) * jax.local_device_count()
    yield (
        "bf16",
        {"product": product, "peak": peak},
        f"bf16: peak {peak / 1e12:.3g} TFLOP/s, a matrix product {product / 1e12:.3g}",
    )

    stage = many_images(sizes, folder)
    work = reference.count_work(stage.setup)
    rate = encoder_rate(stage)
    of_peak = 2 * work["encoder"] * rate / peak
    values = {"images_per_second": rate, "share_of_bf16_peak": of_peak, "multiply_adds_per_image": work}
    yield "encoder", values, f"encoder: {rate:.1f} images/s, {of_peak:.0%} of the peak"

    several = Steps(stage, sizes.submodels)
    first_state = several.placement.gather(several.state, sizes.submodels)
    together = several.seconds()
    single = Steps(stage, 1, first_state).seconds()
    a_step = 2 * work["sub-model and gradient"] * sizes.batch_size  # operations, for one sub-model
    yield step_part(sizes.submodels, together, single, a_step / peak)

    ours = whole(stage, first_state["params"], folder)
    sized = f"stage 1, {sizes.images} images, {sizes.steps} steps, K = {sizes.submodels}"
    line = "{seconds:.1f} s (features {features:.1f}, training {training:.1f}, scoring {scoring:.1f})".format(**ours)
    yield "stage 1", ours, f"{sized}: {line}"

    theirs = reference_whole(stage, torch)
    line = "{seconds:.1f} s, from {step:.3g} s a step and {batch:.3g} s a batch of scores".format(**theirs)
    yield "stage 1, reference", theirs, f"the same in the reference's way, {theirs['way']}: {line}"

    values = profile(several, folder / "profile")
    busy = values["device_busy"]
    lines = ["device during training: " + ("no trace of it" if busy is None else f"busy {busy:.1%} of the time")]
    lines += [f"    {operation['share']:6.1%}  {operation['name']}" for operation in values["longest_operations"]]
    yield "profile", values, "\n".join(lines)

    del several  # its memory is needed
    together = Steps(stage, largest, first_state).seconds()
    yield step_part(largest, together, single, a_step / peak)


def step_part(submodels: int, together: float, single: float, needed: float) -> tuple[str, dict[str, float], str]:
    """A yield of `parts`, from seconds: of a step of K, of a step of one, and what one needs at the device's peak."""
    values = {
        "together": together,
        "one_after_the_other": submodels * single,
        "ratio": submodels * single / together,
        "share_of_bf16_peak": submodels * needed / together,
    }
    line = (
        "together {together:.3g} s ({share_of_bf16_peak:.0%} of the peak), "
        "one after the other {one_after_the_other:.3g} s, ratio {ratio:.2f}"
    ).format(**values)
    return f"step, K = {submodels}", values, f"step, K = {submodels}: {line}"


def many_images(sizes: Sizes, folder: Path) -> Stage:
    """sizes.images names of PHOTOS different images."""
    few = replace(sizes, images=min(sizes.images, PHOTOS))
    encoder = random_encoder(sizes.spec, sizes.image_size, default_precision())
    stage = prepare(few, encoder, draw_photos(folder, few.images, sizes.photo))
    paths = [stage.paths[index % few.images] for index in range(sizes.images)]
    images = np.take(stage.images, np.arange(sizes.images), axis=0, mode="wrap")
    return replace(stage, paths=paths, images=images, subsets=deal(sizes.images, sizes.submodels))


def timed(work: Callable[[], Any]) -> float:
    """Median of the seconds of REPEATS times; once more before, untimed, to compile."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def bf16_rate(side: int) -> float:
    """Operations per second of a square bf16 matrix product."""
    a = jnp.ones((side, side), jnp.bfloat16)
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: (a @ b) * jnp.bfloat16(1e-4), a))
    return 10 * 2 * side**3 / timed(lambda: product(a).block_until_ready())


def encoder_rate(stage: Stage) -> float:
    """Images per second: decoded images on the host → features on the host, in llb's own batches."""
    images = stage.images[: 8 * ENCODE_BATCH]

    def work() -> None:
        for start in range(0, len(images), ENCODE_BATCH):
            stage.source.encode(images[start : start + ENCODE_BATCH])

    return len(images) / timed(work)


class Steps:
    """K sub-models that are trained as in `llb.train.train`, but without checkpoints and any number of steps at a time.

    state: a host tree of any number of sub-models, whose copies they start from; None for new ones.
    """

    def __init__(self, stage: Stage, submodels: int, state: State | None = None) -> None:
        shape = (FEATURES, *stage.source.shape)
        self.features = np.random.default_rng(0).random(shape, np.float32).astype(np.float16)
        self.setup, self.placement = stage.setup, place_submodels(submodels)
        self.batch = np.arange(submodels * self.setup.batch_size).reshape(submodels, -1) % FEATURES
        keys = self.placement.spread_keys(submodel_keys(jax.random.key(0), submodels))
        self.each = {"key": keys, "steps_per_pass": self.placement.spread(np.ones(submodels, np.int32))}
        if state is None:
            self.state = init_state(keys, setup=self.setup, sharding=self.placement.sharding)
        else:
            copies = jax.tree.map(lambda leaf: np.resize(leaf, (submodels, *leaf.shape[1:])), state)
            self.state = self.placement.spread(copies)

    def train(self, steps: int = STEPS) -> None:
        """Features come from the host, as in llb.train."""

        def features_of(step: int) -> jax.Array:
            return self.placement.spread_features(self.features.__getitem__, self.batch, self.features.shape[1:])

        for step, features in prefetch(features_of, range(steps), PREPARING, PREPARING):
            self.state, losses = train_step(
                self.state, features, self.each, (None, np.int32(step)), setup=self.setup, mesh=self.placement.mesh
            )
        losses.block_until_ready()

    def seconds(self) -> float:
        """Of one step."""
        return timed(self.train) / STEPS


def whole(stage: Stage, params: dict, folder: Path) -> dict[str, float]:
    """Seconds of llb's stage 1, from image files to scores. params: of K sub-models, to compile the scoring before."""
    score_all(params, stage.setup, streamed_features(stage.source, stage.files), 1, "  compiling")
    submodels = Submodels(stage.subsets, submodel_keys(jax.random.key(0), len(stage.subsets)))
    clock = [time.perf_counter()]
    features = cached_features(stage.source, stage.files, folder / "cache", 64.0, 64.0, "  features")
    clock.append(time.perf_counter())
    params, _ = train(stage.setup, features, submodels, CheckpointFolder(folder / "training", "bench"), "  training")
    clock.append(time.perf_counter())
    score_all(params, stage.setup, features, len(stage.paths), "  scoring")
    clock.append(time.perf_counter())
    spent = dict(zip(("features", "training", "scoring"), np.diff(clock).tolist()))
    return spent | {"seconds": clock[-1] - clock[0]}


def reference_whole(stage: Stage, torch) -> dict[str, Any]:
    """The reference's stage 1: the time of a step and of a batch of scores, times their number."""
    setup, submodels, images = stage.setup, len(stage.subsets), len(stage.paths)
    batch = np.arange(setup.batch_size) % images
    if torch:
        stage1 = torch.Stage1(stage, "eager", "cuda")
        steps, score = partial(stage1.train, REFERENCE_STEPS), partial(stage1.score, batch)
    else:
        steps, score = reference_calls(stage, stage.images[batch])
    step_seconds, batch_seconds = timed(steps) / REFERENCE_STEPS, timed(score)
    batches = -(-images // setup.batch_size)
    return {
        "way": "PyTorch eager" if torch else "JAX",
        "step": step_seconds,
        "batch": batch_seconds,
        "seconds": submodels * (setup.steps * step_seconds + batches * batch_seconds),
    }


def reference_calls(stage: Stage, images: np.ndarray) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """REFERENCE_STEPS steps of one sub-model in JAX, and the scores of one batch."""
    weights, setup, params = stage.encoder.params, stage.setup, stage.params[0]
    own = {"key": jax.random.key(0), "steps_per_pass": np.int32(1), "hard": np.int32(stage.hard)}
    latest = {"state": reference.new_state(setup, params, 1)}

    def steps() -> None:
        for _ in range(REFERENCE_STEPS):
            latest["state"], loss = reference.train_step(weights, latest["state"], images, own, setup=setup)
            float(loss)  # as the released loop does, for its log

    return steps, partial(reference.score, weights, params, images, setup)


def profile(steps: Steps, folder: Path) -> dict[str, Any]:
    """JAX's profiler over a few steps: the share of the time in which the device works, and the longest operations."""
    with jax.profiler.trace(str(folder)):
        steps.train()
    trace = next(folder.rglob("*.xplane.pb"))
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(trace)).planes if "/device:" in plane.name]
    if not planes:
        return {"device_busy": None, "longest_operations": []}  # the CPU has no plane of its own
    spans, total = [], {}
    for line in planes[0].lines:
        if "Stream" not in line.name:
            continue  # the other lines repeat the streams' operations under other headings
        for event in line.events:
            spans.append((event.start_ns, event.start_ns + event.duration_ns))
            total[event.name] = total.get(event.name, 0.0) + event.duration_ns
    longest = sorted(total.items(), key=lambda item: -item[1])[:8]
    busy = sum(total.values())
    return {
        "device_busy": covered(spans),
        "longest_operations": [{"name": name, "share": spent / busy} for name, spent in longest],
    }


def covered(spans: list[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end that lies in at least one of the spans."""
    if not spans:
        return None
    spans = sorted(spans)
    work, end = 0.0, spans[0][0]
    for start, stop in spans:
        work += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return work / (end - spans[0][0])


def compare(measured: dict[str, Any], largest: int) -> dict[str, dict[str, Any]]:
    """The targets of the parts that are measured so far."""
    reached = []
    if "stage 1, reference" in measured:
        ratio = measured["stage 1, reference"]["seconds"] / measured["stage 1"]["seconds"]
        reached.append(("stage 1 / reference", ratio, 8.0))
    if "encoder" in measured:
        reached.append(("encoder / bf16 peak", measured["encoder"]["share_of_bf16_peak"], 0.4))
    step = f"step, K = {largest}"
    if step in measured:
        reached.append((f"joint step / sequential, K = {largest}", measured[step]["ratio"], 1.5))
    return judge(reached)


def device_memory() -> float | None:
    """The device's highest memory in use so far, MiB."""
    statistic = jax.devices()[0].memory_stats() or {}
    return statistic["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in statistic else None
