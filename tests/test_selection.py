"""Another selection from a finished stage 1: quick, exact, and never at the cost of a list that was edited by hand."""

import dataclasses
import itertools
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TILE, contents, refuse, rows_of, succeed
from PIL import Image

import evaluate
import stage1_partition
from llb.checkpoint import CheckpointFolder, save_finished
from llb.config import Evaluate, Stage1
from llb.data import Dataset, Record, load_category
from llb.files import UserError, write_json
from llb.head import Headed, evidence
from llb.marks import DEFECT, UNSAID, normal_images, training_set, write_marks
from llb.purify import combine
from llb.runfiles import read_config, write_config
from llb.stage import Stage
from llb.tables import Choice, Stage1Result, read_metrics, read_purified, read_threshold, write_scores


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def stage1(copy, data, monkeypatch):
    """Stage 1 of the copy, which may score no image anew but those of the picture."""

    def never(*arguments):
        raise AssertionError("the images are scored again")

    monkeypatch.setattr(stage1_partition, "score_all", never)
    return ("stage1_partition", "--data", data, "--out", copy, *TILE)


def test_folds_and_standardise_are_those_of_the_settings():
    scores = np.random.default_rng(0).lognormal(size=(30, 3)).astype(np.float32) * np.float32([1, 9, 0.1])
    subset, results = np.arange(30) % 3, []
    for folds, standardise in itertools.product(("own", "others"), ("yes", "no")):
        settings = Stage1(folds=folds, standardise=standardise, aggregate="out-of-fold", keep=0.5)
        results.append(stage1_partition.select(settings, subset, scores).aggregated)
        expected = combine(scores, subset, folds == "others", standardise == "yes", "out-of-fold")
        np.testing.assert_array_equal(results[-1], expected)
    assert len({result.tobytes() for result in results}) == 4


@pytest.mark.parametrize(("folds", "images"), [("own", 4), ("others", 8)])
def test_sub_models_learn_from_their_own_subset_or_from_all_others(folds, images, data, tmp_path, monkeypatch):
    def stop(setup, features, submodels, *_):
        raise UserError(f"{[len(each) for each in submodels.images]} of {sum(map(len, submodels.subsets))}")

    monkeypatch.setattr(stage1_partition, "learn", stop)
    line = ("stage1_partition", "--data", data, "--out", tmp_path / "run", *TILE, "--folds", folds)
    assert refuse(*line) == f"error: {[images] * 3} of 12"


def test_the_sheet_shows_the_first_suspects_in_order_with_what_became_of_them(tmp_path, monkeypatch):
    score = np.random.default_rng(0).permutation(40) / 100
    result = Stage1Result(np.zeros(40, int), score[:, None], score, score < 0.3)
    dataset = Dataset(tmp_path, "folder", "nut", tuple(Record(f"{i}.png", None, (), "") for i in range(40)), ())
    sheets = []
    monkeypatch.setattr(stage1_partition, "heat_maps", lambda _p, _s, _f, shown, _t: ((i, None) for i in shown))
    monkeypatch.setattr(
        stage1_partition, "tile_to_judge", lambda _s, data, i, heat: (data.train[i].path, 0, heat, None)
    )
    monkeypatch.setattr(stage1_partition, "write_tiles", lambda *_: None)
    monkeypatch.setattr(stage1_partition, "contact_sheet", lambda tiles: sheets.append(tiles) or Image.new("L", (1, 1)))
    stage = SimpleNamespace(run=tmp_path, settings=Stage1(), setup=None)
    stage1_partition.write_suspects(stage, dataset, result, None, None)
    order = np.argsort(-score)[:24]
    words = [(f"{n}. {score[i]:.4f} {'dropped' if n <= 10 else 'kept'}", f"{i}.png") for n, i in enumerate(order, 1)]
    assert [text for _, _, text in sheets[0]] == words


