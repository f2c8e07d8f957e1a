"""Defaults that depend on the data, the device, the detector, the encoder, a protocol, and each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llb.config import (
    BATCH,
    DEMO_BATCH,
    DEMO_FINAL_STEPS,
    DEMO_STEPS,
    ENCODER,
    FINAL_STEPS,
    FLAGGED,
    STEPS,
    Stage1,
    Stage2,
)
from llb.data import HALF
from llb.detectors import DETECTORS, is_trained, read_settings
from llb.device import default_precision
from llb.files import UserError
from llb.flags import flag_of
from llb.protocols import PROTOCOLS, resized


def resolve(settings: Stage1, layout: str) -> Stage1:
    """Fill in the defaults that depend on the data, the device, the detector, the protocol and each other.

    layout: "demo", or how `llb.layouts.read_root` has read the root. A UserError is raised if flags contradict.
    """
    detector, demo = DETECTORS[settings.detector], layout == "demo"
    check_typed(settings)
    if protocol := PROTOCOLS.get(settings.protocol):
        of_dinomaly = protocol.stage1 | {"image_score": protocol.stage1_score}
        settings = with_defaults(settings, protocol.every | (of_dinomaly if settings.detector == "dinomaly" else {}))
    encoder = settings.encoder or ("tiny" if demo else ENCODER)
    submodels = settings.submodels or getattr(detector, "SUBMODELS", 3)
    own = read_settings(settings.detector, settings.set, {name: getattr(settings, name) for name in FLAGGED})
    defaults = {
        "layout": layout,
        "noise_ratio": 0.2 if demo else 0.0,
        "noise_pool": HALF if demo or settings.noise_ratio is not None else 0,
        "encoder": encoder,
        "submodels": submodels,
        "folds": "others" if submodels > 1 and getattr(detector, "ADDITIVE", False) else "own",
        "aggregate": detector.AGGREGATE if submodels > 1 else "mean",
        "standardise": "yes" if submodels > 1 and getattr(detector, "STANDARDISE", True) else "no",
        "keep": "auto",
        "precision": default_precision(),
    }
    published = getattr(detector, "PUBLISHED", {}).get(encoder, {})
    if settings.image_size:  # the side before the centre is cut out belongs to the published size
        published = {name: value for name, value in published.items() if name != "resize"}
    defaults |= learning_defaults(settings, own, 0, demo) | published
    return dataclasses.replace(with_defaults(settings, defaults), **own_flags(own))


def check_typed(settings: Stage1) -> None:
    """Raise a UserError if flags and --set, as they were typed, contradict each other."""
    typed = {name: value for name in FLAGGED if (value := getattr(settings, name)) is not None}
    own = read_settings(settings.detector, settings.set, typed)
    for name, value in typed.items():
        if getattr(own, name) != value:
            raise UserError(f"--set {name}={getattr(own, name)} and --{name} {value} contradict each other: give one")
    if typed.get("dropout") and getattr(own, "noise", None) == "jitter":
        raise UserError(f"--set noise=jitter and --dropout {own.dropout} contradict each other: give one")


def with_sizes(settings: Stage1, image_size: int) -> Stage1:
    """The settings with the encoder's image size, and the side of which a --protocol shows the centre. A UserError is
    raised if a centre of this size cannot be cut out."""
    protocol = PROTOCOLS.get(settings.protocol)
    resize = settings.resize or (resized(protocol, image_size) if protocol else None)
    if resize and resize < image_size:
        raise UserError(f"--resize {resize}: is smaller than the image size {image_size} that is cut out")
    return dataclasses.replace(settings, image_size=image_size, resize=resize)


def resolve_final(settings: Stage2, config: dict[str, Any]) -> Stage2:
    """Fill in what was not given: stage 1's if the detector is stage 1's, else the new detector's own defaults.

    config: RUN/config.json.
    """
    if settings.head == "none" and settings.train_on != "reviewed":
        raise UserError("--head none: only --train-on reviewed has a head; leave it out")
    demo, name = config["data"] is None, settings.detector or config["detector"]
    settings = dataclasses.replace(settings, detector=name)
    protocol = PROTOCOLS.get(config["protocol"]) if name == "dinomaly" else None
    if settings.released:
        check_released(settings)
    elif protocol and not settings.steps and not settings.passes:
        settings = with_defaults(settings, protocol.stage2)
    if protocol:
        settings = with_defaults(settings, {"image_score": protocol.test_score})
    if settings.steps and settings.passes:
        raise UserError("--steps and --passes both say how long to train: give one of them")
    same = name == config["detector"]
    source = config if same else protocol.stage1 if protocol else {}
    values = {setting: source[setting] for setting in FLAGGED if setting in source} | (config["set"] if same else {})
    own = read_settings(name, settings.set, values)
    typed = "--learning-rate" in config.get("command", "").split()
    rate = ["learning_rate"] if typed or getattr(own, "recipe", None) == source.get("recipe") else []
    inherited = [each for each in ("batch_size", "image_score", *rate) if each in source]
    published = getattr(DETECTORS[name], "PUBLISHED", {}).get(config["encoder"], {})
    published = {flag: value for flag, value in published.items() if hasattr(settings, flag)}  # images are stage 1's
    defaults = learning_defaults(settings, own, 1, demo) | published | {each: source[each] for each in inherited}
    if settings.passes:
        defaults.pop("steps")
    if settings.released:
        defaults |= {"steps": 1, "learning_rate": 0.0}  # as of a fit: no training takes place
    return dataclasses.replace(with_defaults(settings, defaults), set=dataclasses.asdict(own))


def check_released(settings: Stage2) -> None:
    """Raise a UserError if a setting of a training is given with --released, which takes its place."""
    for name in ("steps", "passes", "batch_size", "learning_rate"):
        if getattr(settings, name) is not None:
            raise UserError(f"{flag_of(name)}: --released takes the place of a training; leave one of them out")


def learning_defaults(settings: Stage1 | Stage2, own: Any, stage: int, demo: bool) -> dict[str, Any]:
    """Defaults of how a detector learns. own: its Settings; stage: 0 is stage 1, 1 the final detector's.

    A UserError is raised for settings of a training if the detector is fitted in closed form.
    """
    name, detector = settings.detector, DETECTORS[settings.detector]
    own_batch = getattr(detector, "BATCH_SIZE", DEMO_BATCH if demo else BATCH)
    defaults = {
        "image_score": detector.SCORE,
        "batch_size": getattr(detector, "DEMO_BATCH_SIZE", own_batch) if demo else own_batch,
    }
    if is_trained(name):
        common = (DEMO_STEPS, DEMO_FINAL_STEPS) if demo else (STEPS, FINAL_STEPS)
        own_steps = getattr(detector, "STEPS", common)
        steps = getattr(detector, "DEMO_STEPS", own_steps) if demo else own_steps
        rate = own.learning_rate if hasattr(own, "learning_rate") else detector.LEARNING_RATE
        return defaults | {"steps": steps[stage], "learning_rate": rate}
    for flag_name in ("steps", "passes", "learning_rate"):
        if getattr(settings, flag_name, None) is not None:
            raise UserError(
                f"--{flag_name.replace('_', '-')}: {name} is fitted in closed form, without steps; leave it out"
            )
    return defaults | {"steps": 1, "learning_rate": 0.0}


def with_defaults(settings, defaults: Mapping[str, Any]):
    """The settings with the defaults where they are None."""
    names = {item.name for item in dataclasses.fields(settings)}
    missing = {name: value for name, value in defaults.items() if name in names and getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)


def own_flags(own: Any) -> dict[str, Any]:
    """The Settings of a detector as settings of a script: those with a flag of their own, and the others as "set"."""
    values = dataclasses.asdict(own)
    return {name: values.pop(name, None) for name in FLAGGED} | {"set": values}
