"""A grid of runs, in one process: what does a setting do?

    python -m llb.ablate --vary submodels=2,3,5,8 --vary aggregate=mean,out-of-fold --seeds 3
    python -m llb.ablate --preset noise --detector padim
    python -m llb.ablate --preset submodels --print              the commands of each run, for a scheduler

Each cell of the grid is a run in its own folder, as the three scripts make it. Flags of stage 1 hold for all of them;
--vary takes their names, final.NAME for stage 2's, set.NAME for the detector's own settings; review.simulate and
review.errors put a simulated look between the stages (llb.review). What runs have in common is done once: features
(--cache), sub-models if the selection alone differs, final detectors on the same images.
"""

import dataclasses
import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate import run_evaluation
from llb.borrow import Cell, borrow_detector, borrow_submodels, finished
from llb.compare import publish, read_groups, written
from llb.config import Evaluate, Stage1, Stage2
from llb.console import progress, run_script, say
from llb.data import HALF
from llb.defaults import resolve, resolve_final, with_sizes
from llb.device import start_jax
from llb.encoders.specs import SPECS
from llb.files import UserError, check_writable_file, is_writer
from llb.flags import SEVERAL, flag, flag_of, influential, parse_flags, real, typed_flags, whole
from llb.lock import hold
from llb.pages import PAGE
from llb.presets import PRESETS
from llb.processes import agreed, process_0_first, wait
from llb.review import Review, run_review
from llb.run import place_run, sources_digest
from llb.runfiles import CARRIED, own_config
from stage1_partition import run_stage1
from stage2_train import run_stage2

ALONE = "none"
# not to be varied, with what to give instead
OWNED = dict.fromkeys(("out", "final.run", "review.run"), "give --out") | {"final.train_on": "give --train-on"}
OTHER = " (by other sources of llb: --overwrite makes it again)"


@dataclass
class Ablate(Stage1):
    """Make a grid of runs and compare them. Flags of stage 1 hold for all of them."""

    vary: Any = flag(
        SEVERAL, "NAME=A,B,… of a flag, final.NAME of stage 2's, set.NAME of the detector's, review.NAME; repeatable"
    )
    single: bool = flag(False, "vary one setting at a time, beside a run with none varied; else all combinations")
    preset: str | None = flag(None, "a grid by name; given flags come after its own", choices=PRESETS, shown="–")
    seeds: int = flag(3, "number of seeds, from --seed on", whole(1))
    train_on: str = flag("purified", f"final detectors, with commas; {ALONE}: stage 1 alone")
    suspects: int = flag(PAGE, "as stage 1's; few, since nobody marks the images of a grid", whole(1), affects=False)
    lowest: float | None = flag(None, "as of llb.compare", real(0, 1, open_below=True), shown="–")
    out: str | None = flag(None, "folder of the grid", shown="runs/PRESET or runs/ablate")
    print: bool = flag(False, "print the commands of each run, and do nothing")


def main() -> None:
    settings = parse_flags(Ablate)
    given = [name_of(text) for text in settings.vary]  # of a preset's they take the place
    if twice := [name for name in given if given.count(name) > 1]:
        raise UserError(f"--vary {twice[0]}: is given twice; give all values in one, with commas")
    if settings.preset:
        settings = parse_flags(Ablate, PRESETS[settings.preset].split() + sys.argv[1:])
    out = Path(settings.out or f"runs/{settings.preset or 'ablate'}")
    names, cells = grid(settings, out)
    if settings.print:
        say("\n".join(dict.fromkeys(map(commands, cells))))
        return
    device = start_jax(settings)
    say(device)
    cells = distinct(cells)
    check_writable_file(str(out / "compare.csv"), "--out")
    with hold(out, "ablate"):
        done = run_cells(cells, out, device, settings.overwrite)
        if done:
            groups = read_groups([cell.run for cell in done], settings.lowest)
            publish(groups, str(out / "compare.csv"), str(out / "compare"), names)
    if len(done) < len(cells):
        raise UserError(f"{len(cells) - len(done)} of {len(cells)} runs are left out, see above")


# ---- the grid ----


def grid(settings: Ablate, out: Path) -> tuple[list[str], list[Cell]]:
    """The names that are varied, and the cells. What a script would not accept ends the program."""
    varied = {}
    for text in settings.vary:
        name, _, values = text.partition("=")
        if not all(values.split(",")) or name.rpartition(".")[0] not in ("", "final", "set", "review"):
            raise UserError(f"--vary {text}: give NAME=A,B,… of a flag, final.NAME=…, set.NAME=… or review.NAME=…")
        varied[name_of(text)] = values.split(",")
    for name in varied:
        if name in OWNED:
            raise UserError(f"--vary {name}: it is the grid's own; {OWNED[name]}")
        if name.startswith("final.") and settings.train_on == ALONE:
            raise UserError(f"--vary {name}: with --train-on {ALONE} there is no final detector; leave it out")
        if (name.startswith("review.") or name == "final.head") and "reviewed" not in settings.train_on.split(","):
            raise UserError(f"--vary {name}: is of --train-on reviewed alone; give that too, or leave it out")
    if "noise_ratio" in varied and settings.data is not None and settings.noise_pool is None:
        settings = dataclasses.replace(settings, noise_pool=HALF)  # the same test set, also without a ratio
    grids = [{}, *({name: values} for name, values in varied.items())] if settings.single else [varied]
    owns = [dict(zip(each, values)) for each in grids for values in itertools.product(*each.values())]
    seeds = range(settings.seed, settings.seed + settings.seeds)  # outermost: soon there is something to compare
    return list(varied), [cell_of(settings, out, {"seed": str(seed)} | own) for seed in seeds for own in owns]


