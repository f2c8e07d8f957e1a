"""`evaluate.py --images FOLDER`: score other images with a finished final detector. Nothing else of the run changes.

RUN/<category>/images-<name of FOLDER>/, or --out
    folder.txt              where the images are; the run and the category
    scores-<final>.csv      path, score, verdict: defect above the run's threshold, else fine; empty if there is none,
                            or if the detector remembers what it has learned from, and that is one of it
    overlays-<final>/       --overlays: each image beside its heat map, all on one colour scale
    maps-<final>/           --save-maps
    begun-<final>.csv       only while it works, or of a killed command: path of each image that may have a picture

FOLDER is read as a plain one, subfolders too, but for those of masks; the training images need not be there. A detector
or a threshold whose list has changed since is refused. An interrupted command begins again. It writes its table last,
so beside a table all pictures are there. When the detector is trained again, they go with it, but for those in --out.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from llb import tables
from llb.checkpoint import check_finished
from llb.config import Evaluate
from llb.console import say
from llb.data import Dataset, Record
from llb.detectors import remembers
from llb.features import streamed_features
from llb.files import (
    UserError,
    atomic,
    check_writable,
    digest_of_file,
    discard_files,
    some,
    typed,
    write_csv,
    write_text,
)
from llb.images import ImageFiles, load_image
from llb.lock import CHANGERS, hold
from llb.manifest import ABOUT, check_readable, clear_new_images, listed
from llb.maps import check_map_names, map_names, write_maps
from llb.marks import EDITABLE, choose_images, listed_as_purified, threshold_is_old, training_set
from llb.pairing import is_masks
from llb.pictures import contact_sheet
from llb.run import as_shown, final_checkpoints, finished_detectors, run_encoder
from llb.runfiles import IMAGES_FILE, final_name, read_config, read_manifest, steps_in
from llb.score import heat_maps, score
from llb.stage import final_params, make_stage
from llb.tables import Choice
from llb.tree import count, summary, walk

SMALLEST = 192  # side of an image in an overlay, pixels
FLAGS = ("category", "detector", "overlays", "out")


def check_flags(settings: Evaluate) -> None:
    """Raise a UserError for a flag that has no meaning without --images."""
    for name in FLAGS:
        if getattr(settings, name) and not settings.images:
            raise UserError(f"--{name} is of other images than the test set: give --images FOLDER too")


def score_images(run: Path, settings: Evaluate) -> None:
    """Score a folder of images and write the results."""
    config = read_config(run, f"--run {run}", "make the run again")
    # stages that delete a detector wait; two folders may be scored at once, but only one command writes to a place
    writes_to = os.path.realpath(place_of(run, category_of(run, config, settings), settings))
    with hold(run, f"evaluate-images-{hashlib.sha256(os.fsencode(writes_to)).hexdigest()[:16]}", against=CHANGERS):
        name, final = choose(run, config, settings)
        check_lists(run, name, final, config["stage2"][final])
        dataset = read_folder(settings.images, name, config)
        if settings.save_maps or settings.overlays:
            check_map_names(dataset.test)
        out, about = place(run, name, settings)
        encoder = run_encoder(run, config)
        stage = make_stage(run, settings, encoder, config | config["stage2"][final], final)
        check_readable(dataset, dataset.test)  # before anything is written
        params = final_params(stage, name)
        learned = [False] * len(dataset.test)
        if remembers(stage.setup.detector, stage.setup.settings):
            learned = learned_from(run / name, config["stage2"][final]["train_on"], dataset)
        if any(learned):
            why = "it scores them far too low, and they get no verdict"
            say(f"{name}, {final}: {sum(learned)} of these are images that it has learned from: {why}")

        # ---- what an earlier command has written goes: it may be of images that are no longer there ----
        clear_new_images(out, final)
        maps_folder, overlays, table = out / f"maps-{final}", out / f"overlays-{final}", out / f"scores-{final}.csv"
        begun = out / f"begun-{final}.csv"
        write_text(out / ABOUT, about)
        write_csv(begun, ["path"], [[record.path] for record in dataset.test])

        # ---- scores; only one batch of maps is in memory ----
        records = dataset.test
        files = ImageFiles(tuple(dataset.root / record.path for record in records), dataset.white, dataset.resize)
        features, everything = streamed_features(stage.source, files), np.arange(len(records))
        scores, levels = np.empty(len(records), np.float32), np.zeros((len(records), 2))
        title = f"{name}, new images on {final}"
        for positions, score_k, maps_k in score(params, stage.setup, features, everything, title, with_maps=True):
            scores[positions] = score_k[:, 0]
            if settings.overlays:
                levels[positions] = np.quantile(maps_k[:, 0], [0.5, 0.999], axis=(1, 2)).T
            if settings.save_maps:
                write_maps(maps_folder, [records[i] for i in positions], maps_k[:, 0])

        # ---- verdicts ----
        facts = tables.read_threshold(run / name, final, also_none=True)
        threshold = facts["threshold"] if facts else None
        verdicts = ["" if threshold is None else "defect" if value > threshold else "fine" for value in scores]
        verdicts = ["" if known else verdict for known, verdict in zip(learned, verdicts)]

        # ---- write ----
        if settings.overlays:
            side = max(SMALLEST, stage.setup.image_size)
            # a folder without a defect shall not look hot: the scale reaches the threshold at least
            scale = np.median(levels[:, 0]), max(levels[:, 1].max(), -np.inf if threshold is None else threshold)
            for index, heat in heat_maps(params, stage.setup, features, everything, f"{name}, overlays"):
                image = load_image(files.paths[index], stage.setup.image_size, dataset.white, dataset.resize)
                tile = (image, heat, (f"{scores[index]:.4f} {verdicts[index]}", records[index].path))
                atomic(overlays / map_names(records)[index], contact_sheet([tile], side=side, scale=scale).save)
        rows = [[record.path, float(value), verdict] for record, value, verdict in zip(records, scores, verdicts)]
        write_csv(table, ["path", "score", "verdict"], rows)
        discard_files(out, [begun.name])
    if threshold is None:
        answer = "--overwrite says why" if facts else "looks for one"
        say(f"{name}, {final}: no threshold, so no verdicts; python evaluate.py --run {typed(run)} {answer}")
    else:
        above, judged = verdicts.count("defect"), len(records) - sum(learned)
        say(f"{name}, {final}: {above} of {judged} images score above the threshold {threshold:.4g}")
    say(f"scores: {table}")


def choose(run: Path, config: dict[str, Any], settings: Evaluate) -> tuple[str, str]:
    """The category, and the name of the final detector: of those that are finished reviewed, else purified, else the
    only one."""
    name = category_of(run, config, settings)
    finished = finished_detectors(run, config | {"categories": [name]}, settings.train_on)
    finals = [f for f in finished if settings.detector in (None, config["stage2"][f]["detector"])]
    detector = settings.detector or config["detector"]
    lists = (settings.train_on,) if settings.train_on else EDITABLE[::-1]
    wanted = [final_name(train_on, detector, config) for train_on in lists]
    best = [final for final in wanted if final in finals]
    if not best and len(finals) != 1:
        choice = f"choose one of {', '.join(finished)} with --train-on and --detector"
        raise UserError(f"--run {run}: {wanted[-1]} is not finished for {name}; {choice}")
    return name, (best or finals)[0]


def category_of(run: Path, config: dict[str, Any], settings: Evaluate) -> str:
    """--category, or the only one."""
    there, name = config["categories"], settings.category
    name = there[0] if name is None and len(there) == 1 else name
    if name not in there:
        raise UserError(f"--category: {run} has {', '.join(there)}; give the one whose detector scores the images")
    return name


def check_lists(run: Path, name: str, final: str, settings: dict[str, Any]) -> None:
    """Raise a UserError, as evaluation does, if what the final detector has learned from has changed since, or the list
    that its threshold is taken from. By the run's tables alone. settings: of the detector, in config.json."""
    folder, train_on = run / name, settings["train_on"]
    if train_on in EDITABLE:
        training, chosen = chosen_by_tables(folder, train_on)
        check_finished(final_checkpoints(run, training, final, chosen), steps_in(settings, name))
    if threshold_is_old(folder, final, train_on):
        again = f"take it again with python evaluate.py --run {typed(run)} --train-on {train_on}"
        file = folder / tables.threshold_file(final)
        raise UserError(f"{file}: the list of training images that it is taken from has changed; {again}")


