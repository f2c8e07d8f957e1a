"""The three scripts as a user runs them: whole runs on small data, going on, refusing, and bad input."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llb.console
import llb.encoder
import llb.features
from llb import load_encoder
from llb.config import Stage2
from llb.run import command_line, record_stage2
from llb.weights_io import write_tree

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--encoder", "tiny", "--image-size", "32", "--batch-size", "2")


def command(capsys, script: str, *arguments) -> tuple[int, str, str]:
    """Run a script's main in this process (which keeps the compiled steps): status, standard output and error."""
    module = importlib.import_module(script)
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        try:
            llb.console.run(module.main)
        except SystemExit as stop:
            status = stop.code or 0
    return status, *capsys.readouterr()


def draw(file: Path, seed: int, defect: bool = False) -> None:
    """A 40 × 40 picture: stripes with noise, and a bright square where it is defective."""
    random = np.random.default_rng(seed)
    pixels = 120 + 40 * np.sin(np.arange(40) / 2)[:, None, None] + random.normal(0, 6, (40, 40, 3))
    if defect:
        pixels[8:20, 22:34] += 90
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


def draw_mvtec(root: Path, category: str = "tile", good: int = 9) -> Path:
    for i in range(good):
        draw(root / category / "train" / "good" / f"{i:03}.png", i)
    for i in range(3):
        draw(root / category / "test" / "good" / f"{i:03}.png", 100 + i)
    mask = np.zeros((40, 40), np.uint8)
    mask[8:20, 22:34] = 255
    for i in range(6):
        draw(root / category / "test" / "square" / f"{i:03}.png", 200 + i, defect=True)
        file = root / category / "ground_truth" / "square" / f"{i:03}_mask.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    return root


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on interruptions (checkpoints hold dates, the cache is a cache)."""
    names = ("scores.csv", "purified.txt", "suspects.png", "metrics.json", "metrics.csv", "config.json")
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted(run.rglob("*"))
        if file.name in names or file.name.startswith(("predictions-", "examples-"))
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_mvtec(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A whole run: stage 1, stage 2 on purified and on all, evaluation with maps."""
    run = tmp_path_factory.mktemp("runs") / "run"

    class Quiet:
        @staticmethod
        def readouterr():
            return "", ""

    for script, *arguments in (
        ("stage1_partition", "--data", data, "--out", run, "--noise-ratio", 0.25, "--steps", 4, *SMALL),
        ("stage2_train", "--run", run, "--steps", 3),
        ("stage2_train", "--run", run, "--steps", 3, "--train-on", "all"),
        ("evaluate", "--run", run, "--save-maps"),
    ):
        assert command(Quiet, script, *arguments)[0] == 0
    return run


def test_scores_hold_every_training_image_once_with_its_label(finished, data):
    rows = rows_of(finished / "tile" / "scores.csv")
    paths = [row["path"] for row in rows]
    assert len(set(paths)) == len(paths) == 12  # 9 good and 3 moved: a quarter
    assert all((data / path).is_file() for path in paths)
    assert [row["label"] for row in rows] == ["1" if "square" in path else "0" for path in paths]
    assert {row["subset"] for row in rows} == {"0", "1", "2"}
    for row in rows:
        models = [float(row[f"model_{k}"]) for k in range(3)]
        assert float(row["score"]) == pytest.approx(np.mean(models), rel=1e-6)
    by_score = sorted(rows, key=lambda row: -float(row["score"]))
    assert [int(row["rank"]) for row in by_score] == list(range(1, 13))


def test_purified_lists_exactly_the_kept_paths(finished):
    kept = [row["path"] for row in rows_of(finished / "tile" / "scores.csv") if row["kept"] == "1"]
    assert (finished / "tile" / "purified.txt").read_text().splitlines() == kept


def test_moved_defects_are_not_tested_on(finished):
    train = {row["path"] for row in rows_of(finished / "tile" / "scores.csv")}
    test = {row["path"] for row in rows_of(finished / "tile" / "predictions-purified.csv")}
    assert not train & test and len(test) == 3 + 6 - 3


