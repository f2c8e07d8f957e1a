"""A head: a linear classifier on the encoder's features that learns from the images a person called defective.

    patch     (C,)           of one position: the encoder's maps side by side, on the grid of the detector's distance
                             or on that of the finest map, whichever is coarser
    positive  (n, C)         of each image called defective, the worst positions for the detector: where the defect is
    negative  (m, C)         positions drawn from all images in training, and the worst ones of images called fine
    own       (B, h, w)      weight · patch + bias, of a class-balanced logistic regression on standardised features
    distance  (B, h, w)      above(detector's distance) + λ · above(own)

    above(x) = √max(0, (x − median) / MAD), both over the positions of the training images

A detector finds unusual patches. Not every unusual patch is a defect: the head learns the difference from the marks. It
works with every detector. Features come in batches, and only patches that are learned from stay in memory: some of each
image that was looked at, and of IMAGES others.

λ says how much the head counts, and it comes from evidence. It is 0 with fewer than MARKS images of either verdict,
since few marks show only the plainest defects. Else λ = (L − ½) / max(R − ½, LEAST), clipped to 0 … LARGEST. L is the
lower bound of the AUROC that heads reach on marked images which they have not learned from (FOLDS folds). R is the
AUROC of stage 1's ranking on the same images, which were picked by it. So the better the head and the worse the
ranking, the more the head counts. With λ = 0 the detector is as it was.

Source: none; the head is llb's own addition to the method.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from llb.checkpoint import Params
from llb.console import progress
from llb.detectors import DETECTORS
from llb.detectors.common import SCORES, Setup, anomaly_map, maps_of
from llb.features import Features, normalise, prefetch
from llb.files import UserError, read_json
from llb.marks import DEFECT, FINE, MARKS
from llb.metrics import image_metrics

# worst positions of an image that was called defective, and of one called fine: so many, at most this share of all
OF_DEFECT, OF_FINE = (24, 0.125), (60, 0.3)
DRAWN, LEARNED = 20, 2  # positions of an image in training that say what is usual; those of them that are learned from
IMAGES = 1000  # training images besides those that were looked at
FOLDS, CONFIDENCE = 5, 0.95  # of the cross-validation; of L
LEAST, LARGEST = 0.02, 1.5  # R − ½ in the quotient; λ
BATCH = 16  # images
LOGISTIC = {"C": 1.0, "class_weight": "balanced", "max_iter": 1000}
Heads = dict[str, np.ndarray]  # leading axis K: weight (K, C), bias (K,); of a final detector also lambda (K,) and
# detector, own (K, 2): median and MAD of its distance over the training positions, and of the head's
SHAPES = {"weight": 1, "bias": 0, "own": 1, "lambda": 0, "detector": 1}  # axes of the leaves of one head


def head_file(final: str) -> str:
    return f"head-{final}.json"


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
    own = own_of(head, encoder_maps(setup, features), distance.shape[1:])
    return above(distance, *head["detector"]) + head["lambda"] * above(own, *head["own"])


def encoder_maps(setup: Setup, features: Any) -> tuple[jax.Array, ...]:
    if isinstance(features, tuple):  # images, of a detector that encodes itself
        images, frozen = features
        return setup.encode(frozen, normalise(images))
    return maps_of(setup, features)


def on_grid(maps: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(B, h, w, C) → (B, *grid, C): averaged if the grid is coarser, interpolated if it is finer."""
    return jax.image.resize(maps, (len(maps), *grid, maps.shape[-1]), "linear")


