"""The folder of a run: config.json, and checks that images, settings and weights belong together.

RUN/config.json          every setting, versions, device, seed, git commit, digest of the sources
RUN/<category>/…         tables (llb.tables), pictures and checkpoints
RUN/cache/               features, and the demo set; may be deleted
"""

import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llb.checkpoint import CheckpointFolder, paths_digest
from llb.config import Evaluate, Stage1, Stage2, influential
from llb.console import say
from llb.data import Dataset, load_category
from llb.demo import write_demo
from llb.detectors.recipes import RECIPES
from llb.encoders import Encoder, load_encoder
from llb.features import Encode, Fetch, cached_features, streamed_features
from llb.files import UserError, check_writable, digest_of_files, discard, is_writer, read_json, write_json
from llb.processes import process_0_first
from llb.tables import METRICS_FILE, read_metrics
from llb.train import Training, make_training

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "scikit-learn", "scipy")
PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = ("stage1_partition.py", "stage2_train.py", "evaluate.py")


@dataclass(frozen=True)
class Stage:
    """What a stage needs for every category. It is made once."""

    run: Path
    settings: Stage1 | Stage2 | Evaluate
    encoder: Encoder
    encode: Encode
    training: Training


def stage_training(encoder: Encoder, settings: dict[str, Any]) -> Training:
    """The training of a stage. settings, by name: those of stage 1; for a final detector stage 2's replace some."""
    names = ("learning_rate", "dropout", "steps", "batch_size")
    return make_training(encoder, RECIPES[settings["recipe"]], **{name: settings[name] for name in names})


def demo_or_given_root(run: Path, data: str | None) -> Path:
    """The folder of the images: --data, or without it the demo set, which is drawn into the run's cache once."""
    if data is not None:
        return Path(data)
    demo = run / "cache" / "demo"
    with process_0_first("demo set"):
        write_demo(demo)
    return demo


def fetch_features(stage: Stage, dataset: Dataset, part: str) -> Fetch:
    """Features of a category's "train" or "test" images: from RUN/cache, or with --no-cache computed each time."""
    paths = [dataset.root / record.path for record in getattr(dataset, part)]
    if stage.settings.no_cache:
        return streamed_features(stage.encoder, stage.encode, paths)
    folder = stage.run / "cache" / dataset.category / part
    title = f"{dataset.category}, {part}"
    return cached_features(stage.encoder, stage.encode, paths, folder, stage.settings.cache_gib, title)


# ---- stage 1 begins a run ----


@process_0_first("folder of the run")
def make_run_folder(run: Path) -> None:
    """Make the folder of the run. A folder that holds something else is refused and stays as it is."""
    names = check_writable(run)
    # dot-files come from killed runs or from file managers
    strangers = [name for name in names if name != "cache" and not name.startswith(".")]
    if strangers and not (run / "config.json").exists():
        raise UserError(f"--out {run} holds other files ({strangers[0]}): give a new or empty folder")


@process_0_first("open run")
def open_run(run: Path, settings: Stage1, categories: list[str], encoder: Encoder, device: str) -> None:
    """Begin a run, or continue it: writes RUN/config.json. Other settings or weights raise a UserError."""
    file, where = run / "config.json", f"--out {run}"
    settings_now = influential(settings) | {"categories": categories}
    if settings.overwrite and file.exists():
        clear_run(run, categories)
    if file.exists():
        advice = "give another --out, or --overwrite to start again"
        config = read_config(run, where, advice)
        refuse_differences(config, settings_now, where, advice)
        check_weights(config, encoder, where, advice)
        note_sources(run, config)
    elif is_writer():
        facts = {"weights_digest": encoder.weights_digest, "command": command_line()} | environment(device)
        write_json(file, settings_now | facts)
    else:
        raise UserError(f"{where}: process 0 has written it, but this process cannot see it; share the folder")


def clear_run(run: Path, categories: list[str]) -> None:
    """Delete what the stages of a run wrote. Cached features stay, since they say what they hold."""
    try:
        categories = read_json(run / "config.json", "").get("categories", [])
    except UserError:
        pass  # damaged: take the categories of this command
    discard(*(run / name for name in (*categories, METRICS_FILE, "metrics.csv", "report.html", "config.json")))


def refuse_differences(old: dict[str, Any], new: dict[str, Any], where: str, advice: str) -> None:
    """Raise a UserError that names every setting in `new` that differs from `old`."""
    differences = [f"{name}: {old.get(name)}, now {value}" for name, value in new.items() if old.get(name) != value]
    if differences:
        raise UserError(f"{where} was made with other settings ({'; '.join(differences)}): {advice}")


def check_weights(config: dict[str, Any], encoder: Encoder, where: str, advice: str) -> None:
    """Raise a UserError if the run began with other weights: a file of the same name may hold new ones."""
    if config["weights_digest"] != encoder.weights_digest:
        raise UserError(f"{where} was made with other weights of {encoder.spec.name}: {advice}")


# ---- later stages continue it ----


