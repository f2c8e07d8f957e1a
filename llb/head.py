"""A head: a linear classifier on the encoder's features that learns from the images a person called defective.

    maps      (B, h, w, C)   the encoder's maps side by side, on the grid on which the detector's distance lies
    patch     (C,)           of one position
    positive  (n, C)         of each image called defective, the WORST positions for the detector: where the defect is
    negative  (m, C)         positions drawn from all images in training, and the worst ones of images called fine
    own       (B, h, w)      weight · patch + bias, of a class-balanced logistic regression on standardised features
    distance  (B, h, w)      above(detector's distance) + λ · above(own)

    above(x) = √max(0, (x − median) / MAD), both over the positions of the training images

A detector sees that a patch is unusual; the head knows what unusual patches a person minds. It knows no detector by
name. Features come in batches, and only patches that are learned from stay in memory.

λ comes from evidence: 0 unless MARKS images of each verdict were given, since of few marks only the loudest defects
are known; else 2 (L − ½) within 0 … 1. L is the lower bound of the AUROC that heads reach on the images of a person's
look which they have not learned from (FOLDS folds). With λ = 0 the detector is as it was.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from llb.checkpoint import Params
from llb.console import progress
from llb.detectors import DETECTORS
from llb.detectors.common import SCORES, Setup, anomaly_map, maps_of
from llb.features import Features, normalise, prefetch
from llb.files import UserError, read_json
from llb.marks import DEFECT, FINE
from llb.metrics import image_metrics

MARKS = 15  # images of each verdict without which there is no head
WORST, DRAWN = 8, 20_000  # positions of an image that was looked at; of all training images together
FOLDS, LARGEST = 5, 1.0  # of the cross-validation; λ
CONFIDENCE = 0.95
BATCH = 16  # images
LOGISTIC = {"C": 1.0, "class_weight": "balanced", "max_iter": 1000}
Heads = dict[str, np.ndarray]  # leading axis K: weight (K, C), bias (K,); of a final detector also lambda (K,) and
# detector, own (K, 2): median and MAD of its distance over the training positions, and of the head's
SHAPES = {"weight": 1, "bias": 0, "own": 1, "lambda": 0, "detector": 1}  # axes of the leaves of one head


def head_file(final: str) -> str:
    return f"head-{final}.json"


def review_file(final: str) -> str:
    return f"review-{final}.json"


class Headed(NamedTuple):
    """Parameters of K sub-models with their heads: in place of a detector's own wherever images are scored."""

    detector: Params
    head: Heads


# ---- on one sub-model, as llb.detectors ----


def distance_of(setup: Setup, params: Params | Headed, features: Any) -> jax.Array:
    """The distance of every position, float32 (B, h, w): the detector's, or with its head's."""
    measure = DETECTORS[setup.detector].distance
    if not isinstance(params, Headed):
        return measure(setup, params, features)
    distance, head = measure(setup, params.detector, features), params.head
    own = encoder_maps(setup, features, distance.shape[1:]) @ head["weight"] + head["bias"]
    return above(distance, *head["detector"]) + head["lambda"] * above(own, *head["own"])


def encoder_maps(setup: Setup, features: Any, grid: tuple[int, int]) -> jax.Array:
    """All maps of the encoder on one grid, float32 (B, h, w, C); finer ones are averaged, coarser ones interpolated."""
    if isinstance(features, tuple):  # images, of a detector that encodes itself
        images, frozen = features
        maps = setup.encode(frozen, normalise(images))
    else:
        maps = maps_of(setup, features)
    shapes = [(len(one), *grid, one.shape[-1]) for one in maps]
    return jnp.concatenate([jax.image.resize(one, shape, "linear") for one, shape in zip(maps, shapes)], axis=-1)


def above(values: jax.Array, middle: jax.Array, width: jax.Array) -> jax.Array:
    """How far values lie above what is usual; the root keeps one position from outweighing all."""
    return jnp.sqrt(jnp.maximum((values - middle) / width, 0.0))


def usual(values: np.ndarray) -> np.ndarray:
    """Median and median absolute deviation, float32 (2,); a deviation of 0 becomes the mean one, or 1."""
    middle = np.median(values)
    far = np.abs(values - middle)
    return np.array([middle, np.median(far) or far.mean() or 1.0], np.float32)


# ---- a look at images ----


