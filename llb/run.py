"""A run's folder: what one stage leaves for the next, and the checks that it is what the next one thinks it is."""

import csv
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llb import processes
from llb.config import Stage1, Stage2, influential
from llb.data import Dataset, Record, load_category
from llb.demo import write_demo
from llb.encoder import Encoder, load_encoder
from llb.features import Encode, Fetch, cached, streamed
from llb.files import UserError, discard, read_json, writable, write_csv, write_json, write_text
from llb.purify import ranks

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "scikit-learn", "scipy")


METRICS = "metrics.json"


def data_root(run: Path, data: str | None) -> Path:
    """Where the images lie; without --data the embedded set is drawn into the run's cache, if it is not there yet."""
    if data is not None:
        return Path(data)
    embedded = run / "cache" / "embedded"
    with processes.first_ahead("embedded set"):
        write_demo(embedded)
    return embedded


@processes.first_ahead("open run")
def open_run(run: Path, settings: Stage1, categories: list[str], encoder: Encoder, device: str) -> None:
    """Begin a run, or go on with it: writes RUN/config.json.

    Raises:
        UserError: the folder was made with other settings or weights, or is not seen by all processes.
    """
    file = run / "config.json"
    wanted = influential(settings) | {"categories": categories}
    if settings.overwrite and file.exists() and processes.first():
        clear_run(run, categories)
    if file.exists():
        mend = "give another --out, or --overwrite to start it anew"
        config = read_config(run, f"--out {run}", mend)
        refuse_differences(config, wanted, f"--out {run}", mend)
        check_weights(config, encoder, f"--out {run}", mend)
    elif processes.first():
        wanted |= {"weights_digest": encoder.weights_digest}
        write_json(file, wanted | {"command": command_line()} | environment(device))
    else:
        raise UserError(f"--out {run}: process 0 has written it, but here it is not to be seen; share the folder")


@processes.first_ahead("run's folder")
def own_folder(run: Path) -> None:
    """Make the run's folder, or say why not; a folder that holds something else is left alone."""
    there = writable(run)
    # names with a dot in front: what a killed run has left, or what a file manager writes
    strangers = [name for name in there if name != "cache" and not name.startswith(".")]
    if strangers and not (run / "config.json").exists():
        raise UserError(f"--out {run} holds other files ({strangers[0]}): give a new or empty folder")


def clear_run(run: Path, categories: list[str]) -> None:
    """Delete what the run's stages wrote, and nothing else; cached features stay (they know what they belong to).

    categories: taken to be the run's where its config.json is damaged.
    """
    try:
        categories = read_json(run / "config.json", "").get("categories", [])
    except UserError:
        pass
    for name in categories:
        discard(run / name)
    for name in ("metrics.json", "metrics.csv", "report.html", "config.json"):
        (run / name).unlink(missing_ok=True)


def refuse_differences(old: dict[str, Any], new: dict[str, Any], where: str, mend: str) -> None:
    """Raise a UserError that names every setting in `new` that differs from `old`."""
    differences = [f"{name}: {old.get(name)}, now {value}" for name, value in new.items() if old.get(name) != value]
    if differences:
        raise UserError(f"{where} was made with other settings ({'; '.join(differences)}): {mend}")


def check_weights(config: dict[str, Any], encoder: Encoder, where: str, mend: str) -> None:
    """Raise a UserError if the run began with other weights: a file of the same name may hold new ones."""
    if config["weights_digest"] != encoder.weights_digest:
        raise UserError(f"{where} was made with other weights of {encoder.spec.name} than are there now: {mend}")


def run_encoder(run: Path, config: dict[str, Any]) -> Encoder:
    """The encoder that stage 1 used.

    Raises:
        UserError: its weights are not there, or others are in their place.
    """
    if config["weights"] and not Path(config["weights"]).exists():
        raise UserError(
            f"--run {run}: the encoder's weights, {config['weights']}, are not there; put them back, or give this "
            "command where stage 1's was given"
        )
    encoder = load_encoder(config["encoder"], config["weights"], config["image_size"], config["precision"])
    check_weights(config, encoder, f"--run {run}", f"put those back, or begin anew: {config['command']} --overwrite")
    return encoder