def chosen_by_tables(folder: Path, train_on: str) -> tuple[Dataset, Choice]:
    """The training images, and those for --train-on; none need be on the disk. folder: RUN/<category>."""
    training = training_set(folder)
    if train_on == "purified":
        return training, Choice(listed_as_purified(folder, training))
    return training, choose_images(train_on, folder, training)


def learned_from(folder: Path, train_on: str, dataset: Dataset) -> list[bool]:
    """Whether each image has the contents of one that a final detector has learned from. folder: RUN/<category>."""
    (training, chosen), states = chosen_by_tables(folder, train_on), read_manifest(folder)
    paths = [training.train[index].path for index in chosen.indices]
    if missing := [path for path in paths if path not in states]:
        known = "whether any of these images is one of them, is not known"
        raise UserError(f"{folder / IMAGES_FILE} lacks {some(missing)}, from which the detector has learned: {known}")
    learned = [states[path] for path in paths]
    sizes, digests = {size for size, _, _ in learned}, {digest for _, _, digest in learned}
    files = [dataset.root / record.path for record in dataset.test]
    return [file.stat().st_size in sizes and digest_of_file(file) in digests for file in files]


def read_folder(given: str, name: str, config: dict[str, Any]) -> Dataset:
    """The images, as `test`, shown as stage 1 showed those of the category `name`."""
    if not os.path.isdir(given):
        raise UserError(f"--images {given} is not there, or no folder: give a folder of images")
    tree = walk(Path(given), "--images")
    masks = {path for path in tree.images if any(map(is_masks, path.split("/")[:-1]))}
    rest = summary(count(tree.left_out | {"masks": sorted(masks)}))
    records = tuple(Record(path, None, (), "") for path in tree.images if path not in masks)
    if not records:
        raise UserError(f"--images {given} holds no images{f' ({rest})' if rest else ''}: give a folder of images")
    (dataset,) = as_shown([Dataset(Path(given), "folder", name, (), records)], config)
    listed(dataset)  # names that no table can hold
    say(f"images: {os.path.abspath(given)}, {len(records)} to score; left out: {rest or 'nothing'}")
    return dataset


