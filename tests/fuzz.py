"""Give llb's readers thousands of damaged and hostile files: each must be read, or refused in one line.

    python -m tests.fuzz                             8,000 images, 4,000 weight files, 2,000 lists
    python -m tests.fuzz --only images --count 300   fewer; --keep FOLDER: where inputs that failed are saved

Prints a table; the exit status is 1 if an input failed: anything but a UserError of one line was raised, the process
died, or a reader took more than SECONDS or MEMORY. Input number n of a seed is always the same (tests/mutations.py).
Linux. Readers run in forks of this process, so that a crash is seen.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llb.data import choose_categories, load_category
from llb.encoders.weights import read_tensors
from llb.files import UserError
from llb.images import load_image
from llb.layouts import read_root
from llb.masks import load_mask
from tests import mutations as m
from tests.mutations import Seeds

COUNTS = {"images": 8000, "weights": 4000, "lists": 2000}
MEMORY = {"images": 4500, "weights": 200, "lists": 200}  # MB
SECONDS = 10
IN_A_WORKER = 200  # inputs
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"  # ends a line, or changes a terminal


# ---- reading ----


def read_image(file: Path) -> None:
    image = load_image(file, 16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8, (image.shape, image.dtype)


def read_mask(file: Path) -> None:
    mask = load_mask(file, 16)
    assert mask.shape == (16, 16) and mask.dtype == bool, (mask.shape, mask.dtype)


def read_weights(file: Path) -> None:
    for value in read_tensors(file).values():
        assert isinstance(value, np.ndarray)
        value.tobytes()  # touches all of it


def read_lists(file: Path) -> None:
    root = read_root(file.parent.parent)
    for name in choose_categories(root, "all"):
        assert Path(name).name == name, name
        dataset = load_category(root, name)
        for record in (*dataset.train, *dataset.test):
            for path in (record.path, *record.masks):
                assert not Path(path).is_absolute() and ".." not in Path(path).parts, path


GENERAL = (m.flip, m.truncate, m.set_field, m.rearrange)
KINDS = {  # seeds, mutations, readers
    "images": (m.image_seeds, (*GENERAL, m.claim_size), (read_image, read_mask)),
    "weights": (m.weight_seeds, (*GENERAL, *[m.change_inside] * 4), (read_weights,)),
    "lists": (m.list_seeds, (m.flip, m.truncate, *[m.change_list] * 4), (read_lists,)),
}


def mutated(kind: str, seeds: Seeds, seed: int, number: int) -> tuple[str, bytes]:
    """The name and the content of input `number`."""
    draws = random.Random(f"{kind} {seed} {number}")
    name = list(seeds)[number % len(seeds)]
    return name, draws.choice(KINDS[kind][1])(seeds[name], draws)


def try_one(read: Callable[[Path], None], file: Path) -> str:
    """Gives "read", "refused", or what went wrong. SIGALRM ends the process if it takes too long."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(file)
        return "read"
    except UserError as error:
        line = str(error).replace(str(file), "")
        return f"a message with control characters: {line!r}" if re.search(CONTROL, line) else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def peak(reset: bool = False) -> int:
    """The most memory that this process has had since the last reset, MB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def worker(kind: str, seeds: Seeds, numbers: range, seed: int, folder: Path) -> None:
    """Try inputs and write a line of JSON for each: number, reader, outcome, seconds, MB, bytes on standard error."""
    limit = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]) + MEMORY[kind] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(folder / "stderr", "wb") as noise, open(folder / "log", "a") as log:
        os.dup2(noise.fileno(), 2)
        for number in numbers:
            name, data = mutated(kind, seeds, seed, number)
            file = folder / (name if kind == "lists" else f"input{Path(name).suffix}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            for read in KINDS[kind][2]:
                print(json.dumps([number, read.__name__, "", 0, 0, 0]), file=log, flush=True)
                before, began = peak(reset=True), time.monotonic()
                outcome = try_one(read, file)
                taken, memory, noisy = time.monotonic() - began, peak() - before, os.fstat(2).st_size
                print(json.dumps([number, read.__name__, outcome, taken, memory, noisy]), file=log, flush=True)
                os.ftruncate(2, 0)
                os.lseek(2, 0, os.SEEK_SET)
            if kind == "lists":
                file.write_bytes(seeds[name])


def fuzz(kind: str, count: int, seed: int, keep: Path) -> Counter:
    """Try `count` inputs of a kind in forks of this process, and save those that fail: the numbers for the table."""
    facts = Counter(inputs=count)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seeds, number = KINDS[kind][0](folder), 0
        while number < count:
            (folder / "log").unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                try:
                    worker(kind, seeds, range(number, min(count, number + IN_A_WORKER)), seed, folder)
                finally:
                    os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
            # a line before each call and one after it; without the latter the process died
            for number, reader, outcome, seconds, memory, noise in lines[1::2] + lines[len(lines) & ~1 :]:
                if memory > MEMORY[kind] * 0.9:
                    outcome = f"{memory} MB"
                known = outcome if outcome in ("read", "refused") else "failed"
                facts.update({known: 1, "calls": 1, "noisy": noise > 0})
                facts["seconds"], facts["MB"] = max(facts["seconds"], seconds), max(facts["MB"], memory)
                if known == "failed":
                    name, data = mutated(kind, seeds, seed, number)
                    keep.mkdir(parents=True, exist_ok=True)
                    saved = keep / f"{kind}-{seed}-{number}-{Path(name).name}"
                    saved.write_bytes(data)
                    problem = outcome[:300] or f"the process ended with status {status}"
                    print(f"FAILED  {saved} ({reader}): {problem}", flush=True)
            number += 1
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=COUNTS, action="append", help="this kind only")
    parser.add_argument("--count", type=int, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "llb-fuzz", help="for what fails")
    settings = parser.parse_args()
    began, failed = time.monotonic(), 0
    columns = ("inputs", "calls", "read", "refused", "failed", "noisy")
    print(f"{'':8}", *(f"{name:>8}" for name in columns), "   slowest    memory")
    for kind in settings.only or COUNTS:
        facts = fuzz(kind, settings.count or COUNTS[kind], settings.seed, settings.keep)
        failed += facts["failed"]
        numbers = [f"{facts[name]:8}" for name in columns]
        print(f"{kind:8}", *numbers, f"{facts['seconds']:8.1f} s {facts['MB']:6} MB", flush=True)
    print(f"noisy: something on standard error; {time.monotonic() - began:.0f} seconds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