def read_run(run: str) -> tuple[Path, dict[str, Any]]:
    """The run that a later stage goes on with: its folder and its config.json."""
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise UserError(f"--run {run}: there is no run; make one with: python stage1_partition.py --out {run}")
    again = f"make the run anew: python stage1_partition.py --out {run} --overwrite, with the flags it had"
    config = read_config(folder, f"--run {run}", again)
    writable(folder, "--run")
    return folder, config


def read_config(run: Path, where: str, mend: str) -> dict[str, Any]:
    """RUN/config.json. where: how the run was named; mend: what to do where the file is damaged.

    Raises:
        UserError: it is damaged, or an older version of llb wrote it.
    """
    config = read_json(run / "config.json", mend)
    if missing := sorted((influential(Stage1()).keys() | {"weights_digest"}) - config.keys()):
        raise UserError(
            f"{where} was made by another version of llb (config.json has no {', '.join(missing)}): "
            f"make it anew with: {config.get('command', 'python stage1_partition.py')} --overwrite"
        )
    return config


def record_stage2(run: Path, settings: Stage2) -> None:
    """Note the settings of a final detector in config.json, or refuse those that differ from the noted ones.

    The file is read here, and not handed over: stage 2 with another --train-on may have been started meanwhile.
    """
    config = read_json(run / "config.json", "run stage 1 with --overwrite")
    noted = config.setdefault("stage2", {})
    old, new = noted.get(settings.train_on), influential(settings)
    if old is not None and not settings.overwrite:
        where = f"--run {run}: stage 2 on {settings.train_on}"
        refuse_differences(old, new, where, "give the same, or --overwrite to train it anew")
    if old != new and processes.first():
        noted[settings.train_on] = new
        write_json(run / "config.json", config)


def read_metrics(run: Path) -> dict[str, Any]:
    """What has been evaluated by now, as metrics.json has it; nothing yet: {}."""
    return read_json(run / METRICS, "delete it") if (run / METRICS).exists() else {}


def clear_stage2(run: Path, category: str, train_on: str) -> None:
    """Delete a final detector and what was evaluated with it."""
    folder = run / category
    metrics = read_metrics(run)
    if metrics.get(category, {}).pop(train_on, None) is not None:
        write_json(run / METRICS, metrics)
    discard(folder / f"stage2-{train_on}")
    discard(folder / f"maps-{train_on}")
    (folder / f"predictions-{train_on}.csv").unlink(missing_ok=True)
    (folder / f"examples-{train_on}.png").unlink(missing_ok=True)


def trained_on(run: Path, config: dict[str, Any], wanted: str | None) -> list[str]:
    """The final detectors to evaluate: those that stage 2 has finished for every category, or the one asked for."""
    found = []
    for train_on, settings in config.get("stage2", {}).items():
        folders = [run / name / f"stage2-{train_on}" / str(settings["steps"]) for name in config["categories"]]
        if all(folder.is_dir() for folder in folders):
            found.append(train_on)
    if wanted is not None and wanted not in found or not found:
        choice = f" --train-on {wanted}" if wanted else ""
        raise UserError(f"--run {run}: no finished detector; first: python stage2_train.py --run {run}{choice}")
    return found if wanted is None else [wanted]


def environment(device: str) -> dict[str, Any]:
    """What a result may depend on besides the settings: recorded, never compared."""
    here = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"versions": versions, "device": device.removeprefix("device: "), "git_commit": commit}


