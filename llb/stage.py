"""What a stage works with: the detector set up for the encoder, and the features that it takes."""

import dataclasses
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llb.checkpoint import CheckpointFolder, Params, open_checkpoints, restore_params
from llb.config import FLAGGED, Evaluate, Stage1, Stage2
from llb.console import say
from llb.data import Dataset
from llb.detectors import DETECTORS, is_trained
from llb.detectors.common import Setup
from llb.encoders import Encoder
from llb.encoders.specs import Spec
from llb.features import Features, Source, cached_features, make_source, streamed_features
from llb.files import UserError, typed, write_json
from llb.head import Headed, evidence, head_file, head_values, learn_head, read_head
from llb.images import ImageFiles, load_image
from llb.manifest import image_states
from llb.marks import read_marks, read_review, review_file
from llb.processes import agreed
from llb.protocols import PROTOCOLS
from llb.runfiles import stage2_folder
from llb.tables import read_scores
from llb.tiles import LOOKED_AT, Tile, small
from llb.train import check_memory


@dataclass(frozen=True)
class Stage:
    """What a stage needs for every category. It is made once."""

    run: Path
    settings: Stage1 | Stage2 | Evaluate
    source: Source
    setup: Setup
    final: str = ""  # name of the final detector, see `final_name`


def make_stage(
    run: Path, settings: Stage1 | Stage2 | Evaluate, encoder: Encoder, values: dict[str, Any], final: str = ""
) -> Stage:
    """values, by name: the settings of stage 1; for a final detector stage 2's replace some. final: of `Stage`."""
    detector = DETECTORS[values["detector"]]
    fields = {field.name for field in dataclasses.fields(detector.Settings)}
    flagged = {name: values[name] for name in FLAGGED if name in fields}
    own = detector.Settings(**flagged | values["set"])
    spec, strides = encoder.spec, detector.STRIDES
    if isinstance(spec, Spec):
        strides = ()
        spec = dataclasses.replace(spec, release=values["protocol"] is not None)  # as both published codes
        if hasattr(detector, "vit_groups"):
            spec = dataclasses.replace(spec, groups=detector.vit_groups(own, spec))
    encoder = dataclasses.replace(encoder, spec=spec, strides=strides)
    names = ("detector", "learning_rate", "steps", "batch_size")
    side = PROTOCOLS[values["protocol"]].map_side if values["protocol"] else None
    rule = dataclasses.replace(detector.MAP, side=side)
    learning = {name: values[name] for name in names} | {"score": values["image_score"], "map_rule": rule}
    setup = Setup(spec, strides, encoder.image_size, own, encoder.precision, **learning)
    check_detector(setup)
    return Stage(run, settings, make_source(encoder, getattr(detector, "IMAGES", False)), setup, final)


def check_step(setup: Setup, submodels: int) -> None:
    """Raise a UserError if a training step needs more memory than there is."""
    if is_trained(setup.detector):
        check_memory(submodels * getattr(DETECTORS[setup.detector], "step_bytes", state_bytes)(setup))


def state_bytes(setup: Setup) -> int:
    """What a step of one sub-model needs at the least: its parameters, their gradients, and two moments of each."""
    return 4 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(check_detector(setup)["params"]))


@cache
def check_detector(setup: Setup) -> Params:
    """The shapes with which the detector begins. A UserError is raised if it does not fit the encoder. Tracing it takes
    half a second, once in a process."""
    detector = DETECTORS[setup.detector]
    if not isinstance(setup.spec, Spec) and not setup.grids:
        strides = " ".join(map(str, setup.strides))
        problem = f"takes stages of stride {strides}, and {setup.spec.name} has none of them"
        raise UserError(f"--detector {setup.detector}: it {problem}; give another --encoder")
    begin = partial(detector.init, setup) if is_trained(setup.detector) else partial(detector.start, setup, images=1)
    return jax.eval_shape(begin, jax.random.key(0))


def load_features(stage: Stage, dataset: Dataset, part: str) -> Features:
    """Features of a category's "train" or "test" images: from the cache, or with --no-cache computed each time."""
    settings, names = stage.settings, [record.path for record in getattr(dataset, part)]
    files = ImageFiles(tuple(dataset.root / name for name in names), dataset.white, dataset.resize)
    if settings.no_cache:
        return streamed_features(stage.source, files)
    files = dataclasses.replace(files, states=image_states(stage.run / dataset.category, dataset.root, names))
    cache, title = Path(settings.cache), f"{dataset.category}, {part}"
    return cached_features(stage.source, files, cache, settings.cache_gib, settings.cache_limit, title)


def tile_to_judge(stage: Stage, dataset: Dataset, index: int, heat: np.ndarray) -> Tile:
    """A training image as a person judges it, with its map, float32 (S, S): people see more than small encoders."""
    path, resize = dataset.train[index].path, dataset.resize
    resize = resize and round(resize * LOOKED_AT / stage.setup.image_size)
    image = load_image(dataset.root / path, LOOKED_AT, dataset.white, resize)
    return path, image, small(heat, LOOKED_AT), None


def keep_head(stage: Stage, dataset: Dataset, at: CheckpointFolder, seed: int) -> None:
    """Learn the head of a finished detector that is trained on `reviewed`, unless it is there: head-<final>.json, if λ
    is above 0, and last review-<final>.json, which says why."""
    folder, final, name = stage.run / dataset.category, stage.final, dataset.category
    if not final.startswith("reviewed") or agreed((folder / review_file(final)).exists()):
        return
    marks = read_marks(folder, dataset)
    head, review = None, evidence(marks) | {"why": "--head none"}
    if stage.settings.head != "none":
        with open_checkpoints(at.folder) as checkpoints:
            params = restore_params(checkpoints)
        features = load_features(stage, dataset, "train")
        ranking = read_scores(folder, dataset)["score"]
        head, review = learn_head(stage.setup, features, params, marks, ranking, seed)
    if head is not None:
        write_json(folder / head_file(final), head_values(head))
    write_json(folder / review_file(final), review)
    say(f"{name}, {final}: {review['why']}")


def final_params(stage: Stage, category: str) -> Params | Headed:
    """The parameters of a finished final detector, K = 1, with its head if it has one."""
    folder, final = stage.run / category, stage.final
    with open_checkpoints(folder / stage2_folder(final)) as checkpoints:
        params = restore_params(checkpoints)
    if not final.startswith("reviewed"):
        return params
    command = f"python stage2_train.py --run {typed(stage.run)} --train-on reviewed --detector {stage.setup.detector}"
    again = f"train again with {command} --overwrite"
    review = read_review(folder, final, again)
    if review is None:
        raise UserError(f"{folder / review_file(final)} is not there: finish it with {command}")
    return Headed(params, read_head(folder / head_file(final), again)) if review["lambda"] else params