def test_another_keep_rule_and_back_again_are_exact(copy, finished, stage1):
    out = succeed(*stage1, "--keep", 0.5, "--aggregate", "max")
    assert "another selection (aggregate: mean, now max; keep: auto, now 0.5): what is trained and scored stays" in out
    assert f"trained on another list; train it again: python stage2_train.py --run {copy}" in out
    old, new = (rows_of(run / "tile" / "scores.csv") for run in (finished, copy))
    models = [name for name in old[0] if name.startswith("model_")]
    for before, now in zip(old, new):
        assert [before[name] for name in models] == [now[name] for name in models]
        assert now["score"] == max((now[name] for name in models), key=float)
    kept = [row["path"] for row in new if row["kept"] == "1"]
    assert (copy / "tile" / "purified.txt").read_text().split("\n") == [*kept, ""] and len(kept) == 6
    assert (copy / "tile" / "suspects.png").read_bytes() != (finished / "tile" / "suspects.png").read_bytes()
    config = read_config(copy, "", "")
    assert (config["keep"], config["aggregate"]) == (0.5, "max") and "--keep 0.5" in config["command"]
    assert "is finished" in succeed(*stage1, "--keep", 0.5, "--aggregate", "max")
    for script, advice in (("stage2_train", "--train-on purified --overwrite"), ("evaluate", "stage2_train.py")):
        flags = ("--steps", 3) if script == "stage2_train" else ()
        assert advice in refuse(script, "--run", copy, *flags)
    out = succeed(*stage1)
    assert "max, now mean" in out and "another list" not in out
    assert contents(copy) == contents(finished)


def test_thresholds_follow_the_list_that_they_are_taken_from(copy, stage1):
    assert "purified," in (copy / "metrics.csv").read_text()
    succeed(*stage1, "--keep", 0.5)
    page, table = (copy / "report.html").read_text(), (copy / "metrics.csv").read_text()
    older = "its threshold may be of another list of images; t"
    assert f"all: {older}ake it again: python evaluate.py --run {copy} --train-on all" in page
    assert (
        f"purified: {older}rain it again: python stage2_train.py --run {copy} --train-on purified --overwrite" in page
    )
    assert "the list of images that it was taken from has changed" in page and "quantile of their scores" not in page
    assert "Defective after" in page and "Ranking AUROC" in page, "scores.csv has them, too"
    assert "purified," not in table and "tile,all," in table, "as in metrics.json"
    succeed("stage2_train", "--run", copy, "--steps", 3, "--overwrite")
    told = succeed("evaluate", "--run", copy)
    assert "is evaluated" not in told and read_threshold(copy / "tile", "all")["images"] == 6
    page = (copy / "report.html").read_text()
    assert (
        older not in page
        and "taken from the\n6 training images that are not dropped: the 99 % quantile of their scores. No" in page
    )
    assert succeed("evaluate", "--run", copy).count("is evaluated") == 2


def test_another_ranking_wants_another_head_and_another_share_does_not(copy, stage1):
    folder, config = copy / "tile", read_config(copy, "", "")
    files = [folder / "review-reviewed.json", folder / "head-reviewed.json"]
    write_json(files[0], dict.fromkeys(("auroc", "lower", "lambda"), 0.9) | {"defect": 20, "fine": 20, "why": "good"})
    files[1].write_text("{}")
    for name in ("predictions-{}.csv", "threshold-{}.json", "kinds-{}.csv", "tiles-{}.json"):
        files.append(shutil.copy(folder / name.format("all"), folder / name.format("reviewed")))
    write_config(
        copy, config | {"stage2": config["stage2"] | {"reviewed": {**config["stage2"]["all"], "train_on": "reviewed"}}}
    )
    files.append(shutil.copytree(folder / "maps-all", folder / "maps-reviewed"))
    metrics = {name: entry | {"reviewed": entry["all"]} for name, entry in read_metrics(copy).items()}
    write_json(copy / "metrics.json", metrics)
    succeed(*stage1, "--keep", 0.5)
    assert all(file.exists() for file in files), "another share needs no other head"
    of_old_list = ("purified", "purification")
    assert (
        read_metrics(copy)
        == {
            name: {key: value for key, value in entry.items() if key not in of_old_list}
            for name, entry in metrics.items()
        }
        != metrics
    )
    succeed(*stage1, "--keep", 0.5, "--aggregate", "max")
    assert not any(file.exists() for file in files), "what the old head has scored is gone with it"
    assert all("reviewed" not in entry and "all" in entry for entry in read_metrics(copy).values())
    assert (folder / "threshold-all.json").exists() and (folder / "maps-all").exists()


