"""llb.review: marks are checked and merged, or simulated, and the estimate of the unseen defects holds the truth."""

import shutil

import numpy as np
import pytest
from helpers import refuse, rows_of, succeed

from llb.files import UserError, write_csv, write_json
from llb.manifest import clear_run
from llb.marks import DEFECT, FINE, UNSAID, training_set, write_marks
from llb.pages import suspect_pages
from llb.review import findings, read_file, threshold_doubt
from llb.run import check_no_marks
from llb.runfiles import read_config, write_config
from llb.tables import read_metrics
from llb.unseen import unseen_defects

NAME = "llb.review"


@pytest.fixture
def run(tmp_path, finished):
    return shutil.copytree(finished, tmp_path / "run")


def saved(file, *rows: str):
    file.write_text("category,path,verdict\n" + "".join(f"{row}\n" for row in rows))
    return file


def paths_of(run) -> list[str]:
    return [row["path"] for row in rows_of(run / "tile" / "scores.csv")]


def test_marks_are_merged_and_a_changed_mind_is_taken(run, tmp_path):
    first, second, third, *_ = paths_of(run)
    assert "no image is marked" in succeed(NAME, "--run", run)
    one = saved(tmp_path / "one.csv", f"tile,{second},defect", f"tile,{first},fine")
    out = succeed(NAME, "--run", run, one)
    assert "2 new marks\n" in out and "2 seen, 1 defects; 10 unseen" in out
    assert out.splitlines()[-1] == f"next: python stage2_train.py --run {run} --train-on reviewed"
    two = saved(tmp_path / "two.csv", f"tile,{first},defect", f"tile,{third},Fine ", f"tile,{second}, DEFECT")
    assert f"1 new marks, and 1 others have changed: {first}\n" in succeed(NAME, "--run", run, two)
    merged = [(row["path"], row["verdict"]) for row in rows_of(run / "tile" / "marks.csv")]
    assert merged == [(first, "defect"), (second, "defect"), (third, "fine")]
    assert "0 new marks\n" in succeed(NAME, "--run", run, two)
    assert "a person's" in refuse(NAME, "--run", run, "--simulate", 3)


def test_what_is_next_is_each_detector_that_was_trained_by_other_marks(run, tmp_path):
    config = read_config(run, "", "")
    stage2 = config["stage2"] | {"reviewed-padim": config["stage2"]["all"] | {"train_on": "reviewed"}}
    write_config(run, config | {"stage2": stage2})
    mine = saved(tmp_path / "mine.csv", f"tile,{paths_of(run)[0]},fine")
    commands = [
        f"next: python stage2_train.py --run {run} --train-on reviewed{more} --overwrite"
        for more in ("", " --detector padim")
    ]
    assert succeed(NAME, "--run", run, mine).splitlines()[-1] == commands[1]
    write_config(run, config | {"stage2": {"reviewed": stage2["reviewed-padim"]} | stage2})
    assert succeed(NAME, "--run", run).splitlines()[-2:] == commands


@pytest.mark.parametrize("sign, before", [(";", ""), ("\t", ""), (";", "sep=;\n"), (",", "sep=,\n")])
def test_marks_may_come_from_a_spreadsheet_of_another_country(run, tmp_path, sign, before):
    first, second, *_ = paths_of(run)
    file = saved(tmp_path / "marks.csv", f"tile,{first},defect", f'tile,"{second}",fine')
    file.write_text(before + file.read_text().replace(",", sign), encoding="utf-8-sig")
    assert "2 new marks\n" in succeed(NAME, "--run", run, file)
    merged = [(row["path"], row["verdict"]) for row in rows_of(run / "tile" / "marks.csv")]
    assert sorted(merged) == sorted([(first, "defect"), (second, "fine")])
    with open(file, "a") as more:
        more.write(f"tile{sign}no.png{sign}good\n")
    assert f"line {4 + bool(before)}: verdict 'good' is" in refuse(NAME, "--run", run, file)


@pytest.mark.parametrize(
    "row, says",
    [
        ("tile,{0},fine", "line 3: {0} stands in line 2 already, as fine"),
        ("tile,{0},defect", "line 3: {0} stands in line 2 already, as fine"),
        ("bottle,{1},fine", "line 3: category 'bottle' is not of this run, which has tile"),
        ("tile,{1},good", "line 3: verdict 'good' is neither defect nor fine"),
        ("tile,{1}", "line 3: verdict '' is neither"),
    ],
)
def test_a_wrong_line_is_named_and_changes_nothing(run, tmp_path, row, says):
    paths = paths_of(run)
    good = saved(tmp_path / "good.csv", f"tile,{paths[2]},defect")
    bad = saved(tmp_path / "bad.csv", f"tile,{paths[0]},fine", row.format(*paths))
    assert says.format(*paths) in refuse(NAME, "--run", run, good, bad)
    assert not (run / "tile" / "marks.csv").exists()


