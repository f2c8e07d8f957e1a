"""The process in which the reference's and PyTorch's ways run.

llb changes how its own process keeps freed memory (`llb.device.keep_memory`). A user of the reference does not have
that, so the reference gets a process without it.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import jax

from llb.bench import reference
from llb.bench.common import JAX, TORCH, Parts, Sizes, Way, draw_maps, prepare, random_encoder, timed
from llb.device import keep_compiled
from llb.files import UserError

Agreements = dict[str, dict[str, float]]  # way → what is compared → difference


@dataclass(frozen=True)
class Task:
    """All that the other process needs for the same input as this one."""

    sizes: Sizes
    paths: list[Path]  # image files
    rounds: int
    torch: bool  # PyTorch's ways too


def import_torch():
    """The module llb.bench.pytorch, which needs PyTorch."""
    try:
        from llb.bench import pytorch
    except ImportError:
        raise UserError("--against torch: PyTorch is not installed; pip install torch, or leave the flag out") from None
    return pytorch


@contextmanager
def other_process(task: Task) -> Iterator[tuple[Parts, Agreements]]:
    """Start the process. Yields its ways, to be called here, and how far PyTorch's results are from the reference's."""
    here, there = multiprocessing.Pipe()
    arguments = (there, task, jax.config.jax_platforms)
    # spawned, not forked: JAX's threads do not survive a fork
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
    process.start()
    there.close()  # if the process ends early, waiting for it ends too

    def ask(part: str, name: str, measured: bool) -> tuple[float, float | None]:
        here.send((part, name, measured))
        return here.recv()

    def remote(part: str, name: str, units: float) -> Way:
        return Way(partial(ask, part, name, True), units, partial(ask, part, name, False), lambda work: work())

    try:
        units, agreements = here.recv()
        yield (
            {part: {name: remote(part, name, n) for name, n in ways.items()} for part, ways in units.items()},
            agreements,
        )
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError("the process that runs the reference's way ended early; its last lines are above") from None
    finally:
        here.close()  # tells it to end
        process.join(5)
        process.kill()


def serve(pipe: Connection, task: Task, platforms: str | None) -> None:
    """The other end: (part, way, whether to work or only to compile) comes in, (seconds, peak memory) goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which then ends this one
    jax.config.update("jax_platforms", platforms)
    keep_compiled()
    sizes = task.sizes
    stage = prepare(sizes, random_encoder(sizes.spec, sizes.image_size), task.paths)
    masks, maps = draw_maps(sizes.reference_maps, sizes.image_size)
    ways = reference.stage1_ways(stage, task.rounds) | reference.other_ways(stage, masks, maps)
    parts, agreements = {part: {JAX: way} for part, way in ways.items()}, {}
    for name in TORCH if task.torch else ():
        ways, agreements[name] = import_torch().stage1_ways(stage, name)
        for part, way in ways.items():
            parts[part][name] = way
    pipe.send(({part: {name: way.units for name, way in ways.items()} for part, ways in parts.items()}, agreements))
    while True:
        try:
            part, name, measured = pipe.recv()
        except EOFError:  # the first process has ended
            return
        way = parts[part][name]
        pipe.send(timed(way.work if measured else way.warm or way.work))
