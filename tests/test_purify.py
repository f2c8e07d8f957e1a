"""Aggregation and selection; and every score stays with the image it belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb.purify import AGGREGATES, combine, partition, seen_by, standardised

SCORES = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [9.0, 1.0, 2.0], [0.5, 0.0, 1.0]], np.float32)
SUBSET = np.array([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [3.0, 4.0, 4.0, 0.5]),
        ("median", [2.0, 4.0, 2.0, 0.5]),
        ("max", [6.0, 4.0, 9.0, 1.0]),
        ("out-of-fold", [4.0, 4.0, 5.0, 0.75]),
        ("max-var", [6 * 14 / 3, 0.0, 9 * 38 / 3, 1 / 6]),
    ],
)
def test_aggregates_by_hand(how, expected):
    seen = jnp.asarray(seen_by(SUBSET, 3, others=False))
    np.testing.assert_allclose(AGGREGATES[how](jnp.asarray(SCORES), seen), expected, rtol=1e-6)


def test_of_negative_scores_too_the_higher_and_the_more_scattered_are_suspects():
    scores = jnp.array([[-1.0, -1.0, -4.0], [-3.0, -3.1, -3.0], [-1.0, -1.1, -1.0]])
    suspicion = AGGREGATES["max-var"](scores, jnp.zeros((3, 3), bool))
    assert np.argsort(-suspicion).tolist() == [0, 2, 1]


def test_out_of_fold_takes_the_one_sub_model_that_has_learned_from_the_other_subsets():
    seen = seen_by(SUBSET, 3, others=True)
    assert (seen.sum(axis=1) == 2).all()
    scores = AGGREGATES["out-of-fold"](jnp.asarray(SCORES), jnp.asarray(seen))
    assert scores.tolist() == [SCORES[i, k] for i, k in enumerate(SUBSET)]


def test_standardised_scores_do_not_depend_on_a_sub_models_scale_but_for_one_common_scale():
    random = np.random.default_rng(0)
    subset = np.arange(60) % 3
    seen = jnp.asarray(seen_by(subset, 3, others=False))
    scores = random.lognormal(size=(60, 3)).astype(np.float32)
    scaled = scores * np.array([1.0, 30.0, 0.2], np.float32) + np.array([0.0, 5.0, -9.0], np.float32)
    one, other = (np.asarray(standardised(jnp.asarray(s), seen)) for s in (scores, scaled))
    slope, shift = np.polyfit(one.ravel(), other.ravel(), 1)
    np.testing.assert_allclose(other, slope * one + shift, rtol=1e-4, atol=1e-4)
    for k in range(3):  # the images that a sub-model has not seen decide
        unseen = one[subset != k, k]
        middle = np.median(unseen)
        assert np.isclose(middle, np.median(one[subset != 0, 0]), rtol=1e-4)
        assert np.isclose(np.median(abs(unseen - middle)), np.median(abs(one[subset != 0, 0] - middle)), rtol=1e-4)
    scores[:50] = 1.0  # copies of one picture: a deviation of 0 is no scale
    np.testing.assert_array_equal(standardised(jnp.asarray(scores), seen), scores)
    equal = jnp.ones((6, 2))
    assert np.isfinite(standardised(equal, jnp.asarray(seen_by(np.arange(6) % 2, 2, others=False)))).all()


@pytest.mark.parametrize("others", [False, True])
def test_no_subset_stands_apart_however_far_the_in_fold_scores_lie_below(others):
    for seed in range(20):  # as PaDiM's of 40 images: 13 out of fold with a deviation of 1, 5 in fold
        random, subset = np.random.default_rng(seed), np.arange(40) % 3
        seen = seen_by(subset, 3, others)
        scores = np.where(seen, random.normal(5, 0.1, (40, 3)), random.normal(13, 1, (40, 3))).astype(np.float32)
        score = combine(scores, subset, others, True, "mean")
        assert np.corrcoef(score, combine(scores, subset, others, True, "out-of-fold"))[0, 1] > 0.95


@pytest.mark.parametrize(("images", "submodels", "others"), [(20, 20, True), (3, 3, True), (5, 1, False), (7, 3, True)])
def test_a_sub_model_that_has_not_seen_two_images_has_no_scale(images, submodels, others):
    scores = np.random.default_rng(0).lognormal(size=(images, submodels)).astype(np.float32)
    subset = np.arange(images) % submodels
    for how in AGGREGATES if submodels > 1 else ("mean", "max"):
        one, other = (combine(scores, subset, others, standardise, how) for standardise in (False, True))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("images", "submodels"), [(10, 3), (3, 3), (7, 1), (100, 8)])
def test_the_partition_is_disjoint_complete_even_and_follows_its_key(images, submodels):
    subset, again, other = (partition(jax.random.key(seed), images, submodels) for seed in (0, 0, 1))
    sizes = np.bincount(subset, minlength=submodels)
    assert sizes.sum() == images and sizes.max() - sizes.min() <= 1
    assert (subset == again).all() and ((subset != other).any() or images < 100)
