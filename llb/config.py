"""Settings: one dataclass for each script defines its flags, its --help and its part of RUN/config.json.

A setting whose default depends on others is None until llb.defaults fills it in, and
RUN/config.json holds the filled-in value. A later command for the same run must give the same settings.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from llb.detectors import DETECTORS
from llb.detectors.common import SCORES
from llb.detectors.recipes import RECIPES
from llb.flags import MOST, Number, flag, real, whole
from llb.keep import KEEP
from llb.layouts import LAYOUTS
from llb.pages import MOST as MOST_SHOWN
from llb.protocols import PROTOCOLS
from llb.purify import AGGREGATES
from llb.tables import TRAIN_ON

ENCODER = "dinov2_vitb14_reg"
LARGEST_SEED = 2**32 - 1  # JAX keys do not distinguish larger ones
STEPS, FINAL_STEPS, BATCH = 1000, 5000, 16
DEMO_STEPS, DEMO_FINAL_STEPS, DEMO_BATCH = 100, 200, 8  # a few minutes on two CPU cores
# they select from the N × K scores; another value trains and scores nothing again
SELECTING = ("aggregate", "standardise", "keep")
FLAGGED = ("recipe", "dropout")  # settings of a detector that have flags of their own
PRECISIONS, FOLDS, YES_NO = ("float32", "bfloat16"), ("own", "others"), ("yes", "no")
HEADS = ("auto", "none")
# bounds far above any use, below what JAX, NumPy or the machine fails at without a word of help
LARGEST_BATCH, LARGEST_SIDE, MOST_SUBMODELS = 2**16, 2**12, 10**4

# ---- flags that several scripts have ----

SIDE, IMAGES, SHARE = whole(1, LARGEST_SIDE), whole(1, LARGEST_BATCH), Number(float, 0, 1, True, tuple(KEEP))
RATE = real(0, 1000, open_below=True)
HELD = "features up to this size, in GiB, are held in memory; larger ones are read from the disk"
CACHED = "folder of features and demo sets, shared by all runs; may be deleted"
LIMIT = "features in the cache, in GiB: beyond it those that were used longest ago are deleted, not this command's own"
STREAMED = "store no features: decode and encode an image each time it is needed (slow; the scores are the same)"
TOGETHER = "HOST:PORT of process 0, if several processes run this together (llb/processes.py); all see the same files"
VERIFY = "compare the images with those of stage 1 by their contents, not by size and date (reads them all)"
cache_gib_flag = partial(flag, 4.0, HELD, real(0, MOST), affects=False)
cache_flag = partial(flag, "runs/cache", CACHED, affects=False)
cache_limit_flag = partial(flag, 20.0, LIMIT, real(0, MOST), affects=False)
verify_flag = partial(flag, False, VERIFY, affects=False)
no_cache_flag = partial(flag, False, STREAMED, affects=False)
coordinator_flag = partial(flag, None, TOGETHER, shown="from srun or mpirun, else one process", affects=False)
with_coordinator = partial(flag, None, shown="likewise", affects=False)
SETS = "the detector's own settings, NAME=VALUE,… (another NAME lists them)"
SCORED = "how the score of an image is taken from its map (patch-max: from the distances)"
INHERITED = "stage 1's; of another detector its own"
set_flag = partial(flag, None, SETS, shown="as published")
image_score_flag = partial(flag, None, SCORED, choices=tuple(SCORES), shown="the detector's")
processes_flag = partial(with_coordinator, "with --coordinator: how many processes", whole(1))
process_id_flag = partial(with_coordinator, "with --coordinator: number of this process", whole(0))


@dataclass
class Stage1:
    """Find the hidden defects: partition, train K sub-models together, score, aggregate, select."""

    data: str | None = flag(
        None, "root of a public set or of one laid out like it, or any folder of images", shown="the demo set"
    )
    layout: str | None = flag(None, "how --data is read", choices=LAYOUTS, shown="recognised by content")
    # not compared: config.json lists the categories, and those are compared
    category: str | None = flag(None, "one category, several with commas, or all", shown="the only one", affects=False)
    noise_ratio: float | None = flag(
        None,
        "share of defective images in train. Real-IAD: picks the split (0.0, 0.1, 0.2, 0.4); "
        "MVTec, VisA: moves randomly drawn defective test images of the noise pool into train; not for a plain folder",
        real(0, 1),
        shown="0.2 for the demo set, else 0.0",
    )
    noise_pool: str | int | None = flag(
        None,
        "defective test images that are set aside for noise: the rest, the test set, is the same at every ratio",
        Number(int, 0, MOST, words=("half",)),
        shown="half of them for the demo set, with --noise-ratio or in a grid that varies it; else 0",
    )
    out: str = flag("runs/demo", "folder of the run", affects=False)
    encoder: str | None = flag(
        None,
        "tiny; dino_vit{s,b}{16,8}, dinov2_vit{s,b,l}14[_reg]; resnet18, wide_resnet50_2, efficientnet_{b4,lite0}",
        shown=f"tiny for the demo set, else {ENCODER}",
    )
    weights: str | None = flag(
        None, "model.safetensors from Hugging Face or the original release's .pth", shown="downloaded from the hub once"
    )
    image_size: int | None = flag(
        None,
        "side in pixels, a multiple of the patch size (of a CNN: 32)",
        SIDE,
        shown="the detector's published one, else 392, 384 for patch 16, 224 CNNs, 112 tiny",
    )
    resize: int | None = flag(
        None,
        "side of a larger square, of which the centre is taken",
        SIDE,
        shown="the detector's published one, else the image size: nothing is cut off",
    )
    protocol: str | None = flag(
        None,
        "a published evaluation's settings; flags that are given still win",
        choices=tuple(PROTOCOLS),
        shown="none",
    )
    submodels: int | None = flag(
        None, "K, the number of subsets and sub-models", whole(1, MOST_SUBMODELS), shown="3, student 1"
    )
    folds: str | None = flag(
        None, "each sub-model learns from its own subset, or from all others", choices=FOLDS, shown="the detector's"
    )
    steps: int | None = flag(
        None, "steps of each sub-model", whole(1), shown=f"the detector's, or {STEPS}, demo set {DEMO_STEPS}"
    )
    batch_size: int | None = flag(
        None, "images per step, sub-model", IMAGES, shown=f"the detector's, or {BATCH}, demo set {DEMO_BATCH}"
    )
    learning_rate: float | None = flag(None, "peak learning rate", RATE, shown="the detector's and recipe's")
    dropout: float | None = flag(None, "rate in Dinomaly's bottleneck, or in UniAD", real(0, 1), shown="0.2, or 0.1")
    seed: int = flag(0, "determines all random numbers", whole(0, LARGEST_SEED))
    recipe: str | None = flag(
        None, "Dinomaly's optimiser, schedule, initialisation, hard mining", choices=tuple(RECIPES), shown="dinomaly"
    )
    aggregate: str | None = flag(
        None, "combines the K scores of an image into one", choices=AGGREGATES, shown="the detector's"
    )
    standardise: str | None = flag(
        None,
        "bring the sub-models' scores to one scale before they are combined",
        choices=YES_NO,
        shown="yes, dinomaly no",
    )
    image_score: str | None = image_score_flag()
    keep: str | float | None = flag(
        None, "share of images to keep; auto: drop clear groups of outliers; mirror: drop more", SHARE, shown="auto"
    )
    precision: str | None = flag(
        None, "matrix products round operands to this", choices=PRECISIONS, shown="float32 on a CPU, else bfloat16"
    )
    detector: str = flag("dinomaly", "the anomaly detector", choices=DETECTORS)
    set: Any = set_flag()
    cache: str = cache_flag()
    cache_limit: float = cache_limit_flag()
    cache_gib: float = cache_gib_flag()
    no_cache: bool = no_cache_flag()
    coordinator: str | None = coordinator_flag()
    processes: int | None = processes_flag()
    process_id: int | None = process_id_flag()
    suspects: int = flag(MOST_SHOWN, "training images on the report's pages, to be marked", whole(1), affects=False)
    verify: bool = verify_flag()
    overwrite: bool = flag(False, "start again: delete the run's results, stage 2 and reports included", affects=False)


@dataclass
class Stage2:
    """Train the final detector from scratch on what stage 1 kept."""

    run: str = flag("runs/demo", "folder of the run that stage 1 made", affects=False)
    train_on: str | None = flag(
        None,
        "purified: by stage 1; reviewed: all but what a person called defective; all: unpurified; clean: by the labels",
        choices=TRAIN_ON,
        shown="purified; demo set purified, all, clean",
    )
    head: str = flag(
        "auto",
        "of reviewed: auto also trains a linear head on the marked images, none only leaves out the defects",
        choices=HEADS,
    )
    detector: str | None = flag(None, "the final detector", choices=DETECTORS, shown="stage 1's")
    set: Any = set_flag(shown=INHERITED)
    image_score: str | None = image_score_flag(shown=INHERITED)
    steps: int | None = flag(
        None, "optimiser steps", whole(1), shown=f"the detector's, or {FINAL_STEPS}, demo set {DEMO_FINAL_STEPS}"
    )
    released: str | None = flag(
        None, "a checkpoint (.pth) of Dinomaly's release: the final detector, in place of a training", shown="none"
    )
    passes: int | None = flag(
        None,
        "passes over the images, in place of --steps; each category with other steps compiles programs of its own",
        whole(1),
        shown="see --steps",
    )
    batch_size: int | None = flag(None, "images per step", IMAGES, shown=INHERITED)
    learning_rate: float | None = flag(None, "peak learning rate", RATE, shown=INHERITED)
    cache: str = cache_flag()
    cache_limit: float = cache_limit_flag()
    cache_gib: float = cache_gib_flag()
    no_cache: bool = no_cache_flag()
    coordinator: str | None = coordinator_flag()
    processes: int | None = processes_flag()
    process_id: int | None = process_id_flag()
    verify: bool = verify_flag()
    overwrite: bool = flag(False, "train again: delete the detector of this --train-on", affects=False)


@dataclass
class Evaluate:
    """Score the test images and write the report."""

    run: str = flag("runs/demo", "folder of the run")
    train_on: str | None = flag(None, "which final detector", choices=TRAIN_ON, shown="all that stage 2 has trained")
    save_maps: bool = flag(False, "write each test image's anomaly map as a 16-bit PNG")
    images: str | None = flag(None, "score these images in place of the test set: a folder", shown="the test set")
    category: str | None = flag(None, "with --images: whose detector scores them", shown="the only one")
    detector: str | None = flag(None, "with --images: which detector", choices=DETECTORS, shown="stage 1's, if trained")
    overlays: bool = flag(False, "with --images: write each image beside its heat map")
    out: str | None = flag(None, "with --images: folder for the results", shown="RUN/<category>/images-<name>")
    cache: str = cache_flag()
    cache_limit: float = cache_limit_flag()
    cache_gib: float = cache_gib_flag()
    no_cache: bool = no_cache_flag()
    verify: bool = verify_flag()
    overwrite: bool = flag(False, "score again", affects=False)
