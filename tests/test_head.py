"""A head from what a person said: llb.head, --train-on reviewed, and evaluate with it."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import contents, refuse, rows_of, small_setup, succeed

from llb import head as heads
from llb.detectors import DETECTORS
from llb.features import Features
from llb.files import write_csv
from llb.head import Headed, distance_of, learn_head, lower_bound
from llb.marks import DEFECT, FINE, UNSAID
from llb.runfiles import commands, read_config, write_config

GRID, CHANNELS = 9, 8  # of small_setup: positions, numbers of each of the two maps


@pytest.fixture(scope="module")
def setup():
    return small_setup("padim", score="patch-max")  # of 9 positions a blurred map shows little


@pytest.fixture(scope="module")
def images():
    """40 of 100 images hold a defect at one position, where the first number of the first map is larger by
    6. float16 (100, 2, 11, 8), bool (100,)."""
    random = np.random.default_rng(0)
    features, defective = random.normal(size=(100, 2, 2 + GRID, CHANNELS)), np.arange(100) < 40
    features[np.flatnonzero(defective), 0, 2 + random.integers(GRID, size=40), 0] += 6
    return features.astype(np.float16), defective


@pytest.fixture(scope="module")
def fitted(setup, images):
    detector, features = DETECTORS["padim"], images[0]
    state = detector.start(setup, jax.random.key(0), len(features))
    state = detector.add(setup, state, features, np.ones(len(features), np.float32), 0)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], detector.finish(setup, state, jax.random.key(0)))  # K = 1


def fit(setup, fitted, images, marks, ranking=None):
    """ranking: by default one that says nothing."""
    ranking = np.zeros(len(marks)) if ranking is None else ranking
    return learn_head(setup, Features(images.__getitem__, images.shape[1:]), fitted, marks, ranking, 0)


def one(tree):
    """Of a stack of K = 1."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def test_a_head_finds_what_was_named_and_its_map_counts_as_far_as_it_ranks_images_it_was_not_taught(
    setup, fitted, images, monkeypatch
):
    features, defective = images
    marks = np.where(defective, DEFECT, FINE).astype(np.int8)
    marks[30:40] = marks[70:] = UNSAID
    head, facts = fit(setup, fitted, features, marks)
    assert (facts["defect"], facts["fine"]) == (30, 30) and facts["auroc"] > 0.8
    assert facts["lambda"] == head["lambda"][0] == 1.5 and head["weight"][0, 0] > 0.5 * head["weight"].max()
    unsaid = marks == UNSAID
    headed = Headed(fitted, head)
    both = (one(params) for params in (headed, fitted))
    with_head, without = (np.asarray(distance_of(setup, p, features)).max(axis=(1, 2))[unsaid] for p in both)
    ranked = [np.mean(s[defective[unsaid]][:, None] > s[~defective[unsaid]]) for s in (with_head, without)]
    assert ranked[0] > ranked[1] + 0.1, ranked

    less = fit(setup, fitted, features, marks, ranking=defective)[1]  # a ranking that has put all defects first
    assert less["ranking"] == 1.0 and less["lambda"] == pytest.approx(2 * less["lower"] - 1)
    again, same = fit(setup, fitted, features, marks)
    assert facts == same and all(np.array_equal(head[name], again[name]) for name in head)
    monkeypatch.setattr(heads, "BATCH", 7)  # features come in blocks
    blocks, _ = fit(setup, fitted, features, marks)
    np.testing.assert_allclose(blocks["weight"], head["weight"], rtol=0.02, atol=1e-3)


