"""The HTML report is one file that needs nothing else, escapes every name, and draws every score once."""

import html
import re

import numpy as np
import pytest
from PIL import Image

from llb.files import UserError, write_csv, write_json
from llb.report import histogram, write_report
from llb.tables import METRICS

NASTY = "<script>alert(1)</script>&\"'{{ 7 * 7 }}.png"
CONFIG = {"data": "<b>images</b>", "weights": None, "seed": 0, "device": "CPU", "versions": {"jax": "0.10.2"}} | {
    "command": "python stage1_partition.py",
    "stage2": {"purified": {"steps": 200, "batch_size": 8}},
}
FACTS = {"n": 6, "kept": 4, "contamination_before": 1 / 3, "contamination_after": 0.25, "train_auroc": 0.875}


def values(value=0.5):
    return dict.fromkeys(METRICS, value)


def write_run(folder, labels=(1, 1, 0, 0, 0, 0), categories=("bolt",), metrics=None):
    """A run of six training and six test images; labels "" are unknown."""
    write_json(folder / "config.json", CONFIG | {"categories": list(categories)})
    paths = [NASTY, *(f"train/{i}.png" for i in range(1, 6))]
    for name in categories:
        rows = [[path, 0.9 - 0.1 * i, int(i >= 2), labels[i]] for i, path in enumerate(paths)]
        for table in ("scores", "predictions-purified"):
            write_csv(folder / name / f"{table}.csv", ["path", "score", "kept", "label"], rows)
        for sheet in ("suspects", "examples-purified"):
            Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / name / f"{sheet}.png")
    write_json(folder / "metrics.json", metrics or {})
    return folder


def report(folder, notes=None):
    """The report, the names of its tags, and its visible text."""
    write_report(folder, notes)
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub("<style>.*</style>|<[^>]*>", " ", page, flags=re.DOTALL))
    return page, re.findall(r"<(\w+)", page), " ".join(text.split())


def test_the_report_needs_no_other_file_and_tells_how_it_was_made(tmp_path):
    run = write_run(tmp_path, metrics={"bolt": {"purified": values(), "purification": FACTS}})
    page, tags, text = report(run)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(tags) and tags.count("img") == 2
    assert not re.search(r"https?:|url\(|@import|<[^>]* on\w+=", page)
    targets = re.findall(r'<[^>]*\b(?:src|href|srcset|action|data)="([^"]*)', page)
    assert targets and all(target.startswith(("#", "data:image/")) for target in targets)
    for part in ("stage1_partition.py", "purified --steps 200 --batch-size 8", "evaluate.py --run", "Device CPU"):
        assert part in text
    assert report(run)[0] == page, "it depends on the run's files only"


def test_paths_categories_and_settings_are_escaped(tmp_path):
    name = "a&amp;b'c {{ 7 + 7 }}"
    _, tags, text = report(write_run(tmp_path, categories=(name,)), {name: ["<i>note</i>"]})
    assert not {"script", "b", "i"} & set(tags)
    assert all(part in text for part in (NASTY, name, "<b>images</b>", "<i>note</i>"))


@pytest.mark.parametrize(
    ("labels", "undefined", "reason"),
    [
        ((1, 1, 0, 0, 0, 0), {"pixel_ap": None}, "no defective image has a mask"),
        ((1,) * 6, {"image_ap": None}, "no image is normal"),
        (("",) * 6, values(None), "Nothing could be measured: it is not known which images are defective."),
    ],
)
def test_undefined_metrics_are_explained_and_the_ranking_is_shown(tmp_path, labels, undefined, reason):
    _, tags, text = report(write_run(tmp_path, labels, metrics={"bolt": {"purified": values() | undefined}}))
    assert reason in text and ("AUPRO" in text) == (undefined != values(None)) == ("labelled" in text)
    assert "4 of 6" in text and "train/5.png" in text and tags.count("img") == 2


