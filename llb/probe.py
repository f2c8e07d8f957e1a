"""How good are features? A nearest-neighbour detector without anything to train or to tune.

    python -m llb.probe                                               the embedded set
    python -m llb.probe --data ROOT --category NAME --noise-ratio A   a set with labels

The features of each patch are averaged over its 3 × 3 neighbourhood and whitened by the training images' covariance;
its distance to the nearest of up to 40,000 training patches is its anomaly (PatchCore, CVPR 2022, without its coreset).
An image is odd in a place or as a whole, so its score is the sum of both, each by what is usual in the training images.
Where a set holds near-duplicates, they decide much of that: --neighbour 2 judges by the second nearest image.
Compares `tiny` with what it must beat: itself with random weights, its own filter bank, and raw pixels. The three
scripts do not need it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import uniform_filter

from llb.config import LARGEST_SEED, flag, parse, real, whole
from llb.console import choose_device, progress, run, say
from llb.data import Dataset, choose_categories, load_category, load_image, load_masks, recognise
from llb.dinomaly import map_matrix
from llb.encoder import SPECS, ViT, load_encoder
from llb.files import UserError, writable
from llb.metrics import image_metrics, pixel_metrics
from llb.pretrain import WHITEN, Pretrain, draw_image, feature_whitening, zca
from llb.run import data_root
from llb.stem import energies, normalise, pool

MEMORY = 40_000  # patches
TOP_PATCHES = 0.02  # share of an image's patches that tell how odd it is in a place
SHRINK = 1e-3  # of the largest variance, added to all: directions without information stay without
SPEC = SPECS["tiny"]
ENCODE_BATCH = 32
MEASURED = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "train_auroc": "AUROC of the ranking in train"}

Describe = Callable[[jax.Array], jax.Array]  # float32 (B, S, S, 3), ImageNet-normalised → (B, P, D)


@dataclass
class Probe:
    """Compare features by a nearest-neighbour detector."""

    data: str | None = flag(None, "a set with labels, as for stage 1", shown="the embedded set")
    category: str | None = flag(None, "one category", shown="the only one there is")
    noise_ratio: float = flag(0.0, "share of defective images in train, as for stage 1", real(0, 1))
    weights: str | None = flag(None, "weights of tiny to look at", shown="those of this repository")
    neighbour: int = flag(
        1, "judge a patch by its J-th nearest training image: from 2 on, near-duplicates of it help no more", whole(1)
    )
    out: str = flag("runs/probe", "where the embedded set is drawn")
    seed: int = flag(0, "which patches are remembered, and the random weights", whole(0, LARGEST_SEED))


def main() -> None:
    settings = parse(Probe)
    say(choose_device())
    writable(Path(settings.out))
    root = data_root(Path(settings.out), settings.data)
    category = one_category(root, settings.category)
    images = load_images(root, category, settings.noise_ratio, settings.seed)
    if settings.neighbour >= len(images.train):
        raise UserError(f"--neighbour {settings.neighbour}: each image has only {len(images.train) - 1} others")
    say(f"{'features':24} " + "  ".join(MEASURED.values()))
    for name, describe in features(settings.seed, settings.weights).items():
        known, seen = (apply(describe, part, name) for part in (images.train, images.test))
        row = probe(known, seen, images, settings.seed, neighbour=settings.neighbour)
        say(f"{name:24} " + "  ".join("–".center(11) if row[m] is None else f"{row[m]:11.3f}" for m in MEASURED))


@dataclass(frozen=True)
class Images:
    """A category as stage 1 would read it, decoded once for all kinds of features."""

    dataset: Dataset
    train: np.ndarray  # uint8 (N, S, S, 3)
    test: np.ndarray  # uint8 (M, S, S, 3)
    masks: np.ndarray | None  # bool (M, S, S); None: unknown


def one_category(root: Path, wanted: str | None) -> str:
    """The category that `--category` names.

    Raises:
        UserError: it is none, or several.
    """
    names = choose_categories(root, wanted)
    if len(names) > 1:
        raise UserError(f"--category: one of {', '.join(names)}")
    return names[0]


def load_labelled(root: Path, category: str, noise_ratio: float, seed: int) -> Dataset:
    """A category that figures can be made of.

    Raises:
        UserError: it has no test images with labels.
    """
    dataset = None if recognise(root) == "folder" else load_category(root, category, noise_ratio, seed)
    if dataset is None or not dataset.test:
        raise UserError(f"--data {root}: {category} has no labelled test images, so nothing can be measured on it")
    return dataset


def load_images(root: Path, category: str, noise_ratio: float, seed: int) -> Images:
    dataset = load_labelled(root, category, noise_ratio, seed)
    train, test = (
        np.stack([load_image(root / record.path, SPEC.image_size) for record in records])
        for records in (dataset.train, dataset.test)
    )
    return Images(dataset, train, test, load_masks(root, dataset.test, SPEC.image_size))


def probe(
    known: np.ndarray, seen: np.ndarray, images: Images, seed: int, chosen: np.ndarray | None = None, neighbour: int = 1
) -> dict[str, float | None]:
    """The keys of MEASURED for one kind of features; None: undefined.

    Args:
        known, seen: float (N, P, D) and (M, P, D), the features of images.train and images.test.
        chosen: int (n,), the training images to go by; None: all.
        neighbour: as for `nearest_neighbours`.
    """
    records = images.dataset.train
    if chosen is not None:
        known, records = known[chosen], [records[index] for index in chosen]
    own, distances = nearest_neighbours(known, seen, seed, neighbour)
    maps = full_size(distances, SPEC.image_size)
    labels, train_labels = ([record.label for record in part] for part in (images.dataset.test, records))
    found = image_metrics(labels, image_scores(distances, own)) | pixel_metrics(images.masks, maps)
    if any(train_labels):
        found["train_auroc"] = image_metrics(train_labels, image_scores(own, own))["image_auroc"]
    return {name: found.get(name) for name in MEASURED}


def features(seed: int, weights: str | None = None) -> dict[str, Describe]:
    """What is compared. `tiny`'s and its random twin's are what Dinomaly reconstructs, both groups side by side."""
    trained = load_encoder("tiny", weights)
    shape = jnp.zeros((1, SPEC.image_size, SPEC.image_size, 3))
    random = ViT(SPEC).init(jax.random.key(seed), shape)["params"]
    random["stem"] |= {name: trained.params["stem"][name] for name in ("mean", "std")}
    drawn = np.stack([draw_image(index, Pretrain.seed, Pretrain.mix) for index in range(WHITEN)])  # as tiny's own
    known = apply(partial(energies, patch=SPEC.patch), drawn, "drawn images")
    random["whitening"] = feature_whitening(random, known)

    def groups(params: dict, images: jax.Array) -> jax.Array:
        found = trained.features(params, images)[:, :, 1 + SPEC.registers :]  # (B, 2, P, D)
        return jnp.concatenate([found[:, 0], found[:, 1]], axis=-1)

    return {
        "raw patches": lambda images: pool(images, SPEC.patch).reshape(len(images), SPEC.native_grid**2, -1),
        "filter-bank energies": partial(energies, patch=SPEC.patch),
        "tiny, random weights": partial(groups, random),
        "tiny": partial(groups, trained.params),
    }


def apply(describe: Describe, images: np.ndarray, title: str) -> np.ndarray:
    """uint8 (N, S, S, 3) → float32 (N, P, D)."""
    compiled = jax.jit(lambda images: describe(normalise(images)))
    parts = []
    for start in progress(range(0, len(images), ENCODE_BATCH), desc=title, unit="batch"):
        part = images[start : start + ENCODE_BATCH]
        parts.append(np.asarray(compiled(np.resize(part, (ENCODE_BATCH, *images.shape[1:]))))[: len(part)])
    return np.concatenate(parts)


def neighbourhoods(features: np.ndarray) -> np.ndarray:
    """float (N, P, D), patches of a square grid → float32 (N, P, D): the mean over 3 × 3 patches, mirrored borders."""
    images, patches, width = features.shape
    grid = round(patches**0.5)
    square = features.astype(np.float32).reshape(images, grid, grid, width)
    return uniform_filter(square, (0, 3, 3, 0), mode="reflect").reshape(images, patches, width)


@partial(jax.jit, static_argnames=("leave_out", "images", "neighbour"))
def _nearest(
    queries: jax.Array,
    memory: jax.Array,
    own: jax.Array,
    origin: jax.Array,
    *,
    leave_out: bool,
    images: int,
    neighbour: int,
) -> jax.Array:
    """(P, D), (n, D) → (P,): distance to the nearest; `leave_out` ignores memory patches whose origin is `own`."""
    square = (memory**2).sum(1)[:, None] - 2 * memory @ queries.T  # (n, P): twice as fast as (P, n) on a CPU
    if leave_out:
        square = jnp.where((origin == own)[:, None], jnp.inf, square)
    if neighbour > 1:
        of_images = jax.ops.segment_min(square, origin, images, indices_are_sorted=True)  # (N, P)
        square = jnp.sort(of_images, axis=0)[neighbour - 1 :]
    return jnp.sqrt(jnp.maximum(square.min(axis=0) + (queries**2).sum(1), 0))


def nearest_neighbours(
    train: np.ndarray, test: np.ndarray, seed: int = 0, neighbour: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of patches to those of a training set.

    Args:
        train, test: float (N, P, D) and (M, P, D).
        seed: which patches are remembered.
        neighbour: 1 for the distance to the nearest patch; J for that to the nearest patch of the image that is the
            J-th nearest in this sense.

    Returns:
        own, float32 (N, P): of the training images themselves, each to the patches of the others.
        distances, float32 (M, P): of the test images.
    """
    train = neighbourhoods(train)
    images, patches, width = train.shape
    rows = train.reshape(-1, width)
    picked = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MEMORY])
    mean, matrix = zca(rows[picked], SHRINK)
    memory, origin = jnp.asarray((rows[picked] - mean) @ matrix), jnp.asarray(picked // patches)

    def of(queries: np.ndarray, leave_out: bool) -> np.ndarray:
        nearest = partial(_nearest, leave_out=leave_out, images=images, neighbour=neighbour)
        return np.stack([nearest((query - mean) @ matrix, memory, i, origin) for i, query in enumerate(queries)])

    return of(train, True), of(neighbourhoods(test), False)


def image_scores(distances: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """float32 (M, P), and the training images' own (N, P) → (M,): how odd in a place, plus how odd as a whole.

    In a place: the mean of the highest 2 % of the patches; as a whole: the mean of all. Both are measured from the
    training images' median in units of their median absolute deviation, which a share of defects among them moves
    little.
    """
    total = 0.0
    for share in (TOP_PATCHES, 1.0):
        count = max(1, int(share * distances.shape[1]))
        of_images, of_usual = (np.sort(part, axis=1)[:, -count:].mean(axis=1) for part in (distances, usual))
        centre = np.median(of_usual)
        total = total + (of_images - centre) / max(np.median(np.abs(of_usual - centre)), 1e-12)
    return total


def full_size(distances: np.ndarray, size: int) -> np.ndarray:
    """float32 (M, P) → (M, size, size): upsampled and blurred as the detector's own maps are."""
    grid = round(distances.shape[1] ** 0.5)
    matrix = map_matrix(size, grid)
    return np.einsum("sg,mgh,th->mst", matrix, distances.reshape(-1, grid, grid), matrix, optimize=True)


if __name__ == "__main__":
    run(main, goes_on=False)
