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
from llb.protocols import PROTOCOLS, resized


def resolve(settings: Stage1, layout: str) -> Stage1:
    """Fill in the defaults that depend on the data, the device, the detector, the protocol and each other.

    layout: "demo", or how `llb.layouts.read_root` has read the root. A UserError is raised if flags contradict.
    """
    detector, demo = DETECTORS[settings.detector], layout == "demo"
    protocol = PROTOCOLS.get(settings.protocol)
    if protocol:
        named = protocol.stage1 | {"image_score": protocol.stage1_score}
        settings = with_defaults(settings, {name: named[name] for name in named if learns(settings.detector, name)})
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
    settings = dataclasses.replace(with_defaults(settings, defaults), **own_flags(own))
    if settings.resize and settings.image_size and settings.resize < settings.image_size:
        raise UserError(
            f"--resize {settings.resize}: is smaller than the image size {settings.image_size} that is cut out"
        )
    return settings


def learns(detector: str, setting: str) -> bool:
    """Whether a setting is one for this detector: Dinomaly has a recipe, and only what is trained has steps."""
    own = {field.name for field in dataclasses.fields(DETECTORS[detector].Settings)}
    return setting in own if setting in FLAGGED else setting != "steps" or is_trained(detector)


def with_sizes(settings: Stage1, image_size: int) -> Stage1:
    """The settings with the encoder's image size, and the side of which a --protocol shows the centre."""
    protocol = PROTOCOLS.get(settings.protocol)
    resize = settings.resize or (resized(protocol, image_size) if protocol else None)
    return dataclasses.replace(settings, image_size=image_size, resize=resize)


def resolve_final(settings: Stage2, config: dict[str, Any]) -> Stage2:
    """Fill in what was not given: stage 1's if the detector is stage 1's, else the new detector's own defaults.

    config: RUN/config.json.
    """
    demo, name = config["data"] is None, settings.detector or config["detector"]
    settings, protocol = dataclasses.replace(settings, detector=name), PROTOCOLS.get(config["protocol"])
    if protocol and not settings.steps and not settings.passes and is_trained(name):
        settings = with_defaults(settings, protocol.stage2)
    if protocol:
        settings = with_defaults(settings, {"image_score": protocol.test_score})
    if settings.steps and settings.passes:
        raise UserError("--steps and --passes both say how long to train: give one of them")
    same = name == config["detector"]
    values = {setting: config[setting] for setting in FLAGGED} | config["set"] if same else {}
    own = read_settings(name, settings.set, values)
    inherited = ("batch_size", "learning_rate", "image_score") if same else ()
    published = getattr(DETECTORS[name], "PUBLISHED", {}).get(config["encoder"], {})
    published = {flag: value for flag, value in published.items() if hasattr(settings, flag)}  # images are stage 1's
    defaults = learning_defaults(settings, own, 1, demo) | published | {each: config[each] for each in inherited}
    if settings.passes:
        defaults.pop("steps")
    return dataclasses.replace(with_defaults(settings, defaults), set=dataclasses.asdict(own))


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
