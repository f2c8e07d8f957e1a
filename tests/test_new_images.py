"""evaluate.py --images: other images get the scores that they would get as test images, and the run stays as it is."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import draw, refuse, rows_of, succeed
from PIL import Image

from llb.config import Evaluate
from llb.data import Dataset, Record
from llb.files import UserError, write_json
from llb.manifest import clear_stage2
from llb.new_images import check_lists, choose, learned_from
from llb.runfiles import read_config
from llb.score import heat_maps
from llb.tables import read_threshold


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_new_images_score_as_test_images_do_and_nothing_else_of_the_run_changes(finished, data, tmp_path):
    before = state(finished)
    images, out = data / "tile" / "test", tmp_path / "out"
    flags = ("--run", finished, "--images", images, "--out", out, "--save-maps", "--overlays")
    line = succeed("evaluate", *flags)
    assert state(finished) == before
    rows = {row["path"]: row for row in rows_of(out / "scores-purified.csv")}
    assert list(rows) == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    threshold = read_threshold(finished / "tile", "purified")["threshold"]
    for path, row in rows.items():
        assert row["verdict"] == ("defect" if float(row["score"]) > threshold else "fine")
        with Image.open(out / "overlays-purified" / f"{path}.png") as overlay:
            assert overlay.width > 2 * 192
    assert f"{[row['verdict'] for row in rows.values()].count('defect')} of {len(rows)} images score above" in line
    known = rows_of(finished / "tile" / "predictions-purified.csv")
    for row in known:
        path = row["path"].removeprefix("tile/test/")
        assert rows[path]["score"] == row["score"], path
        maps = [folder / "maps-purified" / file for folder, file in ((finished / "tile", row["path"]), (out, path))]
        first, second = (np.asarray(Image.open(f"{file}.png")) for file in maps)
        np.testing.assert_array_equal(first, second)

    shutil.copytree(images / "good", tmp_path / "fewer" / "good")  # images that are gone
    assert "holds the scores of other images" in refuse("evaluate", *flags, "--images", tmp_path / "fewer")
    (out / "folder.txt").write_text(f"{tmp_path / 'fewer'}\n")  # as of an older version
    succeed("evaluate", "--run", finished, "--images", tmp_path / "fewer", "--out", out)
    assert len(rows_of(out / "scores-purified.csv")) == 3
    assert {file.suffix for file in out.rglob("*") if file.is_file()} == {".txt", ".csv"}, (
        "pictures of old scores are gone"
    )


def test_above_the_threshold_is_a_defect_and_all_overlays_have_one_scale_that_reaches_it(
    finished, data, tmp_path, monkeypatch
):
    run, scales, verdicts = shutil.copytree(finished, tmp_path / "run"), [], []
    facts = json.loads((run / "tile" / "threshold-purified.json").read_text())

    def sheet(tiles, side, scale):
        scales.append(scale)
        return Image.new("L", (8, 8))

    monkeypatch.setattr("llb.new_images.contact_sheet", sheet)
    for threshold in (5.0, 0.0):  # none of these images is a defect, or all are
        write_json(run / "tile" / "threshold-purified.json", facts | {"threshold": threshold})
        succeed("evaluate", "--run", run, "--images", data / "tile" / "test" / "good", "--overlays")
        verdicts += [row["verdict"] for row in rows_of(run / "tile" / "images-good" / "scores-purified.csv")]
    assert verdicts == ["fine"] * 3 + ["defect"] * 3
    assert len(scales) == 6 and len(set(scales)) == 2
    assert scales[0][1] == 5 > scales[3][1] > scales[3][0] == scales[0][0]


def test_pictures_of_a_killed_command_go_with_their_images(finished, data, tmp_path, monkeypatch):
    images, out = shutil.copytree(data / "tile" / "test" / "good", tmp_path / "images"), tmp_path / "out"
    flags = ("evaluate", "--run", finished, "--images", images, "--out", out, "--overlays")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            "llb.new_images.contact_sheet", lambda tiles, **_: tiles[0][2][1] != "002.png" and picture or 1 / 0
        )
        picture = Image.new("L", (8, 8))
        succeed(*flags)
    (images / "000.png").unlink()
    succeed(*flags)
    assert sorted(file.name for file in out.rglob("*") if file.is_file()) == [
        "001.png.png", "002.png.png", "folder.txt", "scores-purified.csv"
    ]  # fmt: skip


def test_what_cannot_be_scored_is_one_line_and_nothing_is_written(finished, tmp_path):
    images = tmp_path / "images"
    for i in range(3):
        draw(images / "a b" / f"{i}.png", i)
    (images / "a b" / "1.png").write_bytes((images / "a b" / "1.png").read_bytes()[:600])
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "single" / "0.png", 0)
    out = ("--out", tmp_path / "out")
    cases = {
        "1.png cannot be read (truncated)": ("--images", images, *out),
        "is not there": ("--images", tmp_path / "nowhere", *out),
        "empty holds no images": ("--images", tmp_path / "empty", *out),
        "--images": ("--images", finished, *out),
        "lies in --images": ("--images", images, "--out", images / "out"),
        "tile lies in the run": ("--images", images, "--out", finished / "tile"),
        "maps-purified lies in the run": ("--images", images, "--out", finished / "tile" / "maps-purified"),
        "holds other files (0.png)": ("--images", tmp_path / "single", "--out", images / "a b"),
        "run has tile": ("--images", images, *out, "--category", "bottle"),
        "padim": ("--images", images, *out, "--detector", "padim"),
        "--overlays is of other images": ("--overlays",),
    }
    before = state(finished)
    for mention, flags in cases.items():
        assert mention in refuse("evaluate", "--run", finished, *flags)
        assert not list((tmp_path / "out").glob("*")) and not (images / "out").exists()
    assert state(finished) == before


def test_names_that_no_map_can_have_are_refused_before_the_scoring_and_scored_without_maps(
    finished, tmp_path, monkeypatch
):
    images, out, name = tmp_path / "images", tmp_path / "out", f"{'x' * 248}.png"
    draw(images / name, 0)
    flags = ("evaluate", "--run", finished, "--images", images, "--out", out)
    for flag in ("--overlays", "--save-maps"):
        assert "its map would have a name of more than 255 bytes; give" in refuse(*flags, flag)
        assert not out.exists()
    for _ in range(2):  # what the first has written goes
        succeed(*flags)
    assert [row["path"] for row in rows_of(out / "scores-purified.csv")] == [name]
    monkeypatch.setattr("llb.maps.LONGEST_NAME", 5)
    assert "its map would have a name" in refuse("evaluate", "--run", finished, "--save-maps", "--overwrite")


def test_a_detector_has_learned_from_the_images_of_its_list_whatever_their_names(finished, data, tmp_path):
    paths = [row["path"] for row in rows_of(finished / "tile" / "scores.csv")]
    for name in ("scores.csv", "images.csv"):
        shutil.copy(finished / "tile" / name, tmp_path)
    (tmp_path / "purified.txt").write_text("\n".join(paths[2:]))
    for i, path in enumerate(paths):
        shutil.copy(data / path, tmp_path / f"{i}.png")
    images = Dataset(tmp_path, "", "tile", (), tuple(Record(f"{i}.png", None, (), "") for i in range(12)))
    assert learned_from(tmp_path, "purified", images) == [False] * 2 + [True] * 10
    assert learned_from(tmp_path, "all", images) == [True] * 12


def test_scores_of_one_run_and_category_are_not_replaced_by_anothers(finished, data, tmp_path):
    run, out = shutil.copytree(finished, tmp_path / "run"), tmp_path / "out"
    images = data / "tile" / "test" / "good"
    succeed("evaluate", "--run", finished, "--images", images, "--out", out)
    about = (out / "folder.txt").read_text()
    assert about == f"{images}\n{finished}, tile\n"
    line = ("evaluate", "--run", run, "--images", images)
    assert "by another run (see folder.txt)" in refuse(*line, "--out", out)
    (out / "folder.txt").write_text(about.splitlines(keepends=True)[0])  # of an older version
    succeed(*line, "--out", out)
    assert (out / "folder.txt").read_text() == f"{images}\n{run}, tile\n"
    succeed(*line)
    moved = run.rename(tmp_path / "moved")
    succeed("evaluate", "--run", moved, "--images", images)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_commands_may_score_at_once_but_not_to_one_place(finished, data, tmp_path, monkeypatch):
    images, refused = data / "tile" / "test" / "good", []
    line = ("evaluate", "--run", finished, "--images", images, "--overlays", "--out")
    (tmp_path / "link").symlink_to(tmp_path / "out")

    def meanwhile(*given):
        with monkeypatch.context() as patch:
            patch.setattr("llb.new_images.heat_maps", heat_maps)
            refused.append(refuse(*line, tmp_path / "link"))
            succeed(*line, tmp_path / "other")
        return heat_maps(*given)

    monkeypatch.setattr("llb.new_images.heat_maps", meanwhile)
    succeed(*line, tmp_path / "out")
    assert "works in this run (evaluate-images-" in refused[0] and f", process {os.getpid()} on " in refused[0]
    first, second = (
        sorted(p.relative_to(out) for p in out.rglob("*")) for out in (tmp_path / "out", tmp_path / "other")
    )
    assert first == second and len(first) == 6


def test_verdicts_of_a_detector_go_with_it_and_those_of_others_stay(finished, data, tmp_path):
    run, images = shutil.copytree(finished, tmp_path / "run"), data / "tile" / "test" / "good"
    for train_on in ("purified", "all"):
        succeed("evaluate", "--run", run, "--images", images, "--overlays", "--train-on", train_on)
    theirs = run / "tile" / "images-theirs" / "scores-purified.csv"  # nothing says that it is llb's
    theirs.parent.mkdir()
    theirs.touch()
    clear_stage2(run, ["tile"], "purified")
    names = {"folder.txt", "scores-all.csv", "overlays-all"}
    assert {file.name for file in (run / "tile" / "images-good").iterdir()} == names and theirs.exists()


def test_masks_below_the_folder_are_left_out_and_counted(finished, data, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(data / "tile" / "test" / "good", images / "good")
    shutil.copytree(data / "tile" / "ground_truth", images / "ground_truth")
    flags = ("evaluate", "--run", finished, "--out", out)
    assert "3 to score; left out: masks: 6 (ground_truth/square/000_mask.png" in succeed(*flags, "--images", images)
    assert {row["path"].partition("/")[0] for row in rows_of(out / "scores-purified.csv")} == {"good"}
    shutil.rmtree(images / "good")
    assert "holds no images (masks: 6" in refuse(*flags, "--images", images)


def test_a_detector_or_a_threshold_whose_list_has_changed_is_refused_as_by_evaluation(finished, data, tmp_path):
    run, images = shutil.copytree(finished, tmp_path / "run"), ("--images", data / "tile" / "test")
    purified, flags = run / "tile" / "purified.txt", ("evaluate", "--run", run)
    lines = purified.read_text().splitlines()
    purified.write_bytes("\r\n".join(["# as it was", *lines]).replace("/", "\\").encode("utf-8-sig"))
    check_lists(run, "tile", "purified", read_config(run, "", "")["stage2"]["purified"])
    purified.write_text("\n".join(lines[1:]))
    line = refuse(*flags, *images)
    assert line == refuse(*flags)
    assert line.endswith(f"python stage2_train.py --run {run} --train-on purified --overwrite")
    line = refuse(*flags, *images, "--train-on", "all")
    assert "threshold-all.json: the list" in line and line.endswith(f"evaluate.py --run {run} --train-on all")
    assert not list((run / "tile").glob("images-*"))
    (run / "tile" / "threshold-all.json").unlink()  # so it says no verdict
    check_lists(run, "tile", "all", read_config(run, "", "")["stage2"]["all"])
    purified.unlink()
    assert "run stage 1 again" in refuse(*flags, *images)


def test_the_detector_is_the_reviewed_or_purified_one_or_the_only_one(tmp_path):
    stage2 = {
        final: {"train_on": final.partition("-")[0], "detector": final.partition("-")[2] or "dinomaly", "steps": 3}
        for final in ("reviewed", "purified", "all", "all-padim")
    }
    config = {"categories": ["nut", "bolt"], "detector": "dinomaly", "stage2": stage2}
    for final in ("all", "all-padim"):
        (tmp_path / "nut" / f"stage2-{final}" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="nut, bolt; give the one"):
        choose(tmp_path, config, Evaluate())
    with pytest.raises(UserError, match="choose one of all, all-padim"):
        choose(tmp_path, config, Evaluate(category="nut"))
    assert choose(tmp_path, config, Evaluate(category="nut", train_on="all")) == ("nut", "all")
    assert choose(tmp_path, config, Evaluate(category="nut", detector="padim")) == ("nut", "all-padim")
    (tmp_path / "nut" / "stage2-purified" / "3").mkdir(parents=True)
    assert choose(tmp_path, config, Evaluate(category="nut")) == ("nut", "purified")
    (tmp_path / "nut" / "stage2-reviewed" / "3").mkdir(parents=True)
    assert choose(tmp_path, config, Evaluate(category="nut")) == ("nut", "reviewed")
    assert choose(tmp_path, config, Evaluate(category="nut", train_on="purified")) == ("nut", "purified")