def test_marks_that_were_moved_away_are_taken_back_without_those_of_images_that_are_gone(run, tmp_path):
    first, second, *_ = paths_of(run)
    succeed(NAME, "--run", run, saved(tmp_path / "mine.csv", f"tile,{first},defect", f"tile,{second},fine"))
    kept = (run / "tile" / "marks.csv").rename(tmp_path / "kept.csv")
    rows = kept.read_text()
    kept.write_text(f"{rows}gone/1.png,fine\ngone/2.png,defect\n")
    told = succeed(NAME, "--run", run, kept)
    why = "2 of the marks are left out: the category has no such training image (gone/1.png, gone/2.png)"
    assert f"{kept}: {why}\n2 new marks\n" in told
    assert (run / "tile" / "marks.csv").read_text() == rows
    kept.write_text("path,verdict\ngone/1.png,fine\n")
    assert "none of its images is a training image (gone/1.png); give" in refuse(NAME, "--run", run, kept)
    kept.write_text(f"path,score,verdict\n{first},3.5,fine\n")  # of evaluate.py --images
    assert "has no columns category, path, verdict" in refuse(NAME, "--run", run, kept)
    kept.write_text(rows)
    said = read_file(kept, {"nut": {first: 0}, "tile": {second: 0}})
    assert sorted(said) == sorted([("nut", first, DEFECT), ("tile", second, FINE)])


def test_what_is_no_table_of_marks_is_refused(run, tmp_path):
    assert "is not there" in refuse(NAME, "--run", run, tmp_path / "none.csv")
    assert "is a folder: give the file" in refuse(NAME, "--run", run, tmp_path)
    assert "has no columns" in refuse(NAME, "--run", run, run / "tile" / "scores.csv")
    assert "exclude each other" in refuse(NAME, "--run", run, "a.csv", "--simulate", 3)
    assert "belongs to" in refuse(NAME, "--run", run, "--errors", 0.1)
    (run / "tile" / "purified.txt").unlink()
    assert "stage 1 is not finished for tile" in refuse(NAME, "--run", run)


def test_simulated_marks_are_the_labels_of_what_is_seen_with_errors_and_said_to_be_simulated(run, tmp_path):
    label = {row["path"]: row["label"] for row in rows_of(run / "tile" / "scores.csv")}
    rank = np.array([int(row["rank"]) for row in rows_of(run / "tile" / "scores.csv")])
    out = succeed(NAME, "--run", run, "--simulate", 10, "--errors", 0.2)
    assert "SIMULATED by the labels, as who looks at 10 images and errs in 20%" in out
    rows = rows_of(run / "tile" / "marks.csv")
    wrong = [row["path"] for row in rows if (row["verdict"] == "defect") != (label[row["path"]] == "1")]
    shown = np.concatenate([page.images for page in suspect_pages(rank, 0, len(rank))])[:10]
    assert {row["path"] for row in rows} == {paths_of(run)[i] for i in shown} and len(wrong) == 2
    assert read_config(run, "", "")["review"] == {"simulate": 10, "errors": 0.2}
    assert "SIMULATED" in succeed(NAME, "--run", run), "later, too"
    succeed(NAME, "--run", run, "--simulate", 3)  # anew
    assert len(rows_of(run / "tile" / "marks.csv")) == 3
    own = saved(tmp_path / "own.csv", f"tile,{paths_of(run)[0]},fine")
    assert "first delete" in refuse(NAME, "--run", run, own)
    (run / "tile" / "marks.csv").unlink()
    assert "SIMULATED" not in succeed(NAME, "--run", run, own)
    assert "review" not in read_config(run, "", "")


def test_where_scores_lack_a_marked_image_they_are_blamed_and_not_the_marks(run, tmp_path):
    succeed(NAME, "--run", run, saved(tmp_path / "own.csv", f"tile,{paths_of(run)[-1]},fine"))
    scores = run / "tile" / "scores.csv"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    line = refuse(NAME, "--run", run)
    assert "scores.csv is damaged" in line and "run stage 1 again" in line