def test_a_head_learns_neither_from_what_it_is_tested_on_nor_from_the_rest_of_a_defective_image(
    setup, fitted, images, monkeypatch
):
    features, defective = images
    marks, learned, spreads = np.where(defective, DEFECT, FINE).astype(np.int8), [], []
    marks[30:40] = marks[70:] = UNSAID

    def fit_head(*patches, whole=heads.fit_head):
        learned.append(tuple(map(len, patches)))
        return whole(*patches)

    def usual(values, whole=heads.usual):
        spreads.append(values.size)
        return whole(values)

    monkeypatch.setattr(heads, "fit_head", fit_head)
    monkeypatch.setattr(heads, "usual", usual)
    assert fit(setup, fitted, features, marks)[0] is not None
    # of 9 positions the worst one of each defect; 2 of 20 drawn ones of each other image, and the 3 worst of each fine
    # one; without the 6 defects and 6 fine ones of a fold, at last of all
    assert learned == [(24, 2 * 64 + 3 * 24, 20 * 64)] * 5 + [(30, 2 * 70 + 3 * 30, 20 * 70)]
    assert sorted(spreads) == [20 * 64] * 5 + [20 * 70] * 2


def test_a_head_learns_also_when_no_image_is_left_unseen(setup, fitted, images):
    features, defective = images
    head, facts = fit(setup, fitted, features, np.where(defective, DEFECT, FINE).astype(np.int8))
    assert head["weight"][0, 0] > 0.5 * head["weight"].max() and facts["fine"] == 60


def test_few_marks_and_marks_without_a_sense_bear_no_head(setup, fitted, images):
    features, defective = images
    few = np.where(defective, DEFECT, UNSAID).astype(np.int8)
    few[50:64] = FINE
    head, facts = fit(setup, fitted, features, few)
    assert head is None and facts["lambda"] == 0 and facts["auroc"] is None and "15 images of each" in facts["why"]
    chance = np.random.default_rng(0).choice([DEFECT, FINE], 100).astype(np.int8)
    chance[:40] = UNSAID
    head, facts = fit(setup, fitted, features, chance)
    assert head is None and facts["lambda"] == 0 and "no head" in facts["why"]


def test_the_combined_distance_is_the_formula(setup, fitted, images):
    features, random = images[0][:2], np.random.default_rng(1)
    w = random.normal(size=16).astype(np.float32)
    head = {"weight": w, "bias": 0.3, "own": (0.5, 1.5), "detector": (3.0, 2.0), "lambda": 0.7}
    x = np.concatenate([features[:, 0, 2:], features[:, 1, 2:]], axis=-1).astype(np.float32)  # behind two other tokens
    own = np.asarray(DETECTORS["padim"].distance(setup, one(fitted), features)).reshape(2, -1)
    expected = np.sqrt(((own - 3) / 2).clip(0)) + 0.7 * np.sqrt(((x @ w + 0.3 - 0.5) / 1.5).clip(0))
    actual = np.asarray(distance_of(setup, Headed(one(fitted), head), features)).reshape(2, -1)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.array_equal(distance_of(setup, one(fitted), features).reshape(2, -1), own)


def test_a_map_is_multiplied_on_its_own_grid_which_is_the_same():
    random = np.random.default_rng(2)
    maps = [random.normal(size=(2, side, side, depth)).astype(np.float32) for side, depth in ((8, 3), (4, 5))]
    head = {"weight": random.normal(size=8).astype(np.float32), "bias": 0.5}
    for grid in ((4, 4), (16, 16)):  # averaged, interpolated
        patches = np.concatenate([heads.on_grid(one, grid) for one in maps], axis=-1)
        np.testing.assert_allclose(heads.own_of(head, maps, grid), patches @ head["weight"] + 0.5, atol=1e-5)
    means = maps[0][0, :, :, 0].reshape(2, 4, 2, 4).mean(axis=(1, 3))
    assert np.corrcoef(heads.on_grid(maps[0], (2, 2))[0, :, :, 0].ravel(), means.ravel())[0, 1] > 0.9


def test_lower_bound_is_hanley_and_mcneils():
    # their standard error for an area of .893 with 51 and 58 images is .032 (Radiology 143, page 32)
    assert (0.893 - lower_bound(0.893, 51, 58)) / 1.645 == pytest.approx(0.032, abs=1e-3)
    assert lower_bound(1.0, 20, 20) == 1.0


