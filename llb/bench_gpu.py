"""An accelerator's table: `python -m llb.bench --gpu`, called by llb.bench.

ViT-B/14 with registers at 392 pixels, batch 16, K = 3 and 8. Images per second through the encoder and the share of the
bf16 peak; a step of all K together against one sub-model after the other; the whole of stage 1 on 2,000 images with
1,000 steps against the reference's way; and how busy the device is while llb trains, from JAX's profiler.

The reference's steps are alike, so a few are timed and multiplied by their number; llb's stage 1 really runs.
"""

import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llb import bench
from llb import bench_reference as reference
from llb.config import default_precision
from llb.console import say
from llb.encoder import SPECS, Spec
from llb.features import ENCODE_BATCH, Fetch, cached
from llb.files import UserError
from llb.optimizer import hard_positions
from llb.train import score_all, submodel_keys, train

# Dense bf16 peak of one device, operations per second, by a part of its name, the longer before the shorter; NVIDIA's
# data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Sizes:
    """What the table is made with."""

    spec: Spec = SPECS["dinov2_vitb14_reg"]
    image_size: int = 392
    photo: int = 1024  # side of the images on the disk
    batch_size: int = 16
    submodels: tuple[int, ...] = (3, 8)
    images: int = 2000
    steps: int = 1000
    short: int = 50  # steps that are timed where all are alike
    repeats: int = 3
    product: int = 8192  # side of the matrices whose bf16 product is timed


def measure(settings, device: str, sizes: Sizes = Sizes()) -> dict[str, Any]:  # noqa: B008 (frozen)
    """Prints the table and returns what --json writes. settings: llb.bench.Bench, of which only `against` is used."""
    if jax.default_backend() == "cpu":
        raise UserError("--gpu: JAX sees no accelerator here; leave the flag out")
    torch = bench.import_torch() if settings.against else None
    if torch and not torch.torch.cuda.is_available():
        raise UserError("--against torch: this PyTorch sees no GPU; install one built for CUDA, or leave the flag out")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stage = prepare(sizes, folder)
        work = bench.count_work(stage.encoder, stage.training)
        found: dict[str, Any] = {"bf16_product": bf16_rate(sizes)}
        peak = next((value for part, value in PEAKS.items() if part in device), found["bf16_product"])
        peak *= jax.local_device_count()
        found["encoder"] = encoder_rate(stage, sizes)
        found["encoder"]["share_of_bf16_peak"] = 2 * work["encoder"] * found["encoder"]["images_per_second"] / peak
        for count in sizes.submodels:
            found[f"step, K = {count}"] = joint_step(stage, sizes, count, folder, work, peak)
        found["profile"] = profile(stage, sizes, folder)
        found["stage 1"] = whole(stage, sizes, folder)
        found["stage 1, reference"] = reference_whole(stage, sizes, torch)
    targets = compare(found, sizes)
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m llb.bench", *sys.argv[1:]]),
        "machine": bench.machine(device) | {"bf16_peak": peak, "peak_mib": device_memory()},
        "settings": asdict(sizes) | {"spec": sizes.spec.name, "precision": default_precision()},
        "multiply_adds_per_image": work,
        "found": found,
        "targets": targets,
        "seconds": time.monotonic() - began,
    }
    say(table(results))
    return results


