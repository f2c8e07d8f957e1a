"""A run that continues: after an interruption, after an edit by hand, or with other settings, weights or sources."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import LATER, ROOT, TILE, dates, refuse, succeed

import llb.encoders
import llb.run
from llb.checkpoint import CheckpointFolder, check_finished, open_checkpoints, restore_params, save, save_finished
from llb.device import silence_checkpoints
from llb.encoders.weights import write_tree
from llb.files import UserError, discard
from llb.runfiles import write_config
from llb.tables import read_metrics


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows allows no such names")
@pytest.mark.parametrize("name", ("batch [3]", "a*b?", "**", "a\\b", "gs:"))
def test_checkpoints_can_be_read_from_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "stage1"
    for step in (1, 2):
        with open_checkpoints(folder, tidy=True) as checkpoints:
            save(checkpoints, step, {"params": {"a": np.full(3, step)}}, "")
    with open_checkpoints(folder) as checkpoints:
        assert restore_params(checkpoints)["a"].tolist() == [2, 2, 2]
    assert os.listdir(tmp_path) == [name] and os.listdir(folder) == ["2"]


def test_a_damaged_or_half_copied_checkpoint_is_refused(copy, capfd):
    folder = copy / "tile" / "stage2-purified" / "3"
    arrays = max((folder / "state").rglob("*"), key=lambda file: file.stat().st_size)
    shutil.copytree(folder, copy / "whole")
    flipped = bytearray(arrays.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    names = (folder / "state" / "_METADATA").read_text()
    for damage in (
        lambda: arrays.write_bytes(flipped),
        lambda: arrays.write_bytes(flipped[:99]),
        lambda: shutil.rmtree(folder / "state"),
        lambda: (folder / "state" / "_METADATA").unlink(),
        lambda: (folder / "state" / "_METADATA").write_text("np.other".join(names.rsplit("np.ndarray", 1))),
        lambda: (folder / "meta" / "metadata").write_text("{"),
        lambda: (folder / "meta" / "metadata").unlink(),
    ):
        damage()
        line = refuse("evaluate", "--run", copy, "--overwrite")
        assert line.endswith("stage2-purified: the checkpoint is damaged or not whole; train again with --overwrite")
        assert not capfd.readouterr().err
        shutil.rmtree(folder)
        shutil.copytree(copy / "whole", folder)
    assert "report" in succeed("evaluate", "--run", copy, "--overwrite")


@pytest.mark.parametrize(
    "folder, command",
    [
        ("stage2-purified", "python stage2_train.py --run {} --train-on purified --overwrite"),
        ("stage2-purified-padim", "python stage2_train.py --run {} --train-on purified --detector padim --overwrite"),
        ("stage1", "python stage1_partition.py --out {} --overwrite, with the flags it had"),
    ],
)
def test_the_advice_to_train_again_is_the_whole_command_of_that_detector(tmp_path, folder, command):
    run = tmp_path / "my run"
    save_finished(CheckpointFolder(run / "tile" / folder, "old"), 1, {"a": np.zeros(1)})
    with pytest.raises(UserError) as refusal:
        check_finished(CheckpointFolder(run / "tile" / folder, "new"), 1)
    assert str(refusal.value).endswith("; train again with " + command.format(shlex.quote(str(run))))


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
@pytest.mark.parametrize("words", (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)))
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(tmp_path, words, monkeypatch, caplog):
    import resource

    silence_checkpoints()
    state, limit = {"params": {"a": np.random.default_rng(0).random(2**17)}}, resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, state, "")
    with (
        pytest.raises(UserError, match=r"needs 1.0 MiB, and [\d.]+ are free \(" + words),
        monkeypatch.context() as patch,
    ):
        if words == os.strerror(errno.ENOSPC):  # noticed before it is written
            patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**20 - 1))
        try:
            with open_checkpoints(tmp_path, tidy=True) as checkpoints:
                if words == os.strerror(errno.EFBIG):  # while it is written
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limit[1]))
                save(checkpoints, 2, state, "")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not caplog.records
    for step in (1, 2):
        with open_checkpoints(tmp_path, tidy=True) as checkpoints:
            assert checkpoints.latest_step() == step
            save(checkpoints, 2, state, "")


def test_a_folder_that_is_half_deleted_does_not_look_whole(tmp_path, monkeypatch):
    folder = tmp_path / "stage2-all"
    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # interrupted before it deletes a file
    discard(folder)
    assert not folder.exists() and list(tmp_path.iterdir())
    monkeypatch.undo()
    discard(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_remains_of_a_killed_start_and_a_damaged_config_are_in_nobodys_way(data, tmp_path):
    flags = ("--data", data, "--out", tmp_path, *TILE)  # as the fixture `finished`: nothing is compiled again
    for name in (".config.tmp.json", ".probe"):
        (tmp_path / name).write_text("{")
    refuse("stage1_partition", *flags, "--submodels", 99)
    succeed("stage1_partition", *flags)
    assert not list(tmp_path.rglob(".*"))
    (tmp_path / "config.json").write_bytes((tmp_path / "config.json").read_bytes()[:-9])
    assert "--overwrite" in refuse("stage1_partition", *flags)
    succeed("stage1_partition", *flags, "--overwrite")
    line = ["python", "stage1_partition.py", *map(str, flags)]  # which continues the run, and so deletes nothing
    assert sorted(shlex.split(json.loads((tmp_path / "config.json").read_text())["command"])) == sorted(line)


def test_finished_stages_are_not_repeated(finished, data):
    before = dates(finished / "tile")
    assert "stage 1 is finished" in succeed("stage1_partition", "--data", data, "--out", finished, *TILE)
    assert "stage 2 on purified is finished" in succeed("stage2_train", "--run", finished, "--steps", 3)
    assert "purified is evaluated" in succeed("evaluate", "--run", finished)
    assert dates(finished / "tile") == before


def test_other_settings_or_weights_are_refused_with_the_difference(finished, data, tmp_path, monkeypatch):
    stage1, stage2 = ("stage1_partition", "--data", data, "--out", finished, *TILE), ("stage2_train", "--run", finished)
    assert "(steps: 4, now 5): give another --out, or --overwrite" in refuse(*stage1, "--steps", 5)
    assert "steps: 3, now 7" in refuse(*stage2, "--steps", 7)
    params = llb.encoders.load_encoder("tiny").params
    write_tree(params | {"cls_token": 2 * params["cls_token"]}, tmp_path / "new.safetensors", {})
    monkeypatch.setattr(llb.encoders, "TINY_WEIGHTS", tmp_path / "new.safetensors")
    for line in (stage1, stage2, ("evaluate", "--run", finished)):
        assert "other weights of tiny" in refuse(*line)


def test_later_stages_take_encoder_and_images_from_the_run_or_name_them(copy):
    config = json.loads((copy / "config.json").read_text())
    encoder = llb.run.run_encoder(copy, config | {"precision": "bfloat16"})
    assert (encoder.spec.name, encoder.image_size, encoder.precision) == ("tiny", 32, "bfloat16")
    for name, mention in (("data", "its images, gone, are not"), ("weights", "encoder's weights, gone, are not")):
        write_config(copy, config | {name: "gone", "data_given": "gone"})
        for line in (("stage2_train", "--steps", 3), ("evaluate",)):
            assert mention in refuse(*line, "--run", copy)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the sources, in the place of the project."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "llb", project / "llb", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for script in llb.run.SCRIPTS:
        shutil.copy(ROOT / script, project)
    monkeypatch.setattr(llb.run, "PROJECT", project)
    return project


def test_the_digest_covers_the_scripts_and_the_core_only(project):
    for name in ("evaluate.py", "llb/score.py", "llb/detectors/dinomaly.py", "llb/new.py", "llb/tiny/probe.py", "x.py"):
        before = llb.run.sources_digest()
        with open(project / name, "a") as file:
            file.write("# changed\n")
        assert (llb.run.sources_digest() == before) == (name in ("llb/tiny/probe.py", "x.py")), name
    shutil.rmtree(project / "llb" / "bench")
    assert llb.run.sources_digest() == before


def test_a_run_that_continues_with_other_sources_says_so_and_records_them(copy, project):
    note, began = "note: the sources of llb have changed", llb.run.sources_digest()
    config = json.loads((copy / "config.json").read_text())
    write_config(copy, config | {"sources": [began]})
    assert note not in succeed("evaluate", "--run", copy)
    (project / "llb" / "score.py").write_text("")
    for flags in (("stage2_train", "--steps", 3), ("evaluate",)):
        assert succeed(*flags, "--run", copy).count(note) == 1
        assert json.loads((copy / "config.json").read_text())["sources"] == [began, llb.run.sources_digest()]


def test_a_run_that_continues_elsewhere_records_versions_and_device_once(copy, data):
    def continued() -> list[dict]:
        return json.loads((copy / "config.json").read_text()).get("continued_on")

    config, here = json.loads((copy / "config.json").read_text()), llb.run.machine("device: CPU, seen as 3 devices")
    succeed("evaluate", "--run", copy)
    assert continued() is None
    write_config(copy, config | {"device": "another"})
    for line in (("evaluate", "--run", copy), ("stage1_partition", "--data", data, "--out", copy, *TILE)):
        succeed(*line)
        assert continued() == [here]
    write_config(copy, config | {"versions": {"jax": "0.1"}})
    succeed("stage1_partition", "--data", data, "--out", copy, *TILE)
    assert continued() == [here]


def test_a_run_records_the_commit_and_whether_files_differ_from_it(project):
    before = llb.run.environment("device: CPU")
    for line in ("init", "add .", "-c user.name=a -c user.email=a@b commit -m all"):
        subprocess.run(["git", "-C", project, *line.split()], check=True, capture_output=True)
    committed = llb.run.environment("device: CPU")
    (project / "evaluate.py").write_text("")
    edited = llb.run.environment("device: CPU")
    assert [facts["git_dirty"] for facts in (before, committed, edited)] == [None, False, True]
    assert before["git_commit"] is None and len(committed["git_commit"]) == 40


def test_stage_2_trains_on_an_edited_list_and_the_report_says_so(copy, data):
    purified, stage2 = copy / "tile" / "purified.txt", ("stage2_train", "--run", copy, "--steps", 3)
    lines = purified.read_text().splitlines()
    purified.write_bytes("\r\n".join(lines).encode("utf-8-sig"))  # as some editors save it
    assert "stage 2 on purified is finished" in succeed(*stage2)
    purified.write_text("\n".join(lines[1:]))
    (copy / "tile" / "suspects.png").unlink()  # stage 1 draws it again, and leaves the list as it is
    succeed("stage1_partition", "--data", data, "--out", copy, *TILE)
    assert (copy / "tile" / "suspects.png").exists() and purified.read_text() == "\n".join(lines[1:])
    for line in (stage2, ("evaluate", "--run", copy)):
        problem = refuse(*line)
        assert "has changed since this was trained" in problem and "--train-on purified --overwrite" in problem
    for _ in range(2):  # the metrics of the old list are gone; what it has scored is still there
        told = succeed("evaluate", "--run", copy, "--train-on", "all")
        assert "purified is outdated, and its metrics are left out" in told and "     purified" not in told
        assert all("purified" not in entry and "all" in entry for entry in read_metrics(copy).values())
        assert "purified is outdated" in (copy / "report.html").read_text(encoding="utf-8")
    out = succeed(*stage2, "--overwrite")
    assert "edited by hand: 0 added, 1 removed" in out and f"training on {len(lines) - 1} of 12" in out
    succeed("evaluate", "--run", copy)
    assert "edited by hand" in (copy / "report.html").read_text()


def test_a_damaged_file_is_named(copy):
    table, config = (copy / "tile" / "scores.csv").read_bytes(), (copy / "config.json").read_bytes()
    metrics = json.loads((copy / "metrics.json").read_text())
    for name, damaged, mention in (
        ("tile/scores.csv", table.replace(b",", b";"), "scores.csv"),
        ("tile/scores.csv", table.replace(b"0.", b"0,"), "scores.csv"),
        ("tile/scores.csv", b"path,score\n", "scores.csv"),
        ("tile/scores.csv", re.sub(rb",[^,]+(,\d+,\d,\d\n)", rb",inf\1", table), "scores.csv is damaged ('inf')"),
        ("tile/scores.csv", re.sub(rb"\d(,\d\n)", rb"x\1", table), "scores.csv is damaged ('x')"),
        ("tile/purified.txt", "no.png".encode("utf-16"), "purified.txt is not UTF-8"),
        ("tile/purified.txt", b"no.png\n", "line 1: no.png is not among"),
        ("tile/purified.txt", None, "stage 1"),
        ("config.json", b"{", "config.json is not llb's"),
        ("config.json", config[:-9], "config.json is not valid JSON"),
        ("config.json", config.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000), "config.json is not valid JSON"),
        ("config.json", config.replace(b'"seed": 0', b'"seed": 1'), "config.json is damaged, edited or of"),
        ("metrics.json", b"[]", "metrics.json is damaged; delete it"),
        *(
            ("metrics.json", json.dumps(metrics | {"tile": metrics["tile"] | part}).encode(), "metrics.json is damaged")
            for part in ({"all": None}, {"all": {"image_auroc": "1"}}, {"missing_masks": 3}, {"purification": {}})
        ),
    ):
        whole = (copy / name).read_bytes()
        (copy / name).unlink() if damaged is None else (copy / name).write_bytes(damaged)
        for script in LATER[name == "metrics.json" :]:
            assert mention in refuse(script, "--run", copy)
        (copy / name).write_bytes(whole)
    predictions = copy / "tile" / "predictions-all.csv"  # evaluation writes a damaged one again
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[:40])
    succeed("evaluate", "--run", copy)
    assert predictions.read_bytes() == whole
