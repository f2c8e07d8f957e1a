"""The nearest-neighbour detector against a plain loop."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import llb.probe
from llb.files import UserError
from llb.pretrain import zca
from llb.probe import (
    Images,
    full_size,
    image_scores,
    load_images,
    load_labelled,
    nearest_neighbours,
    neighbourhoods,
    one_category,
    probe,
)

RANDOM = np.random.default_rng(0)
TRAIN, TEST = RANDOM.normal(size=(6, 16, 5)), RANDOM.normal(size=(3, 16, 5))


def by_loops(train, queries, own=None, neighbour=1):
    mean, matrix = zca(train.reshape(-1, train.shape[-1]), llb.probe.SHRINK)
    distances = np.empty(queries.shape[:2])
    for i, query in enumerate(queries):
        memory = np.delete(train, i, axis=0) if own else train
        for p, patch in enumerate(query):
            nearest = [min(np.linalg.norm((patch - other) @ matrix) for other in image) for image in memory]
            distances[i, p] = sorted(nearest)[neighbour - 1]
    return distances


@pytest.mark.parametrize("neighbour", (1, 2, 5))
def test_distances_equal_a_plain_loop(neighbour):
    _, distances = nearest_neighbours(TRAIN, TEST, neighbour=neighbour)
    expected = by_loops(neighbourhoods(TRAIN), neighbourhoods(TEST), neighbour=neighbour)
    np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("neighbour", (1, 2, 5))
def test_a_training_image_is_compared_with_the_others_only(neighbour):
    own, _ = nearest_neighbours(TRAIN, TEST, neighbour=neighbour)
    expected = by_loops(neighbourhoods(TRAIN), neighbourhoods(TRAIN), own=True, neighbour=neighbour)
    np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3)


def test_an_image_is_odd_in_a_place_or_as_a_whole():
    usual = np.random.default_rng(1).normal(10, 1, (99, 100))
    odd = np.full((3, 100), 10.0)
    odd[1, :2], odd[2] = 30, 12  # 2 % of the patches far off; all of them a little
    scores = image_scores(np.concatenate([usual, odd]), usual)
    assert scores[-2] > scores[:-3].max() and scores[-1] > scores[:-3].max() and scores[-3] < np.median(scores)
    np.testing.assert_allclose(image_scores(7 * odd, 7 * usual), scores[-3:])  # whatever the unit


def test_neighbourhoods_are_means_of_nine():
    features = RANDOM.normal(size=(1, 25, 2))
    square = features.reshape(5, 5, 2)
    np.testing.assert_allclose(neighbourhoods(features)[0, 12], square[1:4, 1:4].mean(axis=(0, 1)), rtol=1e-5)


def test_full_size_maps_peak_where_the_distance_does():
    distances = np.zeros((1, 196), np.float32)
    distances[0, 14 * 3 + 10] = 1
    row, column = np.unravel_index(full_size(distances, 112)[0].argmax(), (112, 112))
    assert abs(row / 111 * 13 - 3) < 0.6 and abs(column / 111 * 13 - 10) < 0.6


def test_some_training_images_are_taken_with_their_labels(monkeypatch):
    """Of all four, one pair of a defective and a normal image in four is in order; of images 3 and 1 the only pair."""
    monkeypatch.setattr(llb.probe, "nearest_neighbours", lambda train, test, *_: (train[..., 0], test[..., 0]))
    monkeypatch.setattr(llb.probe, "image_scores", lambda distances, usual: distances.mean(axis=1))
    train, test = ([SimpleNamespace(label=label) for label in labels] for labels in ([0, 1, 1, 0], [0, 1]))
    images = Images(SimpleNamespace(train=train, test=test), None, None, np.zeros((2, 112, 112), bool))
    known = np.array([9.0, 2.0, 0.0, 1.0])[:, None, None] * np.ones((4, 196, 1))
    seen = np.array([5.0, 1.0])[:, None, None] * np.ones((2, 196, 1))
    found = probe(known, seen, images, 0, np.array([3, 1]))
    assert found["train_auroc"] == 1.0 and found["image_auroc"] == 0.0 and found["pixel_auroc"] is None
    assert probe(known, seen, images, 0)["train_auroc"] == 0.25


def put(file, defect=False):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), 200 if defect else 90, np.uint8)).save(file)


def test_a_set_that_nothing_can_be_measured_on_is_refused(tmp_path):
    put(tmp_path / "plain" / "0.png")
    with pytest.raises(UserError, match="plain has no labelled test images"):
        load_labelled(tmp_path / "plain", "plain", 0.0, 0)


def test_of_several_categories_one_must_be_named(tmp_path):
    for name in ("a", "b"):
        for part in ("train/good", "test/good"):
            put(tmp_path / name / part / "0.png")
    assert one_category(tmp_path, "b") == "b"
    for wanted in (None, "all", "a,b"):
        with pytest.raises(UserError, match="a, b"):
            one_category(tmp_path, wanted)


def test_where_a_mask_is_missing_pixels_are_not_judged(tmp_path):
    for part in ("train/good", "test/good"):
        put(tmp_path / "a" / part / "0.png")
    put(tmp_path / "a/test/hole/0.png", defect=True)
    assert load_images(tmp_path, "a", 0.0, 0).masks is None
    put(tmp_path / "a/ground_truth/hole/0_mask.png", defect=True)
    masks = load_images(tmp_path, "a", 0.0, 0).masks
    assert [mask.all() for mask in masks] == [False, True] and not masks[0].any()
