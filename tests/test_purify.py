"""Aggregation and selection; and every score stays with the image it belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb.purify import AGGREGATES, keep_auto, keep_lowest, partition, seen_by, standardised

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
    equal = jnp.ones((6, 2))
    assert np.isfinite(standardised(equal, jnp.asarray(seen_by(np.arange(6) % 2, 2, others=False)))).all()


@pytest.mark.parametrize(("images", "submodels"), [(10, 3), (3, 3), (7, 1), (100, 8)])
def test_the_partition_is_disjoint_complete_even_and_follows_its_key(images, submodels):
    subset, again, other = (partition(jax.random.key(seed), images, submodels) for seed in (0, 0, 1))
    sizes = np.bincount(subset, minlength=submodels)
    assert sizes.sum() == images and sizes.max() - sizes.min() <= 1
    assert (subset == again).all() and ((subset != other).any() or images < 100)


@pytest.mark.parametrize(
    ("share", "kept"), [(0.5, [False, False, True, True]), (0.01, [False, False, True, False]), (1.0, [True] * 4)]
)
def test_a_share_keeps_exactly_the_lowest_even_with_ties(share, kept):
    assert keep_lowest(np.array([0.3, 0.9, 0.1, 0.3]), share).tolist() == kept


def skewed(seed: int, normal: int, defective: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal scores, the defective ones six spreads higher; and bool, True for those."""
    random = np.random.default_rng(seed)
    logs = np.concatenate([random.normal(-3, 0.2, normal), random.normal(-1.8, 0.3, defective)])
    return np.exp(logs).astype(np.float32), np.arange(normal + defective) >= normal


@pytest.mark.parametrize("defective", (0, 30, 60, 120, 240))
def test_auto_keeps_normal_images_and_drops_separable_defects_whatever_the_ratio(defective):
    for seed in range(5):
        scores, bad = skewed(seed, 600 - defective, defective)
        kept = keep_auto(scores)
        assert kept[~bad].mean() > 0.9 and (not defective or kept[bad].mean() < 0.1)


def test_auto_is_indifferent_to_the_scale_and_the_order_of_the_scores():
    scores, _ = skewed(0, 100, 20)
    kept, order = keep_auto(scores), np.random.default_rng(1).permutation(120)
    np.testing.assert_array_equal(keep_auto(scores * 8), kept)
    np.testing.assert_array_equal(keep_auto(scores[order]), kept[order])


@pytest.mark.parametrize("scores", ([0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1e-9, 5.0]))
def test_auto_keeps_something_of_the_strangest_scores(scores):
    kept = keep_auto(np.array(scores, np.float32))
    assert kept.any() and kept.dtype == bool


def test_auto_takes_scores_that_may_be_negative_as_they_are():
    scores = np.concatenate([np.random.default_rng(0).normal(0, 1, 200), np.full(20, 12.0)]).astype(np.float32)
    kept = keep_auto(scores)
    assert kept[:200].mean() > 0.95 and not kept[200:].any()


@pytest.mark.parametrize("images", (2, 24, 38, 45, 160))
def test_auto_keeps_all_of_equal_scores_and_of_mostly_equal_ones_the_equal(images):
    """The mean of equal numbers may round to below them, and then no score is below the mean."""
    for score in np.random.default_rng(images).lognormal(-3, 1, 50).astype(np.float32):
        scores = np.full(images, score)
        assert keep_auto(scores).all()
        scores[: images // 10] *= 1.5
        assert (keep_auto(scores) == (scores == score)).all()