def test_the_metric_of_samples_is_shown_only_where_it_is_defined(tmp_path):
    for value in (None, 0.625):
        metrics = {"bolt": {"purified": values() | {"sample_auroc": value}}, "nut": {"purified": values()}}
        text = report(write_run(tmp_path, categories=("bolt", "nut"), metrics=metrics))[2]
        assert ("Sample AUROC" in text) == ("0.625" in text) == ("no sample is normal" in text) == (value is not None)


def test_defective_images_without_a_mask_are_counted_and_named(tmp_path):
    metrics = {"bolt": {"purified": values(), "missing_masks": ["test/<1>.png"]}}
    _, _, text = report(write_run(tmp_path, metrics=metrics))
    assert "1 of 2 defective test images has no mask (test/<1>.png): their pixels are not counted" in text


def test_missing_files_are_left_out_and_a_damaged_one_is_named(tmp_path):
    write_run(tmp_path)
    for file in ("predictions-purified.csv", "examples-purified.png", "suspects.png", "scores.csv"):
        (tmp_path / "bolt" / file).unlink()
        assert "no detector has been evaluated" in report(tmp_path)[2]
    for file, content in (("suspects.png", "no image"), ("scores.csv", "path,score,kept,label\na.png,high,1,\n")):
        (tmp_path / "bolt" / file).write_text(content)
        with pytest.raises(UserError, match=file):
            write_report(tmp_path)
        (tmp_path / "bolt" / file).unlink()


def test_several_categories_get_links_a_mean_and_their_notes_at_the_top(tmp_path):
    metrics = {"bolt": {"purified": values(0.25)}, "nut": {"purified": values(0.75)}, "mean": {"purified": values(0.5)}}
    run = write_run(tmp_path, categories=("bolt", "nut"), metrics=metrics)
    page, _, text = report(run, {"nut": ["edited by hand"]})
    links = re.findall('href="#([^"]*)', page)
    assert links == re.findall('id="([^"]*)', page) and len(links) == 2
    assert "mean purified 0.500" in text and text.count("edited by hand") == 2


def histogram_of(scores, kept, label=None):
    return histogram([{"score": s, "kept": k, "label": label} for s, k in zip(scores, kept)])


def test_the_histogram_draws_every_image_once_and_the_threshold_between_kept_and_dropped():
    scores = np.sort(np.random.default_rng(0).normal(1, 0.1, 200))
    plot = histogram_of(scores, np.arange(200) < 150)
    kept, dropped = ([bar for bar in plot["bars"] if bar["kind"] == kind] for kind in ("kept", "dropped"))
    assert sum(bar["height"] for bar in kept) / sum(bar["height"] for bar in dropped) == pytest.approx(3, rel=0.02)
    assert scores[149] <= float(plot["threshold"]["label"]) <= scores[150] + 1e-3 and plot["outline"] is None
    assert dropped[0]["x"] <= plot["threshold"]["x"] <= kept[-1]["x"] + kept[-1]["width"] + 1e-2


@pytest.mark.parametrize("scores", [[1.0], [0.0, 0.0], [2, 2, 2], [-1, 5], [1e-9, 1, 1e3], [0, 1e-300], [3, 3.0000001]])
def test_any_scores_can_be_drawn(scores):
    for kept in (True, False):
        plot = histogram_of(scores, [kept] * len(scores), 0)
        left, right, top, bottom = plot["box"]
        for bar in plot["bars"]:
            assert left <= bar["x"] and bar["x"] + bar["width"] <= right + 0.1
            assert top <= bar["y"] and bar["y"] + bar["height"] <= bottom + 0.1
        assert all(left - 0.1 <= x <= right + 0.1 for x, _ in plot["x_ticks"])
        assert plot["logarithmic"] == (0 < 3 * min(scores) <= max(scores)) and plot["outline"]
        assert plot["threshold"] is None and len(plot["x_ticks"]) <= 12 and len(plot["y_ticks"]) >= 2