def test_other_marks_make_the_metrics_of_reviewed_those_of_an_old_list_and_the_same_marks_do_not(run, tmp_path):
    one, two = (saved(tmp_path / f"{word}.csv", f"tile,{paths_of(run)[0]},{word}") for word in ("fine", "defect"))
    before = read_metrics(run)
    old = {name: entry | dict.fromkeys(("reviewed", "reviewed-padim"), entry["all"]) for name, entry in before.items()}
    for look, other in ((("--simulate", 3), ("--simulate", 4)), ((one,), (two,))):
        succeed(NAME, "--run", run, *look)
        write_json(run / "metrics.json", old)
        succeed(NAME, "--run", run, *look)
        assert read_metrics(run) == old
        succeed(NAME, "--run", run, *other)
        assert read_metrics(run) == before
        (run / "tile" / "marks.csv").unlink()


def test_a_run_that_begins_again_has_no_marks_whose_origin_nobody_knows(run):
    succeed(NAME, "--run", run, "--simulate", 3)
    clear_run(run, ["tile"])
    assert not (run / "tile" / "marks.csv").exists()


def test_what_a_person_marked_is_not_deleted_by_overwrite(run, tmp_path):
    succeed(NAME, "--run", run, "--simulate", 3)
    check_no_marks(run, ["tile"], read_config(run, "", ""))  # made by the labels: may go
    (run / "tile" / "marks.csv").unlink()
    succeed(NAME, "--run", run, saved(tmp_path / "own.csv", f"tile,{paths_of(run)[0]},fine"))
    with pytest.raises(
        UserError,
        match="tile/marks.csv is what a person marked: move it away first; llb.review takes it back",
    ):
        check_no_marks(run, ["tile"], read_config(run, "", ""))


def test_unknown_labels_cannot_be_looked_up(run):
    file = run / "tile" / "scores.csv"
    head, first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([head, first.rpartition(",")[0] + ",\n", *rest]))
    assert "needs labels" in refuse(NAME, "--run", run, "--simulate", 3)
    assert not (run / "tile" / "marks.csv").exists() and "review" not in read_config(run, "", "")


def drawn_run(seed: int, share: float, shift: float, seen: int):
    """Pages, ranks, marks and labels of 150 images; shift: of the defects' scores, in standard deviations."""
    random = np.random.default_rng((seed, 1))  # not the stream that the pages draw from
    label = random.random(150) < share
    rank = np.argsort(np.argsort(-random.normal(shift * label))) + 1
    pages = suspect_pages(rank, seed, 150)
    marks = np.full(150, UNSAID, np.int8)
    looked = np.concatenate([page.images for page in pages])[:seen]
    marks[looked] = label[looked]
    return pages, rank, marks, label


def look_at_next_page(marks: np.ndarray, label: np.ndarray, seed: int, images: int) -> None:
    """Mark unseen images, picked by somebody who knows the defects well."""
    known = np.where(marks == UNSAID, 2 * label + np.random.default_rng((seed, 2)).normal(size=len(marks)), -np.inf)
    picked = np.argsort(-known)[:images]
    marks[picked] = label[picked]


@pytest.mark.parametrize(
    "share, shift, seen, asked",
    [(0.1, 2, 72, 0), (0.4, 0.5, 60, 0), (0.1, 0, 48, 0), (0.4, 0.5, 60, 24), (0.2, 1, 48, 24)],
)
def test_the_interval_holds_the_truth_in_nine_of_ten_runs(share, shift, seen, asked):
    """asked: images of a next page."""
    held = []
    for seed in range(200):
        pages, rank, marks, label = drawn_run(seed, share, shift, seen)
        look_at_next_page(marks, label, seed, asked)
        left = unseen_defects(pages, rank, marks)
        held.append(left.low <= label[marks == UNSAID].sum() <= left.high)
        assert left.images == 150 - seen - asked and 0 <= left.low <= left.defects <= left.high <= left.images
    assert np.mean(held) >= 0.9


def test_defects_that_a_next_page_has_found_are_no_longer_among_those_that_are_left():
    errors = []
    for seed in range(60):
        pages, rank, marks, label = drawn_run(seed, 0.4, 1, 48)
        look_at_next_page(marks, label, seed, 24)
        errors.append(unseen_defects(pages, rank, marks).defects - label[marks == UNSAID].sum())
    assert abs(np.mean(errors)) < 4, "of 10 that are left, on average"


