"""Metrics equal scikit-learn's, an independent AUPRO, and values worked out by hand; streamed ones keep their bound."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import evaluate
from llb import metrics
from llb.data import Dataset, Record
from llb.detectors.common import map_matrix
from llb.detectors.dinomaly import MAP
from llb.files import UserError
from llb.masks import MaskRule
from llb.metrics import IMAGE_METRICS, PIXEL_METRICS, PixelCounts, accumulate, image_metrics, pixel_metrics
from llb.tables import read_metrics


def scikit_learn(labels, scores):
    """AUROC, AP, F1-max; labels and scores are flat."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1.max()


def random_labels_and_scores(seed):
    """Few or many ties, rare or frequent defects; at least one of each class."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 200))
    labels = (rng.random(count) < rng.uniform(0.02, 0.9)).astype(int)
    labels[:2] = 0, 1
    scores = rng.random(count) + rng.uniform(-0.5, 1) * labels
    return labels, np.round(scores, int(rng.integers(0, 8)))


def stored_cases():
    """Twenty cases of masks bool (3, 20, 20), maps float32 (3, 20, 20) and the independent AUPRO."""
    with np.load(Path(__file__).parent / "reference" / "metrics.npz") as stored:
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
    return metrics.pixel_metrics_of(counted(masks, maps))


def differences(counts, masks, maps):
    """For each metric the difference between streamed and exact, and its bound."""
    exact, close = pixel_metrics(masks, maps), metrics.pixel_metrics_of(counts)
    bounds = metrics.pixel_metrics_error(counts)
    return {name: (abs(close[name] - exact[name]), bounds[name]) for name in bounds}


BOTH = pytest.mark.parametrize("judge", (pixel_metrics, streamed))


def smooth_maps(count, size=168, grid=28):
    """Masks bool and maps float32 (count, size, size): distances of patches, upsampled and blurred as a detector's."""
    rng = np.random.default_rng(5)
    matrix = map_matrix(size, grid, MAP)
    patches = rng.random((count, grid, grid)) < 0.02
    distances = 0.05 * np.exp(0.5 * rng.standard_normal(patches.shape)) + 0.2 * patches * rng.random(patches.shape)
    maps = matrix @ distances.astype(np.float32) @ matrix.T
    return patches.repeat(size // grid, 1).repeat(size // grid, 2), maps


def hand_made_cases():
    """For each a name, masks, maps, and metrics worked out by hand."""
    # Two regions, of one and of three pixels, in ten normal pixels. Falling threshold: 9 covers region one (overlap 1/2
    # at rate 0), 8 is a false alarm (rate .1), 7 covers a third of region two (2/3), 6 is a false alarm (rate .2),
    # 5 covers another third (5/6); the eight ones take the rate to 1.
    masks = np.array([[1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], bool)[None]
    maps = np.array([[9, 8, 1, 1, 1, 1, 1], [1, 1, 1, 6, 7, 5, 0]], np.float32)[None]
    yield "curve", masks, maps, {"pixel_aupro": (0.1 * 1 / 2 + 0.1 * 2 / 3 + 0.1 * 5 / 6) / 0.3}
    masks = np.zeros((1, 12, 12), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region of two pixels, joined at a corner
    masks[0, 5:10, 5:10] = True  # one of 25
    maps = np.where(masks, 0.0, 1.0).astype(np.float32)
    maps[0, 0, 0] = maps[0, 1, 1] = 2.0
    # the small region is covered before any false alarm, the large one after all of them
    yield "regions count equally", masks, maps, {"pixel_aupro": 0.5}
    masks = np.zeros((2, 6, 6), bool)
    masks[0, :2, :3] = True
    chance = (0.5, 1 / 12, 2 / 13, 0.15)  # one threshold, so overlap = rate: a triangle of 0.3 · 0.3 / 2
    yield "no information", masks, np.zeros(masks.shape, np.float32), dict(zip(PIXEL_METRICS, chance))
    yield "perfect", masks, masks.astype(np.float32), dict.fromkeys(PIXEL_METRICS, 1.0)
    yield "worst", masks, 1 - masks.astype(np.float32), {"pixel_auroc": 0, "pixel_aupro": 0}
    signs = np.tile(np.array([0.0, -0.0], np.float32), (2, 1, 1))  # zeros of either sign are one score
    yield "zeros", np.array([[[1, 0]], [[1, 0]]], bool), signs, {"pixel_auroc": 0.5}


@pytest.mark.parametrize("seed", range(30))
def test_image_metrics_equal_scikit_learn(seed):
    labels, scores = random_labels_and_scores(seed)
    values = image_metrics(labels.tolist(), scores)
    assert tuple(values) == IMAGE_METRICS
    np.testing.assert_allclose(list(values.values()), scikit_learn(labels, scores), rtol=0, atol=1e-12)


@BOTH
def test_pixel_metrics_equal_scikit_learn_and_an_independent_aupro(judge):
    for masks, maps, aupro in stored_cases():
        values = judge(masks, maps)
        assert tuple(values) == PIXEL_METRICS
        expected = [*scikit_learn(masks.ravel(), maps.ravel()), aupro]
        np.testing.assert_allclose(list(values.values()), expected, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize(("name", "masks", "maps", "expected"), [*hand_made_cases()])
def test_pixel_metrics_equal_values_worked_out_by_hand(judge, name, masks, maps, expected):
    values = judge(masks, maps)
    assert {metric: values[metric] for metric in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", (1, 1e-30, -1e-3))
def test_streaming_is_exact_where_scores_lie_close_together_whatever_outliers_there_are(scale):
    """Neighbouring floats, ties, a constant map, and single scores that are far away."""
    rng = np.random.default_rng(2)
    masks = rng.random((6, 20, 20)) < 0.1
    levels = rng.integers(0, 300, masks.shape) + 100 * masks
    maps = (np.float32(scale) * (1 + levels * 2.0**-23)).astype(np.float32)
    maps[4] = maps[0, 0, 0]
    for place, outlier in enumerate((0.0, -0.0, 1e-40, -1e38, 3e38, 2.0)):
        maps[0, 0, place] = outlier
    counts = counted(masks, maps)
    assert metrics.pixel_metrics_of(counts) == pytest.approx(pixel_metrics(masks, maps), abs=1e-12)
    assert set(metrics.pixel_metrics_error(counts).values()) == {0.0}


def test_streaming_differs_on_smooth_maps_by_less_than_its_bound_of_1e_5():
    masks, maps = smooth_maps(48)
    counts = counted(masks, maps, 16)
    assert counts.table.shape[2] < 2**16  # scores share bins
    for difference, bound in differences(counts, masks, maps).values():
        assert difference <= bound + 1e-12 and 0 <= bound < 1e-5 and difference < 1e-6


def test_the_bound_holds_in_coarse_bins_and_is_no_looser_than_need_be(monkeypatch):
    monkeypatch.setattr(metrics, "BINS", 16)
    reached = dict.fromkeys(PIXEL_METRICS, 0.0)
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
        assert counts.table[0].size <= 16
        for name, (difference, bound) in differences(counts, masks, maps).items():
            assert difference <= bound + 1e-12, (seed, name)
            reached[name] = max(reached[name], difference / max(bound, 1e-12))
    assert min(reached.values()) > 0.9, reached


def test_any_cut_into_batches_and_any_order_gives_the_same_counts(monkeypatch):
    monkeypatch.setattr(metrics, "BINS", 2**12)  # joined several times on the way
    masks, maps = smooth_maps(12, size=56)
    maps *= np.geomspace(1e-3, 1, 12, dtype=np.float32)[:, None, None]  # each batch brings new pages
    whole = accumulate(PixelCounts(), masks, maps)
    for order, batch in ((np.arange(12), 1), (np.arange(12)[::-1], 5), (np.random.default_rng(0).permutation(12), 4)):
        counts = counted(masks[order], maps[order], batch)
        np.testing.assert_array_equal(counts.pages, whole.pages)
        np.testing.assert_array_equal(counts.table[:2], whole.table[:2])
        np.testing.assert_allclose(counts.table[2], whole.table[2], rtol=1e-12)
        assert metrics.pixel_metrics_of(counts) == pytest.approx(metrics.pixel_metrics_of(whole), abs=1e-12)
    accumulate(whole, masks, maps)  # leaves its argument as it is
    assert whole.table[0].sum() == maps.size and whole.table[1].sum() == masks.sum()


def test_one_class_or_no_image_or_unknown_labels_leave_image_metrics_undefined_and_say_why():
    reasons = {(0, 0): "no image is defective", (1, 1): "no image is normal", (): "there is no image to judge"}
    reasons[(1, None)] = "it is not known which images are defective"
    for labels, reason in reasons.items():
        assert image_metrics(labels, np.ones(len(labels))) == dict.fromkeys(IMAGE_METRICS)
        assert metrics.why_undefined("image_auroc", labels) == reason


def test_a_sample_of_real_iad_has_the_highest_score_and_label_of_its_views():
    views = {  # two of the folders are called S0001
        "bolt/OK/S0001": ([0, 0, 0, 0, 0], [0.1, 0.9, 0.2, 0.3, 0.1]),
        "bolt/OK/S0002": ([0, 0], [0.4, 0.3]),
        "bolt/NG/AK/S0001": ([0, 0, 1, 0, 0], [0.1, 0.95, 0.1, 0.2, 0.1]),  # found by a view that does not show it
        "bolt/NG/BX/S0004": ([1, 1], [0.5, 0.2]),
    }
    places = [(folder, i) for folder, (labels, _) in views.items() for i in range(len(labels))]
    places = [places[i] for i in np.random.default_rng(0).permutation(len(places))]
    paths = [f"{folder}/bolt_0001_OK_C{i + 1}_20231021104018.jpg" for folder, i in places]
    labels, scores = ([views[folder][part][i] for folder, i in places] for part in (0, 1))

    def of(labels=labels, paths=paths, layout="real-iad"):
        return metrics.sample_auroc(paths, labels, np.array(scores), layout)

    by_hand = image_metrics([0, 0, 1, 1], np.array([0.9, 0.4, 0.95, 0.5]))["image_auroc"]
    assert of() == {"sample_auroc": by_hand} == {"sample_auroc": 0.75}
    undefined = [of(layout=layout) for layout in ("mvtec", "real-iad-sv")]
    undefined += [of([None, *labels[1:]]), of([0] * len(labels)), of([1] * len(labels))]
    undefined += [of(paths=[path.replace("/S0", "/T0") for path in paths])]
    assert undefined == [{"sample_auroc": None}] * 6
    assert metrics.sample_auroc([], [], np.empty(0), "real-iad") == {"sample_auroc": None}
    assert "no sample is normal" in metrics.why_undefined("sample_auroc", [0, 1])


def test_one_class_of_pixels_leaves_pixel_metrics_undefined_and_says_why_and_no_image_changes_nothing():
    maps, none = np.random.default_rng(0).random((2, 4, 4), np.float32), dict.fromkeys(PIXEL_METRICS)
    for masks in (np.zeros((2, 4, 4), bool), np.ones((2, 4, 4), bool), np.zeros((0, 4, 4), bool)):
        assert pixel_metrics(masks, maps[: len(masks)]) == streamed(masks, maps[: len(masks)]) == none
        assert set(metrics.pixel_metrics_error(counted(masks, maps[: len(masks)])).values()) <= {0.0}
    assert metrics.pixel_metrics_of(PixelCounts()) == none
    masks = np.array([[1, 0, 0, 0]] * 4, bool)[None].repeat(2, 0)
    some = accumulate(PixelCounts(), masks[:0], maps[:0])  # a batch whose images all lack their masks
    some = accumulate(accumulate(some, masks, maps), masks[:0], maps[:0])
    assert metrics.pixel_metrics_of(some) == streamed(masks, maps) == pytest.approx(pixel_metrics(masks, maps))
    assert "has a mask" in metrics.why_undefined("pixel_aupro", [0, 1])
    assert metrics.why_undefined("pixel_aupro", [0, 0]) == "no image is defective"


def test_a_missing_mask_costs_its_image_its_pixels_and_is_named_once(tmp_path, monkeypatch, capsys):
    masks = np.zeros((5, 16, 16), bool)
    masks[:3, 4:9, 4:9] = True
    maps = (masks * 0.4 + np.random.default_rng(3).random(masks.shape)).astype(np.float32)
    for name, mask in (("0.png", masks[0]), ("black.png", masks[4]), ("a.png", masks[4]), ("b.png", masks[4])):
        Image.fromarray(mask).save(tmp_path / name)
    given = {"a": (1, ("0.png",)), "b": (1, ("black.png",)), "c": (1, ()), "d": (0, ()), "e": (None, ())}
    records = [Record(f"{name}.png", label, files, "") for name, (label, files) in given.items()]
    stage = SimpleNamespace(run=tmp_path, setup=SimpleNamespace(image_size=16, detector="dinomaly", settings=None))
    nothing = {
        "load_features": None,
        "final_params": None,
        "write_test_tiles": None,
    }
    for name, result in nothing.items():
        monkeypatch.setattr(evaluate, name, lambda *_, result=result: result)

    def entry(test, *detectors):
        chosen = [records.index(record) for record in test]
        batches = [(np.array([i]), np.array([[0.5 + i]]), maps[[j], None]) for i, j in enumerate(chosen)]
        monkeypatch.setattr(evaluate, "score", lambda *_, **__: iter(batches))
        for final in detectors:
            stage.final, stage.settings = final, SimpleNamespace(save_maps=False)
            bolt = Dataset(tmp_path, "mvtec", "bolt", (), tuple(test))
            yield evaluate.evaluate(stage, bolt, MaskRule(), np.arange(0), lambda *_: None)
        yield read_metrics(tmp_path).get("bolt", {}).get("missing_masks")

    *values, missing = entry(records[:4], "purified", "all")
    judged = pixel_metrics(masks[[0, 3]], maps[[0, 3]])
    assert [{name: value[name] for name in PIXEL_METRICS} for value in values] == [judged, judged]
    assert missing == ["b.png", "c.png"] and values[0]["image_auroc"] is not None
    line = "bolt: 2 of 3 defective test images have no mask (b.png, c.png): their pixels are not counted"
    assert capsys.readouterr().out.count(line) == 1
    (value, missing) = entry(records[1:4], "all")
    assert value["pixel_ap"] is None and missing == ["b.png", "c.png"]
    (value, missing) = entry([records[0], records[3], records[4]], "all")  # an unknown label: not counted either
    assert {name: value[name] for name in PIXEL_METRICS} == judged and value["image_ap"] is None and missing is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    maps = np.full((1, 4, 4), value, np.float32)
    for refusing in (
        lambda: image_metrics([0, 1], np.array([0.0, value])),
        lambda: pixel_metrics(maps > 0, maps),
        lambda: accumulate(PixelCounts(), maps > 0, maps),
    ):
        with pytest.raises(UserError, match="not all finite"):
            refusing()


def test_ranks_count_from_the_first_suspect_and_ties_go_by_order_and_tiny_differences_count():
    assert image_metrics([0, 1], np.array([1.0, 1.0 + 1e-12]))["image_auroc"] == 1.0  # float32 would tie them
    assert metrics.ranks(np.array([0.2, 0.9, 0.2, 0.5])).tolist() == [3, 1, 4, 2]


def test_purification_counts_the_defective_images_before_and_after():
    names = "n", "kept", "contamination_before", "contamination_after", "train_auroc"
    facts = metrics.purification([0, 1, 0, 1, 0], np.array([0.1, 0.9, 0.2, 0.3, 0.4]), np.array([1, 0, 1, 1, 0], bool))
    assert facts == pytest.approx(dict(zip(names, (5, 3, 0.4, 1 / 3, 5 / 6))))
    unknown = metrics.purification([None, None], np.array([0.1, 0.9]), np.array([True, False]))
    assert unknown == dict(zip(names, (2, 1, None, None, None)))