def own_of(head: Heads, maps: tuple[jax.Array, ...], grid: tuple[int, int]) -> jax.Array:
    """What a head says of every position, float32 (B, h, w): weight · patch + bias. Each map is multiplied on its own
    grid, which is the same, since resizing is linear, and needs less memory."""
    weights = jnp.split(head["weight"], np.cumsum([one.shape[-1] for one in maps])[:-1])
    return sum(on_grid(one @ weight[:, None], grid) for one, weight in zip(maps, weights))[..., 0] + head["bias"]


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
    """What is taken of n images."""

    drawn: np.ndarray  # float32 (n, DRAWN, C), patches of random positions
    distance: np.ndarray  # float32 (n, DRAWN), the detector's, there
    defect: np.ndarray  # float32 (n, w, C): patches where the distance is largest, as many as of OF_DEFECT
    fine: np.ndarray  # float32 (n, w', C): and as of OF_FINE


@partial(jax.jit, static_argnames="setup")
def look_step(params: Params, inputs: Any, random: jax.Array, setup: Setup) -> Look:
    """params: of one sub-model; inputs: of `distance_of`; random: float32 (b, DRAWN), within 0 … 1."""
    distance, maps = distance_of(setup, params, inputs), encoder_maps(setup, inputs)
    grid = tuple(map(min, distance.shape[1:], maps[0].shape[1:3]))
    flat = on_grid(distance[..., None], grid).reshape(len(distance), -1)
    patches = jnp.concatenate([on_grid(one, grid) for one in maps], axis=-1).reshape(*flat.shape, -1)
    places = (random * flat.shape[1]).astype(np.int32)
    counts = [min(most, max(1, round(share * flat.shape[1]))) for most, share in (OF_DEFECT, OF_FINE)]
    worst = jax.lax.top_k(flat, max(counts))[1]
    taken = (jnp.take_along_axis(patches, at[..., None], axis=1) for at in (places, *(worst[:, :n] for n in counts)))
    drawn, defect, fine = taken
    return Look(drawn, jnp.take_along_axis(flat, places, axis=1), defect, fine)


@partial(jax.jit, static_argnames="setup")
def own_step(heads: Heads, params: Params, inputs: Any, setup: Setup) -> jax.Array:
    """What F heads say of the same images, apart from the detector: scores float32 (b, F)."""
    grid = jax.eval_shape(partial(distance_of, setup), params, inputs).shape[1:]
    maps = encoder_maps(setup, inputs)

    def of_one(head: Heads) -> jax.Array:
        own = above(own_of(head, maps, grid), *head["own"])
        return SCORES[setup.score](own, anomaly_map(own, setup.image_size, setup.map_rule))

    return jax.lax.map(of_one, heads).T


def by_batches(step: Callable, features: Features, images: np.ndarray, title: str) -> Any:
    """A tree of arrays (n, …): what `step(inputs, places in images)` makes of all images, batch by batch."""
    starts, parts = range(0, len(images), BATCH), []
    batches = [np.resize(np.arange(start, min(start + BATCH, len(images))), BATCH) for start in starts]  # by repetition
    fetched = prefetch(lambda at: features.fetch(images[at]), batches)
    for at, batch in progress(fetched, total=len(batches), desc=title, unit="batch"):
        inputs = batch if features.frozen is None else (batch, features.frozen)
        parts.append(jax.tree.map(np.asarray, step(inputs, at)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(images)], *parts)


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


def rows(patches: np.ndarray) -> np.ndarray:
    """(n, w, C) → (n · w, C)."""
    return patches.reshape(-1, patches.shape[-1])