def place_of(run: Path, name: str, settings: Evaluate) -> Path:
    """The folder for the results: --out, or one in RUN/<category>."""
    images = os.path.abspath(settings.images)
    return Path(settings.out or run / name / f"images-{os.path.basename(images).lstrip('.') or 'all'}")


def place(run: Path, name: str, settings: Evaluate) -> tuple[Path, str]:
    """The folder for the results, and the text of its folder.txt. One that lies elsewhere in the run, or among the
    images, or that holds anything else raises a UserError."""
    images, out = os.path.abspath(settings.images), place_of(run, name, settings)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(images)):
        raise UserError(f"--out {out} lies in --images {settings.images}: give a folder that is apart from the images")
    home = os.path.dirname(os.path.realpath(out)) == os.path.realpath(run / name) and out.name.startswith("images-")
    if not home and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(run)):
        raise UserError(f"--out {out} lies in the run: give another folder, or leave the flag out")
    others = [there for there in check_writable(out) if not there.startswith((".", "begun-"))]
    first, second = (
        text.encode(errors="replace").decode() + "\n" for text in (images, f"{os.path.abspath(run)}, {name}")
    )
    before = (out / ABOUT).read_bytes().decode(errors="replace") if (out / ABOUT).is_file() else None
    if before is None and others:
        raise UserError(f"--out {out} holds other files ({others[0]}): give an empty folder")
    # of an older version, which wrote one line; or the run has moved, and its own folder with it
    if before not in (None, first, first + second) and not (home and before.startswith(first)):
        problem = f"holds the scores of other images, or by another run (see {ABOUT})"
        raise UserError(f"--out {out} {problem}: give another folder")
    return out, first + second
