"""Sheets, tables and the HTML report, from small runs written to a temporary folder."""

import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llb.files import UserError, write_csv, write_json
from llb.report import (
    METRICS,
    PALETTE,
    contact_sheet,
    heat_overlay,
    histogram,
    mean_metrics,
    summary_table,
    write_metrics_csv,
    write_report,
)

NASTY = "<script>alert(1)</script>&\"'{{ 7 * 7 }}.png"
CONFIG = {"data": "<b>images</b>", "encoder": "tiny", "weights": None, "submodels": 3, "steps": 100, "seed": 0}
FACTS = {"n": 6, "kept": 4, "contamination_before": 1 / 3, "contamination_after": 0.25, "train_auroc": 0.875}


def values(value=0.5):
    return dict.fromkeys(METRICS, value)


def write_run(folder, labels=(1, 1, 0, 0, 0, 0), categories=("bolt",), metrics=None):
    """A run of six training and six test images; labels "" are unknown."""
    more = {"categories": list(categories), "device": "CPU", "versions": {"jax": "0.10.2"}, "git_commit": None}
    stage2 = {"purified": {"steps": 200, "batch_size": 8}}
    write_json(folder / "config.json", CONFIG | more | {"command": "python stage1_partition.py", "stage2": stage2})
    paths = [NASTY, *(f"train/{i}.png" for i in range(1, 6))]
    for name in categories:
        rows = [[path, 0, 0.9 - 0.1 * i, i + 1, int(i >= 2), labels[i]] for i, path in enumerate(paths)]
        write_csv(folder / name / "scores.csv", ["path", "subset", "score", "rank", "kept", "label"], rows)
        rows = [[path, 0.9 - 0.1 * i, labels[i]] for i, path in enumerate(paths)]
        write_csv(folder / name / "predictions-purified.csv", ["path", "score", "label"], rows)
        for sheet in ("suspects", "examples-purified"):
            Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / name / f"{sheet}.png")
    if metrics is not None:
        write_json(folder / "metrics.json", metrics)
    return folder


