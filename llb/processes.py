"""Several processes that work as one, on one machine or on many: JAX's own distributed engine, and a shared folder.

    python stage1_partition.py … --coordinator HOST:PORT --processes 2 --process-id 0    and elsewhere --process-id 1
    srun python stage1_partition.py …                                                    Slurm (or mpirun) sets all

All processes run the same script on the same data and write into the same RUN and cache, which all of them see:

    features   each computes every P-th shard of the cache            nothing is sent
    training   each holds its own sub-models (llb.placement)          nothing, except "save now?", one bit a step
    saving     the K sub-models are gathered, process 0 writes        parameters and optimiser state
    scoring    each scores its part of the images with all K          N · K floats, once
    the rest   all compute the same; process 0 writes and prints

With one process each function here does nothing.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from llb.files import UserError, is_writer

# How a launcher says how many processes it has started, and which one this is. JAX finds out the rest.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def launched() -> tuple[int, int]:
    """How many processes srun or mpirun has started, and which of them this is; (1, 0) without them."""
    for count, number in LAUNCHERS.items():
        if int(os.environ.get(count, 1)) > 1:
            return int(os.environ[count]), int(os.environ[number])
    return 1, 0


def join(settings=None) -> None:
    """Join the other processes, before JAX looks for its devices. JAX ends this one if they do not come in 5 minutes.

    settings: with coordinator, processes and process_id: all three are given, or none of them and the launcher's are
        taken. Without these fields one process does all the work, and the launcher's others end here. A UserError is
        raised if only some of the flags are given, or they do not fit.
    """
    if not hasattr(settings, "coordinator"):
        if launched()[1] > 0:
            sys.exit(0)
        return
    given = (settings.coordinator, settings.processes, settings.process_id)
    if given == (None, None, None):
        if launched()[0] > 1:
            jax.distributed.initialize()
        return
    if None in given:
        raise UserError("--coordinator, --processes and --process-id belong together: give all three, or none")
    if settings.process_id >= settings.processes:
        raise UserError(f"--process-id {settings.process_id}: with --processes {settings.processes}, count from 0")
    host, _, port = settings.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator {settings.coordinator}: give HOST:PORT, where process 0 can listen")
    jax.distributed.initialize(settings.coordinator, settings.processes, settings.process_id)


def wait(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def process_0_first(name: str) -> Iterator[None]:
    """Process 0 passes the block (or decorated function) while the others wait; then they pass it and see its files."""
    if not is_writer():
        wait(name)
    try:
        yield
    finally:  # also after an error in process 0: the others shall find it as well instead of waiting
        if is_writer():
            wait(name)


def agreed(value):
    """Process 0's value, in all processes: for what may differ by the clock or by the machine.

    value: bool, or an array that has the same shape in all.
    """
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def gathered(tree):
    """Arrays spread over the devices of all processes → a host tree that each process has in full."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.array, tree)  # copied, since the next step reuses the memory


def part_size(count: int) -> int:
    """How many of `count` items each process has; the last ones may have fewer."""
    return -(-count // jax.process_count())


def part_of(count: int) -> np.ndarray:
    """Which of `count` items belong to this process: int, consecutive."""
    size = part_size(count)
    start = jax.process_index() * size
    return np.arange(min(start, count), min(start + size, count))


def joined(part: np.ndarray, count: int) -> np.ndarray:
    """The values of each process's `part_of` the items → those of all `count` items, in all processes."""
    if jax.process_count() == 1:
        return part
    padded = np.concatenate([part, np.zeros((part_size(count) - len(part), *part.shape[1:]), part.dtype)])
    return multihost_utils.process_allgather(padded, tiled=True)[:count]