@pytest.mark.parametrize("images", [25, 26, 27, 48, 51])
def test_nothing_is_left_where_all_is_seen(images):
    """The last page may hold drawn images alone."""
    rank = np.arange(1, images + 1)
    marks = np.where(rank <= images // 3, DEFECT, FINE).astype(np.int8)
    left = unseen_defects(suspect_pages(rank, 0, images), rank, marks)
    assert left[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize("images, contradicted", [(30, False), (72, False), (80, True), (150, True)])
def test_marks_that_contradict_the_draws_leave_an_interval(images, contradicted):
    """Drawn images say that nearly all are defects and the others that none is, or the other way round."""
    rank = np.arange(1, images + 1)
    pages, marks = suspect_pages(rank, 0, images), np.full(images, UNSAID, np.int8)
    whole = pages[: 1 if images < 80 else 2]
    for page in whole:
        marks[page.images] = DEFECT if not contradicted else FINE
    rest = np.flatnonzero(marks == UNSAID)
    marks[rest[: -1 if images < 80 else 20]] = DEFECT if contradicted else FINE
    left = unseen_defects(pages, rank, marks)
    assert 0 <= left.low <= left.defects <= left.high <= left.images == (marks == UNSAID).sum() > 0


def test_the_interval_narrows_with_the_last_page_and_knows_its_bounds():
    pages, rank, marks, _ = drawn_run(0, 0, 0, 48)
    few = unseen_defects(pages, rank, marks)
    assert few.images == 102 and few.low == few.defects == 0 and few.high < 18
    marks[pages[1].images[~pages[1].drawn][0]] = DEFECT
    more = unseen_defects(pages, rank, marks)
    assert few.high < more.high < 25 and (few.last, more.last) == (0, 1)
    marks[pages[1].images[pages[1].drawn]] = DEFECT  # the draws contradict the ranking
    most = unseen_defects(pages, rank, marks)
    assert most.high > 60 and most.low > 3
    assert unseen_defects(pages, rank, np.full(150, UNSAID, np.int8)) is None
    assert unseen_defects(pages, rank, np.zeros(150, np.int8))[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "by_page, says",
    [
        ([0], "what is seen leaves room for 62 defects"),
        ([0] * 6, "what is seen leaves room for 31 defects"),
        ([9, 2, 0, 0, 0, 0, 0, 0], "enough: the last whole page held 0, and at most 9% are left"),
        ([9, 2, 0, 0, 0, 0, 0, 2], "the last whole one held 2 defects"),
        ([], "mark all images of the first page"),
    ],
)
def test_one_more_page_pays_after_one_with_defects_and_while_there_is_room_for_many(tmp_path, by_page, says):
    rank, folder = np.arange(1, 451), tmp_path / "nut"
    write_csv(folder / "scores.csv", ["path", "label", "score"], [[f"{i}.png", 0, -r] for i, r in enumerate(rank)])
    marks = np.full(450, UNSAID, np.int8)
    marks[0] = FINE
    for page, defects in zip(suspect_pages(rank, 0, 450), by_page):
        marks[page.images] = FINE
        marks[page.images[~page.drawn][:defects]] = DEFECT
    write_marks(folder, training_set(folder), marks)
    assert says in findings(folder, training_set(folder), 0)[1]


def test_defects_are_counted_by_page_and_elsewhere_and_those_that_are_left_make_the_threshold_doubtful(tmp_path):
    pages, rank, marks, labels = drawn_run(0, 0.3, 1.0, 48)
    folder = tmp_path / "nut"
    rows = [[f"{i}.png", int(labels[i]), -float(rank[i])] for i in range(len(rank))]
    write_csv(folder / "scores.csv", ["path", "label", "score"], rows)
    dataset = training_set(folder)
    write_marks(folder, dataset, marks)
    by_page = [int(labels[page.images].sum()) for page in pages[:2]]
    (line, _), left = findings(folder, dataset, 0), unseen_defects(pages, rank, marks)
    assert f"48 seen, {sum(by_page)} defects ({by_page[0]}, {by_page[1]} by page)" in line
    said = threshold_doubt(folder, dataset, 0)
    assert f"about {left.defects} of the {left.images} unseen images are defective ({left.low} to {left.high})" in said
    other = pages[5].images[labels[pages[5].images] == 1][0]  # as of a next page
    marks[other] = DEFECT
    write_marks(folder, dataset, marks)
    assert (
        f"49 seen, {sum(by_page) + 1} defects ({by_page[0]}, {by_page[1]} by page; 1 elsewhere)"
        in findings(folder, dataset, 0)[0]
    )
    marks[:] = np.where(labels == 1, DEFECT, FINE)
    write_marks(folder, dataset, marks)
    assert threshold_doubt(folder, dataset, 0) == ""
