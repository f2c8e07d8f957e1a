"""Another selection from a finished stage 1: quick, exact, and never at the cost of a list that was edited by hand."""

import dataclasses
import shutil

import numpy as np
import pytest
from helpers import TILE, contents, refuse, rows_of, succeed

import evaluate
import stage1_partition
from llb.checkpoint import CheckpointFolder, save_finished
from llb.config import Evaluate
from llb.data import load_category
from llb.files import write_json
from llb.head import evidence
from llb.marks import DEFECT, UNSAID, normal_images, training_set, write_marks
from llb.runfiles import read_config, write_config
from llb.stage import Stage
from llb.tables import read_metrics, read_purified, read_threshold


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
    assert "all: its threshold is of an older list of images; run evaluate.py again" in page
    assert "the list of images that it was taken from has changed" in page and "of them score below it" not in page
    assert "Defective after" in page and "Ranking AUROC" in page, "scores.csv has them, too"
    assert "purified," not in table and "tile,all," in table, "as in metrics.json"
    succeed("stage2_train", "--run", copy, "--steps", 3, "--overwrite")
    told = succeed("evaluate", "--run", copy)
    assert "is evaluated" not in told and read_threshold(copy / "tile", "all")["images"] == 6
    page = (copy / "report.html").read_text()
    assert "of an older list" not in page and "taken from the\n6 training images that are not dropped" in page
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
