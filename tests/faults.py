"""Break runs on purpose: they must end with the files of an undisturbed one, or be refused in one line.

    python -m tests.faults                        all faults, 150 kills
    python -m tests.faults --only kill --kills 9  fewer; --only may be given again
    python -m tests.faults --kills 1 --most 2 --detector simplenet    two of each stage, as tests/test_faults.py runs it

Prints a table; the exit status is 1 if anything is wrong. Linux. How a command is disturbed: tests/disturbed.py.

A chain is the three stages in one run. Each stage is disturbed several times in a row, as the queue of faults has it,
and then given again until it ends. At the end every table, list, picture and map is compared, byte for byte.
"""

import argparse
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax

from tests.disturbed import SCRIPTS, STEPS, Bench, Ended, Wrong, at_change, at_step, save_each_step, send, together

GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 lie evenly in 0…1, however many are taken
IN_A_ROW = 5  # faults of one stage of a chain
EARLY = ("full disk (cache)", "full disk (checkpoint)")  # too late once another fault has let these be written
MAYBE_LATE = ("kill -9 at a moment",)  # a stage that has ended before takes the faults behind it into another chain
COMPLETE = ("second writer, the first continues", "interrupt by SIGTERM, in training")  # these let the stage end
ORDER = {name: turn for turn, names in ((-1, EARLY), (1, MAYBE_LATE), (2, COMPLETE)) for name in names}
Outcome = tuple[str, str]  # fault; "identical", "refused" or "wrong"
Disturb = Callable[[Bench, str, str], str | None]  # (bench, root, script) → the outcome; None: it came too late


def ended_or_hit(ended: Ended, status: int, problem: str) -> str | None:
    """A command that ended before the fault was due counts as not disturbed."""
    ended.require(ended.status in (0, status), problem)
    return "identical" if ended.status else None


def kill_at_moment(share: float, bench: Bench, root: str, script: str) -> str | None:
    began = time.monotonic()
    pid = bench.start(root, script, save_each_step)
    time.sleep(share * bench.seconds[script])
    os.kill(pid, signal.SIGKILL)  # its id is its own until it is waited for
    return ended_or_hit(bench.finish(pid, began), -signal.SIGKILL, "kill -9 at a moment")


def kill_at_write(share: float, delay: float, bench: Bench, root: str, script: str) -> str | None:
    hook = at_change(bench.run, 1 + int(share * bench.changes(script)), send(signal.SIGKILL, delay))
    return ended_or_hit(bench.command(root, script, together(save_each_step, hook)), -signal.SIGKILL, "kill -9")


def interrupt(number: signal.Signals, share: float, bench: Bench, root: str, script: str) -> str | None:
    """Ctrl-C or SIGTERM at a write."""
    hook = at_change(bench.run, 1 + int(share * bench.changes(script)), send(number))
    return interrupted(bench.command(root, script, together(save_each_step, hook)), number)


