"""The figures of a CPU: every part of llb beside the reference's way, and fitted detectors beside the way people write
them.

The ways take turns, so a machine that slows down slows all of them. Reported are the median over the turns and, in
brackets, the lowest and highest. Compiling is not timed. Weights are random, since the time does not depend on them.
All ways get the same weights and images, and the table says how far their results differ.
"""

import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llb.bench.common import (
    EAGER,
    JAX,
    OURS,
    TORCH,
    Sizes,
    Timing,
    Timings,
    about,
    conclusion,
    draw_maps,
    draw_photos,
    judge,
    prepare,
    random_encoder,
    ratio,
    take_turns,
)
from llb.bench.detectors import bank_ways, gaussian_ways
from llb.bench.ours import agreement, other_ways, product_ways, stage1_ways
from llb.bench.process import Task, other_process
from llb.bench.reference import count_work
from llb.console import say

UNITS = {  # of a part's seconds
    "decoding": "image",
    "encoder": "image",
    "training step": "step of all K",
    "scoring": "image by all K",
    "maps": "map",
    "pixel metrics": "map",
    "stage 1": "whole",
}
FITTED = {  # part → unit, and how many times as fast llb should be
    "coreset": ("patch that is chosen", 2.0),
    "search": ("image", 2.0),
    "PaDiM fit": ("image", 3.0),
    "subspace fit": ("image", 3.0),
}


def measure(sizes: Sizes, device: str, rounds: int, torch: bool = False) -> dict[str, Any]:
    """Measure, print the table and return the content of --json.

    Args:
        device: what `llb.device.start_jax` has returned.
        rounds: how often the ways take turns.
        torch: PyTorch's ways too.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = draw_photos(folder, sizes.images, sizes.photo)
        stage = prepare(sizes, random_encoder(sizes.spec, sizes.image_size), paths)
        masks, maps = draw_maps(sizes.maps, sizes.image_size)
        work = count_work(stage.setup)
        agreements = {JAX: agreement(sizes, stage, masks, maps)}
        large = {part: {OURS: way} for part, way in stage1_ways(stage, folder).items()}
        small = other_ways(stage, masks, maps)
        with other_process(Task(sizes, paths, rounds, torch)) as (theirs, torch_agreements):
            agreements |= torch_agreements
            large, small = ({part: parts[part] | theirs[part] for part in parts} for parts in (large, small))
            timings = take_turns({"matrix product": product_ways(sizes.product)} | large, rounds)
            timings |= take_turns(small, max(3, rounds))
        add_stage1(timings, sizes)
    ratios, targets = compare(timings, work, sizes)
    results = about(device, sizes.settings() | {"rounds": rounds, "torch": torch}) | {
        "multiply_adds_per_image": work,
        "agreement": agreements,
        "parts": measurements(timings),
        "ratios": ratios,
        "share_of_matrix_product": shares(timings, work, sizes),
        "targets": targets,
        "seconds": time.monotonic() - began,
    }
    say(table(results))
    return results


def measure_detectors(device: str, rounds: int) -> dict[str, Any]:
    """Measure fitted detectors, print the table and return the content of --json, as `measure` does.

    All ways run in this process, so the others too have llb's memory settings.
    """
    began = time.monotonic()
    timings = take_turns(bank_ways() | gaussian_ways(), max(3, rounds))
    ratios = ratios_of(timings)
    reached = [
        (f"{part} / {way}", ratios[part][way][0], target)
        for part, (_, target) in FITTED.items()
        for way in ratios[part]
    ]
    results = about(device, {"rounds": rounds}) | {
        "parts": measurements(timings),
        "ratios": ratios,
        "targets": judge(reached),
        "seconds": time.monotonic() - began,
    }
    lines = rows(results, {part: unit for part, (unit, _) in FITTED.items()})
    say("\n".join([*lines, *conclusion(results["targets"], results["seconds"])]))
    return results


def measurements(timings: Timings) -> dict[str, Any]:
    """For --json."""
    return {part: {way: asdict(timing) for way, timing in ways.items()} for part, ways in timings.items()}


def add_stage1(timings: Timings, sizes: Sizes) -> None:
    """Stage 1, from its three parts. llb encodes once; the reference's steps and scores contain the encoder."""
    encoder, step, scoring = (timings[part] for part in ("encoder", "training step", "scoring"))
    timings["stage 1"] = {}
    for way in step:
        encoding = encoder[way].seconds if way == OURS else [0.0] * len(step[way].seconds)
        rounds = zip(encoding, step[way].seconds, scoring[way].seconds)
        seconds = [sizes.images * (e + c) + sizes.steps * s for e, s, c in rounds]
        peaks = [part[way].peak_mib for part in (encoder, step, scoring)]
        timings["stage 1"][way] = Timing(seconds, max((p for p in peaks if p), default=None))


