"""A grid is made of ordinary runs, as the three scripts make them; what they have in common is done once."""

import dataclasses
import json
import shlex
import shutil
import sys

import pytest
from helpers import TILE, command, contents, dates, draw, refuse, rows_of, succeed

import evaluate
from llb import ablate, compare
from llb.borrow import STAGE1_FILES, Cell, borrow_detector, borrow_submodels
from llb.borrow import finished as finished_cell
from llb.config import Evaluate, Stage1, Stage2
from llb.files import UserError, write_csv, write_json
from llb.flags import parse_flags
from llb.lock import hold
from llb.presets import PRESETS
from llb.run import command_line
from llb.runfiles import COLUMNS, read_config, write_config
from llb.tables import read_metrics

CELLS = [f"keep={keep},seed=0,submodels=3" for keep in ("auto", "0.5")]


def test_an_interrupted_grid_continues_and_its_runs_are_those_of_the_scripts(finished, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "write_report", lambda run, notes: None)  # both draw curves, which takes long
    monkeypatch.setattr(compare, "draw", lambda prefix, groups, first: None)
    out = tmp_path / "grid"
    line = ["--data", data, *TILE, "--seeds", 1, "--vary", "keep=auto,0.5", "--vary", "submodels=3,13", "--out", out]
    line += ["--vary", "final.steps=3", "--train-on", "all"]

    def interrupted(run, settings, device, whole=ablate.run_evaluation):
        if "keep=0.5" in run.name:
            raise KeyboardInterrupt
        whole(run, settings, device)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ablate, "run_evaluation", interrupted)
        patch.setattr(sys, "argv", ["ablate", *map(str, line)])
        ablate.main()
    first, second = (out / f"final.steps=3,{cell}" for cell in CELLS)
    assert (second / "tile" / "stage2-all").is_dir() and not (second / "metrics.json").exists()
    written = dates(first)
    status, printed, error = command("llb.ablate", *line)
    assert dates(first) == written
    assert status == 2 and "2 of 4 runs are left out" in error
    assert "category tile: 12 training images are too few for 13 sub-models" in printed
    assert [each["keep"] for each in rows_of(out / "compare.csv")] == ["auto", "0.5"]
    assert any(each.startswith("| 0.5 ") and "50.0 %" in each for each in printed.splitlines())

    mine = {name: text for name, text in contents(first).items() if not name.endswith("images.csv")}
    assert mine.items() <= contents(finished).items() and "tile/predictions-all.csv" in mine
    # the second run has trained neither sub-models nor the detector of all images: their files are copies
    for part in ("stage1", "stage2-all"):
        trained, copied = (
            {(f.name, date) for f, date in dates(run / "tile" / part).items()} for run in (first, second)
        )
        assert trained and copied == trained


def test_the_commands_of_a_grid_are_the_scripts_own(tmp_path):
    line = ["--preset", "dinomaly", "--dropout", "0.1", "--train-on", "all", "--seeds", "2", "--out", tmp_path]
    lines = succeed("llb.ablate", *line, "--print", "--vary", "final.steps=7").splitlines()
    assert len(lines) == 2 * 8 and not list(tmp_path.iterdir())
    given = []
    for each in lines:
        words = [shlex.split(part) for part in each.split(" && ")]
        scripts = {"stage1_partition.py": Stage1, "stage2_train.py": Stage2, "evaluate.py": Evaluate}
        assert [(python, script) for python, script, *_ in words] == [("python", script) for script in scripts]
        stage1, stage2, last = (parse_flags(kind, flags) for kind, (_, _, *flags) in zip(scripts.values(), words))
        assert stage1.out == stage2.run == last.run and stage2.train_on == "all"
        given.append((stage1.seed, stage1.set, stage1.dropout, stage2.steps, stage1.out))
    assert len(set(given)) == len(lines) and {seed for seed, *_ in given} == {0, 1}
    varied = [each[1:4] for each in given if each[0] == 0]
    assert {(None, 0.1, None), ("attention=softmax", 0.1, None), (None, 0.0, None), (None, 0.1, 7)} < set(varied)


