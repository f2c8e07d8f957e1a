"""Metrics against scikit-learn, against an independent AUPRO, and against values worked out by hand."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import llb.metrics
from llb.dinomaly import map_matrix
from llb.files import UserError
from llb.metrics import (
    PixelCounts,
    accumulate,
    image_metrics,
    pixel_metrics,
    pixel_metrics_error,
    pixel_metrics_of,
    purification,
    why_undefined,
)

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


def counted(masks, maps, batch=2):
    """The counts of all maps, in batches."""
    counts = PixelCounts()
    for start in range(0, len(maps), batch):
        counts = accumulate(counts, masks[start : start + batch], maps[start : start + batch])
    return counts


def streamed(masks, maps):
    return pixel_metrics_of(counted(masks, maps))


BOTH = pytest.mark.parametrize("metrics", (pixel_metrics, streamed))


def smooth_maps(count, size=168, grid=28):
    """Masks bool and maps float32 (count, size, size): distances of patches, upsampled and blurred as a detector's."""
    rng = np.random.default_rng(5)
    matrix = map_matrix(size, grid)
    patches = rng.random((count, grid, grid)) < 0.02
    distances = 0.05 * np.exp(0.5 * rng.standard_normal(patches.shape)) + 0.2 * patches * rng.random(patches.shape)
    maps = matrix @ distances.astype(np.float32) @ matrix.T
    return patches.repeat(size // grid, 1).repeat(size // grid, 2), maps


@pytest.mark.parametrize("seed", range(30))
def test_image_metrics_equal_scikit_learn(seed):
    labels, scores = random_labels_and_scores(seed)
    found = image_metrics(labels.tolist(), scores)
    assert list(found) == ["image_auroc", "image_ap", "image_f1_max"]
    np.testing.assert_allclose(list(found.values()), scikit_learn(labels, scores), rtol=0, atol=1e-12)


@BOTH
def test_pixel_metrics_equal_scikit_learn(metrics):
    for masks, maps, _ in stored_cases():
        found = metrics(masks, maps)
        expected = scikit_learn(masks.ravel(), maps.ravel())
        np.testing.assert_allclose(
            [found["pixel_auroc"], found["pixel_ap"], found["pixel_f1_max"]], expected, rtol=0, atol=1e-12
        )


@BOTH
def test_aupro_equals_the_independent_implementation_on_twenty_random_cases(metrics):
    cases = stored_cases()
    found = [metrics(masks, maps)["pixel_aupro"] for masks, maps, _ in cases]
    assert len(found) == 20
    np.testing.assert_allclose(found, [aupro for _, _, aupro in cases], rtol=0, atol=1e-12)


@BOTH
def test_aupro_of_a_curve_drawn_by_hand(metrics):
    # Two regions, of one and of three pixels, in ten normal pixels.
    masks = np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], bool)[None]
    maps = np.array([[9, 8, 1, 1, 1, 1, 1], [1, 1, 1, 6, 7, 5, 0]], np.float32)[None]
    # Falling threshold: 9 finds region one (overlap 1/2 at rate 0), 8 is a false alarm (rate .1), 7 finds a third of
    # region two (2/3), 6 is a false alarm (rate .2), 5 finds another third (5/6); the eight ones take the rate to 1.
    expected = (0.1 * 1 / 2 + 0.1 * 2 / 3 + 0.1 * 5 / 6) / 0.3
    assert metrics(masks, maps)["pixel_aupro"] == pytest.approx(expected, abs=1e-12)


@BOTH
def test_aupro_weighs_regions_equally_and_counts_corner_neighbours_as_one_region(metrics):
    masks = np.zeros((1, 12, 12), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region of two pixels, joined at a corner
    masks[0, 5:10, 5:10] = True  # one of 25
    maps = np.where(masks, 0.0, 1.0).astype(np.float32)
    maps[0, 0, 0] = maps[0, 1, 1] = 2.0
    # the small region is found whole before any false alarm, the large one after all of them
    assert metrics(masks, maps)["pixel_aupro"] == pytest.approx(0.5, abs=1e-12)


@BOTH
def test_a_map_without_information_scores_chance(metrics):
    masks = np.zeros((2, 6, 6), bool)
    masks[0, :2, :3] = True
    found = metrics(masks, np.zeros((2, 6, 6), np.float32))
    share = 6 / 72
    # one threshold, so overlap = rate: a triangle of 0.3 · 0.3 / 2
    expected = {"pixel_auroc": 0.5, "pixel_ap": share, "pixel_f1_max": 2 * share / (1 + share), "pixel_aupro": 0.15}
    assert found == pytest.approx(expected, abs=1e-12)


@BOTH
def test_a_perfect_ranking_scores_one(metrics):
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:4, 3:6] = masks[0, 7, 7] = True
    assert metrics(masks, masks.astype(np.float32)) == pytest.approx(
        dict.fromkeys(["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"], 1.0), abs=1e-12
    )
    assert set(image_metrics([0, 1, 0], [0.1, 0.2, 0.0]).values()) == {1.0}


@BOTH
def test_the_worst_ranking_has_no_overlap_within_the_limit(metrics):
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 2:4, 3:6] = True
    found = metrics(masks, 1 - masks.astype(np.float32))
    assert found["pixel_auroc"] == 0 and found["pixel_aupro"] == 0


