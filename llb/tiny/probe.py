"""Compare features by a nearest-neighbour detector, which needs no training and has nothing to tune.

    python -m llb.tiny.probe                                               the demo set
    python -m llb.tiny.probe --data ROOT --category NAME --noise-ratio A   a set with labels

It compares `tiny` with three simpler kinds of features: `tiny` with random weights, the energies of its filter bank,
and raw pixels. `tiny` should be better than all of them. The method is PatchCore's (CVPR 2022), without its coreset:

1. Average the features of each patch over its 3 × 3 neighbourhood; whiten them by the covariance of training patches.
2. The distance of a patch is its distance to the nearest of up to 40,000 training patches.
3. The score of an image is the sum of a local part (mean of the highest 2 % of its distances) and a global part (mean
   of all), both in units of their spread over the training images.

If a set holds near-duplicates of its images, they decide a large part of the result. --neighbour 2 takes the second
nearest image in place of the nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import uniform_filter

from llb.config import LARGEST_SEED
from llb.console import progress, run_script, say
from llb.data import Dataset, choose_categories, load_category
from llb.detectors.common import map_matrix
from llb.detectors.dinomaly import MAP
from llb.device import start_jax
from llb.encoders import load_encoder
from llb.encoders.stem import ENERGIES, energies, pool
from llb.encoders.vit import ViT
from llb.features import normalise
from llb.files import UserError, check_writable
from llb.flags import flag, parse_flags, real, whole
from llb.images import find_white, load_image
from llb.layouts import read_root
from llb.masks import load_masks
from llb.metrics import image_metrics, pixel_metrics
from llb.run import demo_or_given_root
from llb.tables import UNDEFINED
from llb.tiny.objectives import GRID, PATCHES, SPEC
from llb.tiny.pretrain import WHITEN, Pretrain, draw_image, feature_whitening, zca

MEMORY = 40_000  # training patches that are kept to compare with
TOP_PATCHES = 0.02  # share of an image's patches that make the local part of its score
SHRINK = 1e-3  # of the largest variance, added to all, so that directions without information stay small
ENCODE_BATCH = 32
COLUMNS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "train_auroc": "ranking AUROC"}

Extract = Callable[[jax.Array], jax.Array]  # images float32 (B, S, S, 3), ImageNet-normalised → features (B, P, D)


@dataclass
class Probe:
    """Compare features by a nearest-neighbour detector."""

    data: str | None = flag(None, "a set with labels, as for stage 1", shown="the demo set")
    category: str | None = flag(None, "one category", shown="the only one")
    noise_ratio: float = flag(0.0, "share of defective images in train, as for stage 1", real(0, 1))
    weights: str | None = flag(None, "weights of tiny", shown="those of this repository")
    neighbour: int = flag(
        1, "J: compare a patch with its J-th nearest training image; J - 1 near-duplicates then do not count", whole(1)
    )
    out: str = flag("runs/probe", "folder that the demo set is drawn into")
    seed: int = flag(0, "determines the training patches that are kept, and the random weights", whole(0, LARGEST_SEED))


@dataclass(frozen=True)
class Images:
    """The images of a category, decoded once for all kinds of features."""

    dataset: Dataset
    train: np.ndarray  # uint8 (N, S, S, 3)
    test: np.ndarray  # uint8 (M, S, S, 3)
    masks: np.ndarray  # bool (M, S, S), see llb.masks.load_masks
    judged: np.ndarray  # bool (M,)


def main() -> None:
    settings = parse_flags(Probe)
    say(start_jax())
    check_writable(Path(settings.out))
    root = demo_or_given_root(Path(settings.out) / "cache", settings.data)
    category = one_category(root, settings.category)
    images = load_images(root, category, settings.noise_ratio, settings.seed)
    if settings.neighbour >= len(images.train):
        raise UserError(f"--neighbour {settings.neighbour}: each image has only {len(images.train) - 1} others")
    say(f"{'features':24} " + "  ".join(COLUMNS.values()))
    for name, extract in feature_kinds(settings.seed, settings.weights).items():
        train, test = (compute_features(extract, part, name) for part in (images.train, images.test))
        own, distances = nearest_neighbours(train, test, settings.seed, settings.neighbour)
        say(f"{name:24} " + metrics_line(detector_metrics(own, distances, images)))


def metrics_line(metrics: dict[str, float | None]) -> str:
    """The values under the titles of COLUMNS."""
    cells = []
    for key, title in COLUMNS.items():
        value = metrics[key]
        cells.append(UNDEFINED.center(len(title)) if value is None else f"{value:{len(title)}.3f}")
    return "  ".join(cells)


# ---- the images ----


def one_category(root: Path, wanted: str | None) -> str:
    """The category that `--category` names.

    Raises:
        UserError: it names none, or several.
    """
    names = choose_categories(root, wanted)
    if len(names) > 1:
        raise UserError(f"--category {wanted}: give one of {', '.join(names)}")
    return names[0]


def load_labelled(root: Path, category: str, noise_ratio: float, seed: int) -> Dataset:
    """A category with labelled test images.

    Raises:
        UserError: it has no such images.
    """
    dataset = None if read_root(root).layout == "folder" else load_category(root, category, noise_ratio, seed)
    if dataset is None or not dataset.test:
        raise UserError(
            f"--data {root}: {category} has no labelled test images, so nothing can be measured; give a set with labels"
        )
    return dataset


def load_images(root: Path, category: str, noise_ratio: float, seed: int) -> Images:
    dataset = find_white(load_labelled(root, category, noise_ratio, seed))
    train, test = (
        np.stack([load_image(root / record.path, SPEC.image_size, dataset.white) for record in records])
        for records in (dataset.train, dataset.test)
    )
    return Images(dataset, train, test, *load_masks(root, dataset.test, SPEC.image_size))


# ---- the features ----


def feature_kinds(seed: int, weights: str | None = None) -> dict[str, Extract]:
    """The features to compare, by name.

    Those of `tiny` and of its random twin are the ones that Dinomaly reconstructs: two groups of blocks, side by side.

    Args:
        seed: of the random weights.
        weights: file with the weights of tiny; None for those of this repository.
    """
    trained = load_encoder("tiny", weights)
    random = ViT(SPEC).init(jax.random.key(seed), jnp.zeros((1, PATCHES, ENERGIES)), GRID)["params"]
    random["stem"] |= {name: trained.params["stem"][name] for name in ("mean", "std")}
    # whitened over the same drawn images as tiny
    drawn = np.stack([draw_image(index, Pretrain.seed, Pretrain.mix) for index in range(WHITEN)])
    drawn_energies = compute_features(partial(energies, patch=SPEC.patch), drawn, "drawn images")
    random["whitening"] = feature_whitening(random, drawn_energies)

    def both_groups(params: dict, images: jax.Array) -> jax.Array:
        groups = trained.features(params, images)[:, :, 1 + SPEC.registers :]  # (B, 2, P, D)
        return jnp.concatenate([groups[:, 0], groups[:, 1]], axis=-1)

    return {
        "raw patches": lambda images: pool(images, SPEC.patch).reshape(len(images), PATCHES, -1),
        "filter-bank energies": partial(energies, patch=SPEC.patch),
        "tiny, random weights": partial(both_groups, random),
        "tiny": partial(both_groups, trained.params),
    }


def compute_features(extract: Extract, images: np.ndarray, title: str) -> np.ndarray:
    """Features of images in batches of one size. images: uint8 (N, S, S, 3) → float32 (N, P, D)."""
    compiled = jax.jit(lambda images: extract(normalise(images)))
    parts = []
    for start in progress(range(0, len(images), ENCODE_BATCH), desc=title, unit="batch"):
        part = images[start : start + ENCODE_BATCH]
        padded = np.resize(part, (ENCODE_BATCH, *images.shape[1:]))
        parts.append(np.asarray(compiled(padded))[: len(part)])
    return np.concatenate(parts)


# ---- the detector ----


def neighbourhoods(features: np.ndarray) -> np.ndarray:
    """Mean over 3 × 3 patches of a square grid, mirrored at the border: float (N, P, D) → float32 (N, P, D)."""
    images, patches, width = features.shape
    grid = round(patches**0.5)
    square = features.astype(np.float32).reshape(images, grid, grid, width)
    return uniform_filter(square, (0, 3, 3, 0), mode="reflect").reshape(images, patches, width)


@partial(jax.jit, static_argnames=("images", "neighbour"))
def _nearest(
    queries: jax.Array, memory: jax.Array, origin: jax.Array, left_out: int | None, images: int, neighbour: int
) -> jax.Array:
    """Distance of each patch of one image to the memory, or to that of the image's J-th nearest training image.

    Args:
        queries: (P, D), the patches of one image.
        memory: (n, D), the training patches that are kept.
        origin: int (n,), the training image of each of them.
        left_out: a training image whose patches do not count; None to count all.
        images: N, the number of training images.
        neighbour: J.

    Returns:
        float32 (P,).
    """
    square = (memory**2).sum(1)[:, None] - 2 * memory @ queries.T  # (n, P): twice as fast as (P, n) on a CPU
    if left_out is not None:
        square = jnp.where((origin == left_out)[:, None], jnp.inf, square)
    if neighbour > 1:
        by_image = jax.ops.segment_min(square, origin, images, indices_are_sorted=True)  # (N, P)
        square = jnp.sort(by_image, axis=0)[neighbour - 1 :]
    return jnp.sqrt(jnp.maximum(square.min(axis=0) + (queries**2).sum(1), 0))


def nearest_neighbours(
    train: np.ndarray, test: np.ndarray, seed: int = 0, neighbour: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of patches to the patches of training images.

    Args:
        train, test: features, float (N, P, D) and (M, P, D).
        seed: determines the training patches that are kept.
        neighbour: 1 takes the nearest patch of all; J sorts the training images by their nearest patch and takes the
            J-th of these distances.

    Returns:
        own, float32 (N, P): the training images' distances, each to the patches of the other training images.
        distances, float32 (M, P): the test images' distances.
    """
    train, test = neighbourhoods(train), neighbourhoods(test)
    images, patches, width = train.shape
    all_patches = train.reshape(-1, width)
    kept = np.sort(np.random.default_rng(seed).permutation(len(all_patches))[:MEMORY])
    mean, matrix = zca(all_patches[kept], SHRINK)
    memory, origin = jnp.asarray((all_patches[kept] - mean) @ matrix), jnp.asarray(kept // patches)

    def distances_of(image: np.ndarray, left_out: int | None) -> jax.Array:
        return _nearest((image - mean) @ matrix, memory, origin, left_out, images=images, neighbour=neighbour)

    own = np.stack([distances_of(image, index) for index, image in enumerate(train)])
    return own, np.stack([distances_of(image, None) for image in test])


def image_scores(distances: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Score of each image: a local part (mean of the highest 2 % of its distances) plus a global part (mean of all).

    Both parts are measured from the training images' median in units of their median absolute deviation. A small share
    of defects in train changes these little.

    Args:
        distances: float32 (M, P).
        own: float32 (N, P), the training images' own distances.

    Returns:
        float (M,).
    """
    total = 0.0
    for share in (TOP_PATCHES, 1.0):
        count = max(1, int(share * distances.shape[1]))
        means, own_means = (np.sort(part, axis=1)[:, -count:].mean(axis=1) for part in (distances, own))
        median = np.median(own_means)
        total = total + (means - median) / max(np.median(np.abs(own_means - median)), 1e-12)
    return total


def full_size(distances: np.ndarray, size: int) -> np.ndarray:
    """Maps of the full size, upsampled and blurred like Dinomaly's: float32 (M, P) → (M, size, size)."""
    grid = round(distances.shape[1] ** 0.5)
    matrix = map_matrix(size, grid, MAP)
    return np.einsum("sg,mgh,th->mst", matrix, distances.reshape(-1, grid, grid), matrix, optimize=True)


def detector_metrics(
    own: np.ndarray, distances: np.ndarray, images: Images, chosen: np.ndarray | None = None
) -> dict[str, float | None]:
    """How well the detector finds defects: the keys of COLUMNS; None where a metric is undefined.

    Args:
        own, distances: of `nearest_neighbours`.
        chosen: int (N,), the numbers of the training images, if only some of images.dataset.train were used.
    """
    records = images.dataset.train if chosen is None else [images.dataset.train[index] for index in chosen]
    labels, train_labels = ([record.label for record in part] for part in (images.dataset.test, records))
    metrics = image_metrics(labels, image_scores(distances, own))
    maps = full_size(distances[images.judged], SPEC.image_size)
    metrics |= pixel_metrics(images.masks[images.judged], maps)
    if any(train_labels):
        metrics["train_auroc"] = image_metrics(train_labels, image_scores(own, own))["image_auroc"]
    return {key: metrics.get(key) for key in COLUMNS}


if __name__ == "__main__":
    run_script(main, resumable=False)