@pytest.mark.parametrize(
    ("flags", "pool"), ((["--data", "D"], "half"), (["--data", "D", "--noise-pool", "3"], 3), ([], None))
)
def test_all_runs_have_one_test_set_if_the_noise_ratio_is_varied(flags, pool, tmp_path):
    """Without --noise-ratio a labelled set has no noise pool by default; the demo set has one at any ratio."""
    line = ["--single", "--vary", "noise_ratio=0.1,0.2", "--vary", "keep=0.8", *flags]
    _, cells = ablate.grid(parse_flags(ablate.Ablate, line), tmp_path)
    assert {cell.stage1.noise_pool for cell in cells} == {pool}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_grid_and_given_values_take_the_place_of_its_own(preset, tmp_path):
    line = ["--preset", preset, "--vary", "noise_ratio=0.3", "--out", tmp_path, "--print"]
    assert "--noise-ratio 0.3" in succeed("llb.ablate", *line)


def test_a_look_stands_between_the_stages(tmp_path):
    line = ["--vary", "review.simulate=24,48", "--vary", "review.errors=0.1", "--vary", "final.head=none"]
    lines = succeed("llb.ablate", *line, "--train-on", "reviewed,all", "--seeds", 1, "--out", tmp_path, "--print")
    for each, simulate in zip(lines.splitlines(), (24, 48), strict=True):
        _, look, *finals, _ = [shlex.split(part) for part in each.split(" && ")]
        assert look[:3] == ["python", "-m", "llb.review"] and look[5:] == [
            "--simulate",
            str(simulate),
            "--errors",
            "0.1",
        ]
        assert [final[4:6] for final in finals] == [["--train-on", "reviewed"], ["--train-on", "all"]]
        assert look[4] == finals[0][3] and ["none" in final for final in finals] == [True, False]  # it has no head


def test_overwrite_begins_again_as_stage_1_does_and_never_deletes_what_a_person_marked(
    finished, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare, "draw", lambda prefix, groups, first: None)
    out = tmp_path / "grid"
    first, second = (out / f"keep={keep},seed=0" for keep in ("0.5", "0.8"))
    line = ["llb.ablate", "--data", data, *TILE, "--seeds", 1, "--train-on", "none", "--out", out, "--overwrite"]
    for run in (first, second):
        shutil.copytree(finished, run)
        (run / "tile" / "images-NEW").mkdir()
        (run / "tile" / "images-NEW" / "scores-all.csv").touch()  # of evaluate.py --images
        (run / "tile" / "marks.csv").write_text(
            f"path,verdict\n{rows_of(run / 'tile' / 'scores.csv')[0]['path']},fine\n"
        )
    written = dates(first)

    def left_out(problem, *more, runs=1) -> None:
        status, printed, error = command(*line, "--vary", *more)
        assert status == 2 and f"1 of {runs} runs are left out" in error and problem in printed, printed

    left_out(f"{first.name}: left out: {first}/tile/marks.csv is what a person marked", "keep=0.5")
    (first / "tile" / "marks.csv").unlink()
    del written[first / "tile" / "marks.csv"]
    with hold(first, "evaluate"):
        left_out("another command works in this run (evaluate", "keep=0.5")
    assert dates(first) == written
    (first / "config.json").write_text('{"llb": 3, "cat')  # damaged: it names no categories
    left_out(f"{second.name}: left out: {second}/tile/marks.csv is what a person marked", "keep=0.5,0.8", runs=2)
    (second / "tile" / "marks.csv").unlink()
    assert "left out" not in succeed(*line, "--vary", "keep=0.5,0.8")
    assert all((run / "tile" / "images-NEW" / "scores-all.csv").exists() for run in (first, second))
    assert not any((run / "tile" / "stage2-all").exists() for run in (first, second))
    assert [read_config(run, "", "")["keep"] for run in (first, second)] == [0.5, 0.8]
    trained, copied = (
        {(f.name, date) for f, date in dates(run / "tile" / "stage1").items()} for run in (first, second)
    )
    assert trained and copied == trained