@pytest.mark.parametrize("scale", (1, 1e-30, -1e-3))
def test_streaming_is_exact_where_scores_lie_close_together_whatever_outliers_there_are(scale):
    """Neighbouring floats, ties, a constant map, and single scores that are far away."""
    rng = np.random.default_rng(2)
    masks = rng.random((6, 20, 20)) < 0.1
    ranks = rng.integers(0, 300, masks.shape) + 100 * masks
    maps = (np.float32(scale) * (1 + ranks * 2.0**-23)).astype(np.float32)
    maps[4] = maps[0, 0, 0]
    for place, outlier in enumerate((0.0, -0.0, 1e-40, -1e38, 3e38, 2.0)):
        maps[0, 0, place] = outlier
    counts = counted(masks, maps)
    assert pixel_metrics_of(counts) == pytest.approx(pixel_metrics(masks, maps), abs=1e-12)
    assert set(pixel_metrics_error(counts).values()) == {0.0}


def test_zeros_of_either_sign_are_one_score():
    masks = np.array([[[1, 0]], [[1, 0]]], bool)
    maps = np.array([[[0.0, -0.0]], [[0.0, -0.0]]], np.float32)
    assert streamed(masks, maps)["pixel_auroc"] == 0.5


def test_streaming_differs_on_smooth_maps_by_less_than_its_bound_of_1e_5():
    masks, maps = smooth_maps(48)
    counts = counted(masks, maps, 16)
    exact, found, error = pixel_metrics(masks, maps), pixel_metrics_of(counts), pixel_metrics_error(counts)
    assert counts.table.shape[2] < 2**16  # scores share bins
    for name in exact:
        assert abs(found[name] - exact[name]) <= error[name] + 1e-12
        assert 0 <= error[name] < 1e-5 and abs(found[name] - exact[name]) < 1e-6


def test_the_bound_holds_in_coarse_bins_and_is_no_looser_than_need_be(monkeypatch):
    monkeypatch.setattr(llb.metrics, "BINS", 16)
    reached = dict.fromkeys(["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"], 0.0)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        masks = rng.random((2, 12, 12)) < rng.choice([0.02, 0.1, 0.5, 0.95])
        masks[0, 0, 0], masks[0, 0, 1] = True, False
        # scores in 1 … 2, four pages at most; the fourth power gathers them in one of the bins
        maps = 1 + 0.03 * rng.choice([1, 4]) * rng.random(masks.shape) ** rng.choice([1, 4])
        if seed % 4:  # within a bin defective pixels come first, or last, or share one score with or without the normal
            scores = np.floor(maps * 512) / 512
            shift = np.array([[0.5, 0], [0, 0.5], [0.1, 0.1]])[seed % 4 - 1]
            maps = scores + (np.where(masks, *shift) + rng.choice([0, 0.3]) * rng.random(masks.shape)) / 512
        maps = maps.astype(np.float32)
        counts = counted(masks, maps)
        exact, found, error = pixel_metrics(masks, maps), pixel_metrics_of(counts), pixel_metrics_error(counts)
        for name in exact:
            difference = abs(found[name] - exact[name])
            assert difference <= error[name] + 1e-12, (seed, name)
            reached[name] = max(reached[name], difference / max(error[name], 1e-12))
    assert min(reached.values()) > 0.9, reached


def test_any_cut_into_batches_and_any_order_gives_the_same_counts(monkeypatch):
    monkeypatch.setattr(llb.metrics, "BINS", 2**12)  # joined several times on the way
    masks, maps = smooth_maps(12, size=56)
    maps *= np.geomspace(1e-3, 1, 12, dtype=np.float32)[:, None, None]  # each batch brings new pages
    whole = accumulate(PixelCounts(), masks, maps)
    shuffled = np.random.default_rng(0).permutation(12)
    for order, batch in ((np.arange(12), 1), (np.arange(12), 5), (np.arange(12)[::-1], 4), (shuffled, 3)):
        counts = counted(masks[order], maps[order], batch)
        np.testing.assert_array_equal(counts.pages, whole.pages)
        np.testing.assert_array_equal(counts.table[:2], whole.table[:2])
        np.testing.assert_allclose(counts.table[2], whole.table[2], rtol=1e-12)
        assert pixel_metrics_of(counts) == pytest.approx(pixel_metrics_of(whole), abs=1e-12)
    assert whole.table[0].sum() == maps.size and whole.table[1].sum() == masks.sum()
    accumulate(whole, masks, maps)  # leaves its argument as it was
    assert whole.table[0].sum() == maps.size and whole.table[1].sum() == masks.sum()


def test_ten_times_the_maps_take_no_more_memory():
    masks, maps = smooth_maps(50, size=112)
    maps = 1 + maps / 64  # few pages: the counts are small beside the maps

    def peak(batches: int) -> int:
        tracemalloc.start()
        counts = PixelCounts()
        for number in range(batches):
            counts = accumulate(counts, masks, maps + np.float32(number % 7 / 512))
        pixel_metrics_of(counts), pixel_metrics_error(counts)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    assert peak(40) < 1.2 * peak(4)


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
    masks = np.array([[1, 0, 0, 0]] * 4, bool)[None].repeat(2, 0)
    known = accumulate(PixelCounts(), masks, maps)
    assert None not in pixel_metrics_of(known).values()
    unknown = accumulate(known, None, maps)
    for counts in (PixelCounts(), unknown, accumulate(unknown, masks, maps)):
        assert pixel_metrics_of(counts) == none and set(pixel_metrics_error(counts).values()) == {0.0}
    assert streamed(np.zeros((2, 4, 4), bool), maps) == streamed(np.ones((2, 4, 4), bool), maps) == none
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
    for masks in (None, maps > 0):
        with pytest.raises(UserError, match="not all finite"):
            accumulate(PixelCounts(), masks, maps)


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