def test_metrics_and_report_are_complete(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    names = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro"}
    for train_on in ("purified", "all"):
        assert metrics["tile"][train_on].keys() == names
        assert all(0 <= value <= 1 for value in metrics["tile"][train_on].values())
        assert metrics["mean"][train_on] == metrics["tile"][train_on]
    assert metrics["tile"]["purification"]["n"] == 12
    assert metrics["tile"]["purification"]["contamination_before"] == 0.25
    assert (finished / "metrics.csv").exists() and (finished / "report.html").exists()
    config = json.loads((finished / "config.json").read_text())
    assert config["seed"] == 0 and config["versions"]["jax"] and config["device"] and "git_commit" in config
    assert config["stage2"]["all"]["steps"] == 3


def test_maps_read_back_as_the_scores_say(finished):
    from llb.dinomaly import image_score

    rows = rows_of(finished / "tile" / "predictions-all.csv")
    for row in rows:
        with Image.open(finished / "tile" / "maps-all" / f"{row['path']}.png") as image:
            assert image.mode == "I;16"
            heat = np.asarray(image).astype(np.float32) * float(image.info["scale"])
        assert heat.shape == (32, 32)
        assert float(image_score(heat[None])[0]) == pytest.approx(float(row["score"]), rel=1e-3)


def test_maps_are_let_go_of_and_examples_show_their_own_images_map(finished, tmp_path, capsys, monkeypatch):
    """Batches of two in place of one of all six: the same files, and never more than two batches alive."""
    import evaluate
    import llb.train

    run = shutil.copytree(finished, tmp_path / "run")
    batches, alive, examples = [], [], []
    accumulate, contact_sheet = evaluate.accumulate, evaluate.contact_sheet

    def watched(counts, masks, maps):
        memory = maps
        while isinstance(memory.base, np.ndarray):  # a view: watch what holds the memory
            memory = memory.base
        batches.append(weakref.ref(memory))
        alive.append(sum(batch() is not None for batch in batches))
        return accumulate(counts, masks, maps)

    def shown(tiles):
        examples.extend(tiles)
        return contact_sheet(tiles)

    monkeypatch.setattr(llb.train, "SCORE_BATCH", 2)
    monkeypatch.setattr(evaluate, "accumulate", watched)
    monkeypatch.setattr(evaluate, "contact_sheet", shown)
    assert command(capsys, "evaluate", "--run", run, "--train-on", "all", "--save-maps", "--overwrite")[0] == 0
    assert len(batches) == 3 and max(alive) <= 2
    metrics, expected = (json.loads((folder / "metrics.json").read_text())["tile"]["all"] for folder in (run, finished))
    assert metrics == pytest.approx(expected, abs=1e-5)
    assert len(examples) == 6 and not (run / "tile" / ".maps-all.tmp").exists()
    for _, heat, (_, path) in examples:
        with Image.open(run / "tile" / "maps-all" / f"{path}.png") as image:
            np.testing.assert_allclose(np.asarray(image) * float(image.info["scale"]), heat, atol=2e-5)


def test_pixel_metrics_that_may_be_off_are_said_to_be(finished, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("predictions-*"))
    import evaluate

    for error, said in ((0.9e-5, False), (3e-5, True)):
        monkeypatch.setattr(evaluate, "pixel_metrics_error", lambda counts, error=error: {"pixel_aupro": error})
        status, out, _ = command(capsys, "evaluate", "--run", run, "--overwrite", "--train-on", "all")
        assert status == 0 and ("pixel metrics on all may be off by 3e-05" in out) == said


def test_finished_stages_are_not_repeated(finished, data, capsys):
    before = {file: file.stat().st_mtime_ns for file in (finished / "tile").rglob("*") if file.is_file()}
    out = command(
        capsys, "stage1_partition", "--data", data, "--out", finished, "--noise-ratio", 0.25, "--steps", 4, *SMALL
    )
    assert out[0] == 0 and "stage 1 is finished" in out[1]
    out = command(capsys, "stage2_train", "--run", finished, "--steps", 3)
    assert out[0] == 0 and "is finished" in out[1]
    out = command(capsys, "evaluate", "--run", finished)
    assert out[0] == 0 and "is evaluated" in out[1] and "report.html" in out[1].splitlines()[-1]
    assert before == {file: file.stat().st_mtime_ns for file in (finished / "tile").rglob("*") if file.is_file()}


def test_other_settings_are_refused_with_the_difference(finished, data, capsys):
    status, _, err = command(
        capsys, "stage1_partition", "--data", data, "--out", finished, "--noise-ratio", 0.25, "--steps", 5, *SMALL
    )
    assert status == 2 and "steps: 4, now 5" in err and "--overwrite" in err
    status, _, err = command(capsys, "stage2_train", "--run", finished, "--steps", 7)
    assert status == 2 and "steps: 3, now 7" in err


def test_new_weights_in_the_place_of_the_old_are_refused(finished, data, tmp_path, capsys, monkeypatch):
    params = load_encoder("tiny").params
    new = tmp_path / "new.safetensors"
    write_tree(params | {"cls_token": 2 * params["cls_token"]}, new, {})
    monkeypatch.setattr(llb.encoder, "TINY_WEIGHTS", new)
    for script, *arguments in (
        ("stage1_partition", "--data", data, "--out", finished, "--noise-ratio", 0.25, "--steps", 4, *SMALL),
        ("stage2_train", "--run", finished, "--steps", 3),
        ("evaluate", "--run", finished),
    ):
        status, _, err = command(capsys, script, *arguments)
        assert status == 2 and "other weights of tiny" in err and len(err.splitlines()) == 1, err


def test_an_edited_list_is_what_stage_2_trains_on_and_is_reported(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    purified = run / "tile" / "purified.txt"
    lines = purified.read_text().splitlines()
    purified.write_text("\n".join(lines[1:]) + "\n")
    status, _, err = command(capsys, "stage2_train", "--run", run, "--steps", 3)
    assert status == 2 and "has changed" in err and "--overwrite" in err
    status, out, _ = command(capsys, "stage2_train", "--run", run, "--steps", 3, "--overwrite")
    assert status == 0 and "edited by hand: 0 added, 1 removed" in out and f"training on {len(lines) - 1} of 12" in out
    status, out, _ = command(capsys, "evaluate", "--run", run)
    assert status == 0 and "edited by hand" in (run / "report.html").read_text()
    purified.write_text("tile/train/good/nothing.png\n")
    status, _, err = command(capsys, "stage2_train", "--run", run, "--steps", 3, "--overwrite")
    assert status == 2 and "line 1" in err and "nothing.png" in err


def test_a_detector_is_not_evaluated_beside_a_list_it_was_not_trained_on(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    purified = run / "tile" / "purified.txt"
    purified.write_text("\n".join(purified.read_text().splitlines()[1:]) + "\n")
    status, _, err = command(capsys, "evaluate", "--run", run)
    assert status == 2 and "has changed since this was trained" in err and len(err.splitlines()) == 1
    assert command(capsys, "evaluate", "--run", run, "--train-on", "all")[0] == 0


@pytest.mark.parametrize("script", ("stage2_train", "evaluate"))
def test_a_later_stage_given_elsewhere_says_which_images_it_misses(script, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": "images"}))
    status, _, err = command(capsys, script, "--run", run)
    assert status == 2 and "its images, images, are not there" in err and len(err.splitlines()) == 1


def test_a_list_saved_by_another_editor_is_read_or_refused_in_one_line(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    purified = run / "tile" / "purified.txt"
    text = purified.read_text()
    purified.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    status, out, _ = command(capsys, "stage2_train", "--run", run, "--steps", 3)
    assert status == 0 and "stage 2 on purified is finished" in out
    purified.write_bytes(text.encode("utf-16"))
    status, _, err = command(capsys, "stage2_train", "--run", run, "--steps", 3)
    assert status == 2 and "purified.txt is not UTF-8" in err and len(err.splitlines()) == 1


def test_a_damaged_table_or_a_deleted_list_is_named(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    scores, purified = run / "tile" / "scores.csv", run / "tile" / "purified.txt"
    whole = scores.read_text()
    for damaged in (whole.replace(",", ";"), whole.replace("0.", "0,"), "path,score\n"):
        scores.write_text(damaged)
        for script in ("stage2_train", "evaluate"):
            status, _, err = command(capsys, script, "--run", run)
            assert status == 2 and "scores.csv" in err and len(err.splitlines()) == 1, err
    scores.write_text(whole)
    purified.unlink()
    for script in ("stage2_train", "evaluate"):
        status, _, err = command(capsys, script, "--run", run)
        assert status == 2 and len(err.splitlines()) == 1 and "stage" in err, err


def test_an_interrupted_overwrite_leaves_nothing_that_looks_finished(finished, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    stage2 = ("stage2_train", "--run", run, "--steps", 3)

    def interrupted(folder, ignore_errors=False):
        if Path(folder).is_dir():
            next(file for file in Path(folder).rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        patch.setattr(os, "_exit", sys.exit)
        assert command(capsys, *stage2, "--overwrite")[0] == 130
    status, out, _ = command(capsys, *stage2)
    assert status == 0 and "is finished" not in out and "training on" in out
    assert command(capsys, *stage2, "--overwrite")[0] == 0
    assert not list(run.rglob(".*.old"))


def test_missing_weights_are_named_by_a_later_stage(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"weights": "gone.safetensors"}))
    for script in ("stage2_train", "evaluate"):
        status, _, err = command(capsys, script, "--run", run)
        assert status == 2 and "weights, gone.safetensors, are not there" in err and len(err.splitlines()) == 1


def test_a_damaged_cache_is_made_anew(finished, data, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "cache" / "tile" / "train" / "features.json").write_text("{")
    status, _, err = command(capsys, "stage2_train", "--run", run, "--steps", 3, "--train-on", "clean")
    assert status == 0 and json.loads((run / "cache" / "tile" / "train" / "features.json").read_text())


def test_a_planted_defect_that_is_dropped_is_the_planted_one(tmp_path, capsys):
    """Two permutations in the released code lose this: there the kept images are not those that scored low."""
    folder, defects = tmp_path / "unsorted", {7, 12, 18}
    names = np.random.default_rng(4).permutation(24)  # the names say nothing about the order of drawing
    for i, name in enumerate(names):
        draw(folder / f"{name:02}.png", i, defect=i in defects)
    planted = {f"{names[i]:02}.png" for i in defects}
    run = tmp_path / "run"
    keep = 21 / 24
    status, out, _ = command(
        capsys, "stage1_partition", "--data", folder, "--out", run, "--keep", keep, "--steps", 30, "--seed", 3, *SMALL
    )
    assert status == 0, out
    rows = rows_of(run / "unsorted" / "scores.csv")
    assert {row["path"] for row in rows if row["kept"] == "0"} == planted
    assert {row["path"] for row in rows if int(row["rank"]) <= 3} == planted
    assert not planted & set((run / "unsorted" / "purified.txt").read_text().splitlines())

    # and what stage 2 is fed are the features of the kept images, by their own paths
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("stage2_train")
        real = module.train

        def spy(training, fetch, subsets, keys, folder, digest, title):
            array = fetch(np.arange(24))
            seen.append(array[subsets[0]])
            return real(training, fetch, subsets, keys, folder, digest, title)

        patch.setattr(module, "train", spy)
        assert command(capsys, "stage2_train", "--run", run, "--steps", 1)[0] == 0
    kept = [row["path"] for row in rows if row["kept"] == "1"]
    fresh = encode_directly([folder / path for path in kept])
    np.testing.assert_allclose(seen[0].astype(np.float32), fresh, rtol=2e-3, atol=2e-3)


def encode_directly(files: list[Path]) -> np.ndarray:
    """Features of single images, by none of the machinery that keeps track of them."""
    from llb.data import load_image
    from llb.encoder import load_encoder

    encoder = load_encoder("tiny", image_size=32)
    encode = llb.features.make_encode(encoder)
    return np.concatenate([encode(load_image(file, 32)[None]) for file in files]).astype(np.float32)


def test_a_plain_folder_is_scored_whole_without_metrics(tmp_path, capsys):
    folder, run = tmp_path / "parts", tmp_path / "run"
    for i in range(6):
        draw(folder / "deep" / f"{i}.png", i)
    rounded = ("--precision", "bfloat16")  # later stages take it from the run, and find the features of stage 1
    assert command(capsys, "stage1_partition", "--data", folder, "--out", run, "--steps", 2, *rounded, *SMALL)[0] == 0
    status, out, _ = command(capsys, "stage2_train", "--run", run, "--steps", 2)
    assert status == 0 and "features of 6 images found" in out
    assert command(capsys, "evaluate", "--run", run)[0] == 0
    assert json.loads((run / "config.json").read_text())["precision"] == "bfloat16"
    assert len(rows_of(run / "parts" / "predictions-purified.csv")) == 6
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["parts"]["purified"].values()) == {None}
    assert [row["label"] for row in rows_of(run / "parts" / "scores.csv")] == [""] * 6


def test_without_the_cache_the_scores_are_the_same(finished, data, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ("--data", data, "--out", run, "--noise-ratio", 0.25, "--steps", 4, "--no-cache", *SMALL)
    assert command(capsys, "stage1_partition", *arguments)[0] == 0
    assert not (run / "cache").exists()
    for mine, cached in zip(rows_of(run / "tile" / "scores.csv"), rows_of(finished / "tile" / "scores.csv")):
        assert mine["path"] == cached["path"]
        assert float(mine["score"]) == pytest.approx(float(cached["score"]), rel=1e-5)


def test_features_are_computed_once_for_all_stages(data, tmp_path, capsys, monkeypatch):
    encoded = []
    real = llb.features.load_image
    monkeypatch.setattr(llb.features, "load_image", lambda path, size: encoded.append(path) or real(path, size))
    run = tmp_path / "run"
    assert command(capsys, "stage1_partition", "--data", data, "--out", run, "--steps", 2, *SMALL)[0] == 0
    assert command(capsys, "stage2_train", "--run", run, "--steps", 2, "--train-on", "all")[0] == 0
    assert command(capsys, "evaluate", "--run", run)[0] == 0
    assert len(encoded) == len(set(encoded)) == 9 + 9  # train and test, each once


def test_several_categories_share_one_run(tmp_path, capsys):
    draw_mvtec(tmp_path / "data", "one")
    draw_mvtec(tmp_path / "data", "two", good=7)
    run, data = tmp_path / "run", tmp_path / "data"
    assert (
        command(capsys, "stage1_partition", "--data", data, "--category", "all", "--out", run, "--steps", 2, *SMALL)[0]
        == 0
    )
    assert command(capsys, "stage2_train", "--run", run, "--steps", 2)[0] == 0
    assert command(capsys, "evaluate", "--run", run)[0] == 0
    metrics = json.loads((run / "metrics.json").read_text())
    values = [metrics[name]["purified"]["image_auroc"] for name in ("one", "two")]
    assert metrics["mean"]["purified"]["image_auroc"] == pytest.approx(np.mean(values))
    status, _, err = command(capsys, "stage1_partition", "--data", data, "--out", tmp_path / "r2", *SMALL)
    assert status == 2 and "one" in err and "two" in err and len(err.splitlines()) == 1


def test_an_interrupted_evaluation_goes_on_with_the_next_category(tmp_path, capsys, monkeypatch):
    evaluate = importlib.import_module("evaluate")
    for name in ("one", "two"):
        draw_mvtec(tmp_path / "data", name)
    run, given = tmp_path / "run", ["--data", tmp_path / "data", "--category", "all", "--steps", 1, *SMALL]
    assert command(capsys, "stage1_partition", *given, "--out", run)[0] == 0
    assert command(capsys, "stage2_train", "--run", run, "--steps", 1)[0] == 0
    whole, scored = evaluate.evaluate, []

    def until_two(dataset, *rest):
        scored.append(dataset.category)
        if scored == ["one", "two"]:
            raise llb.console.UserError("the power fails")
        return whole(dataset, *rest)

    monkeypatch.setattr(evaluate, "evaluate", until_two)
    assert command(capsys, "evaluate", "--run", run)[0] == 2
    assert command(capsys, "evaluate", "--run", run)[0] == 0
    assert scored == ["one", "two", "two"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["one", "two", "mean"] and metrics["one"].keys() == {"purified", "purification"}


def test_two_final_detectors_begun_at_once_are_both_recorded(tmp_path):
    """Each has read config.json before the other has written it."""
    (tmp_path / "config.json").write_text("{}")
    for train_on in ("purified", "all"):
        record_stage2(tmp_path, Stage2(train_on=train_on, steps=1))
    assert json.loads((tmp_path / "config.json").read_text())["stage2"].keys() == {"purified", "all"}


# stage 1 with a checkpoint after each step
EAGER = """
import llb.console, llb.train, stage1_partition
llb.train.SAVE_SECONDS, llb.train.SAVE_SHARE = 0.0, 1e9
llb.console.run(stage1_partition.main)
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_files(data, tmp_path):
    """kill -9 while features are computed, then in the middle of training; the same command goes on each time."""
    run = tmp_path / "run"
    arguments = ["--data", data, "--out", run, "--noise-ratio", 0.25, "--steps", 100, *SMALL]
    line = [sys.executable, "-c", EAGER, *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def kill_when(reached) -> None:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.wait()

    def steps_saved() -> list[int]:
        return [int(folder.name) for folder in (run / "tile" / "stage1").glob("[0-9]*") if folder.name.isdigit()]

    kill_when((run / "cache" / "tile").is_dir)
    kill_when(lambda: any(step > 5 for step in steps_saved()))
    first = max(steps_saved())
    kill_when(lambda: any(step > first + 5 for step in steps_saved()))
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "going on from step" in result.stdout and not list(run.rglob(".*.tmp*"))
    killed = contents(run)
    shutil.rmtree(run)
    subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert killed == contents(run)


def bad_inputs(root: Path) -> dict[str, tuple[list, str]]:
    """name → (arguments of stage 1, what the line must mention)."""
    good = draw_mvtec(root / "good")
    (root / "empty").mkdir()
    draw(root / "single" / "0.png", 0)
    for i in range(4):
        draw(root / "truncated" / f"{i}.png", i)
    file = root / "truncated" / "2.png"
    file.write_bytes(file.read_bytes()[:600])
    (root / "notes.pth").write_text("these are no weights")
    from safetensors.numpy import save_file

    save_file({"embeddings.cls_token": np.zeros((1, 1, 8), np.float32)}, root / "small.safetensors")
    blocked = root / "blocked"
    blocked.write_text("a file where a folder should be")
    realiad = root / "realiad"
    folder = realiad / "realiad_jsons_fuiad_0.1"
    folder.mkdir(parents=True)
    draw(realiad / "realiad_256" / "cap" / "OK" / "0.jpg", 0)
    entry = {"category": "cap", "anomaly_class": "OK", "image_path": "OK/0.jpg", "mask_path": None}
    (folder / "cap.json").write_text(json.dumps({"meta": {"normal_class": "OK"}, "train": [entry], "test": []}))
    elsewhere = entry | {"image_path": str(root / "single" / "0.png")}
    (folder / "lid.json").write_text(json.dumps({"meta": {"normal_class": "OK"}, "train": [elsewhere], "test": []}))
    for i in range(3):
        draw(root / "mean" / f"{i}.png", i)
    here = ["--data", good]
    vits = ["--encoder", "dinov2_vits14"]
    return {
        "missing folder": (["--data", root / "nowhere"], "nowhere"),
        "a file, not a folder": (["--data", root / "notes.pth"], "notes.pth"),
        "empty folder": (["--data", root / "empty"], "empty"),
        "one image": (["--data", root / "single"], "single"),
        "truncated image": (["--data", root / "truncated", *SMALL], "2.png"),
        "category not there": ([*here, "--category", "bottle"], "tile"),
        "ratio without a split": (["--data", realiad, "--category", "cap", "--noise-ratio", 0.3], "0.1"),
        "an image outside the root": (
            ["--data", realiad, "--category", "lid", "--noise-ratio", 0.1, *SMALL],
            "lies elsewhere",
        ),
        "a category with a name of the run's": (["--data", root / "mean", *SMALL], "rename"),
        "a name that is not UTF-8": (["--data", f"{root}/b\udcffd"], "the name is not UTF-8"),
        "infinite rate": ([*here, "--learning-rate", "inf"], "--learning-rate"),
        "seed beyond 32 bits": ([*here, "--seed", 2**32], "--seed"),
        "variance of one sub-model": ([*here, "--submodels", 1, "--aggregate", "max-var", *SMALL], "max-var"),
        "ratio that the test set cannot fill": ([*here, "--noise-ratio", 0.9, *SMALL], "noise-ratio"),
        "ratio of a plain folder": (["--data", root / "truncated", "--noise-ratio", 0.1], "noise-ratio"),
        "K above N": ([*here, "--submodels", 10, *SMALL], "--submodels"),
        "K = 0": ([*here, "--submodels", 0], "--submodels"),
        "size that the patch does not divide": ([*here, "--encoder", "tiny", "--image-size", 100], "--image-size"),
        "weights of another size": ([*here, *vits, "--weights", root / "small.safetensors"], "small.safetensors"),
        "weights that are none": ([*here, *vits, "--weights", root / "notes.pth"], "notes.pth"),
        "missing weights": ([*here, *vits, "--weights", root / "no.pth"], "no.pth"),
        "unknown encoder": ([*here, "--encoder", "resnet50"], "dinov2_vitb14_reg"),
        "keep out of range": ([*here, "--keep", 1.5], "--keep"),
        "unwritable --out": ([*here, "--out", blocked / "run", *SMALL], "--out"),
        "--out that holds something else": ([*here, "--out", good, *SMALL], "--out"),
        "unknown flag": ([*here, "--epochs", 3], "--epochs"),
        "out-of-fold with one sub-model": (
            [*here, "--submodels", 1, "--aggregate", "out-of-fold", *SMALL],
            "out-of-fold",
        ),
    }


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    return root, bad_inputs(root)


def test_bad_input_ends_with_status_2_and_one_helpful_line(bad, capsys):
    root, cases = bad
    for name, (arguments, mention) in cases.items():
        out = [] if "--out" in arguments else ["--out", root / "runs" / name.replace(" ", "-")]
        status, _, err = command(capsys, "stage1_partition", *arguments, *out)
        lines = [line for line in err.splitlines() if line.strip()]
        assert status == 2, name
        assert len(lines) == 1 and lines[0].startswith("error: "), (name, err)
        assert mention in lines[0], (name, lines[0])


@pytest.mark.parametrize("script", ("stage1_partition", "stage2_train", "evaluate"))
def test_a_run_of_another_version_says_how_to_make_it_anew(script, tmp_path, capsys):
    old = {"encoder": "tiny", "command": "python stage1_partition.py --seed 7"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    where = ("--out", tmp_path, *SMALL) if script == "stage1_partition" else ("--run", tmp_path)
    status, _, err = command(capsys, script, *where)
    assert status == 2 and len(err.splitlines()) == 1 and "precision" in err and "--seed 7 --overwrite" in err


@pytest.mark.parametrize("script", ("stage2_train", "evaluate"))
def test_a_later_stage_without_a_run_says_how_to_make_one(script, tmp_path, capsys):
    status, _, err = command(capsys, script, "--run", tmp_path / "nothing")
    assert status == 2 and len(err.splitlines()) == 1 and "stage1_partition.py" in err


def test_what_a_killed_start_has_left_is_in_nobodys_way(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".config.tmp.json", ".probe"):
        (run / name).write_text("{")
    arguments = ["--data", data, "--out", run, "--steps", 1, *SMALL]
    assert command(capsys, "stage1_partition", *arguments)[0] == 0
    assert not list(run.rglob(".*"))
    (run / "config.json").write_text("{")  # damaged: the line's advice must work
    status, _, err = command(capsys, "stage1_partition", *arguments)
    assert status == 2 and "--overwrite" in err
    assert command(capsys, "stage1_partition", *arguments, "--overwrite")[0] == 0


def test_the_command_that_goes_on_with_a_run_deletes_nothing_and_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/stage1_partition.py", "--data", "my images", "--overwrite", "--seed", "7"])
    assert command_line() == "python stage1_partition.py --data 'my images' --seed 7"


def test_a_bad_command_can_be_mended_and_given_again(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert command(capsys, "stage1_partition", "--data", data, "--out", run, "--submodels", 99, *SMALL)[0] == 2
    assert command(capsys, "stage1_partition", "--data", data, "--out", run, "--steps", 1, *SMALL)[0] == 0


@pytest.mark.parametrize("script", ("stage1_partition", "stage2_train", "evaluate"))
def test_help_lists_every_flag_with_its_default(script, capsys):
    status, out, _ = command(capsys, script, "--help")
    flags = [line for line in out.splitlines() if line.startswith("  --")]
    assert status == 0 and len(flags) >= 6
    assert out.count("(default:") >= len(flags)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_ends_with_one_line(data, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", data, "--out", run, "--steps", 100_000, *SMALL]
    line = [sys.executable, ROOT / "stage1_partition.py", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    # "ignored" is handed down to a child, a handler is not: where this suite is a shell's background job,
    # which ignores SIGINT, the child would too (preexec_fn would fork, which JAX warns of)
    here = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(list(map(str, line)), env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, here)
    while not (run / "tile" / "stage1").is_dir():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err and "Traceback" not in err