def read_run(run: str) -> tuple[Path, dict[str, Any]]:
    """The run that a later stage continues: its folder and its config.json. No run raises a UserError."""
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"--run {run}: there is no run; make one with: python stage1_partition.py --out {run}")
    advice = f"make the run again: python stage1_partition.py --out {run} --overwrite, with the flags it had"
    config = read_config(folder, f"--run {run}", advice)
    check_writable(folder, "--run")
    note_sources(folder, config)
    return folder, config


def read_config(run: Path, where: str, advice: str) -> dict[str, Any]:
    """RUN/config.json; a UserError if it is damaged or of an older version of llb. where: names the run in messages."""
    config = read_json(run / "config.json", advice)
    missing = sorted((influential(Stage1()).keys() | {"weights_digest", "sources"}) - config.keys())
    if missing:
        problem = f"{where} was made by another version of llb (config.json has no {', '.join(missing)})"
        command = config.get("command", "python stage1_partition.py")
        raise UserError(f"{problem}: make it again with: {command} --overwrite")
    return config


def note_sources(run: Path, config: dict[str, Any]) -> None:
    """Say if a run continues with other sources than it began with, and add their digest to config.json."""
    now = sources_digest()
    if {now} != set(config["sources"]):
        say(f"note: the sources of llb have changed since {run} began; its results may mix old and new code")
    if now not in config["sources"]:
        config["sources"].append(now)
        write_json(run / "config.json", config)


def run_encoder(run: Path, config: dict[str, Any]) -> Encoder:
    """The encoder that stage 1 used. A UserError is raised if its weights are missing, or others are in their place."""
    check_there(run, "the encoder's weights", config["weights"])
    encoder = load_encoder(config["encoder"], config["weights"], config["image_size"], config["precision"])
    advice = f"put the old ones back, or begin again: {config['command']} --overwrite"
    check_weights(config, encoder, f"--run {run}", advice)
    return encoder


def load_dataset(run: Path, config: dict[str, Any], category: str) -> Dataset:
    """The category as stage 1 saw it. A UserError is raised if the images are no longer where they were."""
    check_there(run, "its images", config["data"])
    root = demo_or_given_root(run, config["data"])
    return load_category(root, category, config["noise_ratio"], config["seed"])


def check_there(run: Path, name: str, path: str | None) -> None:
    """Raise a UserError if a path that stage 1 was given no longer exists. name: what lies there, for the message."""
    if path and not Path(path).exists():
        advice = "put them back, or give this command in the folder where stage 1's was given"
        raise UserError(f"--run {run}: {name}, {path}, are not there; {advice}")


@process_0_first("begin stage 2")
def begin_stage2(run: Path, settings: Stage2, categories: list[str]) -> None:
    """Write the settings of a final detector to config.json, or refuse those that differ from the recorded ones.

    With --overwrite the old detector is deleted first. The file is read here: stage 2 with another --train-on may have
    changed it since this command started.
    """
    if settings.overwrite:
        for category in categories:
            clear_stage2(run, category, settings.train_on)
    config = read_json(run / "config.json", "run stage 1 with --overwrite")
    recorded = config.setdefault("stage2", {})
    old, new = recorded.get(settings.train_on), influential(settings)
    if old is not None and not settings.overwrite:
        where = f"--run {run}: stage 2 on {settings.train_on}"
        refuse_differences(old, new, where, "give the same, or --overwrite to train again")
    if old != new:
        recorded[settings.train_on] = new
        write_json(run / "config.json", config)


def final_checkpoints(run: Path, dataset: Dataset, train_on: str, indices: np.ndarray) -> CheckpointFolder:
    """Where a final detector is saved, with the digest of its training images. indices: int (n,), into dataset.train"""
    digest = paths_digest([dataset.train[index].path for index in indices])
    return CheckpointFolder(run / dataset.category / f"stage2-{train_on}", digest)


def clear_stage2(run: Path, category: str, train_on: str) -> None:
    """Delete a final detector and its evaluation."""
    folder = run / category
    metrics = read_metrics(run)
    if metrics.get(category, {}).pop(train_on, None) is not None:
        write_json(run / METRICS_FILE, metrics)
    names = ("stage2-{}", "maps-{}", "predictions-{}.csv", "examples-{}.png")
    discard(*(folder / name.format(train_on) for name in names))


def finished_detectors(run: Path, config: dict[str, Any], wanted: str | None) -> list[str]:
    """Each --train-on (or the wanted one) whose detector is finished for every category. None raises a UserError."""
    finished = []
    for train_on, settings in config.get("stage2", {}).items():
        folders = [run / name / f"stage2-{train_on}" / str(settings["steps"]) for name in config["categories"]]
        if wanted in (None, train_on) and all(folder.is_dir() for folder in folders):
            finished.append(train_on)
        elif wanted is None:
            say(f"{train_on} is not finished and left out: python stage2_train.py --run {run} --train-on {train_on}")
    if not finished:
        choice = f" --train-on {wanted}" if wanted else ""
        raise UserError(f"--run {run}: no finished detector; first: python stage2_train.py --run {run}{choice}")
    return finished


# ---- facts that are recorded ----


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on besides the settings: recorded, never compared."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": device.removeprefix("device: "),
        "git_commit": commit,
        "git_dirty": None if changes is None else bool(changes),
        "sources": [sources_digest()],
    }


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


def command_line() -> str:
    """The command that continues the run, as a person would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if word != "--overwrite")])
