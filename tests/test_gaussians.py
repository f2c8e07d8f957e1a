"""PaDiM, its robust form and the PCA residual: PyTorch's arithmetic (gaussians_reference.py), sums over images, what
they can find."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb.detectors import DETECTORS, padim, remembers, student, subspace
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

with np.load(Path(__file__).parent / "reference" / "gaussians.npz") as file:
    STORED = dict(file)
FEATURES, NEW = STORED["features"][:30], STORED["features"][30:]
RESNET = replace(SPECS["resnet18"], layers=tuple((2, width, 3, 1 + (width > 3)) for width in (3, 4, 5, 6)))
LITE = replace(SPECS["efficientnet_lite0"], layers=tuple((1, width, 3, 2) for width in (3, 4, 5)), stem=2)
TINY = replace(SPECS["tiny"], width=8)
BOTH = pytest.mark.parametrize("module", (padim, subspace))


def setup_of(module, spec=RESNET, **settings):
    if module is not subspace:
        settings = {"dimensions": 8} | settings
    return Setup(spec, (4, 8, 16), 32, module.Settings(**settings))


@partial(jax.jit, static_argnames=("module", "setup", "size"))
def sums(module, setup, features, weight, size=16):
    """As llb.fit does it: in batches, the last one filled up with garbage of weight 0."""
    fill = -len(features) % size
    weight, state = jnp.pad(weight, (0, fill)), module.start(setup, jax.random.key(0), len(features) + fill)
    features = jnp.pad(features, ((0, fill), *((0, 0),) * (features.ndim - 1)), constant_values=50)
    with jax.default_matmul_precision("highest"):
        for place in range(0, len(features), size):
            batch = slice(place, place + size)
            state = module.add(setup, state, features[batch], weight[batch], jnp.int32(place))
    return state


@partial(jax.jit, static_argnames=("module", "setup"))
def distance(module, setup, state, features):
    with jax.default_matmul_precision("highest"):
        return module.distance(setup, module.finish(setup, state, jax.random.key(1)), jnp.asarray(features))


def fitted(module, setup, features=FEATURES, new=NEW, **how):
    """The distances of new images after a fit to `features`."""
    return np.asarray(distance(module, setup, sums(module, setup, features, np.ones(len(features)), **how), new))


def assert_close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- against the reference ----


def test_padim_is_the_published_arithmetic_with_the_release_s_channels():
    assert_close(fitted(padim, setup_of(padim)), STORED["published"])


def test_another_channel_seed_draws_other_channels_as_the_release_would():
    for seed in (1, 1024):
        drawn = padim.channels(setup_of(padim, channel_seed=seed)).tolist()
        assert drawn == sorted(random.Random(seed).sample(range(3 + 4 + 5), 8))


def test_padim_on_one_coarse_grid_takes_means_of_neighbours():
    assert_close(fitted(padim, setup_of(padim, pooling="mean")), STORED["pooled"])


def test_an_encoder_that_is_no_resnet_gets_means_without_being_told():
    assert_close(fitted(padim, setup_of(padim, LITE)), STORED["pooled"])


def test_the_subspace_leaves_the_residual_of_pytorch_s_svd():
    setup = setup_of(subspace)
    assert_close(fitted(subspace, setup), STORED["residual"])
    params = subspace.finish(setup, sums(subspace, setup, FEATURES, np.ones(30)), None)
    assert np.any(params["residual"], axis=0).sum() == 9 - STORED["components"]


# ---- sums over images ----


@BOTH
def test_the_size_of_batches_does_not_matter(module):
    assert_close(fitted(module, setup_of(module), size=7), fitted(module, setup_of(module), size=30))


@BOTH
def test_weights_equal_a_subset(module):
    setup, weight = setup_of(module), np.float32(np.arange(30) % 3 > 0)
    state = sums(module, setup, FEATURES, weight)
    assert_close(distance(module, setup, state, NEW), fitted(module, setup, FEATURES[weight > 0]))


@BOTH
def test_leaving_out_by_subtraction_equals_a_fit_to_the_others(module):
    setup = setup_of(module)
    every, left_out = (sums(module, setup, part, np.ones(len(part))) for part in (FEATURES, FEATURES[20:]))
    others = jax.tree.map(jnp.subtract, every, left_out)
    assert_close(distance(module, setup, others, NEW), fitted(module, setup, FEATURES[:20]))


# ---- the robust form ----


def expectation_maximisation(x, rounds, freedom=4.0):
    """Weighted means and covariances of one position in float64, as Liu and Rubin have them: distances (N,)."""
    weight = np.ones(len(x))
    for _ in range(rounds + 1):
        mean = np.average(x, axis=0, weights=weight)
        covariance = (weight * (x - mean).T) @ (x - mean) / (weight.sum() - 1) + 0.01 * np.eye(x.shape[1])
        squared = np.einsum("ni,ij,nj->n", x - mean, np.linalg.inv(covariance), x - mean)
        weight = (freedom + x.shape[1]) / (freedom + squared)
    return np.sqrt(squared)


@pytest.mark.parametrize("rounds", (1, 6))
def test_student_is_the_t_distribution_s_expectation_and_maximisation(rounds):
    setup = setup_of(student, rounds=rounds, recurrence=1e9)
    found = fitted(student, setup, new=FEATURES, size=7)
    x = np.float16(padim.embed(setup, jnp.asarray(FEATURES))).astype(np.float64)
    expected = [[expectation_maximisation(x[:, row, column], rounds) for column in range(8)] for row in range(8)]
    assert_close(found, np.transpose(expected, (2, 0, 1)), 1e-3)


def test_student_without_rounds_is_padim():
    assert_close(fitted(student, setup_of(student, rounds=0, recurrence=1e9)), fitted(padim, setup_of(padim)), 1e-3)


def test_an_image_of_weight_0_changes_nothing_in_the_robust_fit():
    setup, weight = setup_of(student), np.float32(np.arange(30) % 3 > 0)
    state = sums(student, setup, FEATURES, weight)
    assert_close(distance(student, setup, state, NEW), fitted(student, setup, FEATURES[weight > 0], size=5))


def recurring(images=5):
    """Features of 60 images of a ViT, of which some have the same defect at the first position of 4 × 4."""
    known = np.random.default_rng(0).normal(size=(60, 2, 21, 8)).astype(np.float16)
    known[:images, :, 5] += 20
    return known


def test_defects_that_recur_hide_themselves_from_padim_more_than_from_student():
    known, told_apart = recurring(), []
    for module, settings in ((padim, {}), (student, {"recurrence": 1e9})):
        found = fitted(module, setup_of(module, TINY, **settings), known, known)[:, 0, 0]
        told_apart.append(found[:5].mean() / found[5:].mean())
    assert told_apart[1] > 1.5 * told_apart[0]


def test_trimmed_it_is_padim_without_the_outliers_where_they_recur():
    known = recurring()
    trimmed = fitted(student, setup_of(student, TINY, weights="trim"), known, known)
    first, elsewhere = np.s_[:, 0, 0], np.s_[:, 2:, 2:]
    for part, images in ((first, known[5:]), (elsewhere, known)):
        assert_close(trimmed[part], fitted(padim, setup_of(padim, TINY), images, known)[part], 1e-3)


def test_who_scores_its_own_images_too_low_says_so():
    said = {name: remembers(name, module.Settings()) for name, module in DETECTORS.items()}
    fair = {"dinomaly", "rd", "uniad", "destseg", "student", "mutual"}
    assert {name for name, own in said.items() if not own} == fair
    assert remembers("student", student.Settings(weights="trim")), "it is PaDiM where no outliers recur"


def test_outliers_recur_where_they_are_more_frequent_than_elsewhere():
    share = np.full((6, 6), 0.01, np.float32)
    share[:2, :2] = 0.1
    found = np.asarray(student.recurs(jnp.asarray(share.ravel()), (6, 6), 2.5)).reshape(6, 6)
    assert found[:2, :2].all() and not found[3:].any() and not found[:, 3:].any()
    assert not student.recurs(jnp.full(36, 0.05), (6, 6), 2.5).any()  # everywhere: normal images differ so much


# ---- what follows from the definition ----


def test_in_the_sample_without_ridge_the_mean_squared_distance_is_d_times_n_minus_1_over_n():
    squares = fitted(padim, setup_of(padim, ridge=0.0), new=FEATURES) ** 2
    np.testing.assert_allclose(squares.mean(axis=0), 8 * 29 / 30, rtol=1e-4)
    assert squares.max() <= 29**2 / 30


@BOTH
def test_a_damaged_position_of_a_vit_stands_out_with_its_neighbours(module):
    random = np.random.default_rng(0)
    known = random.normal(size=(60, 2, 21, 1)) * random.normal(size=8) + 0.1 * random.normal(size=(60, 2, 21, 8))
    damaged = known[40:].copy()
    damaged[:, :, 5] += 50  # the class token and 4 registers come first: the damage is at the first position of 4 × 4
    found = fitted(module, setup_of(module, TINY), known[:40].astype(np.float16), damaged.astype(np.float16))
    near = np.s_[:, :2, :2]
    assert found.shape == (20, 4, 4) and found[near].min() > 2 * np.delete(found.reshape(20, 16), [0, 1, 4, 5], 1).max()


def test_means_that_are_large_against_the_deviations_cost_little_precision():
    shift = np.where(np.arange(FEATURES.shape[1]) % 2, 64, -32).astype(np.float16)
    new, known = (np.float16(part + shift) for part in (NEW, FEATURES))
    exact = [np.float64(part) - np.float64(shift) for part in (known, new)]  # the same numbers without the shift
    setup = setup_of(padim)
    assert_close(fitted(padim, setup, known, new), fitted(padim, setup, *exact), 1e-3)


def test_inverses_of_triangular_matrices_are_exact_to_the_last_digits():
    random = np.random.default_rng(0)
    for size in (1, 5, 70):
        lower = np.tril(random.normal(size=(size, size)) / np.sqrt(size)).astype(np.float32)
        np.fill_diagonal(lower, 1 + random.random(size))
        inverse = jax.jit(padim.inverse_of_lower)(lower)
        assert_close(inverse, np.linalg.inv(np.float64(lower)), 1e-5)


def test_the_memory_is_said_before_it_is_spent():
    line = padim.describe(Setup(SPECS["wide_resnet50_2"], padim.STRIDES, 224, padim.Settings()), 1000)
    assert line.startswith("3136 Gaussians of 550 dimensions, 3.53 GiB a sub-model")
    line = student.describe(Setup(SPECS["wide_resnet50_2"], student.STRIDES, 224, student.Settings()), 1000)
    assert line.startswith(
        "3136 Gaussians of 550 dimensions, 3.53 GiB a sub-model, and 3.21 GiB for the features of 1,000"
    )
