"""The folder of a run: config.json, and checks that images, settings and weights belong together.

RUN/config.json          every setting, versions, device, seed, git commit, digest of the sources
RUN/<category>/…         tables (llb.tables), images.csv (llb.manifest), pictures and checkpoints
"""

import dataclasses
import os
import platform
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llb.checkpoint import CheckpointFolder, check_finished, paths_digest
from llb.config import SELECTING, Evaluate, Stage1, Stage2
from llb.console import say
from llb.data import Dataset, load_category
from llb.demo import demo_in
from llb.encoders import Encoder, load_encoder
from llb.files import UserError, check_writable, digest_of_files, is_writer, typed
from llb.flags import influential, typed_flags
from llb.images import find_white
from llb.layouts import read_root
from llb.lock import turn
from llb.manifest import check_manifest, clear_run, clear_stage2
from llb.marks import EDITABLE, MARKS_FILE, choose_images
from llb.processes import process_0_first
from llb.runfiles import (
    VERSION,
    data_of,
    note_machine,
    note_sources,
    own_config,
    read_config,
    stage1_command,
    stage2_command,
    stage2_folder,
    steps_in,
    write_config,
)
from llb.tables import Choice

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "scikit-learn", "scipy")
PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = ("stage1_partition.py", "stage2_train.py", "evaluate.py")


def demo_or_given_root(cache: Path, data: str | None) -> Path:
    """The folder of the images: --data, or without it the demo set, which is drawn into the cache once for all runs."""
    if data is not None:
        return Path(os.path.abspath(data))
    with process_0_first("demo set"):
        return demo_in(cache)


# ---- stage 1 begins a run ----


def place_run(settings: Stage1) -> Path:
    """Make the folder of a run. One that holds something else, or overlaps the images', is refused as it is."""
    run, cache = Path(settings.out), Path(settings.cache)
    if settings.data is not None:
        if not _is_within(Path(os.path.realpath(settings.data)), cache / "demo"):  # whose pictures are images
            check_apart("--out", run, settings.data)
            check_apart("--cache", cache, settings.data)
    elif settings.layout is not None:
        raise UserError(f"--layout {settings.layout} says how --data is read: give --data too, or leave it out")
    make_run_folder(run, cache)
    check_cache(settings)
    if os.path.lexists(run / "config.json"):
        own_config(run, f"--out {run}")
    return run


def check_cache(settings: Stage1 | Stage2 | Evaluate) -> None:
    """Raise a UserError if --cache can be no folder. One that is there may be read-only: it may hold all features."""
    if not settings.no_cache and not os.path.isdir(settings.cache):
        check_writable(Path(settings.cache), "--cache")


@process_0_first("folder of the run")
def make_run_folder(run: Path, cache: Path) -> None:
    """Make the folder of the run. A folder that holds something else is refused and stays as it is."""
    names = check_writable(run)
    # dot-files come from killed runs or from file managers
    strangers = [name for name in names if name != "quarantine.csv" and not name.startswith(".")]
    strangers = [name for name in strangers if not _is_within(cache, run / name)]
    if strangers and not (run / "config.json").exists():
        raise UserError(f"--out {run} holds other files ({strangers[0]}): give a new or empty folder")


def check_apart(flag: str, folder: Path, data: str) -> None:
    """Raise a UserError if a folder that llb writes to is, or lies in or around, the folder of the images."""
    out, root = Path(os.path.realpath(folder)), Path(os.path.realpath(data))
    if _is_within(out, root) or _is_within(root, out):
        where = "inside" if not _is_within(root, out) else "around" if not _is_within(out, root) else "equal to"
        raise UserError(f"{flag} {folder} is {where} --data {data}: give a folder that is apart from the images")


def _is_within(inner: Path, outer: Path) -> bool:
    """Whether a folder is another one or lies in it, by the files themselves: some systems ignore case."""
    there = (folder for folder in (inner, *inner.parents) if folder.exists())
    return outer.exists() and any(folder.samefile(outer) for folder in there)


