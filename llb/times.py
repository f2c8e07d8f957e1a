"""How long each stage has worked and how much memory it took: RUN/times.json, for the report alone. No JAX.

Results do not depend on it: a damaged file counts as empty, and one that cannot be written is left out.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llb.files import UserError, write_json
from llb.lock import turn

try:
    import resource
except ImportError:  # Windows
    resource = None

TIMES_FILE = "times.json"
MEMORIES = ("memory", "device_memory")
Times = dict[str, dict[str, dict[str, Any]]]  # category → stage → seconds, memory and device_memory in bytes or None


@contextmanager
def timed(run: Path, category: str, stage: str, anew: bool = False) -> Iterator[None]:
    """Add the time of the block to what the stage has taken so far, also if it is interrupted.

    anew: forget what it has taken so far. Memory is the process's largest so far, and the accelerator's.
    """
    began = time.monotonic()
    try:
        yield
    finally:
        with suppress(UserError), turn(run):
            times = read_times(run)
            before = {} if anew else times.get(category, {}).get(stage, {})
            now = {"seconds": before.get("seconds", 0.0) + time.monotonic() - began}
            for name, value in zip(MEMORIES, (memory(), device_memory())):
                now[name] = max(filter(None, (before.get(name), value)), default=None)
            times.setdefault(category, {})[stage] = now
            write_json(run / TIMES_FILE, times)


def memory() -> int | None:
    """The largest memory that this process has had, in bytes; None where the system does not say."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_memory() -> int | None:
    """Likewise of the first accelerator; None without one."""
    jax = sys.modules.get("jax")
    if jax is None or jax.default_backend() == "cpu":
        return None
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def read_times(run: Path) -> Times:
    """RUN/times.json; {} if it is not there or damaged."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        times = json.loads((run / TIMES_FILE).read_text(encoding="utf-8"))
        every = [values for stages in times.values() for values in stages.values()]
        if all(values["seconds"] >= 0 and all((values[m] or 0) >= 0 for m in MEMORIES) for values in every):
            return times
    return {}