class Look(NamedTuple):
    """What is taken of a batch of images."""

    distance: np.ndarray  # float32 (b, h, w), the detector's
    drawn: np.ndarray  # float32 (b, r, C), patches at the places that were drawn
    worst: np.ndarray  # float32 (b, WORST, C), patches where the distance is largest, largest first


@partial(jax.jit, static_argnames="setup")
def look_step(params: Params, features: jax.Array, places: jax.Array, setup: Setup, frozen: Params | None) -> Look:
    """params: of one sub-model; features: (b, …); places: int (b, r), positions of the grid; frozen: of `Features`."""
    inputs = features if frozen is None else (features, frozen)
    distance = distance_of(setup, params, inputs)
    flat = distance.reshape(len(distance), -1)
    patches = encoder_maps(setup, inputs, distance.shape[1:])
    patches = patches.reshape(*flat.shape, -1)
    worst = jax.lax.top_k(flat, min(WORST, flat.shape[1]))[1]
    return Look(distance, *(jnp.take_along_axis(patches, at[..., None], axis=1) for at in (places, worst)))


@partial(jax.jit, static_argnames=("setup", "grid"))
def own_step(
    heads: Heads, features: jax.Array, setup: Setup, frozen: Params | None, grid: tuple[int, int]
) -> jax.Array:
    """What K heads say of the same images, apart from any detector: scores float32 (b, K)."""
    maps = encoder_maps(setup, features if frozen is None else (features, frozen), grid)

    def of_one(head: Heads) -> jax.Array:
        own = above(maps @ head["weight"] + head["bias"], *head["own"])
        return SCORES[setup.score](own, anomaly_map(own, setup.image_size, setup.map_rule))

    return jax.lax.map(of_one, heads).T


