"""Runs that differ in the seed alone are one row; what differs is named; differences are paired by seed."""

import itertools
import sys

import numpy as np
import pytest
from helpers import dates, refuse, rows_of, succeed
from PIL import Image

from llb.compare import Group, differing, main, read_groups, report, written
from llb.data import Record
from llb.figures import house
from llb.files import UserError, read_json, write_json
from llb.looks import looks_figure
from llb.looks import main as looks_main
from llb.metrics import lowest_contamination
from llb.runfiles import VERSION, write_config
from llb.tables import Stage1Result, write_purified, write_scores, write_threshold
from llb.threshold import list_digest, threshold_facts

SCORES = np.array([[1, 4], [2, 1], [3, 3], [6, 2], [5, 6]], np.float32)  # the mean ranks both defects highest
LABELS = (0, 0, 0, 1, 1)


def made(run, seed=0, auroc=0.9, sources="old", finals=("purified", "all"), **settings):
    """A small run: one in five images dropped; the final detector on all images is .1 worse."""
    records = [Record(f"{i}.png", label, (), "") for i, label in enumerate(LABELS)]
    kept = np.array([True, True, True, True, False])
    write_scores(run / "part", records, Stage1Result(np.zeros(5, int), SCORES, SCORES.mean(axis=1), kept))
    write_purified(run / "part", records, kept)
    values = dict.fromkeys(finals, auroc) | {"all": auroc - 0.1}
    metrics = {final: {"image_auroc": values[final], "pixel_aupro": None} for final in finals}
    write_json(run / "metrics.json", {"part": metrics, "mean": metrics})
    stage2 = {final: {"train_on": final, "set": {}, "category_steps": {"part": seed}} for final in finals}
    head = settings.pop("head", "auto")
    stage2 = {final: own | {"head": head if final == "reviewed" else "auto"} for final, own in stage2.items()}
    own = {"submodels": 2, "set": {"power": 2.0}, "data": None} | settings
    facts = {"categories": ["part"], "sources": [sources], "stage2": stage2, "command": f"python … {run}"}
    write_config(run, {"llb": VERSION, "seed": seed} | own | facts)
    return str(run)


def results(*runs):
    return read_groups(runs)


def test_seeds_make_one_row_and_other_settings_or_sources_another(tmp_path):
    for number, (seed, settings) in enumerate(
        [(1, {}), (0, {}), (0, {"submodels": 5}), (0, {"sources": "new"}), (0, {"set": {"power": 1.0}})]
    ):
        made(tmp_path / str(number), seed, **settings)
    groups = results(*(tmp_path / str(number) for number in range(5)))
    assert [list(group.runs) for group in groups] == [[1, 0], [0], [0], [0]]
    assert differing(groups) == (["submodels", "set.power", "sources"], [])
    with pytest.raises(UserError, match="0 and .*0 have the same settings and the same seed"):
        results(tmp_path / "0", tmp_path / "0")