def lower_bound(auroc: float, defective: int, fine: int) -> float:
    """The lower end of the one-sided 95 % interval of an AUROC of so many images of each kind: Hanley and McNeil, "The
    meaning and use of the area under a receiver operating characteristic (ROC) curve" (Radiology 143, 1982)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (defective - 1) * (q1 - auroc**2) + (fine - 1) * (q2 - auroc**2)
    return float(auroc - norm.ppf(CONFIDENCE) * np.sqrt(spread / (defective * fine)))


def learn_head(
    setup: Setup, features: Features, params: Params, marks: np.ndarray, ranking: np.ndarray, seed: int
) -> tuple[Heads | None, dict[str, Any]]:
    """The head of a final detector, and what speaks for it.

    Args:
        features: of all N training images.
        params: host tree of the final detector, K = 1, trained on the images that are not called defective.
        marks: int8 (N,), of `read_marks`.
        ranking: float (N,), stage 1's scores.

    Returns:
        The head, K = 1; None if λ is 0.
        The review: "defect" and "fine", images; "auroc" and "lower" (L) of the cross-validated heads; "ranking" (R);
        "lambda"; "why".
    """
    review = evidence(marks)
    defect, fine = review["defect"], review["fine"]
    if min(defect, fine) < MARKS:
        return None, review | {"why": f"no head: it needs {MARKS} images of each verdict"}
    generator = np.random.default_rng((seed, 3))
    own = jax.device_put(jax.tree.map(lambda leaf: leaf[0], params))  # once, not for each batch

    # ---- one look: the detector's distances, and patches ----
    said, others = np.flatnonzero(marks >= FINE), np.flatnonzero(marks < FINE)
    others = np.sort(generator.choice(others, min(len(others), IMAGES), replace=False))
    verdicts = marks[np.concatenate([said, others])]
    random = generator.random((len(verdicts), DRAWN), np.float32)

    def look_at_said(inputs: Any, at: np.ndarray) -> Look:
        return look_step(own, inputs, random[at], setup=setup)

    def look_at_others(inputs: Any, at: np.ndarray) -> Look:
        return look_step(own, inputs, random[len(said) + at], setup=setup)._replace(defect=None, fine=None)

    look: Look = by_batches(look_at_said, features, said, "head, looked at")
    looks = [look]
    if len(others):
        looks.append(by_batches(look_at_others, features, others, "head, others"))
    drawn, distance = (np.concatenate([getattr(each, name) for each in looks]) for name in ("drawn", "distance"))

    def head_of(apart: np.ndarray) -> Heads:
        """Learned from all images but those at the places `apart` of `said`."""
        here = ~np.isin(np.arange(len(verdicts)), apart)
        told = here[: len(said)]
        positive, worst = look.defect[told & (marks[said] == DEFECT)], look.fine[told & (marks[said] == FINE)]
        patches = drawn[here & (verdicts != DEFECT)]
        return fit_head(rows(positive), np.concatenate([rows(patches[:, :LEARNED]), rows(worst)]), rows(patches))

    # ---- heads on the images that they have not learned from ----
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32).split(said, marks[said])
    parts = [part for _, part in folds]
    heads = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *map(head_of, parts)))

    def heads_on(inputs: Any, at: np.ndarray) -> jax.Array:
        return own_step(heads, own, inputs, setup=setup)

    of_all, scores = by_batches(heads_on, features, said, "head, tested"), np.empty(len(said), np.float32)
    for number, part in enumerate(parts):
        scores[part] = of_all[part, number]
    labels = (marks[said] == DEFECT).astype(int).tolist()
    auroc, by_rank = (image_metrics(labels, each)["image_auroc"] for each in (scores, ranking[said]))
    lower = lower_bound(auroc, defect, fine)
    weight = float(np.clip((lower - 0.5) / max(by_rank - 0.5, LEAST), 0, LARGEST))
    review |= {"auroc": auroc, "lower": lower, "ranking": by_rank, "lambda": weight}
    told = f"heads tell the images apart that they have not learned from with an AUROC of {auroc:.3f}"
    why = f"{told}, at least {lower:.3f}; stage 1's ranking with {by_rank:.3f}"
    if not weight:
        return None, review | {"why": f"no head: {why}"}
    usual_distance = usual(distance[verdicts != DEFECT])
    head = head_of(np.array([], int)) | {"lambda": np.float32(weight), "detector": usual_distance}
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], head), review | {"why": why}


def evidence(marks: np.ndarray) -> dict[str, Any]:
    """A review without a head. marks: int8 (N,)."""
    counts = {name: int((marks == verdict).sum()) for name, verdict in (("defect", DEFECT), ("fine", FINE))}
    return counts | {"auroc": None, "lower": None, "ranking": None, "lambda": 0.0}


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