def test_what_a_memory_has_learned_is_scored_by_those_sub_models_of_stage_1_that_have_not_seen_it(
    tmp_path, monkeypatch
):
    scores, subset = np.random.default_rng(0).random((9, 3), np.float32), np.arange(9, dtype=np.int32) % 3
    dataset = Dataset(tmp_path, "folder", "nut", tuple(Record(f"{i}.png", None, (), "") for i in range(9)), ())
    write_scores(tmp_path / "nut", dataset.train, Stage1Result(subset, scores, scores[:, 0], subset >= 0))
    own = {"detector": "padim", "set": {"ridge": 0.01}, "image_score": "max"}
    own |= {"steps": 1, "learning_rate": 0.1, "batch_size": 2}
    stage = SimpleNamespace(run=tmp_path, final="all", setup=SimpleNamespace(detector="padim", settings=None))
    images = np.array([7, 2, 3])

    def fair(params=None, submodels=3, images=images, alike=evaluate.SAME, **final):
        config = own | {"submodels": submodels, "folds": "others", "stage2": {"all": own | final}}
        return evaluate.fair_scores(stage, dataset, config, params, images, alike)

    np.testing.assert_allclose(fair(), scores[images, subset[images]], rtol=1e-6)
    assert fair(submodels=1) is fair(images=images[:0]) is None
    assert fair(detector="subspace") is fair(set={"ridge": 1.0}) is fair(image_score="top-1%") is None
    scale = evaluate.SAME + evaluate.SAME_TRAINING
    assert fair(steps=2, batch_size=1) is not None and fair(alike=scale) is not None
    assert all(
        fair(alike=scale, **other) is None for other in ({"steps": 2}, {"learning_rate": 0.2}, {"batch_size": 1})
    )

    # ---- with a head the sub-models score them once more ----
    anew = np.random.default_rng(1).random((3, 3), np.float32)
    monkeypatch.setattr(evaluate, "open_checkpoints", nullcontext)
    monkeypatch.setattr(evaluate, "restore_params", lambda folder: folder.name)
    given = []
    monkeypatch.setattr(evaluate, "scored", lambda *arguments: given.append(arguments) or anew)
    headed = fair(Headed(None, {"bias": np.ones(1)}))
    np.testing.assert_allclose(headed, anew[np.arange(3), subset[images]], rtol=1e-6)
    params = given[0][3]
    assert params.detector == "stage1" and params.head["bias"].tolist() == [1, 1, 1]


def test_where_all_that_is_not_dropped_is_called_defective_there_is_no_threshold_until_the_list_changes(
    copy, monkeypatch
):
    dataset, flags = training_set(copy / "tile"), ("evaluate", "--run", copy, "--train-on", "all")
    kept = np.array([row["kept"] == "1" for row in rows_of(copy / "tile" / "scores.csv")])
    write_marks(copy / "tile", dataset, np.where(kept, DEFECT, UNSAID))
    purified = np.flatnonzero(kept)
    assert not len(normal_images("reviewed", copy / "tile", dataset, purified))
    with monkeypatch.context() as patch:  # one that is there, as if it were trained on reviewed
        patch.setattr(evaluate, "normal_images", lambda _, *others: normal_images("reviewed", *others))
        assert "no threshold, since every image that is not dropped" in succeed(*flags)
        assert read_threshold(copy / "tile", "all") is None and "all is evaluated" in succeed(*flags)
        page = (copy / "report.html").read_text(encoding="utf-8")
        assert "no threshold: every training image that is not dropped is marked as a defect." in page
    assert "all is evaluated" not in succeed(*flags)
    assert read_threshold(copy / "tile", "all")["images"] == len(purified)