class Page(HTMLParser):
    """The tags with their attributes, and the visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.hidden = [], "", False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.hidden = tag == "style"
        self.text += " "

    def handle_data(self, data):
        self.text += "" if self.hidden else data


def report(folder, notes=None):
    write_report(folder, notes)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- heat maps and contact sheets ----


def test_the_palette_grows_steadily_lighter():
    luma = PALETTE @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luma[::5]) > 0).all() and luma[0] < 60 and luma[-1] > 220
    assert np.abs(np.diff(PALETTE.astype(int), axis=0)).max() <= 8  # no edges that the map does not have


def test_heat_colours_what_is_hot_and_leaves_the_rest_grey():
    image = np.full((8, 8, 3), (90, 140, 120), np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[2, 3], heat[5, 5] = 1, 5  # at the top of the scale and above it
    overlay = heat_overlay(image, heat, 0, 1)
    colourfulness = np.ptp(overlay.astype(int), axis=2)
    assert overlay.dtype == np.uint8 and overlay.shape == (8, 8, 3)
    assert colourfulness[0, 0] < 20 < colourfulness[2, 3]
    assert (overlay[2, 3] == overlay[5, 5]).all() and (overlay[0] == overlay[7]).all()


def test_a_map_without_spread_can_be_drawn():
    assert contact_sheet([(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.float32), ("", ""))]).size[0] > 0


def test_a_sheet_has_room_for_every_pair_and_puts_the_image_left_of_its_heat():
    red, blank = np.full((30, 30, 3), (255, 0, 0), np.uint8), np.zeros((30, 30), np.float32)
    tiles = [(red, blank, (f"{i}. 0.5", "a/b.png")) for i in range(7)]
    one, seven = contact_sheet(tiles[:1], columns=3, side=50), contact_sheet(tiles, columns=3, side=50)
    assert one.width >= 100 and seven.width >= 300 and seven.width < 3 * one.width
    assert 2.5 * one.height < seven.height <= 3 * one.height
    pixels = np.asarray(seven).astype(int)
    pure = (pixels == (255, 0, 0)).all(axis=2)
    assert pure.sum() == 7 * 50 * 50  # every image is there, whole; its heat map is grey
    pure_columns = np.flatnonzero(pure[20])
    heat_beside = pixels[20, pure_columns[49] + 10]
    assert np.ptp(heat_beside) < 40 < heat_beside.mean()


def test_captions_stay_inside_their_tile_whatever_the_path():
    image, heat = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.float32)
    for path in ("very/" * 80 + "deep.png", "x" * 500 + ".png", "line\nbreak\udcff.png", "日本/画像.png", ""):
        tiles = [(image, heat, ("1. 0.9 " + "long headline " * 9, path)), (image, heat, ("", ""))]
        sheet = np.asarray(contact_sheet(tiles, side=60)).astype(int)
        assert (sheet[:, -10:] == sheet[0, 0]).all() and (sheet[-30:, 155:] == sheet[0, 0]).all()


# ---- tables ----


def test_means_over_categories_leave_undefined_values_out():
    metrics = {
        "a": {"purified": values(0.2) | {"pixel_aupro": None}},
        "b": {"purified": values(0.4) | {"pixel_ap": None, "pixel_aupro": None}, "all": values(0.9)},
    }
    means = mean_metrics(metrics, ["a", "b"])
    assert list(means) == ["purified", "all"]
    assert means["purified"]["image_auroc"] == pytest.approx(0.3)
    assert means["purified"]["pixel_ap"] == pytest.approx(0.2)
    assert means["purified"]["pixel_aupro"] is None
    assert means["all"] == values(0.9)


def test_the_summary_fits_100_columns_and_shows_undefined_values():
    long = {"purified": values(1.0), "clean": values(None), "purification": FACTS | {"n": 57840, "kept": 57840}}
    table = summary_table({"a" * 90: long, "b": {"all": values(0.1234)}, "mean": {"purified": values(1.0)}})
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert "1.000" in table and "–" in table and "0.123" in table and "\nmean " in table
    assert "kept 57840 of 57840, contamination 33.3% → 25.0%, train AUROC 0.875" in table
    columns = [line.index("–") for line in lines if "–" in line] + [
        line.index("0.123") for line in lines if "0.123" in line
    ]
    assert len(set(columns)) == 1
    assert "mean" not in summary_table({"only": {"all": values()}, "mean": {"all": values()}})


def test_metrics_csv_has_a_row_for_each_category_and_detector_and_reads_back_exactly(tmp_path):
    entry = {"purified": values(1 / 3) | {"pixel_ap": None}, "all": values(0.25), "purification": FACTS}
    write_metrics_csv(tmp_path / "metrics.csv", {"a,b": entry, "mean": {"purified": values(0.5)}})
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["train_on"]) for row in rows] == [
        ("a,b", "purified"),
        ("a,b", "all"),
        ("mean", "purified"),
    ]
    assert float(rows[0]["image_auroc"]) == 1 / 3 and rows[0]["pixel_ap"] == ""
    assert rows[0]["purification_kept"] == "4" and rows[2]["purification_kept"] == ""


# ---- the report ----


def test_the_report_needs_nothing_but_itself(tmp_path):
    page = report(write_run(tmp_path, metrics={"bolt": {"purified": values(), "purification": FACTS}}))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", html)
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_paths_categories_and_settings_are_escaped(tmp_path):
    name = "a&amp;b'c {{ 7 + 7 }}"
    page = report(write_run(tmp_path, categories=(name,)), {name: ["<i>note</i>"]})
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    for text in (NASTY, name, "<b>images</b>", "<i>note</i>"):
        assert text in page.text


def test_every_undefined_metric_is_explained(tmp_path):
    metrics = {"bolt": {"purified": values() | dict.fromkeys(["pixel_ap", "pixel_aupro"])}}
    page = report(write_run(tmp_path, metrics=metrics))
    assert "an anomalous image has no mask" in page.text and page.text.count("– 1") == 2
    metrics = {"bolt": {"purified": values() | {"image_ap": None}}}
    page = report(write_run(tmp_path, labels=(1,) * 6, metrics=metrics))
    assert "no image is normal" in page.text


def test_a_run_without_labels_shows_the_ranking_and_the_sheets(tmp_path):
    unknown = {"purified": values(None), "purification": dict.fromkeys(FACTS) | {"n": 6, "kept": 4}}
    for metrics in (None, {"bolt": unknown, "mean": {"purified": values(None)}}):
        page = report(write_run(tmp_path, labels=("",) * 6, metrics=metrics))
        assert "Nothing could be measured: it is not known which images are anomalous." in page.text
        assert "AUPRO" not in page.text and "labelled" not in page.text
        assert "4 of 6" in page.text and "train/5.png" in page.text
        assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_a_run_that_is_not_evaluated_yet_still_has_a_report(tmp_path):
    write_run(tmp_path)
    for file in ("predictions-purified.csv", "examples-purified.png", "suspects.png", "scores.csv"):
        (tmp_path / "bolt" / file).unlink()
        assert "no detector has been evaluated" in report(tmp_path).text


def test_the_report_tells_settings_device_versions_and_commands(tmp_path):
    page = report(write_run(tmp_path))
    for text in (
        "python stage1_partition.py",
        "--train-on purified --steps 200 --batch-size 8",
        "python evaluate.py --run",
    ):
        assert text in page.text
    assert "jax 0.10.2" in page.text and "Device CPU" in page.text


def test_several_categories_get_links_a_mean_and_their_notes_at_the_top(tmp_path):
    entry = {"purified": values(0.25)}
    metrics = {"bolt": entry, "nut": {"purified": values(0.75)}, "mean": {"purified": values(0.5)}}
    page = report(write_run(tmp_path, categories=("bolt", "nut"), metrics=metrics), {"nut": ["edited by hand"]})
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    targets = [attributes["id"] for tag, attributes in page.tags if "id" in attributes]
    assert links == targets and len(links) == 2
    assert "mean purified 0.500" in page.text and page.text.count("edited by hand") == 2


def test_the_report_is_a_function_of_the_run_s_files(tmp_path):
    write_run(tmp_path, metrics={"bolt": {"purified": values()}})
    write_report(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_damaged_file_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "bolt" / "suspects.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="suspects.png"):
        write_report(tmp_path)
    write_run(tmp_path)
    (tmp_path / "bolt" / "scores.csv").write_text("path,score,kept,label\na.png,high,1,\n", encoding="utf-8")
    with pytest.raises(UserError, match="scores.csv"):
        write_report(tmp_path)


def rows(scores, kept, labels):
    return [{"score": s, "kept": k, "label": v} for s, k, v in zip(scores, kept, labels)]


def test_the_histogram_draws_every_image_once_and_the_threshold_between_kept_and_dropped():
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(1, 0.1, 200))
    kept = scores < scores[150]
    plot = histogram(rows(scores, kept, [None] * 200))
    height = {kind: sum(bar["height"] for bar in plot["bars"] if bar["kind"] == kind) for kind in ("kept", "dropped")}
    assert height["kept"] / height["dropped"] == pytest.approx(3, rel=0.02)
    assert plot["outline"] is None and not plot["logarithmic"]
    assert scores[149] <= float(plot["threshold"]["label"]) <= scores[150] + 1e-3
    last_kept = max(bar["x"] + bar["width"] for bar in plot["bars"] if bar["kind"] == "kept")
    first_dropped = min(bar["x"] for bar in plot["bars"] if bar["kind"] == "dropped")
    assert first_dropped <= plot["threshold"]["x"] <= last_kept + 1e-2


@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0], [2, 2, 2], [-1, 5], [1e-9, 1, 1e3], [0, 1e-300], [3, 3.0000001]])
def test_any_scores_can_be_drawn(scores):
    for kept in (True, False):
        plot = histogram(rows(scores, [kept] * len(scores), [0] * len(scores)))
        left, right, top, bottom = plot["box"]
        for bar in plot["bars"]:
            assert left <= bar["x"] and bar["x"] + bar["width"] <= right + 0.1
            assert top <= bar["y"] and bar["y"] + bar["height"] <= bottom + 0.1
        for x, _ in plot["x_ticks"]:
            assert left - 0.1 <= x <= right + 0.1
        assert plot["threshold"] is None and len(plot["x_ticks"]) <= 12 and len(plot["y_ticks"]) >= 2


def test_scores_of_many_sizes_are_drawn_on_a_logarithmic_axis():
    plot = histogram(rows([0.01, 0.1, 1.0, 10.0], [True, True, False, False], [0, 0, 1, 1]))
    left, right, _, _ = plot["box"]
    assert plot["logarithmic"] and plot["outline"]
    assert dict((label, x) for x, label in plot["x_ticks"])["0.1"] == pytest.approx(left + (right - left) / 3, abs=0.1)
    assert plot["threshold"] == {"x": (left + right) / 2, "label": "0.3162"}
