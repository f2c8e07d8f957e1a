"""The three scripts, one after the other, on small images: what their files hold."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import SMALL, TILE, contents, dates, draw, draw_mvtec, refuse, rows_of, succeed
from PIL import Image

import evaluate
from llb.checkpoint import open_checkpoints, restore_params
from llb.detectors.common import SCORES
from llb.detectors.released import released_name
from llb.files import UserError
from llb.masks import MaskRule, load_masks
from llb.tables import read_threshold
from llb.tiles import read_tiles


def test_scores_hold_every_training_image_once_and_no_test_image(finished, data):
    rows = rows_of(finished / "tile" / "scores.csv")
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths) == 12  # 9 good and 3 moved: a quarter
    assert all((data / path).is_file() for path in paths)
    assert [row["label"] for row in rows] == ["1" if "square" in path else "0" for path in paths]
    assert {row["subset"] for row in rows} == {"0", "1", "2"}
    for row in rows:
        assert float(row["score"]) == pytest.approx(np.mean([float(row[f"model_{k}"]) for k in range(3)]), rel=1e-6)
    by_score = sorted(rows, key=lambda row: -float(row["score"]))
    assert [int(row["rank"]) for row in by_score] == list(range(1, 13))
    kept = [row["path"] for row in rows if row["kept"] == "1"]
    assert (finished / "tile" / "purified.txt").read_text().splitlines() == kept
    test = {row["path"] for row in rows_of(finished / "tile" / "predictions-purified.csv")}
    assert not test & set(paths) and len(test) == 3 + 6 - 3


def test_metrics_report_and_facts_are_complete(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    names = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"}
    for train_on in ("purified", "all"):
        values = dict(metrics["tile"][train_on])
        assert values.pop("sample_auroc") is None  # which only Real-IAD has
        assert values.keys() == names and all(0 <= value <= 1 for value in values.values())
        assert metrics["mean"][train_on] == values
    facts, config = metrics["tile"]["purification"], json.loads((finished / "config.json").read_text())
    assert facts["n"] == 12 and facts["contamination_before"] == 0.25
    assert (finished / "metrics.csv").exists() and (finished / "report.html").exists()
    threshold = read_threshold(finished / "tile", "purified")
    assert threshold["images"] == facts["kept"] and 0 <= threshold["false_alarm_rate"] <= 1
    assert config["versions"]["jax"] == jax.__version__ and config["device"] == "CPU, seen as 3 devices"


def test_maps_read_back_as_the_scores_say(finished):
    for row in rows_of(finished / "tile" / "predictions-all.csv"):
        with Image.open(finished / "tile" / "maps-all" / f"{row['path']}.png") as image:
            assert image.mode == "I;16" and image.size == (32, 32)
            heat = np.asarray(image).astype(np.float32) * float(image.info["scale"])
        assert float(SCORES["top-1%"](None, heat[None])[0]) == pytest.approx(float(row["score"]), rel=1e-3)


def test_dropped_images_are_the_planted_defects_and_stage_2_trains_on_the_others(tmp_path):
    """In the released code two permutations get lost: there the kept images are not those with low scores."""
    mixed, pure, defects = tmp_path / "mixed", tmp_path / "pure", {7, 12, 18}
    names = [f"{name:02}.png" for name in np.random.default_rng(4).permutation(24)]  # not in the order of drawing
    for i, name in enumerate(names):
        draw(mixed / name, i, defect=i in defects)
        if i not in defects:
            draw(pure / name, i)
    planted, detectors = {names[i] for i in defects}, []
    # a folder that never held the defects gives the same detector
    for folder, train_on in ((mixed, "purified"), (pure, "all")):
        run = tmp_path / f"run of {folder.name}"
        succeed("stage1_partition", "--data", folder, "--out", run, "--keep", 21 / 24, "--seed", 3, *SMALL)
        succeed("stage2_train", "--run", run, "--train-on", train_on, "--steps", 3)
        with open_checkpoints(run / folder.name / f"stage2-{train_on}") as checkpoints:
            detectors.append(restore_params(checkpoints))
    jax.tree.map(np.testing.assert_array_equal, *detectors)
    results = tmp_path / "run of mixed" / "mixed"
    rows = rows_of(results / "scores.csv")
    assert {row["path"] for row in rows if row["kept"] == "0"} == planted
    assert {row["path"] for row in rows if int(row["rank"]) <= 3} == planted
    assert (results / "purified.txt").read_text().splitlines() == sorted(set(names) - planted)


def test_a_plain_folder_is_scored_whole_without_metrics(tmp_path):
    run = tmp_path / "run"
    for i in range(6):
        draw(tmp_path / "parts" / "deep" / f"{i}.png", i)
    cache = ("--cache", tmp_path / "cache")
    assert "6 to compute" in succeed("stage1_partition", "--data", tmp_path / "parts", "--out", run, *SMALL, *cache)
    (shard,) = (tmp_path / "cache").glob("features/tiny-32-*/*.npy")
    written = shard.stat().st_ino
    assert "already computed" in succeed("stage2_train", "--run", run, "--steps", 3, *cache)
    note = "there is no test set: the training images are scored, the dropped ones too"
    assert f"parts: {note}" in succeed("evaluate", "--run", run, *cache) and note in (run / "report.html").read_text()
    assert shard.stat().st_ino == written and not (run / "cache").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["parts"]["purified"].values()) == {None}
    assert [row["label"] for row in rows_of(run / "parts" / "predictions-purified.csv")] == [""] * 6


def test_training_images_of_known_labels_are_scored_without_rates_of_false_alarms_and_misses(tmp_path):
    run = tmp_path / "run"
    for i in range(6):
        draw(tmp_path / "root" / "tile" / "train" / "good" / f"{i}.png", i)
    cache = ("--cache", tmp_path / "cache")
    flags = ("--detector", "padim", "--encoder", "tiny", "--image-size", 32, *cache)
    succeed("stage1_partition", "--data", tmp_path / "root", "--out", run, *flags)
    succeed("stage2_train", "--run", run, *cache)
    out, page = succeed("evaluate", "--run", run, *cache), (run / "report.html").read_text()
    assert "tile, purified: threshold " in out and not re.search("false alarms|missed", out)
    assert "of 6 images score above it" in page and "False alarms among normal test images" not in page
    facts = json.loads((run / "tile" / "threshold-purified.json").read_text())
    assert facts["false_alarm_rate"] is None and facts["missed_rate"] is None
    assert [row["label"] for row in rows_of(run / "tile" / "predictions-purified.csv")] == ["0"] * 6

    # ---- a detector whose maps of these images are shown: none is called a false alarm ----
    succeed("stage2_train", "--run", run, "--detector", "dinomaly", "--steps", 1, *cache)
    succeed("evaluate", "--run", run, *cache)
    page = (run / "report.html").read_text()
    assert "From the highest score to the lowest" in page and not re.search("[Ff]alse alarms?[,<]", page)


@pytest.mark.slow
def test_without_the_cache_the_results_are_the_same(finished, data, tmp_path):
    cache = tmp_path / "cache"
    told = succeed("stage1_partition", "--data", data, "--out", tmp_path, "--no-cache", "--cache", cache, *TILE)
    # else stage 2 would keep features, and elsewhere
    assert told.splitlines()[-1] == f"next: python stage2_train.py --run {tmp_path} --cache {cache} --no-cache"
    assert not cache.exists() and (tmp_path / "tile" / "purified.txt").exists()
    assert contents(tmp_path).items() <= contents(finished).items()


@pytest.mark.slow
def test_several_categories_share_a_run_whose_interrupted_evaluation_continues(tmp_path, monkeypatch):
    for name, good in (("one", 9), ("two", 7)):
        draw_mvtec(tmp_path / "data", name, good)
    run, flags = tmp_path / "run", ("--data", tmp_path / "data", *SMALL)
    refusal = refuse("stage1_partition", *flags, "--out", run)
    assert "one" in refusal and "two" in refusal
    succeed("stage1_partition", *flags, "--category", "all", "--out", run)
    succeed("stage2_train", "--run", run, "--steps", 3)

    def interrupted(stage, dataset, *others, whole=evaluate.evaluate):
        if dataset.category == "two":
            raise UserError("no power")
        return whole(stage, dataset, *others)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", interrupted)
        assert "no power" in refuse("evaluate", "--run", run)
    assert list(json.loads((run / "metrics.json").read_text())) == ["one"]
    written = dates(run / "one")
    assert "one: purified is evaluated" in succeed("evaluate", "--run", run)
    assert dates(run / "one") == written
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["one", "two", "mean"] and metrics["one"].keys() == {"purified", "purification"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", interrupted)
        assert "no power" in refuse("evaluate", "--run", run, "--overwrite")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["mean"] == {} and "purified" in metrics["one"], "the mean was of scores that are half replaced"


def test_another_final_detector_stands_beside_stage_1s(tmp_path, data):
    run = tmp_path / "run"
    flags = ("--detector", "padim", "--noise-ratio", "0.25", "--encoder", "tiny", "--image-size", "32")
    succeed("stage1_partition", "--data", data, "--out", run, *flags)
    succeed("stage2_train", "--run", run)
    for _ in range(2):  # the second time it is finished
        out = succeed("stage2_train", "--run", run, "--detector", "patchcore", "--set", "fraction=0.5")
    assert "stage 2 on purified-patchcore is finished" in out
    assert "fraction" in refuse("stage2_train", "--run", run, "--detector", "patchcore")
    assert "--steps: padim is fitted" in refuse("stage2_train", "--run", run, "--train-on", "all", "--steps", 5)
    succeed("stage2_train", "--run", run, "--detector", "simplenet", "--steps", 3, "--train-on", "all")
    table = succeed("evaluate", "--run", run, "--save-maps")
    names = ["purified", "purified-patchcore", "all-simplenet"]
    assert all(f"tile     {name} " in table for name in names)
    assert set(names) <= json.loads((run / "metrics.json").read_text())["mean"].keys()
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in names)
    for row in rows_of(run / "tile" / "predictions-all-simplenet.csv"):  # its distances may be negative
        with Image.open(run / "tile" / "maps-all-simplenet" / f"{row['path']}.png") as image:
            heat = np.asarray(image) * float(image.info["scale"]) + float(image.info.get("offset", 0))
        assert np.isfinite(heat).all() and heat.max() > heat.min()
    # PaDiM fits what it has seen: each image's score is of the sub-model that has not seen it (it learned the others)
    rows = [row for row in rows_of(run / "tile" / "scores.csv") if row["kept"] == "1"]
    unseen = [float(row[f"model_{row['subset']}"]) for row in rows]
    threshold = read_threshold(run / "tile", "purified")
    assert threshold["threshold"] == pytest.approx(np.quantile(unseen, 0.99)) and threshold["out_of_fold"] == 1
    assert read_threshold(run / "tile", "purified-patchcore") is None, "stage 1 has none of a bank"
    succeed("stage1_partition", "--data", data, "--out", run, *flags, "--overwrite")
    assert not list((run / "tile").glob("stage2-*/*")) and not list((run / "tile").glob("*-purified*"))


def test_dinomalys_protocol_cuts_out_the_centre_judges_at_256_and_takes_released_weights(tmp_path, data, monkeypatch):
    run, rules = tmp_path / "run", []
    monkeypatch.setattr(evaluate, "load_masks", lambda *given: rules.append(given[2:]) or load_masks(*given))
    flags = ("--protocol", "dinomaly", "--noise-ratio", "0.25", *SMALL, "--set", "groups=layers,attention=softmax")
    succeed("stage1_partition", "--data", data, "--out", run, *flags)
    config = json.loads((run / "config.json").read_text())
    assert (config["resize"], config["image_size"], config["set"]["groups"]) == (37, 32, "layers")
    with open_checkpoints(run / "tile" / "stage1") as checkpoints:
        params = restore_params(checkpoints)["params"]
    tensors = {}
    for path, leaf in flatten_dict(jax.tree.map(lambda leaf: leaf[0], params), sep="/").items():
        tensors[released_name(path)] = np.ascontiguousarray(leaf.T if path.endswith("kernel") else leaf)
    safetensors.numpy.save_file(tensors, tmp_path / "released.pth")
    out = succeed("stage2_train", "--run", run, "--released", tmp_path / "released.pth")
    assert "the final detector is" in out and "note: the release interpolates" not in out
    tensors["bottleneck.0.fc1.bias"] = tensors["bottleneck.0.fc1.bias"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "released.pth")
    assert "released_digest: " in refuse("stage2_train", "--run", run, "--released", tmp_path / "released.pth")
    succeed("evaluate", "--run", run, "--save-maps")
    with Image.open(next((run / "tile" / "maps-purified").rglob("*.png"))) as image:
        assert image.size == (256, 256)
    assert json.loads((run / "metrics.json").read_text())["tile"]["purified"]["pixel_aupro"] is not None
    assert set(rules) == {(32, MaskRule(37, any_share=True, side=256)), (32, MaskRule(37))}, "judged, and drawn"
    succeed("evaluate", "--run", run, "--images", data / "tile" / "test")  # their centre, too
    new = {f"tile/test/{row['path']}": row["score"] for row in rows_of(run / "tile/images-test/scores-purified.csv")}
    known = rows_of(run / "tile" / "predictions-purified.csv")
    assert known and all(new[row["path"]] == row["score"] for row in known)


def test_llbnads_protocol_takes_passes_and_the_maximum_in_the_test(tmp_path, data):
    run = tmp_path / "run"
    succeed("stage1_partition", "--data", data, "--out", run, "--protocol", "llbnad", *TILE, "--submodels", 3)
    assert len((run / "tile" / "purified.txt").read_text().splitlines()) == 5  # 0.4 of 12
    succeed("stage2_train", "--run", run)
    assert [folder.name for folder in (run / "tile" / "stage2-purified").iterdir()] == ["6"]  # 2 passes of ⌈5 / 2⌉
    succeed("evaluate", "--run", run, "--save-maps")
    for row in rows_of(run / "tile" / "predictions-purified.csv"):
        with Image.open(run / "tile" / "maps-purified" / f"{row['path']}.png") as image:
            assert np.asarray(image).max() * float(image.info["scale"]) == pytest.approx(float(row["score"]), rel=1e-4)


def test_images_that_a_memory_has_learned_from_are_scored_by_sub_models_that_have_not(tmp_path):
    run, cache = tmp_path / "run", ("--cache", tmp_path / "cache")
    for i in range(6):
        draw(tmp_path / "parts" / f"{i}.png", i, defect=i == 4)
    flags = ("--encoder", "tiny", "--image-size", "32", "--detector", "patchcore", *cache)
    succeed("stage1_partition", "--data", tmp_path / "parts", "--out", run, *flags)
    succeed("stage2_train", "--run", run, *cache)
    succeed("stage2_train", "--run", run, "--detector", "softpatch", *cache)
    assert "python evaluate.py" not in (run / "report.html").read_text()
    told = succeed("evaluate", "--run", run, *cache)
    assert "parts, purified: the images are scored by stage 1's sub-models that have not seen them" in told
    assert "parts, purified-softpatch: it scores images that it has learned from far too low; give it new" in told
    assert "no metric is defined" in told
    rows = rows_of(run / "parts" / "scores.csv")
    unseen = [np.mean([float(row[f"model_{k}"]) for k in range(3) if k != int(row["subset"])]) for row in rows]
    purified, other = (
        rows_of(run / "parts" / f"predictions-{final}.csv") for final in ("purified", "purified-softpatch")
    )
    assert [row["path"] for row in purified] == [row["path"] for row in rows]
    np.testing.assert_allclose([float(row["score"]) for row in purified], unseen, rtol=1e-5)
    assert np.median([float(row["score"]) for row in other]) < np.median(unseen) / 2, "a bank holds its own patches"
    assert read_tiles(run / "parts" / "tiles-purified.json")["tiles"] == {}
    shutil.copytree(tmp_path / "parts", tmp_path / "more" / "earlier")  # a folder that has grown
    draw(tmp_path / "more" / "new.png", 7)
    told = succeed("evaluate", "--run", run, "--images", tmp_path / "more")
    why = "it scores them far too low, and they get no verdict\n"
    assert f"parts, purified: 6 of these are images that it has learned from: {why}" in told
    assert "parts, purified: 0 of 1 images score above the threshold" in told
    verdicts = {row["path"]: row["verdict"] for row in rows_of(run / "parts/images-more/scores-purified.csv")}
    assert verdicts == {f"earlier/{i}.png": "" for i in range(6)} | {"new.png": "fine"}
    page = (run / "report.html").read_text()  # with nothing of what is not there: a choice, labels, steps
    assert (
        "far too low, and stage 1 has no scores of the same training to put in their place." in page
        and "marked as a defect." not in page
    )
    assert "python evaluate.py" in page and "Steps of each" not in page
    assert not re.search("key dropped|threshold: kept with|is undefined", page)
