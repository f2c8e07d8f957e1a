"""The page of suspects in a browser: a person marks by keys, closes it, goes on, saves; llb reads what was saved."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from helpers import SMALL, draw, draw_mvtec, rows_of, succeed

from llb.files import FORMULA, UserError, read_json, write_csv, write_json
from llb.pages import PAGE
from llb.report import write_report
from llb.sheet import fit_pages, lacks_tiles, marks_key
from llb.tables import read_table, write_threshold
from llb.tiles import read_tiles, tiles_file, write_tiles

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
COUNT = "document.querySelector('.count').textContent"
SHOWN = "[...document.querySelectorAll('.page.current .tile')].map(tile => tile.dataset.path)"
SAID = "[...document.querySelectorAll('[data-verdict]')].map(tile => [tile.dataset.path, tile.dataset.verdict])"


def marks_of(file: Path) -> dict[str, int]:
    return {row["path"]: row["verdict"] for row in read_table(file, ("category", "path", "verdict"))}


@needs_browser
def test_a_person_marks_96_images_by_keys_closes_the_page_in_between_and_trains_with_them(tmp_path):
    data, run = draw_mvtec(tmp_path / "data", good=80), tmp_path / "run"
    for i in range(30):  # hidden defects
        draw(data / "tile" / "train" / "good" / f"odd{i}.png", 300 + i, defect=True)
    succeed("stage1_partition", "--data", data, "--out", run, "--detector", "padim", *SMALL[:6])
    marked = {}
    for part in range(2):
        with Browser(tmp_path / "profile", run / "report.html") as page:
            assert dict(page.value(SAID)) == marked and page.value(COUNT).startswith(f"{48 * part} of 110 seen")
            page.press("d")
            assert dict(page.value(SAID)) == marked, "a letter typed elsewhere leads to the suspects, and marks nothing"
            for _ in range(2):
                paths = page.value(SHOWN)
                assert len(paths) == PAGE and not marked.keys() & paths
                verdicts = {path: "defect" if "odd" in path else "fine" for path in paths}
                keys = ["d" if verdict == "defect" else "f" for verdict in verdicts.values()]
                if part:  # only defects are marked, one after a slip
                    keys = ["d" if key == "d" else "ArrowRight" for key in keys]
                    keys = ["d", "u", *keys]
                page.press([*keys, "n"])
                marked |= verdicts
                assert dict(page.value(SAID)) == marked
            if part:
                saved = page.saved(tmp_path / "saved", "document.querySelector('[data-do=save]').click()")
        assert page.complaints() == []
    assert marks_of(saved) == {path: int(verdict == "defect") for path, verdict in marked.items()}
    named = sum("odd" in path for path in marked)
    assert f"96 new marks\ntile: 96 seen, {named} defects" in succeed("llb.review", "--run", run, saved)
    succeed("stage2_train", "--run", run, "--train-on", "reviewed")
    succeed("evaluate", "--run", run)
    with Browser(tmp_path / "other", run / "report.html") as page:
        assert dict(page.value(SAID)) == marked, "another browser shows what the run knows"
        told = page.value("document.body.innerText")
        assert f"Of the {named} marked as defects 0 are labelled" in told
        assert page.value("document.querySelector('.desk code').textContent").endswith(f"--run {run} marks.csv")
        assert re.search(r"\nreviewed\t[01]\.\d", told) and "reviewed: λ = " in told
        # ---- the next page: the unseen images, by what the detector has learned from the marks ----
        assert page.value("document.querySelector('.where').textContent") == "Page 5 of 5 (asked again)"
        left = page.value(SHOWN)
        assert len(left) == 14 and not marked.keys() & left
        hidden = ["odd" in path for path in left]
        assert hidden == sorted(hidden, reverse=True), "the detector has learned what a defect is"
        page.press(["d", *("d" if bad else "f" for bad in hidden)])  # the first one leads to the suspects
        more = page.saved(tmp_path / "more", "document.querySelector('[data-do=save]').click()")
        assert "14 marks are saved" in page.value("document.querySelector('.saved').textContent")
        assert page.complaints() == []
    assert marks_of(more).keys() == set(left), "the run has the others"
    assert "14 new marks\n" in succeed("llb.review", "--run", run, more)
    marks = {row["path"]: row["verdict"] for row in rows_of(run / "tile" / "marks.csv")}
    assert len(marks) == 110 and all((marks[path] == "defect") == ("odd" in path) for path in marks)
    # ---- somebody else corrects a mark: the run's is newer than the first browser's; undo takes back none of it ----
    path, corrected = next(iter(marked)), {"defect": "fine", "fine": "defect"}[marked[next(iter(marked))]]
    write_csv(tmp_path / "corrected.csv", ["category", "path", "verdict"], [["tile", path, corrected]])
    succeed("llb.review", "--run", run, tmp_path / "corrected.csv")
    write_report(run)
    with Browser(tmp_path / "profile", run / "report.html") as page:
        shown = dict(page.value(SAID))
        assert shown[path] == corrected and shown.keys() >= marked.keys()
        page.press(["u", "u", "d", "u"])  # the first leads to the suspects; the last takes back this page's own mark
        assert dict(page.value(SAID)) == shown
        # ---- a mark that is merged, then corrected here before the report is written again, stays corrected ----
        keys = {"defect": "d", "fine": "f"}
        page.press(keys[marked[path]])
        merged = page.saved(tmp_path / "merged", "document.querySelector('[data-do=save]').click()")
        succeed("llb.review", "--run", run, merged)
        page.press(["ArrowLeft", keys[corrected]])
    write_report(run)
    with Browser(tmp_path / "profile", run / "report.html") as page:
        assert marks_of(merged)[path] == int(marked[path] == "defect") and dict(page.value(SAID))[path] == corrected


def small_run(folder: Path, paths: list[str], seed: int = 0, category: str = '=bolt, "4"') -> Path:
    """A run of which only the pages of suspects are there."""
    write_json(folder / "config.json", {"categories": [category], "seed": seed, "device": "CPU"})
    rows = [[path, 0, 1, 1 - place / 100, 1, ""] for place, path in enumerate(paths)]
    write_csv(folder / category / "scores.csv", ["path", "subset", "model_0", "score", "kept", "label"], rows)
    picture, heat = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.float32)
    write_tiles(folder / category / tiles_file("suspects"), [(path, picture, heat, None) for path in paths])
    write_report(folder, {category: ["one_long_name/" * 9]})
    return folder


@needs_browser
def test_marks_of_any_name_are_saved_by_taps_and_another_run_has_none(tmp_path):
    names = ["=1+1.png", '@"a", b.png', "line\nend.png", "both\r\n.png", "\treturn\r.png", "</script>&amp;é€.png"]
    run, save = small_run(tmp_path / "run", names), "document.querySelector('[data-do=save]')"
    with Browser(tmp_path / "profile", run / "report.html") as page:
        page.picture(tmp_path / "phone.png", 390, 844)
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value("document.querySelector('.kept-not').offsetHeight") == 0, "only where nothing is kept"
        assert min(page.value("[...document.querySelectorAll('button')].map(button => button.offsetHeight)")) >= 44
        for tile in (0, 1, 2, 3, 4, 5):
            page.value(f"document.querySelectorAll('.tile')[{tile}].click()")
            page.value(f"document.querySelector('[data-do={('defect', 'fine')[tile % 2]}]').click()")
        saved = page.saved(tmp_path / "saved", f"{save}.click()")
        assert page.value("document.querySelector('.advice').textContent").startswith("3 of page 1’s 6 are defects")
        small_run(run, names, seed=1)
        page.go(run / "report.html")
        assert page.value(SAID) == [] and page.complaints() == []
    rows = read_table(saved, ("category", "path", "verdict"))
    assert [tuple(row.values()) for row in rows] == [('=bolt, "4"', name, 1 - i % 2) for i, name in enumerate(names)]
    assert all(not cell.startswith(FORMULA) for row in rows_of(saved) for cell in row.values())
    write_csv(tmp_path / "again.csv", ["category", "path", "verdict"], [[*row.values()] for row in rows_of(saved)])
    assert rows_of(tmp_path / "again.csv") == rows_of(saved)


@needs_browser
def test_a_saved_file_holds_what_was_said_in_this_browser_and_not_what_the_run_has_from_others(tmp_path):
    run, saves = small_run(tmp_path / "run", ["a.png", "b.png", "c.png", "d.png"], category="bolt"), iter(range(9))
    write_csv(run / "bolt" / "marks.csv", ["path", "verdict"], [["a.png", "defect"], ["b.png", "fine"]])
    write_report(run)

    def saved(page) -> dict[str, int]:
        return marks_of(page.saved(tmp_path / f"{next(saves)}", "document.querySelector('[data-do=save]').click()"))

    with Browser(tmp_path / "profile", run / "report.html") as page:
        page.value("document.querySelectorAll('.tile')[2].click()")
        assert saved(page) == {}
        page.press(["d", "ArrowLeft", "ArrowLeft", "d", "u"])
        assert saved(page) == {"c.png": 1}, "a slip that is undone says nothing"
        page.press("d")
        assert saved(page) == {"b.png": 1, "c.png": 1}
        page.press("u")
        for _ in range(2):  # that file may be merged: the next one takes it back
            assert saved(page) == {"b.png": 0, "c.png": 1} and dict(page.value(SAID))["b.png"] == "fine"
            page.go(run / "report.html")
        page.value("document.querySelectorAll('.tile')[3].click()")
        page.press(["u", "u"])
        assert dict(page.value(SAID)) == {"a.png": "defect", "b.png": "fine"} and page.complaints() == []


def test_marks_of_the_run_stand_on_the_page_and_damaged_ones_are_named(tmp_path):
    run = small_run(tmp_path, ["a.png", "b.png", "c.png"], category="bolt")
    write_csv(run / "bolt" / "marks.csv", ["path", "verdict"], [["b.png", "fine"], ["c.png", "defect"]])
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    shown = page[page.index('class="suspects"') : page.index("</section>", page.index('class="suspects"'))]
    assert re.findall('data-path="(.)[^>]* data-verdict="(\\w+)"', shown) == [("b", "fine"), ("c", "defect")]
    assert "2 seen, 1 defects; 1 unseen. Mark all images of the first page" in page
    write_csv(run / "bolt" / "marks.csv", ["path", "verdict"], [["d.png", "fine"]])
    with pytest.raises(UserError, match="d.png is not a training image"):
        write_report(run)


def test_what_changed_is_told_beside_the_purified_detector_by_each_threshold(tmp_path):
    run = small_run(tmp_path, ["a.png", "b.png"], category="bolt")
    write_csv(run / "bolt" / "marks.csv", ["path", "verdict"], [["a.png", "defect"]])
    evidence = {"defect": 20, "fine": 20, "auroc": 0.9, "lower": 0.8, "lambda": 0.6, "why": "heads are good"}
    write_json(run / "bolt" / "review-reviewed.json", evidence)
    labels, scores = [1, 1, 1, 0, 0], {"purified": [1, 3, 3, 3, 1], "all": [9] * 5, "reviewed": [30, 30, 10, 10, 30]}
    for final, values in scores.items():
        rows = [[f"{i}.png", value, label] for i, (value, label) in enumerate(zip(values, labels))]
        write_csv(run / "bolt" / f"predictions-{final}.csv", ["path", "score", "label"], rows)
        threshold = {"threshold": 20 if final == "reviewed" else 2, "quantile": 0.99, "images": 1, "out_of_fold": 0}
        write_threshold(run / "bolt", final, threshold | {"false_alarm_rate": 0.5, "missed_rate": 0.5})
    write_report(run)
    text = " ".join(re.sub("(?s)<[^>]*>", " ", (run / "report.html").read_text(encoding="utf-8")).split())
    assert "reviewed: λ = 0.60, the weight of the head beside the detector: heads are good." in text
    assert "reviewed beside purified, each by its threshold: 1 found, which were missed; 1 missed, which" in text
    assert "1 no false alarms any more; 1 new false alarms." in text and "Missed, which were found (1) 2.png" in text
    for damaged in ({"defect": 20}, evidence | {"lambda": None}, evidence | {"why": None}, [1]):
        write_json(run / "bolt" / "review-reviewed.json", damaged)
        with pytest.raises(UserError, match="review-reviewed.json is damaged; delete it and run stage2"):
            write_report(run)


def test_pages_are_cut_so_that_the_report_stays_small_and_more_of_them_need_more_tiles(tmp_path, monkeypatch):
    run = small_run(tmp_path, [f"{i}.png" for i in range(60)], category="bolt")
    assert not lacks_tiles(run / "bolt", 0, 60) and not lacks_tiles(run / "bolt", 0, 1000)
    tiles = read_tiles(run / "bolt" / tiles_file("suspects"))
    fewer = dict(list(tiles["tiles"].items())[:-1])
    write_json(run / "bolt" / tiles_file("suspects"), tiles | {"tiles": fewer})
    assert lacks_tiles(run / "bolt", 0, 60)
    given = {"command": "python stage1_partition.py --data old --seed 4", "data": "new data", "weights": None}
    write_json(run / "config.json", read_json(run / "config.json", "") | given)
    write_report(run)
    more = f"python stage1_partition.py --seed 4 --data &#39;new data&#39; --out {run} --suspects N"
    assert f"<code>{more}</code> shows more" in (run / "report.html").read_text(encoding="utf-8")
    write_json(run / "bolt" / tiles_file("suspects"), tiles)
    monkeypatch.setattr("llb.report.fit_pages", lambda categories: fit_pages(categories, 1))
    write_report(run)
    cut = (run / "report.html").read_text(encoding="utf-8")
    assert "Here are 24 of 60 training images: with more this file would be too large" in cut and more not in cut
    tile = {"image": "x" * 400, "heat": "y" * 600, "verdict": None}  # with its words 2000 bytes
    categories = [{"pages": [[tile] * 24] * 3, "groups": {"a": {"tiles": [tile] * 5}}, "detectors": []}, None]
    categories[1] = {"pages": [[tile] * 24], "groups": {}, "detectors": [{"groups": {}}]}
    categories = [category | {"asked": None} for category in categories]
    for most, pages in ((10**6, 3), (202_000, 3), (201_999, 2), (153_999, 1), (1, 1)):
        cut = copy.deepcopy(categories)
        fit_pages(cut, most)
        assert [len(category["pages"]) for category in cut] == [pages, 1]
        assert [category["cut"] for category in cut] == [pages < 3, False]


def test_pages_that_are_marked_are_left_out_first_and_the_next_page_last():
    kinds = {"marked": ["fine"] * 24, "asked": [None] * 14, "begun": ["fine", None], "open": [None] * 24}
    names = ["marked", "marked", "asked", "begun", "open"]
    tiles = [[{"image": name, "heat": "", "verdict": verdict} for verdict in kinds[name]] for name in names]
    fits = {10**6: names, 70_000: ["marked", *names[2:]], 50_000: names[2:], 20_000: ["asked", "begun"], 1: ["asked"]}
    for most, shown in fits.items():
        category = {"pages": tiles, "groups": {}, "detectors": [], "asked": 2}
        fit_pages([category], most)
        assert [page[0]["image"] for page in category["pages"]] == shown
        assert category["asked"] == shown.index("asked") and category["cut"] == (shown != names)


def test_another_run_has_another_key(tmp_path):
    rows = {"bolt": [{"path": "a", "score": 1.0, "kept": True}, {"path": "b", "score": 2.0, "kept": True}]}
    key, others = marks_key("run", 0, rows), copy.deepcopy(rows)
    others["bolt"][0]["kept"] = False
    assert marks_key("run", 0, others) == key, "another share kept shows the same pages"
    others["bolt"][0]["score"] = 1.5
    assert len({key, marks_key("run", 0, others), marks_key("run", 1, rows), marks_key("other", 0, rows)}) == 4