def prepare(sizes: Sizes, folder: Path) -> bench.Stage:
    """K = the first of sizes.submodels; few different images, each under many names: drawing 2,000 takes long."""
    encoder = bench.random_encoder(sizes.spec, sizes.image_size, default_precision())
    settings = bench.Bench(
        image_size=sizes.image_size,
        images=min(sizes.images, 64),
        submodels=sizes.submodels[0],
        batch_size=sizes.batch_size,
        steps=sizes.steps,
    )
    stage = bench.prepare(settings, encoder, bench.draw_photos(folder, settings.images, sizes.photo))
    paths = [stage.paths[index % len(stage.paths)] for index in range(sizes.images)]
    images = np.take(stage.images, np.arange(sizes.images), axis=0, mode="wrap")
    return replace(stage, paths=paths, images=images, subsets=bench.deal(sizes.images, sizes.submodels[0]))


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat; once more before, untimed, to compile."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def bf16_rate(sizes: Sizes) -> float:
    """Operations per second of a square bf16 matrix product."""
    a = jnp.ones((sizes.product, sizes.product), jnp.bfloat16)
    product = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, b: (a @ b) * jnp.bfloat16(1e-4), a))
    return 10 * 2 * sizes.product**3 / statistics.median(timed(lambda: product(a).block_until_ready(), sizes.repeats))


def encoder_rate(stage: bench.Stage, sizes: Sizes) -> dict[str, float]:
    """Decoded images on the host → features on the host, by llb's own batches."""
    images = stage.images[: 8 * ENCODE_BATCH]

    def work() -> None:
        for start in range(0, len(images), ENCODE_BATCH):
            stage.encode(images[start : start + ENCODE_BATCH])

    return {"images_per_second": len(images) / statistics.median(timed(work, sizes.repeats))}


def random_features(stage: bench.Stage, count: int) -> Fetch:
    shape = (count, 2, stage.encoder.tokens_per_image, stage.encoder.spec.width)
    return np.random.default_rng(0).random(shape, np.float32).astype(np.float16).__getitem__


def joint_step(
    stage: bench.Stage, sizes: Sizes, submodels: int, folder: Path, work: dict[str, int], peak: float
) -> dict[str, float]:
    """Seconds of a step of K sub-models together, and of K steps of one; reading features and checkpoint included."""
    training = replace(stage.training, steps=sizes.short)
    images = max(16, 2 * submodels)
    fetch, made = random_features(stage, images), iter(range(10**6))

    def steps(count: int) -> float:
        keys = submodel_keys(jax.random.key(0), count)

        def work() -> None:
            target = folder / f"step{submodels}-{next(made)}"
            train(training, fetch, bench.deal(images, submodels)[:count], keys, target, "bench", "  steps")

        return statistics.median(timed(work, sizes.repeats)) / training.steps

    together, alone = steps(submodels), steps(1)
    needed = 2 * work["sub-model and gradient"] * sizes.batch_size * submodels
    return {
        "together": together,
        "one_after_the_other": submodels * alone,
        "ratio": submodels * alone / together,
        "share_of_bf16_peak": needed / together / peak,
    }


def whole(stage: bench.Stage, sizes: Sizes, folder: Path) -> dict[str, float]:
    """llb's stage 1, from image files to scores; what the training and the scoring take to compile is in it."""
    size, keys = stage.encoder.image_size, submodel_keys(jax.random.key(0), len(stage.subsets))
    clock = [time.perf_counter()]
    fetch = cached(stage.encoder, stage.encode, stage.paths, folder / "features", 64.0, "  features")
    clock.append(time.perf_counter())
    params = train(stage.training, fetch, stage.subsets, keys, folder / "whole", "bench", "  training")
    clock.append(time.perf_counter())
    score_all(params, stage.training.model, fetch, len(stage.paths), size, "  scoring")
    clock.append(time.perf_counter())
    features, training, scoring = np.diff(clock).tolist()
    return {"features": features, "training": training, "scoring": scoring, "seconds": clock[-1] - clock[0]}