def mark(run, defects: int, fines: int) -> None:
    """Marks by the labels."""
    rows = rows_of(run / "tile" / "scores.csv")
    paths = [[row["path"] for row in rows if row["label"] == label] for label in ("1", "0")]
    verdicts = dict.fromkeys(paths[0][:defects], "defect") | dict.fromkeys(paths[1][:fines], "fine")
    said = [[row["path"], verdicts[row["path"]]] for row in rows if row["path"] in verdicts]
    write_csv(run / "tile" / "marks.csv", ["path", "verdict"], said)


def test_what_has_no_head_takes_no_flag_for_one_and_a_run_that_has_recorded_one_goes_on(tmp_path, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    train = ("stage2_train", "--run", run, "--steps", 3, "--train-on", "all")
    assert "--head none: only --train-on reviewed has a head" in refuse(*train, "--head", "none")
    config = read_config(run, "", "")
    config["stage2"]["all"]["head"] = "none"
    write_config(run, config)
    assert not any("--head" in line for line in commands(run, config, True))
    assert "is finished" in succeed(*train) and read_config(run, "", "")["stage2"]["all"]["head"] == "auto"


def test_reviewed_is_a_final_detector_beside_the_others(tmp_path, finished, data, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    old, folder, files = contents(run), run / "tile", ("head-reviewed.json", "review-reviewed.json")
    train = ("stage2_train", "--run", run, "--steps", 3, "--train-on", "reviewed")
    evaluate = ("evaluate", "--run", run, "--train-on", "reviewed")

    # ---- too few marks: the detector on the list without the named defects, and nothing else ----
    mark(run, 1, 2)
    assert "15 images of each" in succeed(*train)
    assert json.loads((folder / files[1]).read_text())["lambda"] == 0 and not (folder / files[0]).exists()
    assert "next page" not in succeed(*evaluate), "without a head stage 1's order is the better one"
    assert json.loads((folder / "tiles-next-reviewed.json").read_text())["tiles"] == {}

    # ---- marks that bear a head ----
    for name, value in (("MARKS", 1), ("FOLDS", 2), ("lower_bound", lambda *_: 0.7)):
        monkeypatch.setattr(heads, name, value)
    mark(run, 2, 5)
    for flags in ((), ("--images", data / "tile" / "test")):  # other marks, such as a person's after simulated ones
        assert "what a person said" in refuse(*evaluate, *flags)
    succeed(*train, "--overwrite")
    one = [(folder / name).read_bytes() for name in files]
    review = json.loads(one[1])
    assert review["lambda"] == pytest.approx(np.clip(0.2 / max(review["ranking"] - 0.5, 0.02), 0, 1.5))
    (folder / files[1]).unlink()  # killed before it
    assert "finish it with" in refuse(*evaluate)
    assert "is finished" in succeed(*train)
    assert [(folder / name).read_bytes() for name in files] == one
    told = succeed(*evaluate)
    assert "the report has a next page, the 5 unseen images that reviewed suspects most" in told
    taken = json.loads((folder / "threshold-reviewed.json").read_text())["images"]
    of = f"{taken} images that are called fine, or neither dropped nor called defective"
    assert f"(99% quantile of the scores of the {of})" in told
    assert "marked as fine, or neither dropped nor marked as defects" in (run / "report.html").read_text()
    assert contents(run).items() >= old.items()
    unseen = {row["path"] for row in rows_of(folder / "scores.csv")} - {
        r["path"] for r in rows_of(folder / "marks.csv")
    }
    assert json.loads((folder / "tiles-next-reviewed.json").read_text())["tiles"].keys() == unseen

    # ---- other images get the same scores ----
    succeed(*evaluate, "--images", data / "tile" / "test")
    tables = (folder / "predictions-reviewed.csv", *folder.glob("images-test/scores-*.csv"))
    scores, others = ({row["path"].removeprefix("tile/test/"): row["score"] for row in rows_of(t)} for t in tables)
    shared = scores.keys() & others.keys()
    assert shared and all(float(scores[path]) == pytest.approx(float(others[path]), rel=1e-4) for path in shared)

    # ---- a damaged file is named ----
    for name in files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert f"{name} is not valid JSON" in refuse(*evaluate, "--overwrite")
        (folder / name).write_bytes(whole)