def test_an_outdated_detector_does_not_hold_up_another_one_of_the_same_train_on(copy):
    folder, config = copy / "tile", read_config(copy, "", "")
    own = config["stage2"]["all"] | {"train_on": "reviewed"}  # nothing is marked: the list is the same
    stage2 = config["stage2"] | {"reviewed-padim": own | {"detector": "padim", "set": {}}, "reviewed": own}
    write_config(copy, config | {"stage2": stage2})
    shutil.copytree(folder / "stage2-all", folder / "stage2-reviewed")
    write_json(folder / "review-reviewed.json", evidence(np.empty(0)) | {"why": "no head"})
    save_finished(CheckpointFolder(folder / "stage2-reviewed-padim", "of an old list"), 3, {"a": np.zeros(1)})
    assert "stage2-reviewed-padim: the list" in refuse("evaluate", "--run", copy)
    told = succeed("evaluate", "--run", copy, "--train-on", "reviewed")
    assert "reviewed-padim is outdated" in told and "     reviewed " in told
    shutil.rmtree(folder / "stage2-reviewed")
    assert "stage2-reviewed-padim: the list" in refuse("evaluate", "--run", copy, "--train-on", "reviewed")


def test_purification_is_judged_by_the_list_as_a_person_left_it(finished, data):
    dataset = load_category(data, "tile", 0.25)
    labels = [record.label for record in dataset.train]
    for images in (np.arange(5), np.flatnonzero(labels)):
        facts = evaluate.purification_facts(dataset, Choice(images), finished / "tile")
        assert (facts["kept"], facts["contamination_before"]) == (len(images), 0.25)
        assert facts["contamination_after"] == np.mean(np.array(labels)[images])


def test_corrected_labels_and_kinds_are_evaluated_again(finished, data):
    dataset, folder = load_category(data, "tile", 0.25), finished / "tile"
    stage = Stage(finished, Evaluate(), None, None, "purified")
    normal = read_purified(folder, dataset).indices
    assert evaluate.evaluated(folder, stage, dataset, normal)
    *others, last = dataset.test
    for changes in ({"label": 1 - last.label}, {"label": None}, {"kind": "dent"}):
        corrected = (*others, dataclasses.replace(last, **changes))
        assert not evaluate.evaluated(folder, stage, dataclasses.replace(dataset, test=corrected), normal), changes


@pytest.mark.parametrize("killed", ["write_kinds", "write_predictions"])
def test_an_evaluation_that_was_killed_in_its_writing_is_not_taken_for_done(copy, monkeypatch, killed):
    write = getattr(evaluate.tables, killed)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate.tables, killed, lambda *arguments: write(*arguments) or 1 / 0)
        succeed("evaluate", "--run", copy, "--train-on", "all", "--overwrite")
    told = succeed("evaluate", "--run", copy)
    assert "purified is evaluated" in told and "all is evaluated" not in told
    assert "all" in read_metrics(copy)["tile"]


def test_an_interrupted_selection_ends_as_if_it_had_not_been(copy, finished, stage1, monkeypatch):
    succeed(*stage1, "--keep", 0.5)
    expected = contents(copy)
    shutil.rmtree(copy)
    shutil.copytree(finished, copy)
    for name in ("write_scores", "write_suspects", "write_purified"):  # one more file is written each time
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(stage1_partition, name, lambda *arguments: 1 / 0)
            succeed(*stage1, "--keep", 0.5)
        assert read_config(copy, "", "")["keep"] == 0.5
    assert "--keep 0.5" in refuse("stage2_train", "--run", copy, "--steps", 3)
    succeed(*stage1, "--keep", 0.5)
    assert contents(copy) == expected and sum(row["kept"] == "1" for row in rows_of(copy / "tile/scores.csv")) == 6


def test_a_list_that_was_edited_by_hand_is_not_lost(copy, stage1):
    purified = copy / "tile" / "purified.txt"
    before, edited = contents(copy), purified.read_text() + "# checked by hand\n"
    purified.write_text(edited)
    assert "is finished" in succeed(*stage1)  # the same settings
    line = refuse(*stage1, "--keep", 0.5)
    assert "purified.txt was edited by hand" in line and "delete it for that, or give --overwrite" in line
    assert purified.read_text() == edited and read_config(copy, "", "")["keep"] == "auto"
    purified.write_text(edited)
    (copy / "tile" / "scores.csv").unlink()  # so nobody knows
    assert "edited by hand" in refuse(*stage1, "--keep", 0.5)
    (copy / "tile" / "scores.csv").write_bytes(before["tile/scores.csv"])
    purified.unlink()
    assert "another selection" in succeed(*stage1, "--keep", 0.5)
    assert len(purified.read_text().splitlines()) == 6