def command_line() -> str:
    """The command that goes on with the run, as one would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if word != "--overwrite")])


def make_fetch(
    run: Path,
    category: str,
    part: str,
    records: Sequence[Record],
    root: Path,
    encoder: Encoder,
    encode: Encode,
    settings,
) -> Fetch:
    """Features of `records`, from RUN/cache/<category>/<part>/ or, with --no-cache, computed when asked for."""
    paths = [root / record.path for record in records]
    if settings.no_cache:
        return streamed(encoder, encode, paths)
    folder = run / "cache" / category / part
    return cached(encoder, encode, paths, folder, settings.cache_gib, f"{category}, {part}")


def write_scores(folder: Path, dataset: Dataset, subset, scores, aggregated, kept) -> None:
    """RUN/<category>/scores.csv, in the order of the data set; rank 1 is the first suspect (the highest score)."""
    models = [f"model_{k}" for k in range(scores.shape[1])]
    rank = ranks(aggregated)
    rows = [
        [record.path, int(subset[i]), *map(float, scores[i]), float(aggregated[i]), int(rank[i]), int(kept[i])]
        + ["" if record.label is None else record.label]
        for i, record in enumerate(dataset.train)
    ]
    write_csv(folder / "scores.csv", ["path", "subset", *models, "score", "rank", "kept", "label"], rows)


def write_purified(folder: Path, dataset: Dataset, kept) -> None:
    """RUN/<category>/purified.txt; written last, so it also says that stage 1 is finished."""
    write_text(folder / "purified.txt", "".join(f"{r.path}\n" for r, keep in zip(dataset.train, kept) if keep))


def finished_stage1(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("scores.csv", "suspects.png", "purified.txt"))


def read_scores(folder: Path, dataset: Dataset) -> dict[str, np.ndarray]:
    """scores.csv by column: score float (N,), kept bool (N,), rows in the order of the data set.

    Raises:
        UserError: the table is damaged, or not about these training images.
    """
    rows = read_table(folder / "scores.csv", ("path", "score", "kept"))
    if [row["path"] for row in rows] != [record.path for record in dataset.train]:
        raise UserError(
            f"{folder / 'scores.csv'}: the training images have changed since; run stage 1 with --overwrite"
        )
    return {name: np.array([row[name] for row in rows]) for name in ("score", "kept")}


def read_table(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a scores or predictions table, typed; [] without the file."""
    if not file.exists():
        return []
    types = {
        "path": str,
        "score": float,
        "kept": lambda text: text == "1",
        "label": lambda text: int(text) if text else None,
    }
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            return [{name: types[name](row[name]) for name in columns} for row in csv.DictReader(opened)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is damaged ({error}): delete it and run the stage that wrote it again") from None


def read_purified(folder: Path, dataset: Dataset) -> tuple[np.ndarray, str | None]:
    """What stage 2 is to train on: indices into dataset.train, and a note if the list was edited by hand.

    Raises:
        UserError: a listed path is not among the training images, or not on the disk; nothing is listed; the file is
            not there, or no UTF-8 text.
    """
    file = folder / "purified.txt"
    position = {record.path: index for index, record in enumerate(dataset.train)}
    listed = []
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except FileNotFoundError:
        raise UserError(f"{file} is not there: run stage 1 again, which writes it anew") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8 again") from None
    for number, line in enumerate(text.splitlines(), 1):
        path = line.strip()
        if not path:
            continue
        if path not in position:
            raise UserError(f"{file}, line {number}: {path} is not among the training images; mend or delete the line")
        if not (dataset.root / path).is_file():
            raise UserError(f"{file}, line {number}: {path} is not in {dataset.root}; mend or delete the line")
        listed.append(position[path])
    if not listed:
        raise UserError(f"{file} lists no image: list at least one, or delete the file and run stage 1 again")
    chosen = np.unique(listed)
    kept = np.flatnonzero(read_scores(folder, dataset)["kept"])
    added, removed = len(np.setdiff1d(chosen, kept)), len(np.setdiff1d(kept, chosen))
    note = f"purified.txt was edited by hand: {added} added, {removed} removed" if added or removed else None
    return chosen, note


def training_choice(train_on: str, folder: Path, dataset: Dataset) -> tuple[np.ndarray, str | None]:
    """Indices into dataset.train for --train-on, and a note. "clean" is the one place where labels choose anything.

    Raises:
        UserError: "clean" without labels; what `read_purified` raises.
    """
    if train_on == "purified":
        return read_purified(folder, dataset)
    if train_on == "all":
        return np.arange(len(dataset.train)), None
    if any(record.label is None for record in dataset.train):
        raise UserError("--train-on clean needs labels, and these images have none: use purified or all")
    return np.array([i for i, record in enumerate(dataset.train) if record.label == 0]), None


def load_dataset(run: Path, config: dict[str, Any], category: str) -> Dataset:
    """The category as stage 1 saw it. A plain folder has no test set: all its images are scored.

    Raises:
        UserError: the images are no longer where they were.
    """
    if config["data"] is not None and not Path(config["data"]).exists():
        raise UserError(
            f"--run {run}: its images, {config['data']}, are not there; give this command where stage 1's was given"
        )
    return load_category(data_root(run, config["data"]), category, config["noise_ratio"], config["seed"])
