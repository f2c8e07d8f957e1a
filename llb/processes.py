"""Several processes that work as one, on one machine or on many: JAX's own distributed engine, and a folder they share.

    python stage1_partition.py … --coordinator HOST:PORT --processes 2 --process-id 0     and the same with 1, elsewhere
    srun python stage1_partition.py …                                                     Slurm (or mpirun) says it all

All processes run the same script on the same data and write into the same RUN, which all must see. What they do apart:

    features   each computes every P-th shard of the cache                           nothing is sent
    training   one mesh over all devices (llb.train): each holds its own sub-models   K losses a step, sent once a chunk
               where a sub-model's batch is shared out                                its gradients, once a step
    saving     the K sub-models are gathered, process 0 writes                       parameters and optimiser state
    scoring    each scores its share of the images with all K sub-models             N · K floats, once
    the rest   aggregating and selecting are the same everywhere; process 0 writes

With one process each function here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from llb.files import UserError

# How a launcher says how many it has started; JAX finds the rest out by itself.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def launched() -> tuple[int, int]:
    """How many processes srun or mpirun has started, and which of them this is; (1, 0) without them."""
    for count, number in LAUNCHERS.items():
        if int(os.environ.get(count, 1)) > 1:
            return int(os.environ[count]), int(os.environ[number])
    return 1, 0


def join(settings) -> None:
    """Join the other processes, before JAX looks for its devices.

    settings: has coordinator, processes and process_id: all three, or none of them and a launcher's word is taken.

    Raises:
        UserError: only some of the flags are given, or they do not fit. (Where the others do not come, JAX ends the
            process after five minutes, with words of its own.)
    """
    given = (settings.coordinator, settings.processes, settings.process_id)
    if all(value is None for value in given):
        if launched()[0] > 1:
            jax.distributed.initialize()
        return
    if any(value is None for value in given):
        raise UserError("--coordinator, --processes and --process-id belong together: give all three, or none")
    if settings.process_id >= settings.processes:
        raise UserError(f"--process-id {settings.process_id}: with --processes {settings.processes}, count from 0")
    host, _, port = settings.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator {settings.coordinator}: give HOST:PORT, where process 0 can listen")
    jax.distributed.initialize(settings.coordinator, settings.processes, settings.process_id)


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def first_ahead(name: str) -> Iterator[None]:
    """Process 0 goes through the block while the others wait; then they do, and find done what it did.

    Also a decorator, for a function that is such a block.
    """
    if not first():
        wait(name)
    try:
        yield
    finally:  # also when process 0 has found an error: the others are to find it, too, and not to wait
        if first():
            wait(name)


def agreed(value: bool) -> bool:
    """Process 0's answer, in all processes, where it may differ by the clock or by the machine."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def gathered(tree):
    """Arrays spread over the devices of all processes → a host tree that each has in full."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.array, tree)  # copied, since the next step reuses the memory


def share_size(count: int) -> int:
    """How many of `count` rows a process has, the last ones excepted."""
    return -(-count // jax.process_count())


def share(count: int) -> np.ndarray:
    """The rows, of `count`, that are this process's: int, contiguous, those of later processes may be fewer."""
    size = share_size(count)
    start = jax.process_index() * size
    return np.arange(min(start, count), min(start + size, count))


def joined(rows: np.ndarray, count: int) -> np.ndarray:
    """Each process's `share` of the rows → all `count` of them, in all processes."""
    if jax.process_count() == 1:
        return rows
    padded = np.concatenate([rows, np.zeros((share_size(count) - len(rows), *rows.shape[1:]), rows.dtype)])
    return multihost_utils.process_allgather(padded, tiled=True)[:count]