def name_of(text: str) -> str:
    """The setting that a --vary names."""
    return text.partition("=")[0].replace("-", "_")


def cell_of(settings: Ablate, out: Path, own: dict[str, str]) -> Cell:
    """own: a value for each name that is varied."""
    run = str(out / re.sub(r"[^\w.,=@+~-]", "_", ",".join(f"{name}={own[name]}" for name in sorted(own))))
    first, last, looks, sets = [], [], [], [settings.set] * bool(settings.set)
    for name, value in own.items():
        place, _, rest = name.rpartition(".")
        words = {"": first, "final": last, "review": looks, "set": sets}[place]
        words += [f"{rest}={value}"] if place == "set" else [flag_of(rest), value]
    common = {each.name: getattr(settings, each.name) for each in dataclasses.fields(Stage1)}
    common |= {"out": run, "set": ",".join(sets) or None, "overwrite": False}
    carried = {"run": run} | {name: common[name] for name in CARRIED}
    lists = [] if settings.train_on == ALONE else settings.train_on.split(",")
    finals = [parse_flags(Stage2, [*typed_flags(Stage2(**carried)), *last, "--train-on", each]) for each in lists]
    # in a grid that varies final.head the other detectors have none, and are the same in all runs
    finals = [each if each.train_on == "reviewed" else dataclasses.replace(each, head="auto") for each in finals]
    look = parse_flags(Review, ["--run", run, *looks]) if looks else None
    if look and look.simulate is None:
        raise UserError("--vary review.errors: belongs to review.simulate; vary that too, and without --single")
    return Cell(
        parse_flags(Stage1, typed_flags(Stage1(**common)) + first),
        finals,
        Evaluate(**carried),
        look,
    )


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without those that repeat an earlier one: a value that is varied may be the default, or the seed."""
    made: dict[str, Cell] = {}
    for cell in cells:
        first = made.setdefault(identity(cell), cell)
        if first.run != cell.run:
            say(f"{cell.run.name}: has the settings of {first.run.name}, and is not made again")
    return list(made.values())


def identity(cell: Cell) -> str:
    """The settings that tell a run from others, as far as they can be filled in: those that contradict each other stay
    as they are, and leave the run out later."""
    stage1, finals = cell.stage1, cell.finals
    with suppress(UserError):
        stage1 = resolve(stage1, "demo" if stage1.data is None else "")
        if stage1.encoder in SPECS:
            stage1 = with_sizes(stage1, stage1.image_size or SPECS[stage1.encoder].image_size)
        finals = [resolve_final(final, vars(stage1)) for final in finals]
    look = cell.review and (cell.review.simulate, cell.review.errors)
    return repr([influential(stage1), stage1.category, [influential(final) for final in finals], look])


def commands(cell: Cell) -> str:
    """The three scripts' commands, in a line."""
    lines = [("stage1_partition.py", cell.stage1), *(("-m llb.review", look) for look in [cell.review] if look)]
    lines += [("stage2_train.py", final) for final in cell.finals]
    lines += [("evaluate.py", cell.evaluate)] * bool(cell.finals)
    return " && ".join(shlex.join(["python", *script.split(), *typed_flags(settings)]) for script, settings in lines)


# ---- one run after another ----


def run_cells(cells: Sequence[Cell], out: Path, device: str, overwrite: bool) -> list[Cell]:
    """Make the runs, and print a line for each; what the scripts say goes to OUT/ablate.log. Returns those that are
    finished: settings that contradict each other leave a run out."""
    done, sources = [], sources_digest()
    log = open(out / "ablate.log" if is_writer() else os.devnull, "a", encoding="utf-8")
    with log, progress(total=len(cells), desc="runs", unit="run") as bar:
        for cell in cells:
            try:
                if overwrite or not finished(cell):
                    with redirect_stdout(log), redirect_stderr(log):
                        make(cell, done, device, overwrite)
                figures = {name: list(values.values()) for name, values in read_groups([cell.run])[0].figures.items()}
                line = ", ".join(f"{name} {written(name, values)}" for name, values in figures.items() if values)
                line += OTHER * (own_config(cell.run, "")["sources"][-1] != sources)
                done.append(cell)
            except UserError as error:
                line = f"left out: {error}"
            say(f"{cell.run.name}: {line}")
            bar.update()
    return done


def make(cell: Cell, done: Sequence[Cell], device: str, overwrite: bool) -> None:
    """What the three scripts do, beginning with what finished runs have in common with this one."""
    run = place_run(cell.stage1)
    with hold(run, "stage1", against=("",)):
        borrowed = borrow_submodels(cell, done, overwrite)
        run_stage1(run, dataclasses.replace(cell.stage1, overwrite=overwrite and not borrowed), device)
        if cell.review:
            with process_0_first("review"):
                run_review(run, own_config(run, str(run)), cell.review)
        for final in cell.finals:
            borrow_detector(cell, final, done)
            run_stage2(run, final, device)
        if cell.finals:
            wait("final detectors")
            problem = None
            try:
                run_evaluation(run, cell.evaluate, device)
            except UserError as error:
                problem = error
            if not agreed(problem is None):  # process 0 alone writes the metrics and the report, which are read next
                raise problem or UserError("process 0 could not evaluate it")


if __name__ == "__main__":
    run_script(main)