def test_of_settings_that_differ_together_one_names_the_rows(tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for run, submodels in zip(runs, (1, 3)):
        made(run, submodels=submodels, aggregate=f"of {submodels}")
    assert differing(results(*runs)) == (["submodels"], ["aggregate"])
    assert differing(results(*runs), first=["aggregate"]) == (["aggregate"], ["submodels"])
    assert "Together with these differ: aggregate." in report(results(*runs))


def test_the_table_has_means_and_differences_paired_by_seed(tmp_path):
    for seed in range(6):
        made(tmp_path / f"a{seed}", seed, 0.9 + seed / 1000)
        made(tmp_path / f"b{seed}", seed, 0.95 + 2 * seed / 1000, submodels=5)
    made(tmp_path / "b6", 6, 0.1, submodels=5, finals=("purified",))  # a seed without a partner counts in no difference
    few = [each for each in tmp_path.iterdir() if each.name[1] < "5"]  # fewer seeds than give any p < .05
    assert "(p " not in report(results(*sorted(few)))
    lines = report(results(*sorted(tmp_path.iterdir()))).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    titles = ["submodels", "n", "ranking AUROC", "contamination", "kept", "image AUROC purified", "image AUROC all"]
    assert cells[0] == titles and cells[4] == [*titles, "purified − all"]
    assert cells[2] == ["2", "6", "1.000 ± .000", "25.0 ± 0.0 %", "80.0 ± 0.0 %", ".903 ± .002", ".802 ± .002"]
    assert cells[3][:3] == ["5", "7", "1.000 ± .000"] and cells[3][6] == ".855 ± .004 (n 6)"
    assert cells[6] == ["2", "6", *5 * "–", "+.100 ± .000 (p .031)"]
    assert cells[7][2:6] == [
        "+.000 ± .000 (n 6)", "+0.0 ± 0.0 % (n 6)", "+0.0 ± 0.0 % (n 6)", "+.052 ± .002 (p .031) (n 6)"
    ]  # fmt: skip
    assert written("image AUROC all", [-0.0004], "+") == "+.000" and written("kept", [-0.0004], "+") == "+0.0 %"


def test_runs_of_stage_1_alone_are_compared_and_others_are_refused(tmp_path):
    made(tmp_path / "a", finals=())
    assert "image AUROC" not in report(results(tmp_path / "a"))
    (tmp_path / "a" / "part" / "scores.csv").unlink()
    for run, problem in (("a", "finish stage 1"), ("b", "config.json cannot be read")):
        with pytest.raises(UserError, match=problem):
            read_groups([tmp_path / run])


@pytest.mark.parametrize("normal", (np.arange(4.0), None))  # a detector may have no threshold
def test_what_is_kept_is_what_an_edited_list_says_and_a_detector_on_the_older_one_is_left_out(tmp_path, capsys, normal):
    run, folder = made(tmp_path / "a"), tmp_path / "a" / "part"
    write_threshold(folder, "purified", threshold_facts(normal, [], np.empty(0)) | {"list": list_digest(np.arange(4))})
    (group,) = results(run)
    assert group.figures["image AUROC purified"] == {0: 0.9} and not capsys.readouterr().out
    (folder / "purified.txt").write_text("# by hand\n0.png\n3.png\n")
    (group,) = results(run)
    assert group.figures["kept"] == {0: 0.4} and group.figures["contamination"] == {0: 0.5}
    assert group.figures["image AUROC purified"] == {} and group.figures["image AUROC all"] == {0: pytest.approx(0.8)}
    assert "purified are left out: purified.txt has changed since it was trained" in (told := capsys.readouterr().out)
    assert f"python stage2_train.py --run {run} --train-on purified --overwrite" in told


def test_simulated_looks_are_settings_and_are_drawn(tmp_path, capsys, monkeypatch):
    finals, common = ("reviewed", "all", "clean"), {"detector": "padim", "noise_ratio": 0.2}
    for simulate, head in itertools.product((24, 96), ("auto", "none")):
        look = {"simulate": simulate, "errors": 0.1}
        made(tmp_path / f"{simulate}{head}", 0, 0.8 + simulate / 1000, finals=finals, head=head, review=look, **common)
    groups = results(*sorted(tmp_path.iterdir()))
    assert differing(groups)[0] == ["review.simulate", "final.head"] and "reviewed − all" in report(groups)
    assert all(group.figures["image AUROC all"] and group.figures["image AUROC reviewed"] for group in groups)
    with house():
        (axis,) = looks_figure(groups).axes
    lines = {line.get_label(): line for line in axis.lines}
    names = {"all", "clean", "use, 10% errors", "drop, 10% errors"}
    assert axis.get_title("left") == "padim, 20% defects" and lines.keys() == names
    assert lines["use, 10% errors"].get_xydata() == pytest.approx(np.array([[24, 0.824], [96, 0.896]]))
    monkeypatch.setattr(sys, "argv", ["looks", "--grid", str(tmp_path)])
    looks_main()
    assert (tmp_path / "looks.svg").stat().st_size and "looks.png" in capsys.readouterr().out
    metrics = read_json(tmp_path / "24auto" / "metrics.json", "")  # of a grid that was interrupted
    write_json(tmp_path / "24auto" / "metrics.json", {name: metrics[name] for name in metrics if name != "mean"})
    looks_main()
    made(tmp_path / "other", finals=finals, review=look, encoder="tiny", **common)
    with pytest.raises(UserError, match="differ in encoder, too"):
        looks_main()


def test_a_curve_of_looks_is_of_the_seeds_that_all_its_panel_has():
    groups, whole = [], {24: (0.8,), 96: (0.8, 0.9)}  # the run of seed 1 and 24 images is not finished
    for simulate, aurocs in whole.items():
        look = {"review.simulate": simulate, "review.errors": 0.0, "final.head": "auto"}
        groups.append(Group({"detector": "padim", "noise_ratio": 0.2} | look))
        for final in ("reviewed", "all"):  # a look gains nothing
            groups[-1].figures[f"image AUROC {final}"].update(enumerate(aurocs))
    with house():
        (axis,) = looks_figure(groups).axes
    assert [set(line.get_ydata()) for line in axis.lines] == [{0.8}, {0.8}]
    for group, seed in zip(groups, (0, 1)):
        group.figures["image AUROC reviewed"] = {seed: 0.8}
    with house(), pytest.raises(UserError, match="padim, 20% defects: no seed has all of"):
        looks_figure(groups)


def test_the_papers_statistic_counts_defects_among_the_lowest_scores():
    # the first sub-model's two lowest are normal, the second's are one normal and one defective
    assert lowest_contamination(SCORES, LABELS, 0.4) == (0.25, 0.0)
    assert lowest_contamination(SCORES, (None, *LABELS[1:]), 0.4) == (None, None)


def test_no_file_of_a_run_is_overwritten_and_a_share_of_none_is_refused(tmp_path):
    run, other = made(tmp_path / "a"), tmp_path / "link"
    other.symlink_to(tmp_path / "a" / "part")
    written = dates(tmp_path)
    for flag, file in (
        ("--csv", f"{run}/config.json"),
        ("--csv", f"{other}/scores.csv"),
    ):
        assert f"{flag} {file} belongs to a run: name another file" in refuse("llb.compare", run, flag, file)
    assert "--lowest: '0' is not a number above 0 to 1" in refuse("llb.compare", run, "--lowest", "0")
    assert "above 0 to 1" in refuse("llb.ablate", "--lowest", "0", "--print")
    assert dates(tmp_path) == written
    for _ in range(2):  # a file of one's own in a folder of the run
        succeed("llb.compare", run, "--csv", f"{run}/notes/table.csv")


def test_the_command_writes_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    runs = [made(tmp_path / name, submodels=k, seed=s) for name, k, s in (("a", 1, 0), ("b", 1, 1), ("c", 3, 0))]
    files = ["--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "t")]
    monkeypatch.setattr(sys, "argv", ["compare", *runs, *files, "--lowest", "0.4"])
    main()
    assert "25.0 ± 0.0 %" in capsys.readouterr().out
    rows = rows_of(tmp_path / "t.csv")
    assert [(row["run"], row["seed"], row["submodels"]) for row in rows] == list(zip(runs, "010", "113"))
    assert float(rows[0]["image AUROC all"]) == 0.8 and rows[0]["pixel AUPRO all"] == ""
    assert "submodels" in (tmp_path / "t.svg").read_text()
    with Image.open(tmp_path / "t.png") as image:
        assert image.width > 300