@process_0_first("open run")
def open_run(
    run: Path, settings: Stage1, datasets: list[Dataset], encoder: Encoder, facts: dict[str, Any]
) -> dict[str, Any]:
    """Begin a run, or continue it. Other settings or weights, or a folder that llb did not make, raise a UserError.

    facts: what config.json holds of a new run besides. Returns config.json with the places and sources of this command.
    """
    file, where, advice = run / "config.json", f"--out {run}", "give another --out, or --overwrite to start again"
    now = influential(settings) | {"categories": [dataset.category for dataset in datasets]}
    places = {name: now[name] and os.path.abspath(now[name]) for name in ("data", "weights")}
    now |= places
    if is_writer() and (settings.overwrite or not file.exists()):
        # it can take minutes: before anything is deleted, so that an interrupted command leaves the old run
        white = {dataset.category: dict(find_white(dataset).white) for dataset in datasets}
    if settings.overwrite and file.exists():
        clear_own(run, now["categories"])
    if file.exists():
        config = read_config(run, where, advice)
        for name, new in places.items():  # one place has many spellings, and a project may move: contents decide
            old = config[name]
            if old and new and (os.path.realpath(old) == os.path.realpath(new) or not os.path.exists(old)):
                config |= {name: new} | ({"data_given": settings.data} if name == "data" else {})
        trained = {name: value for name, value in now.items() if name not in SELECTING}
        names = {"categories": sorted(config["categories"])}  # a run may be older than their order
        renamed = [name for name, value in trained.items() if config.get(name) != value] == ["categories"]
        if renamed and config.get("reading", {}).get("layout") == facts["reading"]["layout"] == "folder":
            again = f"if its images are the same, call it {config['categories'][0]} again, and the run continues"
            advice = f"a plain folder's name is its category: {again}; or {advice}"
        refuse_differences(config | names, trained, where, advice)
        check_weights(config, encoder, where, advice)
        note_sources(config, run, sources_digest())
        note_machine(config, machine(facts["device"]))
        config["reading"] = facts["reading"]  # unreadable images may have been removed since
    elif is_writer():
        known = {"white": {name: values for name, values in white.items() if values}}
        config = {"llb": VERSION} | now | known | {"weights_digest": encoder.weights_digest} | facts
        write_config(run, config)
    else:
        raise UserError(f"{where}: process 0 has written it, but this process cannot see it; share the folder")
    return config


def clear_own(run: Path, categories: list[str]) -> None:
    """Delete a run of llb, so that it begins again: see `check_no_marks`. categories: of a run whose config.json is
    damaged and names none."""
    config = own_config(run, f"--out {run}")
    categories = config["categories"] if isinstance(config.get("categories"), list) else categories
    check_no_marks(run, categories, config)
    clear_run(run, categories)


def check_no_marks(run: Path, categories: list[str], config: dict[str, Any]) -> None:
    """Raise a UserError if starting again would delete what a person has marked; what the labels marked may go."""
    for file in (run / str(name) / MARKS_FILE for name in categories):
        if file.is_file() and "review" not in config:
            raise UserError(f"{file} is what a person marked: move it away first; llb.review takes it back")


def as_shown(datasets: list[Dataset], config: dict[str, Any]) -> list[Dataset]:
    """The data sets with how their images are shown: white in deep images, as stage 1 has found it, and --resize."""
    white = config["white"]
    return [
        dataclasses.replace(dataset, white=white.get(dataset.category, {}), resize=config["resize"])
        for dataset in datasets
    ]


