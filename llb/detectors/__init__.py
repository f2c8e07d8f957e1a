"""Anomaly detectors on the features of a frozen encoder, by name. They import no run, report or data.

A detector is a module of pure functions, written for ONE sub-model. `setup` (llb.detectors.common.Setup) is what it
may know, `features` a batch as it is cached: float16 (B, G, T, D) of a ViT, (B, L) of a CNN. `maps_of(setup, features)`
makes feature maps (B, h, w, C) of it; `maps_of`, `joined`, `cosine_distance` and `highest_part` are in
llb.detectors.common. A detector has

    Settings                   a dataclass(frozen=True) of its own numbers, changed by --set
    STRIDES                    a tuple, the stages of a CNN that it takes, by stride in pixels
    MAP, SCORE, AGGREGATE      defaults. How distances become a map: a MapRule; a map a score: a name in SCORES (both
                               llb.detectors.common); K scores one: a name in AGGREGATES (llb.purify)
    distance(setup, params, features) → float32 (B, h, w)         how anomalous each position of a grid is

and learns in one of two ways. In closed form, from batches that come once (llb.fit):

    start(setup, key, images) → state                             before the first of so many images
    add(setup, state, features, weight, first) → state            weight (B,): 1, or 0 for what fills the last batch
    finish(setup, state, key) → params

images: how many will come, those that fill the last batch included; first: the place of the batch's first image, a
scalar; state: any tree of arrays; key: a JAX key, the sub-model's own. ADDITIVE: states may be summed; the default is
then that each sub-model learns from all subsets but its own (--folds others), in one pass. Or a detector learns by an
optimiser, step by step (llb.train); `params` are then Flax's variables, {"params": …, "batch_stats": …}:

    init(setup, key) → params
    loss(setup, params, features, key, step) → loss, (each, changed)    each (B,): what the step sees of every image,
                                           its highest distances (`highest_part`), or NaN; changed: the collections it
                                           changes
    optimizer(setup, steps_per_pass) → optax.GradientTransformation
    LEARNING_RATE; STEPS, DEMO_STEPS                              defaults; each a pair, (steps of stage 1, steps of
                                           stage 2); DEMO_STEPS: on the demo set

Optional: PUBLISHED (flags by encoder), BATCH_SIZE, DEMO_BATCH_SIZE, SUBMODELS (default K), STANDARDISE (default of the
flag), IMAGES (it gets images, not features), describe (a bank's size), step_bytes (memory of a step), vit_groups (of
which blocks it takes means), remembers(settings) (see `remembers` below). K at once, devices, checkpoints, scores, maps
and reports are written once, in llb.
"""

import dataclasses
from types import ModuleType, UnionType
from typing import Any, get_type_hints

from llb.detectors import (
    cflow,
    destseg,
    dinomaly,
    mutual,
    padim,
    patchcore,
    rd,
    simplenet,
    softpatch,
    student,
    subspace,
    uniad,
)
from llb.files import UserError

DETECTORS: dict[str, ModuleType] = {
    "dinomaly": dinomaly,
    "padim": padim,
    "student": student,
    "patchcore": patchcore,
    "softpatch": softpatch,
    "subspace": subspace,
    "mutual": mutual,
    "rd": rd,
    "uniad": uniad,
    "simplenet": simplenet,
    "cflow": cflow,
    "destseg": destseg,
}


def is_trained(name: str) -> bool:
    """Whether an optimiser trains the detector; else it is fitted in closed form."""
    return hasattr(DETECTORS[name], "loss")


def remembers(name: str, settings: Any) -> bool:
    """Whether a detector scores the images that it has learned from far too low: a memory bank holds their patches,
    Gaussians and subspaces fit them (PaDiM, demo set: by its own scores 88 % of new normal images are false alarms).

    settings: its Settings.
    """
    detector = DETECTORS[name]
    own = getattr(detector, "remembers", lambda settings: False)
    return detector.AGGREGATE == "out-of-fold" or getattr(detector, "ADDITIVE", False) or own(settings)


def read_settings(name: str, text: str | None, given: dict[str, Any]) -> Any:
    """The Settings of a detector. A UserError is raised for a setting that it has not, or a bad value.

    text: of --set, "NAME=VALUE,…"; given: the settings that have a flag of their own, None where it was not given.
    """
    settings = DETECTORS[name].Settings
    fields = {field.name: field for field in dataclasses.fields(settings)}
    values = {key: value for key, value in given.items() if value is not None}
    for key in values:
        if key not in fields:
            raise UserError(f"--{key}: {name} has no {key}; leave it out, or choose another --detector")
        _check_value(f"--{key} {values[key]}", values[key], fields[key])
    for part in filter(None, (text or "").split(",")):
        key, equals, word = part.partition("=")
        if key not in fields or not equals:
            raise UserError(f"--set {part}: give NAME=VALUE; {name} has {', '.join(fields) or 'no settings'}")
        values[key] = _read_value(f"--set {part}", word, fields[key], get_type_hints(settings)[key])
    return settings(**values)


def _read_value(where: str, word: str, field: dataclasses.Field, kind: type) -> Any:
    """A value of --set as the field's type, within its choices or bounds (llb.detectors.common)."""
    if isinstance(kind, UnionType):  # float | None
        kind = kind.__args__[0]
    try:
        value = {"yes": True, "no": False, "True": True, "False": False}[word] if kind is bool else kind(word)
    except (ValueError, KeyError):
        value = None
    _check_value(where, value, field, "yes or no" if kind is bool else "a number")
    return value


def _check_value(where: str, value: Any, field: dataclasses.Field, wanted: str = "") -> None:
    """wanted: in words, of a setting without choices and bounds."""
    choices, bounds = field.metadata.get("choices"), field.metadata.get("bounds")
    if value is None or (choices and value not in choices) or (bounds and not bounds[0] <= value <= bounds[1]):
        range_of = f"from {bounds[0]} to {bounds[1]}" if bounds else wanted
        raise UserError(f"{where}: give {'one of ' + ', '.join(map(str, choices)) if choices else range_of}")
