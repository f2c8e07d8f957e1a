"""Keep rules: which images of a ranking stay."""

import numpy as np
import pytest
from scipy import stats

from llb.files import UserError
from llb.keep import CUTS, KEEP, START, choose, deviations, expected_above, keep_lowest

RULES = pytest.mark.parametrize("rule", KEEP)


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


@RULES
@pytest.mark.parametrize("defective", (0, 30, 60, 120, 240))
def test_normal_images_stay_and_separable_defects_go_whatever_the_ratio(rule, defective):
    for seed in range(5):
        scores, bad = skewed(seed, 600 - defective, defective)
        kept, _ = KEEP[rule](scores)
        assert kept[~bad].mean() > 0.9 and (not defective or kept[bad].mean() < 0.1)


@pytest.mark.parametrize("tail", ("exponential", "lognormal", "logistic"))
def test_auto_keeps_all_or_next_to_all_of_a_long_tail_without_a_group(tail):
    """What `mirror` cannot: normal images whose log scores reach further up than down."""
    drops = {"auto": [], "mirror": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        logs = {
            "exponential": np.where(random.random(450) < 0.5, -1, 2) * random.exponential(1, 450),
            "lognormal": random.lognormal(0, 0.6, 450),
            "logistic": random.logistic(0, 1, 450),
        }[tail]
        for rule, dropped in drops.items():
            dropped.append((~KEEP[rule](np.exp(logs))[0]).mean())
    assert np.mean(np.array(drops["auto"]) > 0) <= 0.1 and np.mean(drops["mirror"]) > 0.015 + 10 * np.mean(
        drops["auto"]
    )


@pytest.mark.parametrize(("images", "most"), [(40, 0.3), (100, 0.22), (200, 0.13), (600, 0.05)])
def test_auto_seldom_cuts_a_tail_on_one_side_without_a_group(images, most):
    """Scores that rise steeply and fall slowly: the few images of a small set's flank tell little of its tail."""
    random, dropped = np.random.default_rng(0), []
    for tail in (random.exponential(1, (100, images)), random.lognormal(0, 1, (100, images))):
        dropped += [not KEEP["auto"](1 + 0.2 * one)[0].all() for one in tail]
    assert np.mean(dropped) <= most


@RULES
def test_a_rule_is_indifferent_to_the_scale_and_the_order_of_the_scores_and_keeps_the_lowest(rule):
    for seed in range(5):
        scores, _ = skewed(seed, 100, 20)
        (kept, _), order = KEEP[rule](scores), np.random.default_rng(1).permutation(120)
        np.testing.assert_array_equal(KEEP[rule](scores * 8)[0], kept)
        np.testing.assert_array_equal(KEEP[rule](scores[order])[0], kept[order])
        assert scores[kept].max() < scores[~kept].min()


@RULES
@pytest.mark.parametrize("scores", ([0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1e-9, 5.0], [3.0], [-1.0, 2.0]))
def test_something_is_kept_of_the_strangest_scores(rule, scores):
    kept, _ = KEEP[rule](np.array(scores, np.float32))
    assert kept.any() and kept.dtype == bool and kept.shape == (len(scores),)


@RULES
def test_scores_that_may_be_negative_are_taken_as_they_are(rule):
    scores = np.concatenate([np.random.default_rng(0).normal(0, 1, 200), np.full(20, 12.0)]).astype(np.float32)
    kept, _ = KEEP[rule](scores)
    assert kept[:200].mean() > 0.95 and not kept[200:].any()


@pytest.mark.parametrize("images", (2, 24, 38, 45, 160))
def test_all_of_equal_scores_stay_and_of_mostly_equal_ones_mirror_keeps_the_equal(images):
    """The mean of equal numbers may round to below them, and then no score is below the mean."""
    for score in np.random.default_rng(images).lognormal(-3, 1, 50).astype(np.float32):
        scores = np.full(images, score)
        assert all(KEEP[rule](scores)[0].all() for rule in KEEP)
        scores[: images // 10] *= 1.5
        assert (KEEP["mirror"](scores)[0] == (scores == score)).all() and KEEP["auto"](scores)[0].all()


@pytest.mark.parametrize("rate", (0.5, 1.0, 3.0))
@pytest.mark.parametrize("cut", CUTS[:3])
def test_an_exponential_tail_is_continued_beyond_the_cut(rate, cut):
    z = START + stats.expon(scale=1 / rate).ppf((np.arange(20000) + 0.5) / 20000)
    assert expected_above(z, cut) == pytest.approx((z > cut).sum(), rel=0.02)


def test_a_tail_that_does_not_fall_or_is_hardly_there_explains_everything():
    assert expected_above(np.linspace(0, 5, 100), 2.0) == np.inf
    assert expected_above(np.array([0.7, 0.8, 0.9, 0.95, 7.0]), 2.0) == np.inf


def test_two_outliers_are_no_group():
    normal = np.exp(0.1 * stats.norm.ppf((np.arange(200) + 0.5) / 200))
    kept = [KEEP["auto"](np.append(normal, [5.0] * outliers))[0] for outliers in (1, 2, 3)]
    assert [(~each).sum() for each in kept] == [0, 0, 3]


def test_deviations_of_a_normal_distribution_are_its_own():
    z = np.sort(deviations(np.exp(0.1 * stats.norm.ppf((np.arange(2000) + 0.5) / 2000))))
    np.testing.assert_allclose(z, stats.norm.ppf((np.arange(2000) + 0.5) / 2000), atol=0.02)


@pytest.mark.parametrize("wrong", (lambda s: s > 0, lambda s: (np.arange(3), None), lambda s: (s < 0, None)))
def test_an_own_rule_that_returns_something_else_is_named(wrong, monkeypatch):
    monkeypatch.setitem(KEEP, "own", wrong)
    with pytest.raises(UserError, match="--keep own: the rule has to return"):
        choose(np.arange(1.0, 9.0), "own")


def test_what_is_said_of_a_choice():
    scores, bad = skewed(0, 160, 40)
    kept, said = choose(scores, "auto")
    dropped, expected = (int(word) for word in said.split() if word.isdigit())
    assert said == f"{dropped} dropped; by the rule's estimate about {expected} of them are normal"
    assert dropped == (~kept).sum() and (~kept & ~bad).sum() <= expected < 10
    assert choose(scores[:160], "auto")[1].startswith("no clear group of outliers: all kept")
    assert choose(scores, 0.8)[1] is None and choose(scores, 0.8)[0].sum() == 160