def reference_whole(stage: bench.Stage, sizes: Sizes, torch) -> dict[str, Any]:
    """The reference's stage 1: a step and a batch of scores, timed, times their number."""
    batch, submodels = np.arange(sizes.batch_size) % len(stage.images), len(stage.subsets)
    steps = max(1, sizes.short // 5)
    if torch:
        one = torch.Stage1(stage, "eager", "cuda")
        step, score = lambda: one.train(steps), lambda: one.score(batch)
    else:
        images, spec, training = stage.images[batch], stage.encoder.spec, stage.training
        optimizer = reference.optimizer(training, 1)
        params = jax.tree.map(jnp.array, stage.params[0])
        latest = [{"params": params, "opt": jax.jit(optimizer.init)(params)}]
        hard = np.int32(hard_positions(training.recipe, 0, sizes.batch_size * training.model.patches))

        def step() -> None:
            for _ in range(steps):
                latest[0], loss = reference.train_step(
                    stage.encoder.params, latest[0], images, jax.random.key(0), 1, hard, spec=spec, training=training
                )
                float(loss)

        score = partial(reference.score, stage.encoder.params, stage.params[0], images, spec, training.model)
    a_step = statistics.median(timed(step, sizes.repeats)) / steps
    a_batch = statistics.median(timed(score, sizes.repeats))
    batches = -(-sizes.images // sizes.batch_size)
    return {
        "way": "PyTorch eager" if torch else "JAX",
        "step": a_step,
        "batch": a_batch,
        "seconds": submodels * (sizes.steps * a_step + batches * a_batch),
    }


def profile(stage: bench.Stage, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """JAX's profiler over a short training: the share of the time that the device works, and on what."""
    training, images = replace(stage.training, steps=sizes.short), 16
    fetch, keys = random_features(stage, images), submodel_keys(jax.random.key(0), len(stage.subsets))
    with jax.profiler.trace(str(folder / "profile")):
        train(training, fetch, bench.deal(images, len(stage.subsets)), keys, folder / "profiled", "bench", "  profile")
    trace = next((folder / "profile").rglob("*.xplane.pb"))
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


def compare(found: dict[str, Any], sizes: Sizes) -> dict[str, dict[str, Any]]:
    most = max(sizes.submodels)
    reached = [
        ("stage 1 / reference", found["stage 1, reference"]["seconds"] / found["stage 1"]["seconds"], 8.0),
        ("encoder / bf16 peak", found["encoder"]["share_of_bf16_peak"], 0.4),
        (f"joint step / sequential, K = {most}", found[f"step, K = {most}"]["ratio"], 1.5),
    ]
    return bench.judge(reached)


def device_memory() -> float | None:
    """The device's highest memory in use so far, MiB."""
    statistic = jax.devices()[0].memory_stats() or {}
    return statistic["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in statistic else None


def table(results: dict[str, Any]) -> str:
    found, machine = results["found"], results["machine"]
    lines = [
        "",
        f"operands of matrix products: llb's {results['settings']['precision']}, the reference's float32",
        f"bf16: peak {machine['bf16_peak'] / 1e12:.3g} TFLOP/s, product {found['bf16_product'] / 1e12:.3g}",
    ]
    encoder = found["encoder"]
    lines.append(
        f"encoder: {encoder['images_per_second']:.1f} images/s, {encoder['share_of_bf16_peak']:.0%} of the peak"
    )
    for name, step in found.items():
        if name.startswith("step"):
            lines.append(
                f"{name}: together {step['together']:.3g} s ({step['share_of_bf16_peak']:.0%} of the peak), "
                f"one after the other {step['one_after_the_other']:.3g} s, ratio {step['ratio']:.2f}"
            )
    ours, theirs = found["stage 1"], found["stage 1, reference"]
    lines.append(
        f"stage 1: {ours['seconds']:.1f} s (features {ours['features']:.1f}, training {ours['training']:.1f}, "
        f"scoring {ours['scoring']:.1f}); the reference's way in {theirs['way']}, from {theirs['step']:.3g} s a "
        f"step and {theirs['batch']:.3g} s a batch of scores: {theirs['seconds']:.1f} s"
    )
    busy = found["profile"]["device_busy"]
    lines.append("device while training: " + ("no trace of it" if busy is None else f"busy {busy:.1%} of the time"))
    for operation in found["profile"]["longest_operations"]:
        lines.append(f"    {operation['share']:6.1%}  {operation['name']}")
    return "\n".join([*lines, *bench.conclusion(results)])
