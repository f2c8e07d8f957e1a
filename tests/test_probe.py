"""The nearest-neighbour detector against a plain loop, its metrics, and the sets that it can measure."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llb.files import UserError
from llb.tiny import probe
from llb.tiny.pretrain import zca

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("neighbour", (1, 2, 5))
def test_distances_equal_a_plain_loop_and_leave_out_the_image_itself(neighbour):
    train, test = RANDOM.normal(size=(6, 16, 5)), RANDOM.normal(size=(3, 16, 5))
    own, distances = probe.nearest_neighbours(train, test, neighbour=neighbour)
    train, test = probe.neighbourhoods(train), probe.neighbourhoods(test)
    _, matrix = zca(train.reshape(-1, 5), probe.SHRINK)

    def by_loops(patch, memory):
        nearest = [min(np.linalg.norm((patch - other) @ matrix) for other in image) for image in memory]
        return sorted(nearest)[neighbour - 1]

    expected = [[by_loops(patch, train) for patch in image] for image in test]
    np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-3)
    expected = [[by_loops(patch, np.delete(train, i, axis=0)) for patch in image] for i, image in enumerate(train)]
    np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3)


def test_neighbourhoods_are_means_of_nine_patches():
    features = RANDOM.normal(size=(1, 25, 2))
    square = features.reshape(5, 5, 2)
    np.testing.assert_allclose(probe.neighbourhoods(features)[0, 12], square[1:4, 1:4].mean(axis=(0, 1)), rtol=1e-5)


def test_a_score_is_high_for_a_local_and_for_a_global_difference():
    own = np.random.default_rng(1).normal(10, 1, (99, 100))
    distances = np.full((3, 100), 10.0)
    distances[1, :2], distances[2] = 30, 12  # 2 % of the patches much larger; all of them a little
    normal, local, whole = probe.image_scores(distances, own)
    of_train = probe.image_scores(own, own)
    assert local > of_train.max() and whole > of_train.max() and normal < np.median(of_train)
    np.testing.assert_allclose(probe.image_scores(7 * distances, 7 * own), (normal, local, whole))


def test_the_metrics_use_the_labels_of_the_chosen_training_images():
    train, test = ([SimpleNamespace(label=label) for label in labels] for labels in ([0, 1, 1, 0], [0, 1]))
    images = probe.Images(
        SimpleNamespace(train=train, test=test), None, None, np.zeros((2, 112, 112), bool), np.ones(2, bool)
    )
    own, distances = (np.array(levels)[:, None] * np.ones(196) for levels in ([9.0, 2, 0, 1], [5.0, 1]))
    # of the four pairs of a defective and a normal training image one is in order; of images 3 and 1 the only pair
    assert probe.detector_metrics(own, distances, images)["train_auroc"] == 0.25
    metrics = probe.detector_metrics(own[[3, 1]], distances, images, np.array([3, 1]))
    assert metrics == {"train_auroc": 1.0, "image_auroc": 0.0, "pixel_auroc": None}


def put(file, defect=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 255 * defect).save(file)


def test_sets_that_cannot_be_measured_are_refused(tmp_path):
    put(tmp_path / "plain" / "0.png")
    with pytest.raises(UserError, match="plain has no labelled test images"):
        probe.load_labelled(tmp_path / "plain", "plain", 0.0, 0)
    for name in ("a/train/good/0.png", "a/test/good/0.png", "b/train/good/0.png", "b/test/good/0.png"):
        put(tmp_path / "two" / name)
    assert probe.one_category(tmp_path / "two", "b") == "b"
    for wanted in (None, "all", "a,b"):
        with pytest.raises(UserError, match="a, b"):
            probe.one_category(tmp_path / "two", wanted)