def interrupted(ended: Ended, number: signal.Signals) -> str | None:
    status = {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    outcome = ended_or_hit(ended, status, number.name)
    if outcome:
        lines = [line for line in ended.err.splitlines() if line.strip() and "%|" not in line]  # bars of a slow machine
        ended.require(len(lines) == 1 and "same command" in lines[0], f"{number.name} says how to continue")
    return outcome


def interrupt_training(number: signal.Signals, step: int, bench: Bench, root: str, script: str) -> str | None:
    """Ctrl-C or SIGTERM in a training, which saves no checkpoint but for SIGTERM."""
    outcome = interrupted(bench.command(root, script, at_step(step, send(number))), number)
    if outcome and number == signal.SIGTERM:
        # which has saved: the next command would be killed if it trained all steps
        bench.must_end(root, script, at_step(STEPS, send(signal.SIGKILL)))
    return outcome


def full_disk(kind: str, share: float, bench: Bench, root: str, script: str) -> str | None:
    """No room from a write on. The command must be refused in one line, or do without."""
    hook = at_change(bench.run, 1 + int(share * bench.changes(script, kind)), bench.fill, kind)
    ended = bench.command(root, script, together(save_each_step, hook))
    filled = bench.ballast.exists()
    bench.ballast.unlink(missing_ok=True)
    ended.require(ended.status == 0 or ended.refused(), f"full disk ({kind})")
    return ("refused" if ended.status else "identical") if filled else None


def read_only(bench: Bench, root: str, script: str) -> str | None:
    with bench.read_only() as protected:
        if not protected:
            print("read-only: not tried, since root may write everywhere and may not mount here")
            return None
        ended = bench.command(root, script)
    ended.require(ended.refused(), "read-only run")
    return "refused"


def second_writer(killed: bool, bench: Bench, root: str, script: str) -> str | None:
    """The same command again while the first one is held in the middle. Then the first one continues, or is killed."""
    began = time.monotonic()
    hook = at_change(bench.run, bench.changes(script) // 2, send(signal.SIGSTOP))
    first = bench.start(root, script, together(save_each_step, hook))
    if os.waitid(os.P_PID, first, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED:
        bench.finish(first, began)
        return None
    second = bench.command(root, script)
    os.kill(first, signal.SIGKILL if killed else signal.SIGCONT)
    ended = bench.finish(first, began)
    second.require(second.refused() and re.search(rf"\b{first}\b", second.err) is not None, "second writer")
    ended.require(ended.status == (-signal.SIGKILL if killed else 0), "first writer")
    return "refused"


def queue_of(bench: Bench, kills: int, most: int, only: list[str], seed: int) -> dict[str, deque[tuple[str, Disturb]]]:
    """script → (name, fault) in random order: `kills` kills, and the others in proportion."""
    queue = {script: [] for script in SCRIPTS}

    turn = itertools.count()  # so that different faults begin with different stages

    def put(name: str, count: int, make: Callable[[int, float], Disturb], scripts=SCRIPTS) -> None:
        first = next(turn)
        for i in range(max(1, count) if name.split()[0] in only else 0):
            share = ((1 + i // len(scripts)) * GOLDEN + seed / 10) % 1
            queue[scripts[(first + i) % len(scripts)]].append((name, make(i // len(scripts), share)))

    put("kill -9 at a moment", kills // 2, lambda i, share: partial(kill_at_moment, share))
    put("kill -9 at a write", kills - kills // 2, lambda i, share: partial(kill_at_write, share, 0.02 * (i % 3)))
    for kind in ("cache", "checkpoint", "tables", "pictures", "report"):
        there = [script for script in SCRIPTS if bench.changes(script, kind)]
        make = lambda i, share, kind=kind: partial(full_disk, kind, share)  # noqa: E731
        put(f"full disk ({kind})", kills // 12, make, there)
    for number, name in ((signal.SIGINT, "interrupt by Ctrl-C"), (signal.SIGTERM, "interrupt by SIGTERM")):
        put(name, kills // 8, lambda i, share, number=number: partial(interrupt, number, share))
        make = lambda i, share, number=number: partial(interrupt_training, number, 1 + i % 3)  # noqa: E731
        put(f"{name}, in training", kills // 12, make, SCRIPTS[:2])
    put("read-only run", kills // 20, lambda i, share: read_only)
    put("second writer, the first continues", kills // 20, lambda i, share: partial(second_writer, False))
    put("second writer, the first is killed", kills // 20, lambda i, share: partial(second_writer, True))
    for faults in queue.values():
        random.Random(seed).shuffle(faults)
    return {script: deque(faults[:most]) for script, faults in queue.items()}


def chains(bench: Bench, queue: dict[str, deque[tuple[str, Disturb]]]) -> Iterator[Outcome]:
    """Chains until all faults are tried. One that came too late is put off to the next chain, twice at most."""
    delays = Counter()
    for number in itertools.count():
        if not any(queue.values()):
            return
        root = "folder" if number % 4 == 3 else "mvtec"
        bench.prepare(root)
        bench.clear()
        tried, name, script = [], "", ""
        try:
            for script in SCRIPTS:
                row = [queue[script].popleft() for _ in range(min(IN_A_ROW, len(queue[script])))]
                row.sort(key=lambda fault: ORDER.get(fault[0], 0))
                queue[script].extendleft(reversed(row))
                for _ in row:
                    name, disturb = queue[script].popleft()
                    outcome = disturb(bench, root, script)
                    if outcome:
                        tried.append((name, outcome))
                    elif delays[disturb] < 2:
                        queue[script].appendleft((name, disturb))
                        delays[disturb] += 1
                    if not outcome or name in COMPLETE:
                        break
                name = "the same command again"
                bench.must_end(root, script)
            bench.compare(root)
        except Wrong as problem:
            print(f"WRONG  {script}, {name}, after {[name for name, _ in tried]}: {problem}", flush=True)
            tried = [(name, "wrong")]
        yield from tried


def flip(file: Path, draws: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draws: random.Random) -> None:
    os.truncate(file, file.stat().st_size // 2)


def delete(file: Path, draws: random.Random) -> None:
    file.unlink()


HARMS = {"flipped bit": flip, "half a file": cut, "missing file": delete}
SCENES = {  # what is damaged → the state of the run, the files, the commands that read them
    "cache": (SCRIPTS[0], "cache/features/*/*", SCRIPTS[1:]),
    "checkpoint of a detector": (SCRIPTS[1], "tile/stage2-purified/**/*", SCRIPTS[2:]),
    "checkpoint of the sub-models": ("scored", "tile/stage1/**/*", SCRIPTS),
    "checkpoint in a training": ("trained", "tile/stage1/**/*", SCRIPTS),
}


def damage(bench: Bench, kills: int, most: int, seed: int) -> Iterator[Outcome]:
    """A flipped bit in each file of the cache and of each kind of checkpoint, a file cut in half, a missing file."""
    draws = random.Random(seed)
    bench.restore(SCRIPTS[0])
    for name in ("scores.csv", "purified.txt", "suspects.png"):
        (bench.run / "tile" / name).unlink()
    bench.snapshot("scored")
    bench.clear()
    bench.command("mvtec", SCRIPTS[0], together(save_each_step, at_step(4, send(signal.SIGKILL))))
    bench.snapshot("trained")
    for scene, (snapshot, pattern, scripts) in list(SCENES.items())[:most]:
        bench.restore(snapshot)
        files = [file for file in sorted(bench.run.glob(pattern)) if file.is_file() and file.stat().st_size]
        tries = [("flipped bit", file) for file in files] * max(1, kills // 40)
        tries += [(harm, draws.choice(files)) for harm in ("half a file", "missing file") for _ in range(kills // 30)]
        for harm, file in tries if kills >= 40 else draws.sample(tries, 1):
            fault = f"{harm}, {scene}"
            try:
                yield fault, damaged(bench, snapshot, partial(HARMS[harm], file, draws), scripts)
            except Wrong as problem:
                print(f"WRONG  {fault} ({file.relative_to(bench.run)}): {problem}", flush=True)
                yield fault, "wrong"


def damaged(bench: Bench, snapshot: str, harm: Callable[[], None], scripts: tuple[str, ...]) -> str:
    bench.restore(snapshot)
    harm()
    for script in scripts:
        ended = bench.command("mvtec", script)
        ended.require(ended.status == 0 or ended.refused(), script)
        if ended.status:
            return "refused"
    bench.compare("mvtec")
    return "identical"


FAULTS = ("kill", "interrupt", "full", "read-only", "second", "damage")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=150, help="how many kill -9; the other faults in proportion")
    parser.add_argument("--most", type=int, default=1000, help="how many faults of a stage, and of damaged parts")
    parser.add_argument("--only", choices=FAULTS, action="append", help="these faults only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--detector", default="dinomaly", help="a trained one; simplenet begins in half the time")
    settings = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: the file system is unmounted
    began, only, table = time.monotonic(), settings.only or list(FAULTS), {}
    bench = Bench(Path(tempfile.mkdtemp(prefix="llb-faults-")), settings.detector)
    numbers = (settings.kills, settings.most)
    try:
        bench.prepare("mvtec")
        outcomes = chains(bench, queue_of(bench, *numbers, only, settings.seed))
        if "damage" in only:
            outcomes = itertools.chain(outcomes, damage(bench, *numbers, settings.seed))
        for fault, outcome in outcomes:
            table.setdefault(fault, Counter())[outcome] += 1
            print(f"{time.monotonic() - began:6.0f} s  {fault}: {outcome}", file=sys.stderr, flush=True)
    finally:
        bench.close()
    total = sum(table.values(), Counter())
    print(f"\n{'fault':40} {'tried':>6} {'identical':>10} {'refused in one line':>20} {'wrong':>6}")
    for fault, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{fault:40} {counts.total():6} {counts['identical']:10} {counts['refused']:20} {counts['wrong']:6}")
    print(f"{time.monotonic() - began:.0f} seconds")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