def refuse_differences(old: dict[str, Any], new: dict[str, Any], where: str, advice: str) -> None:
    """Raise a UserError that names every setting in `new` that differs from `old`."""
    if changes := differences(old, new):
        raise UserError(f"{where} was made with other settings ({'; '.join(changes)}): {advice}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Every setting in `new` that differs from `old`, in words."""
    return [f"{name}: {old.get(name)}, now {value}" for name, value in new.items() if old.get(name) != value]


def check_weights(config: dict[str, Any], encoder: Encoder, where: str, advice: str) -> None:
    """Raise a UserError if the run began with other weights: a file of the same name may hold new ones."""
    if config["weights_digest"] != encoder.weights_digest:
        raise UserError(f"{where} was made with other weights of {encoder.spec.name}: {advice}")


# ---- later stages continue it ----


def find_run(settings: Stage2 | Evaluate) -> Path:
    """The folder of the run that a later stage continues. A UserError is raised if there is none."""
    run, folder = settings.run, Path(settings.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"--run {run}: there is no run; make one with: python stage1_partition.py --out {typed(run)}")
    read_config(folder, f"--run {run}", _make_again(run))
    check_writable(folder, "--run")
    if not getattr(settings, "images", None):  # those are never cached
        check_cache(settings)
    return folder


def read_run(run: Path, device: str | None = None) -> dict[str, Any]:
    """Its config.json, which from here on names these sources too, and the machine. device: of `start_jax`."""
    with turn(run):
        config = read_config(run, f"--run {run}", _make_again(run))
        if note_sources(config, run, sources_digest()) | (device is not None and note_machine(config, machine(device))):
            write_config(run, config)
    return config


def _make_again(run: Path | str) -> str:
    return f"make the run again: python stage1_partition.py --out {typed(run)} --overwrite, with the flags it had"


def run_encoder(run: Path, config: dict[str, Any]) -> Encoder:
    """The encoder that stage 1 used. A UserError is raised if its weights are missing, or others are in their place."""
    check_there(run, config, "the encoder's weights", config["weights"])
    encoder = load_encoder(config["encoder"], config["weights"], config["image_size"], config["precision"])
    advice = f"put the old ones back, or begin again: {stage1_command(run, config)} --overwrite"
    check_weights(config, encoder, f"--run {run}", advice)
    return encoder


def load_datasets(run: Path, config: dict[str, Any], settings: Stage2 | Evaluate) -> list[Dataset]:
    """The categories as stage 1 saw them. Images that are not there, or others, raise a UserError."""
    data = data_of(config)
    check_there(run, config, "its images", data)
    noise, command = (config["noise_ratio"], config["seed"], config["noise_pool"]), stage1_command(run, config)
    try:
        root = read_root(demo_or_given_root(Path(settings.cache), data), config["layout"] if data else None)
        datasets = as_shown([load_category(root, name, *noise) for name in config["categories"]], config)
    except UserError as error:
        problem = f"--run {run}: its images cannot be read as stage 1 read them ({error})"
        raise UserError(f"{problem}; put the old files back, or begin again: {command} --overwrite") from None
    check_manifest(run, datasets, settings.verify, command)
    return datasets


def check_there(run: Path, config: dict[str, Any], name: str, path: str | None) -> None:
    """Raise a UserError if a path that stage 1 was given no longer exists. name: what lies there, for the message."""
    if path and not Path(path).exists():
        advice = f"put them back, or give stage 1 their new place: {stage1_command(run, config)}"
        raise UserError(f"--run {run}: {name}, {path}, are not there; {advice}")


@process_0_first("begin stage 2")
def begin_stage2(run: Path, settings: Stage2, final: str, steps: dict[str, int], released: str | None = None) -> None:
    """Write the settings of a final detector to config.json, or refuse those that differ from the recorded ones.

    steps: of each category; released: digest of the weights of --released.

    With --overwrite the old detector is deleted first. The file is read here: another stage 2 may have changed it since
    this command started.
    """
    if settings.overwrite:
        clear_stage2(run, list(steps), final)
    with turn(run):
        config = read_config(run, f"--run {run}", _make_again(run))
        recorded = config.setdefault("stage2", {})
        auto, old = {"head": "auto"}, recorded.get(final)  # of before there were heads
        old = old and (auto | old if settings.train_on == "reviewed" else old | auto)  # it has none, whatever was given
        new = influential(settings) | {"category_steps": None if settings.steps else steps}
        new |= {"released_digest": released} if released else {}
        if old is not None and not settings.overwrite:
            where = f"--run {run}: stage 2 on {final}"
            refuse_differences(old, new, where, "give the same, or --overwrite to train again")
        if recorded.get(final) != new:
            recorded[final] = new
            write_config(run, config)


def final_checkpoints(run: Path, dataset: Dataset, final: str, choice: Choice) -> CheckpointFolder:
    """Where a final detector is saved, with the digest of what it learns from: its images, and those called fine."""
    paths = [dataset.train[index].path for index in choice.indices]
    digest = paths_digest([*paths, *(f"fine {path}" for path in choice.fine)])
    return CheckpointFolder(run / dataset.category / stage2_folder(final), digest)


def check_list(run: Path, dataset: Dataset, final: str) -> None:
    """Raise a UserError if a final detector's list, or what a person said of its images, has changed since it was
    trained."""
    train_on = final.partition("-")[0]
    if train_on in EDITABLE:
        chosen = choose_images(train_on, run / dataset.category, dataset)
        check_finished(final_checkpoints(run, dataset, final, chosen), 0)


def finished_detectors(run: Path, config: dict[str, Any], wanted: str | None) -> list[str]:
    """Each final detector that is finished for every category. A UserError is raised if there is none.

    wanted: a --train-on, or None for all.
    """
    finished = []
    for final, settings in config.get("stage2", {}).items():
        folders = [run / name / stage2_folder(final) / str(steps_in(settings, name)) for name in config["categories"]]
        if wanted not in (None, settings["train_on"]):
            continue
        if all(folder.is_dir() for folder in folders):
            finished.append(final)
        elif wanted is None:
            say(f"{final} is not finished and left out: {stage2_command(run, final)}")
    if not finished:
        choice = f" --train-on {wanted}" if wanted else ""
        raise UserError(f"--run {run}: no finished detector; first: python stage2_train.py --run {typed(run)}{choice}")
    return finished


# ---- facts that are recorded ----


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on besides the settings: recorded, never compared."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return machine(device) | {
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "sources": [sources_digest()],
    }


def machine(device: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"versions": versions, "device": device.removeprefix("device: ")}


def git(*arguments: str) -> str | None:
    """The output of a git command in the project's folder; None outside a checkout."""
    try:
        command = ["git", "-C", str(PROJECT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources_digest() -> str:
    """SHA-256 over the sources that results depend on: the three scripts, and llb/ without tiny/ and bench/."""
    workshops = (PROJECT / "llb" / "tiny", PROJECT / "llb" / "bench")
    core = [file for file in sorted((PROJECT / "llb").rglob("*.py")) if not set(workshops) & set(file.parents)]
    return digest_of_files([*(PROJECT / script for script in SCRIPTS), *core], PROJECT)


def command_line(settings: Stage1) -> str:
    """The command that continues a run, as a person would type it. settings: as given, no default filled in."""
    return shlex.join(["python", SCRIPTS[0], *typed_flags(dataclasses.replace(settings, overwrite=False))])