@pytest.fixture
def lent(finished, data, tmp_path):
    """A finished run with simulated marks and a detector on `reviewed`, and a new one with the same stage 1."""
    old, new = (tmp_path / name for name in ("old", "new"))
    shutil.copytree(finished, old)
    tile = old / "tile"
    shutil.copytree(tile / "stage2-all", tile / "stage2-reviewed")
    shutil.copy(tile / "predictions-all.csv", tile / "predictions-reviewed.csv")
    for name in ("marks.csv", "head-reviewed.json", "review-reviewed.json"):
        (tile / name).write_text("")
    metrics = json.loads((old / "metrics.json").read_text())
    metrics["tile"]["reviewed"] = metrics["tile"]["all"]
    write_json(old / "metrics.json", metrics)
    write_config(old, read_config(old, "", "") | {"review": {"simulate": 3, "errors": 0.0}})

    def cell(run, head="auto"):
        stage1 = parse_flags(Stage1, ["--data", str(data), "--out", str(run), *map(str, TILE)])
        finals = [Stage2(run=str(run), train_on=train_on, head=head) for train_on in ("reviewed", "all")]
        return Cell(stage1, finals, Evaluate(run=str(run)))

    borrow_submodels(cell(new), [cell(old)])
    return new, cell(old), cell


def borrowed(lent, head: str) -> set[str]:
    new, old, cell = lent
    for final in cell(new, head).finals:
        borrow_detector(cell(new, head), final, [old])
    return {path.name for path in (new / "tile").iterdir()} - {*STAGE1_FILES}


def test_the_marks_of_another_run_are_not_taken_over(lent):
    assert "review" not in read_config(lent[0], "", "") and not (lent[0] / "tile" / "marks.csv").exists()
    taken = borrowed(lent, "auto")
    assert "stage2-all" in taken and not any("reviewed" in name for name in taken), "without marks: another list"
    assert read_metrics(lent[0])["tile"].keys() == {"all"} and "predictions-all.csv" in taken


def test_with_the_same_marks_a_detector_is_taken_over_but_with_another_head_neither_head_nor_evaluation(lent):
    (lent[0] / "tile" / "marks.csv").write_text("")
    taken = borrowed(lent, "none")
    assert {"stage2-reviewed", "stage2-all", "predictions-all.csv"} < taken
    assert not {"head-reviewed.json", "review-reviewed.json", "predictions-reviewed.csv"} & taken
    assert {"head-reviewed.json", "review-reviewed.json", "predictions-reviewed.csv"} < borrowed(lent, "auto")
    assert read_metrics(lent[0])["tile"].keys() == {"reviewed", "all"}


@pytest.mark.parametrize("change", ["list", "stage 1"])
def test_an_evaluation_is_taken_over_only_with_the_list_and_the_sub_models_that_its_threshold_is_of(lent, change):
    new, old, cell = lent
    assert read_config(new, "", "")["stage2"] == {}, "its own may have other settings"
    if change == "list":
        listed = new / "tile" / "purified.txt"
        listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
        taken = borrowed(lent, "auto")
    else:
        other = dataclasses.replace(cell(new), stage1=dataclasses.replace(cell(new).stage1, submodels=5))
        borrow_detector(other, other.finals[1], [old])
        taken = {path.name for path in (new / "tile").iterdir()} - {*STAGE1_FILES}
    assert "stage2-all" in taken and "predictions-all.csv" not in taken and not read_metrics(new)


OTHER = {"weights_digest": "0", "precision": "bfloat16", "white": {"tile": {"integer": 4095}}}


@pytest.mark.parametrize("fact", ["images", *OTHER])
def test_nothing_is_taken_over_from_a_run_of_other_images_or_of_another_encoder(lent, fact, tmp_path):
    _, old, cell = lent
    if fact == "images":
        rows = [list(row.values()) for row in rows_of(old.run / "tile" / "images.csv")]
        write_csv(old.run / "tile" / "images.csv", COLUMNS, [*rows[:-1], [*rows[-1][:-1], 64 * "0"]])
    else:
        write_config(old.run, read_config(old.run, "", "") | {fact: OTHER[fact]})
    assert not any("stage2" in name or "predictions" in name for name in borrowed(lent, "auto"))
    if fact in ("weights_digest", "precision"):  # of images and white: they are looked at before a run lends anything
        assert not borrow_submodels(cell(tmp_path / "third"), [old]) and not (tmp_path / "third").exists()