def in_batches(features: Features, images: np.ndarray, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in `images`, int (BATCH,), and the features there; the last batch is filled by repetition."""
    starts = range(0, len(images), BATCH)
    batches = [np.resize(np.arange(start, min(start + BATCH, len(images))), BATCH) for start in starts]
    return progress(
        prefetch(lambda at: features.fetch(images[at]), batches), total=len(batches), desc=title, unit="batch"
    )


# ---- learning ----


def fit_head(positive: np.ndarray, negative: np.ndarray, drawn: np.ndarray) -> Heads:
    """One head, of patches (n, C) and (m, C); drawn: patches (…, C) of the training images, which say what is usual."""
    middle, width = drawn.mean(axis=0), drawn.std(axis=0)
    width = np.where(width > 0, width, 1.0)
    patches = (np.concatenate([positive, negative]) - middle) / width
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    fitted = LogisticRegression(**LOGISTIC).fit(patches, labels)
    weight = (fitted.coef_[0] / width).astype(np.float32)
    bias = np.float32(fitted.intercept_[0] - weight @ middle)
    return {"weight": weight, "bias": bias, "own": usual(drawn @ weight + bias)}


def lower_bound(auroc: float, defective: int, fine: int) -> float:
    """The lower end of the two-sided 95 % interval of an AUROC of so many images of each kind: Hanley and McNeil, "The
    meaning and use of the area under a receiver operating characteristic (ROC) curve" (Radiology 143, 1982)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (defective - 1) * (q1 - auroc**2) + (fine - 1) * (q2 - auroc**2)
    return float(auroc - norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(spread / (defective * fine)))


def folds_of(marks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """int (n,): the fold of each image; of each verdict as many as of the other, up to one. marks: DEFECT or FINE."""
    fold = np.empty(len(marks), int)
    for verdict in (DEFECT, FINE):
        own = np.flatnonzero(marks == verdict)
        fold[own] = generator.permutation(len(own)) % FOLDS
    return fold


def learn_head(
    setup: Setup, features: Features, params: Params, marks: np.ndarray, seed: int, title: str
) -> tuple[Heads | None, dict[str, Any]]:
    """The head of a final detector, and what speaks for it.

    Args:
        features: of all N training images.
        params: host tree of the final detector, K = 1, trained on the images that are not called defective.
        marks: int8 (N,), of `read_marks`.

    Returns:
        The head, K = 1; None if λ is 0.
        The review: "defect" and "fine", images; "auroc" and "lower" of the cross-validated heads; "lambda"; "why".
    """
    review = evidence(marks)
    defect, fine = review["defect"], review["fine"]
    if min(defect, fine) < MARKS:
        return None, review | {"why": f"no head: it needs {MARKS} images of each verdict"}
    generator, own = np.random.default_rng((seed, 3)), jax.tree.map(lambda leaf: leaf[0], params)

    # ---- one look at all images: the detector's distances, and patches ----
    learned, said = np.flatnonzero(marks != DEFECT), np.flatnonzero(marks >= FINE)
    everything = np.arange(len(marks))
    probe = partial(look_step, setup=setup, frozen=features.frozen)
    whole = jax.ShapeDtypeStruct((BATCH, *features.shape), features.fetch(everything[:1]).dtype)
    grid = jax.eval_shape(probe, own, whole, jax.ShapeDtypeStruct((BATCH, 1), np.int32)).distance.shape[1:]
    places = generator.integers(0, grid[0] * grid[1], (len(marks), max(1, DRAWN // len(learned))), np.int32)
    distance, drawn, worst = np.empty((len(marks), *grid), np.float32), {}, {}
    for at, batch in in_batches(features, everything, f"{title}, looked at"):
        look = jax.tree.map(np.asarray, probe(own, batch, places[at]))
        distance[at] = look.distance
        drawn |= dict(zip(at.tolist(), look.drawn))
        worst |= {int(image): patches for image, patches in zip(at, look.worst) if marks[image] >= FINE}
    background = np.stack([drawn[image] for image in learned])  # (n, r, C)

    def head_of(apart: np.ndarray) -> Heads:
        """Learned from all images but those `apart`."""
        of = {v: [worst[i] for i in said if marks[i] == v and i not in apart] for v in (DEFECT, FINE)}
        rest = background[~np.isin(learned, apart)].reshape(-1, background.shape[-1])
        return fit_head(np.concatenate(of[DEFECT]), np.concatenate([rest, *of[FINE]]), rest)

    # ---- heads on the images that they have not learned from ----
    fold = folds_of(marks[said], generator)
    heads = [head_of(said[fold == number]) for number in range(FOLDS)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *heads)
    scores = np.empty(len(said), np.float32)
    for at, batch in in_batches(features, said, f"{title}, tested"):
        of_all = np.asarray(own_step(stacked, batch, setup=setup, frozen=features.frozen, grid=grid))
        scores[at] = of_all[np.arange(len(at)), fold[at]]
    auroc = image_metrics((marks[said] == DEFECT).astype(int).tolist(), scores)["image_auroc"]
    lower = lower_bound(auroc, defect, fine)
    weight = float(np.clip(2 * (lower - 0.5), 0, LARGEST))
    review |= {"auroc": auroc, "lower": lower, "lambda": weight}
    told = f"heads tell the images apart that they have not learned from with an AUROC of {auroc:.3f}"
    why = f"{told}, at least {lower:.3f}"
    if not weight:
        return None, review | {"why": f"no head: {why}"}
    head = head_of(np.array([], int)) | {"lambda": np.float32(weight), "detector": usual(distance[learned])}
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], head), review | {"why": why}


def evidence(marks: np.ndarray) -> dict[str, Any]:
    """A review without a head. marks: int8 (N,)."""
    counts = {name: int((marks == verdict).sum()) for name, verdict in (("defect", DEFECT), ("fine", FINE))}
    return counts | {"auroc": None, "lower": None, "lambda": 0.0}


def repeated(head: Heads, submodels: int) -> Heads:
    """The head of a final detector, for each of K sub-models."""
    return jax.tree.map(lambda leaf: np.repeat(leaf, submodels, axis=0), head)


# ---- its file ----


def head_values(head: Heads) -> dict[str, Any]:
    """What head-<final>.json holds: each float32 exactly."""
    return {name: leaf[0].tolist() for name, leaf in head.items()}


def read_head(file: Path, advice: str) -> Heads:
    """The head in a file, K = 1. A damaged one raises a UserError that ends with `advice`."""
    values = read_json(file, advice)
    try:
        head = {name: np.array([values[name]], np.float32) for name in SHAPES}
    except (KeyError, TypeError, ValueError):
        head = {}
    finite = all(np.isfinite(leaf).all() for leaf in head.values())
    if {name: leaf.ndim - 1 for name, leaf in head.items()} != SHAPES or not finite:
        raise UserError(f"{file} is damaged; {advice}")
    return head
