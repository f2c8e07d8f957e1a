"""The folder of a run: what is deleted in it, whose images it is of, and who may work in it at once."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import helpers
import jax
import pytest
from helpers import LATER, TILE, child, draw, draw_mvtec, refuse, rows_of, succeed

from llb.config import Evaluate, Stage1, Stage2
from llb.data import Dataset, load_category
from llb.files import UserError, atomic, digest_of_file, discard_files, move_file, write_csv, write_text
from llb.layouts import Record
from llb.lock import CHANGERS, hold, turn
from llb.manifest import clear_run, clear_stage2, image_states
from llb.marks import choose_images
from llb.new_images import read_folder
from llb.run import find_run, finished_detectors, load_datasets, place_run
from llb.runfiles import VERSION, read_config, write_config
from llb.stage import Stage, load_features
from llb.tables import read_purified
from llb.train import submodel_keys
from stage2_train import lists_to_train_on

OWN = ("notes.txt", "tile/remarks.csv", "tile/stage1/why.txt", "tile/maps-all/best/000.png", "cache/0.npy", "x/1.png")


@pytest.fixture
def moved(finished, data, tmp_path):
    """A finished run and its images, copied to another place."""
    run, root = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(data, tmp_path / "data")
    write_config(run, json.loads((run / "config.json").read_text()) | {"data": str(root), "data_given": "data"})
    return run, root


def files_below(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}


def test_the_demo_set_is_trained_on_as_purified_all_and_clean_and_other_images_as_purified(tmp_path):
    def lists(data, **settings):
        write_config(tmp_path, {"llb": VERSION, "data": data})
        return lists_to_train_on(tmp_path, Stage2(**settings))

    assert lists(None) == ("purified", "all", "clean") and lists("/images") == ("purified",)
    assert lists(None, train_on="all") == lists("/images", train_on="all") == ("all",)
    assert lists(None, released="dinomaly.pth") == ("purified",)


def test_a_final_detector_begins_with_other_random_numbers_than_the_sub_models_and_follows_the_runs_seed(
    moved, monkeypatch
):
    run, _ = moved

    def stop(setup, features, submodels, *_):
        raise UserError(str(jax.random.key_data(submodels.keys).tolist()[0]))

    monkeypatch.setattr("stage2_train.learn", stop)
    keys, config = [], json.loads((run / "config.json").read_text())
    monkeypatch.setattr("stage2_train.load_datasets", lambda *_: [load_category(config["data"], "tile", 0.25)])
    for seed in (0, 7):
        write_config(run, config | {"seed": seed})
        keys.append(refuse("stage2_train", "--run", run, "--steps", 3, "--train-on", "clean"))
        branches = jax.random.split(jax.random.key(seed))
        used = [key for branch in branches for key in jax.random.key_data(submodel_keys(branch, 3)).tolist()]
        assert keys[-1] not in [f"error: {key}" for key in used]
    assert keys[0] != keys[1]


def test_a_detector_is_finished_when_every_category_has_it(tmp_path, capsys):
    final = {"train_on": "all", "steps": 3}
    config = {"categories": ["nut", "bolt"], "stage2": {"all": final, "clean": final | {"train_on": "clean"}}}
    (tmp_path / "nut" / "stage2-all" / "3").mkdir(parents=True)
    (tmp_path / "bolt" / "stage2-all" / "2").mkdir(parents=True)  # still in training
    with pytest.raises(UserError, match="no finished detector; first: .*--train-on all$"):
        finished_detectors(tmp_path, config, "all")
    (tmp_path / "bolt" / "stage2-all" / "3").mkdir()
    assert finished_detectors(tmp_path, config, None) == ["all"]
    assert "clean is not finished and left out" in capsys.readouterr().out


# ---- what is deleted ----


def test_who_begins_with_the_default_encoder_on_a_cpu_hears_of_the_fast_one(data, tmp_path, monkeypatch):
    def stop(*_):
        raise UserError("no network")

    monkeypatch.setattr("stage1_partition.load_encoder", stop)
    for flags, told in (((), True), (("--encoder", "dinov2_vits14_reg"), False)):
        _, out, _ = helpers.command("stage1_partition", "--data", data, "--out", tmp_path / "run", *flags)
        assert ("--encoder efficientnet_lite0 --detector padim takes minutes" in out) == told, out


def test_overwrite_looks_for_the_white_of_deep_images_before_it_deletes(moved, monkeypatch):
    run, root = moved
    before = files_below(run)

    def stop(_):
        raise UserError("an image cannot be read")

    monkeypatch.setattr("llb.run.find_white", stop)
    assert "cannot be read" in refuse("stage1_partition", "--data", root, "--out", run, *TILE, "--overwrite")
    assert files_below(run) == before


def test_overwrite_deletes_what_llb_wrote_and_nothing_else(moved):
    run, root = moved
    images = files_below(root)
    for name in OWN:
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).write_text("mine")
    # what killed commands have left
    for name in (".config.tmp.json", "tile/.scores.tmp.csv", "tile/.maps-all.tmp/tile/test/good/000.png.png"):
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).touch()
    for name in ("7.orbax-checkpoint-tmp", ".3.old"):
        draw(run / "tile" / "stage1" / name / "0.png", 0)
    # a damaged table leads nowhere
    paths = [row["path"] for row in rows_of(run / "tile" / "predictions-all.csv")]
    outside = [run.parent / "a.png", root / "tile" / "train" / "good" / "000.png"]
    outside[0].touch()
    rows = [[path, 0.5, 0] for path in (*paths, "../../../a", str(outside[1])[:-4])]
    write_csv(run / "tile" / "predictions-all.csv", ["path", "score", "label"], rows)
    write_text(run / "tile" / "stage1" / "0" / "mine.txt", "looks like a checkpoint")
    before = files_below(run)
    with pytest.raises(UserError, match="stage1/0/mine.txt is not llb's: move it away"):
        clear_run(run, ["tile"])
    assert files_below(run) == before
    shutil.rmtree(run / "tile" / "stage1" / "0")
    clear_run(run, ["tile"])
    assert files_below(run) == set(OWN)
    assert files_below(root) == images and all(file.exists() for file in outside)
    assert not (run / "tile" / "stage2-all").exists() and not list(run.glob("tile/maps-all/tile"))


def test_stage_2_and_evaluation_replace_their_own_files_only(moved):
    run, _ = moved
    kept = {"tile/maps-all/mine.png", "tile/stage2-all/mine.txt"}
    for name in kept:
        (run / name).write_text("mine")
    maps = {name for name in files_below(run) if name.startswith("tile/maps-all/")}
    written = (run / "tile" / "maps-all" / "tile" / "test" / "good" / "000.png.png").stat().st_mtime_ns
    succeed("evaluate", "--run", run, "--train-on", "all", "--save-maps", "--overwrite")
    assert {name for name in files_below(run) if name.startswith("tile/maps-all/")} == maps
    assert (run / "tile" / "maps-all" / "tile" / "test" / "good" / "000.png.png").stat().st_mtime_ns > written
    clear_stage2(run, ["tile"], "all")
    assert {name for name in files_below(run) if "-all" in name} == kept
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tile"].keys() == {"purified", "purification"} and metrics["mean"].keys() == {"purified"}


@pytest.mark.parametrize("category", ["../data", "..", "/", "", "a/b", 7])
def test_a_category_that_is_a_path_is_refused_before_anything_is_deleted(category, tmp_path):
    (tmp_path / "run").mkdir()
    write_text(tmp_path / "data" / "scores.csv", "mine")
    with pytest.raises(UserError, match="is not the name of a folder"):
        clear_run(tmp_path / "run", ["tile", category])
    assert (tmp_path / "data" / "scores.csv").exists()


STRANGERS = {
    "another program's": '{"categories": ["train"]}',
    "no JSON": "learning_rate: 0.1",
    "a list": "[]",
    "deep": "[" * 100_000,
    "an older llb's": '{"submodels": 3, "sources": [], "categories": ["train"]}',
    "a newer llb's": '{"llb": 99, "categories": ["train"]}',
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_folder_with_a_strange_config_is_refused_and_stays_as_it_is(name, data, tmp_path):
    (tmp_path / "config.json").write_text(STRANGERS[name])
    draw(tmp_path / "train" / "1.png", 1)
    before = files_below(tmp_path)
    for more in ((), ("--overwrite",)):
        line = refuse("stage1_partition", "--data", data, "--out", tmp_path, *TILE, *more)
        assert ("another version" if "llb" in name else "other files") in line and "--overwrite" not in line
    for script in LATER:
        assert "--overwrite" not in refuse(script, "--run", tmp_path)
    assert files_below(tmp_path) == before


# ---- whose images ----


def test_images_that_changed_since_stage_1_are_named_by_every_command(moved):
    run, root = moved
    tile = root / "tile"
    commands = [("stage1_partition", "--data", root, "--out", run, *TILE), *((name, "--run", run) for name in LATER)]

    def swap(name):  # of equal size
        content = bytearray((tile / name).read_bytes())
        content[-20] ^= 1
        (tile / name).write_bytes(content)

    def hidden(name, change=swap):  # with the old time as well
        times = (tile / name).stat()
        change(name)
        os.utime(tile / name, ns=(times.st_atime_ns, times.st_mtime_ns))

    def longer(name):
        hidden(name, lambda name: (tile / name).write_bytes((tile / name).read_bytes() + b"more"))

    for change, name, more, mention in (
        (swap, "train/good/003.png", (), "replaced (1: tile/train/good/003.png)"),
        (swap, "ground_truth/square/002_mask.png", (), "replaced (1: tile/ground_truth/square/002_mask.png)"),
        (hidden, "test/good/001.png", ["--verify"], "replaced (1: tile/test/good/001.png)"),
        (longer, "test/good/000.png", (), "replaced (1: tile/test/good/000.png)"),
        (lambda name: draw(tile / name, 9), "test/good/9.png", (), "added (1: tile/test/good/9.png)"),
        (lambda name: (tile / name).unlink(), "test/good/002.png", (), "removed (1: tile/test/good/002.png)"),
    ):
        file = tile / name
        before, times = (file.read_bytes(), file.stat()) if file.exists() else (None, None)
        change(name)
        for command in commands:
            line = refuse(*command, *more)
            # of this run and these images, not of those that were copied
            assert mention in line and line.endswith(f" --data {root} --out {run} --overwrite")
            assert line.count("--out") == 1
        file.unlink(missing_ok=True)
        if before:
            file.write_bytes(before)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for file in tile.rglob("*.png"):
        os.utime(file)  # a copy with new times is the same data
    succeed("evaluate", "--run", run)
    for damaged in ("path\n", "name\na.png\n"):
        (run / "tile" / "images.csv").write_text(damaged)
        for command in commands:
            assert "images.csv is damaged" in refuse(*command)


def test_all_unreadable_images_are_named_at_once_and_the_same_command_goes_on_without_them(tmp_path):
    images, flags = tmp_path / "images", ("--detector", "padim", "--encoder", "tiny", "--image-size", 32)
    for i in range(12):
        draw(images / f"{i:03}.png", i)
    line = ("stage1_partition", "--data", images, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *flags)
    broken = [images / f"{i:03}.png" for i in (4, 7, 11)]
    for file in broken:
        file.write_bytes(file.read_bytes()[:700])
    told = refuse(*line)
    assert "004.png cannot be read (truncated): remove or replace it; 2 others, too: 007.png, 011.png" in told
    for file in broken:
        file.unlink()
    assert "9 images in 3 subsets" in succeed(*line)
    assert "9 training images" in (tmp_path / "run" / "report.html").read_text()
    assert "removed (1: 000.png)" in ((images / "000.png").unlink(), refuse(*line))[1]  # now they are learned


def test_an_unreadable_test_image_or_mask_is_named_before_any_training(tmp_path):
    root = draw_mvtec(tmp_path / "root")
    for name in ("test/good/001.png", "ground_truth/square/002_mask.png"):
        file = root / "tile" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:60])
        line = refuse("stage1_partition", "--data", root, "--out", tmp_path / "run", "--no-cache", *TILE)
        assert f"{file} cannot be read" in line and not (tmp_path / "run" / "tile").exists()
        file.write_bytes(whole)


def test_copies_of_an_image_are_told(tmp_path):
    root = draw_mvtec(tmp_path / "root")
    for copy, of in (("train/good/003.png", "train/good/001.png"), ("test/good/002.png", "train/good/008.png")):
        shutil.copy(root / "tile" / of, root / "tile" / copy)
    flags = ("--detector", "padim", "--encoder", "tiny", "--image-size", 32)
    out = succeed("stage1_partition", "--data", root, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *flags)
    assert "copies: 1 of training images (tile/train/good/003.png is tile/train/good/001.png)" in out
    assert "1 of training images among the test images (tile/test/good/002.png is tile/train/good/008.png)" in out


def test_the_order_of_categories_is_no_setting(tmp_path):
    for name in ("Alpha", "beta"):
        draw_mvtec(tmp_path / "root", name, good=4)
    run, flags = tmp_path / "run", ("--detector", "padim", "--encoder", "tiny", "--image-size", 32)
    line = ("stage1_partition", "--data", tmp_path / "root", "--out", run, "--cache", tmp_path / "cache", *flags)
    succeed(*line, "--category", "beta,Alpha")
    config = read_config(run, "", "")
    assert config["categories"] == ["Alpha", "beta"]
    assert "Alpha: stage 1 is finished" in succeed(*line, "--category", "Alpha,beta")
    write_config(run, config | {"categories": ["beta", "Alpha"]})  # as an older run has them
    assert "Alpha: stage 1 is finished" in succeed(*line, "--category", "beta,Alpha")


def test_a_plain_folder_that_is_renamed_is_asked_to_have_its_old_name_again(tmp_path):
    photos, other = tmp_path / "photos", tmp_path / "photos2"
    for i in range(4):
        draw(photos / f"{i}.png", i)
    run, flags = tmp_path / "run", ("--detector", "padim", "--encoder", "tiny", "--image-size", 32)
    line = ("stage1_partition", "--out", run, "--cache", tmp_path / "cache", *flags, "--data")
    succeed(*line, photos)
    photos.rename(other)
    again = "if its images are the same, call it photos again, and the run continues"
    advice = f"a plain folder's name is its category: {again}; or give"
    assert f"(categories: ['photos'], now ['photos2']): {advice} another" in refuse(*line, other)
    assert "is its category" not in refuse(*line, other, "--seed", 1), "that is another run"
    (tmp_path / "elsewhere").mkdir()
    other.rename(tmp_path / "elsewhere" / "photos")
    assert "photos: stage 1 is finished" in succeed(*line, tmp_path / "elsewhere" / "photos")


def test_a_run_finds_its_images_and_no_others_of_that_name(moved, tmp_path, monkeypatch):
    run, root = moved
    (tmp_path / "link").symlink_to(root)
    draw_mvtec(tmp_path / "elsewhere" / "data")
    draw(tmp_path / "elsewhere" / "data" / "tile" / "train" / "good" / "000.png", 1)
    monkeypatch.chdir(tmp_path)
    for spelling in ("data/", "./data", "link", root, "data"):
        assert "is finished" in succeed("stage1_partition", "--data", spelling, "--out", "run", *TILE)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "is finished" in succeed("stage2_train", "--run", run, "--steps", 3)
    stage1 = ("stage1_partition", "--data", "data", "--out", run, *TILE)
    assert f"data: {root}, now {tmp_path / 'elsewhere' / 'data'}" in refuse(*stage1)
    root.rename(tmp_path / "gone")  # then a folder of that name must hold the same images
    for line in (stage1, ("stage2_train", "--run", run), ("evaluate", "--run", run)):
        assert "replaced (1: tile/train/good/000.png)" in refuse(*line)
    monkeypatch.chdir(tmp_path)
    assert "are not there" in refuse("evaluate", "--run", run)
    (tmp_path / "gone").rename(tmp_path / "new")
    assert "is finished" in succeed("stage1_partition", "--data", "new", "--out", "run", *TILE)
    assert "purified is evaluated" in succeed("evaluate", "--run", run)


def test_every_stage_shows_images_with_the_white_and_the_cut_of_the_run(moved, monkeypatch, tmp_path):
    run, root = moved
    shown = {"white": {"tile": {"integer": 4095}}, "resize": 37}
    write_config(run, config := json.loads((run / "config.json").read_text()) | shown)
    datasets = load_datasets(run, config, Stage2()) + [read_folder(str(root / "tile" / "test"), "tile", config)]
    assert [(each.white, each.resize) for each in datasets] == [({"integer": 4095}, 37)] * 2
    monkeypatch.setattr("llb.stage.streamed_features", lambda source, files: files)
    stage = Stage(run, Stage2(no_cache=True), None, None)
    files = load_features(stage, datasets[0], "test")
    assert (files.white, files.resize) == ({"integer": 4095}, 37)

    def stop(stage, dataset):
        raise UserError(f"{dataset.white} {dataset.resize}")

    monkeypatch.setattr("stage1_partition.stage1", stop)
    monkeypatch.setattr("llb.run.find_white", lambda dataset: dataclasses.replace(dataset, white={"float": 255}))
    line = ("stage1_partition", "--data", root, "--out", tmp_path / "new", *TILE, "--resize", 37)
    assert refuse(*line) == "error: {'float': 255} 37"


def test_a_file_that_is_not_as_the_run_lists_it_is_not_looked_up_in_the_cache(moved):
    run, root = moved
    rows = rows_of(run / "tile" / "images.csv")
    paths = [row["path"] for row in rows]
    for path, row in zip(paths, rows):
        os.utime(root / path, ns=(0, int(row["modified_ns"])))
    assert [state[2] for state in image_states(run / "tile", root, paths)] == [row["sha256"] for row in rows]
    os.utime(root / paths[2])
    with pytest.raises(UserError, match=f"{paths[2]} is not the file that"):
        image_states(run / "tile", root, paths)


def test_an_image_that_is_replaced_while_stage_1_reads_it_does_not_spoil_the_cache(tmp_path, monkeypatch):
    root, cache = draw_mvtec(tmp_path / "data", good=4), tmp_path / "cache"
    flags = ("--detector", "padim", "--encoder", "tiny", "--image-size", 32, "--cache", cache)
    line = ("stage1_partition", "--data", root, "--out", tmp_path / "run", *flags)
    image = root / "tile" / "train" / "good" / "002.png"

    def replaced(*call):
        states = image_states(*call)
        draw(image, 500)
        return states

    with monkeypatch.context() as patch:
        patch.setattr("llb.stage.image_states", replaced)
        assert f"{image} was changed while it was read: give the same command again" in refuse(*line)
    assert not list(cache.rglob("*.npy"))
    assert "4 to compute" in succeed(*line)


def test_images_of_the_caches_demo_set_may_be_given_as_data(tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    for data in ("demo", "demo/set"):
        (cache / data).mkdir(parents=True)
        assert place_run(Stage1(data=str(cache / data), out=str(run), cache=str(cache))) == run
    with pytest.raises(UserError, match="--cache .* is around --data"):
        place_run(Stage1(data=str(cache / "features"), out=str(run), cache=str(cache)))


def test_later_stages_refuse_a_cache_that_is_a_file_before_any_work_but_not_if_they_need_none(finished, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for script in LATER:
        assert f"--cache {file} cannot be written" in refuse(script, "--run", finished, "--cache", file)
    assert find_run(Stage2(run=str(finished), cache=str(file), no_cache=True)) == finished
    assert find_run(Evaluate(run=str(finished), cache=str(file), images="new")) == finished  # they are never cached


def test_an_edited_list_may_come_from_windows_and_clean_needs_a_normal_image(tmp_path):
    records = [Record(path, 1, (), "x") for path in ("a/0.png", "#1.png", "b\\2.png")]
    dataset = Dataset(tmp_path, "folder", "tile", tuple(records), ())
    for record in records:
        draw(tmp_path / record.path, 0)
    write_csv(tmp_path / "scores.csv", ["path", "score", "kept"], [[record.path, 0.5, 1] for record in records])
    lines = "# without the blurred one\r\na\\0.png\r\n\r\n  #1.png\r\nb\\2.png"
    (tmp_path / "purified.txt").write_bytes(lines.encode("utf-8-sig"))
    assert read_purified(tmp_path, dataset).indices.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="--train-on clean: no training image of tile is labelled normal"):
        choose_images("clean", tmp_path, dataset)


# ---- who works in it, and where there is no room ----

STAGES = {
    "stage1": ("",),
    "quarantine": ("",),
    "stage2-all": CHANGERS,
    "stage2-clean": (*CHANGERS, "evaluate"),  # with --overwrite
    "evaluate": CHANGERS,
}
TOGETHER = {("stage2-all", "stage2-clean"), ("stage2-all", "evaluate"), ("stage2-clean", "evaluate")}
TOGETHER |= {("stage2-clean", "stage2-all"), ("evaluate", "stage2-all")}


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_commands_work_in_one_run_only_if_neither_changes_what_the_other_reads(tmp_path):
    for first in STAGES:
        for second in STAGES:
            with hold(tmp_path, first, STAGES[first]), turn(tmp_path):
                try:
                    with hold(tmp_path, second, STAGES[second]):
                        worked = True
                except UserError as error:
                    worked = False
                    assert f"({first}, process {os.getpid()} on " in str(error) and ", since 20" in str(error)
            assert worked == ((first, second) in TOGETHER), (first, second)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_nobody_trains_or_scores_while_images_are_moved_or_marked(finished, data):
    for stage in ("quarantine", "review"):
        with hold(finished, stage):
            for line in (("stage2_train",), ("evaluate",), ("evaluate", "--images", data)):
                assert f"another command works in this run ({stage}, " in refuse(*line, "--run", finished)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_nothing_is_moved_marked_selected_or_deleted_while_another_command_works(moved, tmp_path):
    run, root = moved
    (tmp_path / "marks.csv").write_text("category,path,verdict\n")
    changers = [("stage1_partition", "--data", root, "--out", run, *TILE)]
    changers += [("llb.review", "--run", run, tmp_path / "marks.csv"), ("llb.review", "--run", run, "--simulate", 3)]
    changers += [("llb.quarantine", "--run", run, way) for way in ("--go", "--undo")]
    for stage in ("evaluate", "evaluate-images-7", "stage2-all"):
        with hold(run, stage):
            for line in changers:
                assert f"another command works in this run ({stage}, " in refuse(*line)
    stage2 = ("stage2_train", "--run", run, "--steps", 3, "--train-on", "all")
    for reader in ("evaluate", "evaluate-images-7"):
        with hold(run, reader):
            assert f"({reader}, " in refuse(*stage2, "--overwrite"), "it deletes what the other one reads"
            assert "is finished" in succeed(*stage2)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_killed_command_locks_nothing(tmp_path):
    code = "import os, sys; from pathlib import Path; from llb.lock import hold\n"
    code += "with hold(Path(sys.argv[1]), 'stage1', ('',)): os.kill(os.getpid(), 9)"
    assert child("-c", code, tmp_path).returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [".lock-stage1"]
    with hold(tmp_path, "evaluate", ("stage1",)):
        pass
    with hold(tmp_path, "stage1", ("",)):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_is_one_line_with_what_is_needed_and_the_old_file_stays(tmp_path):
    code = "import resource, sys; import numpy as np; from llb.files import UserError, atomic, write_text\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); name, kind = sys.argv[1:]\n"
    code += (
        "try: write_text(name, 'x' * 5000) if kind == 'text' else atomic(name, lambda f: np.save(f, np.ones(2000)))\n"
    )
    code += "except UserError as error: print(error)"
    for name, kind, mention in (
        ("old.csv", "text", "it needs 5,000 bytes, and "),
        ("old.npy", "array", "too few; make"),
    ):
        (tmp_path / name).write_text("old")
        out = child("-c", code, tmp_path / name, kind).stdout
        assert out.startswith(f"{tmp_path / name} cannot be written (") and mention in out and out.count("\n") == 1
    assert files_below(tmp_path) == {"old.csv", "old.npy"} and (tmp_path / "old.csv").read_text() == "old"


@pytest.mark.parametrize("name", [f"{'x' * 251}.png", f"{'é' * 127}.", f".{'x' * 254}"])
def test_files_may_have_names_as_long_as_the_system_allows(tmp_path, name):
    write_text(tmp_path / name, "text")
    atomic(tmp_path / name, lambda temporary: temporary.write_text("more"), by_any_process=True)
    move_file(tmp_path / name, tmp_path / "to" / name, digest_of_file(tmp_path / name), 0, copy=True)
    assert files_below(tmp_path) == {name, f"to/{name}"} and (tmp_path / "to" / name).read_text() == "more"
    discard_files(tmp_path / "to", [name, f"{name}.png", f"{'y' * 300}/a.png"])  # the others cannot be there
    assert files_below(tmp_path) == {name}
    with pytest.raises(UserError, match="cannot be written .File name too long.: give the file a shorter name"):
        write_text(tmp_path / f"{name}.png", "text")


def test_what_the_system_refuses_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    for name in ("file/a.csv", "folder.csv", "x" * 300, f"a\nb/{'x' * 300}"):
        with pytest.raises(UserError) as refusal:
            write_text(tmp_path / name, "text")
        assert "cannot be written" in str(refusal.value) and len(str(refusal.value).splitlines()) == 1

    def denied(file):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)

    with pytest.raises(UserError, match="a.csv cannot be written .Permission denied.: grant access"):
        atomic(tmp_path / "a.csv", denied)