def test_a_finished_run_whose_images_have_changed_is_left_out_by_the_scripts_own_line(lent, data, tmp_path):
    _, old, cell = lent
    config = read_config(old.run, "", "") | {"command": command_line(old.stage1)}
    write_config(old.run, config)
    old = dataclasses.replace(old, finals=old.finals[1:])
    assert finished_cell(old)
    root = shutil.copytree(data, tmp_path / "data")
    write_config(old.run, config | {"data": str(root)})
    assert finished_cell(old)
    draw(root / "tile" / "train" / "good" / "003.png", 77)
    with pytest.raises(UserError, match=r"since stage 1, images of tile were replaced \(1: .*003.png\).* --overwrite"):
        finished_cell(old)


def test_metrics_of_another_selection_are_not_shown(finished, data, tmp_path):
    run = shutil.copytree(finished, tmp_path / "grid" / "final.steps=3,seed=0")
    line = ["llb.ablate", "--data", data, *TILE, "--keep", "0.5", "--vary", "final.steps=3", "--seeds", 1]
    for _ in range(2):  # the second time stage 1 is finished, and its command the same
        status, printed, _ = command(*line, "--out", run.parent)
        assert status == 2 and "image AUROC" not in printed
        assert "seed=0: left out:" in printed and "the list of training images has changed" in printed


@pytest.mark.parametrize(
    ("flags", "made"),
    (
        ("--single --vary submodels=1,3,5", ["seed=0", "seed=0,submodels=1", "seed=0,submodels=5"]),
        ("--vary seed=0,1 --seeds 2", ["seed=0", "seed=1"]),
        ("--vary keep=0.5,0.50 --vary image_size=112", ["image_size=112,keep=0.5,seed=0"]),
        ("--single --vary image_size=112 --vary suspects=9 --vary final.steps=200", ["seed=0"]),
        ("--single --vary detector=padim --vary dropout=0.2 --detector padim", ["seed=0", "dropout=0.2,seed=0"]),
        (
            "--vary review.simulate=3 --vary review.errors=0,0.1 --train-on reviewed",
            [f"review.errors={e},review.simulate=3,seed=0" for e in ("0", "0.1")],
        ),
    ),
)
def test_settings_that_are_given_twice_or_are_the_default_make_one_run(flags, made, tmp_path, monkeypatch):
    def stop(cells, *_):
        raise UserError(" ".join(cell.run.name for cell in cells))

    monkeypatch.setattr(ablate, "run_cells", stop)
    line = refuse("llb.ablate", "--seeds", 1, *flags.split(), "--out", tmp_path / "grid")
    assert line.removeprefix("error: ").split() == made


@pytest.mark.parametrize(
    ("vary", "problem"),
    (
        ("keep", "--vary keep: give NAME=A,B"),
        ("keep=0.5,", "--vary keep=0.5,: give NAME=A,B"),
        ("stage3.keep=1", "--vary stage3.keep=1: give NAME=A,B"),
        ("kept=0.5", "unrecognized arguments: --kept"),
        ("keep=2", "--keep"),
        ("final.steps=0", "--steps: '0'"),
        ("review.errors=0,0.1 --train-on reviewed", "review.errors: belongs to review.simulate"),
        ("keep=0.7 --vary keep=0.8,0.9", "--vary keep: is given twice; give all values in one"),
        ("noise_ratio=0.1 --vary noise-ratio=0.2 --preset noise", "--vary noise_ratio: is given twice"),
        ("out=a,b", "--vary out: it is the grid's own; give --out"),
        ("final.train-on=all", "--vary final.train_on: it is the grid's own; give --train-on"),
        ("review.run=a", "--vary review.run: it is the grid's own"),
        ("final.steps=3 --train-on none", "--vary final.steps: with --train-on none there is no final detector"),
        ("review.simulate=3", "--vary review.simulate: is of --train-on reviewed alone"),
        ("final.head=none --train-on all,clean", "--vary final.head: is of --train-on reviewed alone"),
    ),
)
def test_what_no_script_accepts_is_refused_before_anything_is_made(vary, problem, tmp_path):
    assert problem in refuse("llb.ablate", "--vary", *vary.split(), "--out", tmp_path / "grid")
    assert not (tmp_path / "grid").exists()
