"""Settings: one dataclass for each script is its flags, its --help and its part of RUN/config.json.

A setting whose default depends on others (the embedded set needs fewer steps) is None until `resolve` fills it in, and
RUN/config.json holds what was filled in. Another command for the same run must ask for the same.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax

from llb.optimizer import RECIPES
from llb.purify import AGGREGATES

DETECTORS = ("dinomaly",)
LARGEST_SEED = 2**32 - 1  # what a JAX key tells apart
LARGEST_RATE = 1000.0  # keeps infinity out
STEPS, FINAL_STEPS, BATCH = 1000, 5000, 16
EMBEDDED_STEPS, EMBEDDED_FINAL_STEPS, EMBEDDED_BATCH = 100, 400, 8  # two CPU cores, a few minutes
PRECISIONS = ("float32", "bfloat16")
TRAIN_ON = ("purified", "all", "clean")


def whole(minimum: int, maximum: int | None = None):
    """A parser for whole numbers from `minimum` on, up to `maximum` if there is one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum or maximum is not None and value > maximum:
            bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return parse


def real(lowest: float, highest: float, open_below: bool = False):
    """A parser for numbers between two bounds; `open_below` leaves the lower one out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest or (open_below and value == lowest):
            bounds = f"{'above' if open_below else 'from'} {lowest:g}" + ("" if highest > 1e9 else f" to {highest:g}")
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
        return value

    return parse


def share_or_auto(text: str) -> str | float:
    """`auto`, or a share above 0 and up to 1."""
    if text == "auto":
        return text
    try:
        return real(0, 1, open_below=True)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a share above 0 and up to 1") from None


def flag(default: Any, text: str, parse=str, choices=None, shown: str | None = None, affects: bool = True):
    """A dataclass field that becomes a flag.

    `shown` describes a default that depends on others; `affects` says whether results depend on the setting, so that a
    run made with another value is refused.
    """
    about = {"help": text, "parse": parse, "choices": choices, "shown": shown, "affects": affects}
    return field(default=default, metadata=about)


def cache_gib() -> Any:
    text = "features up to this size, in GiB, are held in memory; larger ones are read from disk, or computed anew"
    return flag(4.0, text, real(0, float("inf")), affects=False)


def no_cache() -> Any:
    text = "store no features: decode and encode an image anew whenever it is needed (slow, needs no disk; same scores)"
    return flag(False, text, affects=False)


def overwrite(text: str) -> Any:
    return flag(False, text, affects=False)


def coordinator() -> Any:
    text = "HOST:PORT of process 0, when several processes run this together (llb/processes.py); all see the same files"
    return flag(None, text, shown="srun's or mpirun's word, else one process", affects=False)


def processes() -> Any:
    return flag(None, "with --coordinator: how many processes", whole(1), shown="likewise", affects=False)


def process_id() -> Any:
    return flag(None, "with --coordinator: which one this is, from 0", whole(0), shown="likewise", affects=False)


@dataclass
class Stage1:
    """Find the hidden defects: partition, train K sub-models together, score, aggregate, select."""

    data: str | None = flag(
        None,
        "Real-IAD root, MVTec-AD or VisA root, or any folder of images; recognised by its content",
        shown="the embedded set, drawn by llb",
    )
    # not compared: config.json holds the categories that were found, which are
    category: str | None = flag(
        None, "one category, several with commas, or all", shown="the only one there is", affects=False
    )
    noise_ratio: float | None = flag(
        None,
        "share of defective images in train, 0 to below 1. Real-IAD: picks the split (0.0, 0.1, 0.2, 0.4); "
        "MVTec, VisA: moves randomly drawn test anomalies into train; not for a plain folder",
        real(0, 1),
        shown="0.2 for the embedded set, else 0.0",
    )
    out: str = flag("runs/demo", "folder of the run", affects=False)
    encoder: str | None = flag(
        None,
        "tiny, dino_vit{s,b}{16,8}, dinov2_vit{s,b,l}14 or dinov2_vit{s,b,l}14_reg",
        shown="tiny for the embedded set, else dinov2_vitb14_reg",
    )
    weights: str | None = flag(
        None,
        "encoder weights: model.safetensors from Hugging Face or the original release's .pth",
        shown="fetched from the Hugging Face hub once",
    )
    image_size: int | None = flag(
        None,
        "side in pixels, a multiple of the patch size",
        whole(1),
        shown="the encoder's: 392, 384 for patch 16, 112 for tiny",
    )
    submodels: int = flag(3, "K, the number of subsets and sub-models", whole(1))
    steps: int | None = flag(None, "steps of each sub-model", whole(1), shown=f"{STEPS}, embedded set {EMBEDDED_STEPS}")
    batch_size: int | None = flag(
        None, "images per step, sub-model", whole(1), shown=f"{BATCH}, embedded set {EMBEDDED_BATCH}"
    )
    learning_rate: float | None = flag(
        None, "peak learning rate", real(0, LARGEST_RATE, True), shown="the recipe's: llbnad 0.005, dinomaly 0.002"
    )
    dropout: float | None = flag(
        None, "dropout rate in the bottleneck, 0 to 1", real(0, 1), shown="0.2; dinomaly on Real-IAD 0.4"
    )
    seed: int = flag(0, "all random numbers follow from it", whole(0, LARGEST_SEED))
    recipe: str = flag("dinomaly", "optimiser, schedule, initialisation and hard mining", choices=tuple(RECIPES))
    aggregate: str = flag("mean", "how the K scores of an image become one", choices=AGGREGATES)
    keep: str | float = flag(
        "auto", "share of the images to keep, above 0 to 1, or auto: decided from the scores", share_or_auto
    )
    precision: str | None = flag(
        None,
        "what the operands of matrix products are rounded to; sums and parameters are float32",
        choices=PRECISIONS,
        shown="bfloat16 on an accelerator, float32 on the CPU",
    )
    detector: str = flag("dinomaly", "the anomaly detector", choices=DETECTORS)
    cache_gib: float = cache_gib()
    no_cache: bool = no_cache()
    coordinator: str | None = coordinator()
    processes: int | None = processes()
    process_id: int | None = process_id()
    overwrite: bool = overwrite("start the run anew: delete what it holds, stage 2 and reports included")


@dataclass
class Stage2:
    """Train the final detector from scratch on what stage 1 kept."""

    run: str = flag("runs/demo", "folder of the run that stage 1 made", affects=False)
    train_on: str = flag(
        "purified",
        "purified: what stage 1 kept; all: no purification; clean: by the labels",
        choices=TRAIN_ON,
        affects=False,
    )
    steps: int | None = flag(
        None, "optimiser steps", whole(1), shown=f"{FINAL_STEPS}, embedded set {EMBEDDED_FINAL_STEPS}"
    )
    batch_size: int | None = flag(None, "images per step", whole(1), shown="stage 1's")
    learning_rate: float | None = flag(None, "peak learning rate", real(0, LARGEST_RATE, True), shown="stage 1's")
    cache_gib: float = cache_gib()
    no_cache: bool = no_cache()
    coordinator: str | None = coordinator()
    processes: int | None = processes()
    process_id: int | None = process_id()
    overwrite: bool = overwrite("train anew on the chosen images; what was trained on them before is deleted")


@dataclass
class Evaluate:
    """Score the test images and write the report."""

    run: str = flag("runs/demo", "folder of the run")
    train_on: str | None = flag(
        None, "which final detector", choices=TRAIN_ON, shown="every one that stage 2 has trained"
    )
    save_maps: bool = flag(False, "write each test image's anomaly map as a 16-bit PNG")
    cache_gib: float = cache_gib()
    no_cache: bool = no_cache()
    overwrite: bool = overwrite("score again")


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help lists every flag)\n")


def parse(settings: type, argv: list[str] | None = None):
    """Read the flags of one of the dataclasses above; `argv` None means the command line's."""
    parser = Parser(description=settings.__doc__, allow_abbrev=False)
    for item in dataclasses.fields(settings):
        about, name = item.metadata, "--" + item.name.replace("_", "-")
        shown = about["shown"] or ("no" if item.default is False else item.default)
        text = f"{about['help']} (default: {shown})".replace("%", "%%")
        if item.default is False:
            parser.add_argument(name, action="store_true", help=text)
        else:
            metavar = None if about["choices"] else item.name.rsplit("_")[-1].upper()
            parser.add_argument(
                name, default=item.default, type=about["parse"], choices=about["choices"], metavar=metavar, help=text
            )
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            parser.error(f"--{name.replace('_', '-')} {ascii(value)}: the name is not UTF-8; rename it")
    return settings(**given)


def influential(settings) -> dict[str, Any]:
    """The settings that results depend on."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.metadata["affects"]}


def default_precision() -> str:
    """What the operands of matrix products are rounded to on the device there is."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def resolve(settings: Stage1, layout: str) -> Stage1:
    """Fill in the defaults that depend on the data, on the device and on each other.

    layout: "embedded", or what `llb.data.recognise` answers.
    """
    embedded = layout == "embedded"
    recipe = RECIPES[settings.recipe]
    dropout = 0.4 if recipe.name == "dinomaly" and layout == "real-iad" else recipe.dropout
    defaults = {
        "noise_ratio": 0.2 if embedded else 0.0,
        "encoder": "tiny" if embedded else "dinov2_vitb14_reg",
        "steps": EMBEDDED_STEPS if embedded else STEPS,
        "batch_size": EMBEDDED_BATCH if embedded else BATCH,
        "learning_rate": recipe.learning_rate,
        "dropout": dropout,
        "precision": default_precision(),
    }
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)