def ratios_of(timings: Timings) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Part → way → how many times as fast llb is: median, lowest, highest."""
    return {
        part: {way: ratio(timing, ways[OURS]) for way, timing in ways.items() if way != OURS}
        for part, ways in timings.items()
        if OURS in ways
    }


def compare(timings: Timings, work: dict[str, int], sizes: Sizes) -> tuple[dict, dict]:
    """Ratios {part: {way: [median, lowest, highest]}}, and targets {name: {ratio, target, met}}."""
    ratios = ratios_of(timings)
    # As a target, llb's scoring includes the encoder, once for all K sub-models, though training has paid for it.
    ours = timings["scoring"][OURS].seconds
    with_encoder = Timing([a + b for a, b in zip(ours, timings["encoder"][OURS].seconds)])
    ratios["scoring, encoder included"] = {
        way: ratio(timing, with_encoder) for way, timing in timings["scoring"].items() if way != OURS
    }
    best = min((ratios["encoder"][way] for way in TORCH if way in ratios["encoder"]), default=None)
    rate = shares(timings, work, sizes)["training step"][OURS]
    wanted = [
        ("stage 1 / reference in JAX", ratios["stage 1"].get(JAX), 1.5),
        ("stage 1 / PyTorch eager", ratios["stage 1"].get(EAGER), 2.0),
        ("scoring / reference in JAX", ratios["scoring, encoder included"].get(JAX), 1.6),
        ("scoring / PyTorch eager", ratios["scoring, encoder included"].get(EAGER), 2.5),
        ("maps / SciPy", ratios["maps"].get(JAX), 50.0),
        ("pixel metrics / reference", ratios["pixel metrics"].get(JAX), 20.0),
        ("training step / matrix product", [rate], 0.7),
        ("encoder / PyTorch's best", best, 1.0),
    ]
    return ratios, judge((name, reached[0], target) for name, reached, target in wanted if reached is not None)


def operations(work: dict[str, int], sizes: Sizes) -> dict[str, int]:
    """Necessary operations per unit of a part, two for a multiply-add; only the encoder's part has the encoder's."""
    return {
        "encoder": 2 * work["encoder"],
        "training step": 2 * work["sub-model and gradient"] * sizes.batch_size * sizes.submodels,
        "scoring": 2 * work["sub-model"] * sizes.submodels,
    }


def shares(timings: Timings, work: dict[str, int], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Part → way → arithmetic rate as a share of the machine's matrix product, by the faster library."""
    peak = 1 / min(statistics.median(timing.seconds) for timing in timings["matrix product"].values())
    needed = operations(work, sizes)
    # every way but llb's encodes each batch of each sub-model again
    repeats = {
        "encoder": 0,
        "training step": sizes.batch_size * sizes.submodels,
        "scoring": sizes.submodels,
    }
    result = {}
    for part, own in needed.items():
        result[part] = {}
        for way, timing in timings[part].items():
            again = 0 if way == OURS else needed["encoder"] * repeats[part]
            result[part][way] = (own + again) / statistics.median(timing.seconds) / peak
    return result


def table(results: dict[str, Any]) -> str:
    """The results as text."""
    parts = results["parts"]
    rates = {way: 1e-9 / statistics.median(timing["seconds"]) for way, timing in parts["matrix product"].items()}
    lines = ["", "matrix product: " + ", ".join(f"{way} {rate:.0f} GFLOP/s" for way, rate in rates.items())]
    counted = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in results["multiply_adds_per_image"].items())
    lines.append(f"multiply-adds of an image, ·10⁹: {counted}")
    for way, differences in results["agreement"].items():
        first = "llb" if way == JAX else "the reference in JAX"
        values = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        lines.append(f"{first} and {way} differ by {values}")
    return "\n".join([*lines, *rows(results, UNITS), *conclusion(results["targets"], results["seconds"])])


def rows(results: dict[str, Any], units: dict[str, str]) -> list[str]:
    """The parts' lines of a table. units: part → of its seconds."""
    head = f"{'part':14} {'way':17} {'time':>10}  {'llb is faster':26} {'of matrix product':>17} {'peak MiB':>9}"
    lines, of_product = ["", head], results.get("share_of_matrix_product", {})
    for part, unit in units.items():
        for way, timing in results["parts"][part].items():
            cells = f"{part if way == OURS else '':14} {way:17} {duration(statistics.median(timing['seconds'])):>10}  "
            spread = f"per {unit}"
            if way != OURS:
                spread = "{:.2f} × ({:.2f} – {:.2f})".format(*results["ratios"][part][way])
            rate = of_product.get(part, {}).get(way)
            rate = f"{rate:10.0%}" if rate else " " * 10
            peak = f"{timing['peak_mib']:9.0f}" if timing["peak_mib"] else ""
            lines.append(f"{cells}{spread:26} {rate} {peak}")
    return lines


def duration(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"
