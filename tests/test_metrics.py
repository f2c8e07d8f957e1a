"""Metrics against scikit-learn, against an independent AUPRO, and against values worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from llb.files import UserError
from llb.metrics import image_metrics, pixel_metrics, purification, why_undefined

REFERENCE = Path(__file__).parent / "reference" / "metrics.npz"


def scikit_learn(labels, scores):
    """AUROC, AP, F1-max; labels and scores are flat."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()


def random_labels_and_scores(seed):
    """Few or many ties, rare or frequent anomalies; at least one of each class."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 200))
    labels = (rng.random(count) < rng.uniform(0.02, 0.9)).astype(int)
    labels[:2] = 0, 1
    scores = rng.random(count) + rng.uniform(-0.5, 1) * labels
    return labels, np.round(scores, int(rng.integers(0, 8)))


def stored_cases():
    """Twenty cases of masks bool (3, 20, 20), maps float32 (3, 20, 20) and the independent AUPRO."""
    with np.load(REFERENCE) as stored:
        shape = tuple(stored["shape"])
        masks = np.unpackbits(stored["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        return list(zip(masks, stored["maps"].astype(np.float32), stored["aupro"]))


@pytest.mark.parametrize("seed", range(30))
def test_image_metrics_equal_scikit_learn(seed):
    labels, scores = random_labels_and_scores(seed)
    found = image_metrics(labels.tolist(), scores)
    assert list(found) == ["image_auroc", "image_ap", "image_f1_max"]
    np.testing.assert_allclose(list(found.values()), scikit_learn(labels, scores), rtol=0, atol=1e-12)


def test_pixel_metrics_equal_scikit_learn():
    for masks, maps, _ in stored_cases():
        found = pixel_metrics(masks, maps)
        expected = scikit_learn(masks.ravel(), maps.ravel())
        np.testing.assert_allclose(
            [found["pixel_auroc"], found["pixel_ap"], found["pixel_f1_max"]], expected, rtol=0, atol=1e-12
        )


def test_aupro_equals_the_independent_implementation_on_twenty_random_cases():
    cases = stored_cases()
    found = [pixel_metrics(masks, maps)["pixel_aupro"] for masks, maps, _ in cases]
    assert len(found) == 20
    np.testing.assert_allclose(found, [aupro for _, _, aupro in cases], rtol=0, atol=1e-12)


def test_aupro_of_a_curve_drawn_by_hand():
    # Two regions, of one and of three pixels, in ten normal pixels.
    masks = np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], bool)[None]
    maps = np.array([[9, 8, 1, 1, 1, 1, 1], [1, 1, 1, 6, 7, 5, 0]], np.float32)[None]
    # Falling threshold: 9 finds region one (overlap 1/2 at rate 0), 8 is a false alarm (rate .1), 7 finds a third of
    # region two (2/3), 6 is a false alarm (rate .2), 5 finds another third (5/6); the eight ones take the rate to 1.
    expected = (0.1 * 1 / 2 + 0.1 * 2 / 3 + 0.1 * 5 / 6) / 0.3
    assert pixel_metrics(masks, maps)["pixel_aupro"] == pytest.approx(expected, abs=1e-12)


def test_aupro_weighs_regions_equally_and_counts_corner_neighbours_as_one_region():
    masks = np.zeros((1, 12, 12), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region of two pixels, joined at a corner
    masks[0, 5:10, 5:10] = True  # one of 25
    maps = np.where(masks, 0.0, 1.0).astype(np.float32)
    maps[0, 0, 0] = maps[0, 1, 1] = 2.0
    # the small region is found whole before any false alarm, the large one after all of them
    assert pixel_metrics(masks, maps)["pixel_aupro"] == pytest.approx(0.5, abs=1e-12)


def test_a_map_without_information_scores_chance():
    masks = np.zeros((2, 6, 6), bool)
    masks[0, :2, :3] = True
    found = pixel_metrics(masks, np.zeros((2, 6, 6), np.float32))
    share = 6 / 72
    # one threshold, so overlap = rate: a triangle of 0.3 · 0.3 / 2
    expected = {"pixel_auroc": 0.5, "pixel_ap": share, "pixel_f1_max": 2 * share / (1 + share), "pixel_aupro": 0.15}
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_perfect_ranking_scores_one():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 3:6] = masks[0, 7, 7] = True
    assert pixel_metrics(masks, masks.astype(np.float32)) == pytest.approx(
        dict.fromkeys(["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"], 1.0), abs=1e-12
    )
    assert set(image_metrics([0, 1, 0], [0.1, 0.2, 0.0]).values()) == {1.0}


def test_the_worst_ranking_has_no_overlap_within_the_limit():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 2:4, 3:6] = True
    found = pixel_metrics(masks, 1 - masks.astype(np.float32))
    assert found["pixel_auroc"] == 0 and found["pixel_aupro"] == 0


def test_metrics_do_not_depend_on_the_order_of_images_or_on_a_monotone_change_of_scale():
    rng = np.random.default_rng(1)
    masks, maps, _ = stored_cases()[7]
    expected = pixel_metrics(masks, maps)
    order = rng.permutation(len(maps))
    assert pixel_metrics(masks[order], maps[order]) == pytest.approx(expected, abs=1e-12)
    assert pixel_metrics(masks[:, ::-1, ::-1], maps[:, ::-1, ::-1]) == pytest.approx(expected, abs=1e-12)
    assert pixel_metrics(masks, np.exp(maps / 100) - 3) == pytest.approx(expected, abs=1e-12)
    labels, scores = random_labels_and_scores(3)
    order = rng.permutation(len(labels))
    assert image_metrics(labels[order], scores[order] * 7 - 2) == pytest.approx(image_metrics(labels, scores))


def test_small_differences_of_image_scores_count():
    # float32 would tie them
    assert image_metrics([0, 1], np.array([1.0, 1.0 + 1e-12]))["image_auroc"] == 1.0


def test_one_class_or_no_image_or_unknown_labels_leave_image_metrics_undefined_and_say_why():
    reasons = {(0, 0): "no image is anomalous", (1, 1): "no image is normal", (): "there is no image to judge"}
    reasons[(1, None)] = "it is not known which images are anomalous"
    for labels, reason in reasons.items():
        found = image_metrics(list(labels), np.ones(len(labels)))
        assert found == {"image_auroc": None, "image_ap": None, "image_f1_max": None}
        assert why_undefined("image_auroc", list(labels)) == reason


def test_missing_masks_or_one_class_of_pixels_leave_pixel_metrics_undefined_and_say_why():
    maps = np.random.default_rng(0).random((2, 4, 4), np.float32)
    none = dict.fromkeys(["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"])
    assert pixel_metrics(None, maps) == none
    assert pixel_metrics(np.zeros((2, 4, 4), bool), maps) == none
    assert pixel_metrics(np.ones((2, 4, 4), bool), maps) == none
    assert pixel_metrics(np.zeros((0, 4, 4), bool), maps[:0]) == none
    assert "no mask" in why_undefined("pixel_aupro", [0, 1])
    assert why_undefined("pixel_aupro", [0, 0]) == "no image is anomalous"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(UserError, match="not all finite"):
        image_metrics([0, 1], np.array([0.0, value]))
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 0, 0] = value
    with pytest.raises(UserError, match="not all finite"):
        pixel_metrics(None, maps)


def test_purification_counts_the_anomalies_before_and_after():
    facts = purification([0, 1, 0, 1, 0], np.array([0.1, 0.9, 0.2, 0.3, 0.4]), np.array([1, 0, 1, 1, 0], bool))
    assert facts == {
        "n": 5,
        "kept": 3,
        "contamination_before": 0.4,
        "contamination_after": pytest.approx(1 / 3),
        "train_auroc": pytest.approx(5 / 6),
    }
    unknown = purification([None, None], np.array([0.1, 0.9]), np.array([True, False]))
    assert unknown == {
        "n": 2, "kept": 1, "contamination_before": None, "contamination_after": None, "train_auroc": None
    }  # fmt: skip
