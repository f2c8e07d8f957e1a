"""The HTML report is one file that needs nothing else, escapes every name, and shows what matters."""

import base64
import hashlib
import html
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT

from llb import charts, tables
from llb.config import Stage2
from llb.files import UserError, write_csv, write_json
from llb.flags import parse_flags
from llb.next_page import write_next_page
from llb.report import commands, comparison, detector_facts, write_report
from llb.review import Review, run_review
from llb.runfiles import read_config, write_config
from llb.tables import METRICS
from llb.tiles import tiles_file, write_tiles

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
    picture, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)
    for name in categories:
        rows = [[path, i % 2, 0.9 - 0.1 * i, i, 0.9 - 0.1 * i, int(i >= 2), labels[i]] for i, path in enumerate(paths)]
        for table in ("scores", "predictions-purified"):
            columns = ["path", "subset", "model_0", "model_1", "score", "kept", "label"]
            write_csv(folder / name / f"{table}.csv", columns, rows)
        for tiles in ("suspects", "purified"):
            shown = [(path, picture, np.eye(8, dtype=np.float32), mask) for path in paths]
            write_tiles(folder / name / tiles_file(tiles), shown)
        known = {"false_alarm_rate": 0.25, "missed_rate": 0.5} if "" not in labels else {}
        threshold = {"threshold": 0.85, "quantile": 0.99, "images": 4, "out_of_fold": 0}
        threshold |= {"false_alarm_rate": None, "missed_rate": None}
        tables.write_threshold(folder / name, "purified", threshold | known)
        tables.write_kinds(folder / name, "purified", [("<i>dent", 1, 0.125, 0.5), ("hole", 1, None, None)])
    stages = {"stage 1": {"seconds": 75.0, "memory": 2**30, "device_memory": None}}
    write_json(folder / "times.json", dict.fromkeys(categories, stages))
    write_json(folder / "metrics.json", metrics or {})
    return folder


def report(folder, notes=None):
    """The report, the names of its tags, and its visible text."""
    write_report(folder, notes)
    page = (folder / "report.html").read_text(encoding="utf-8")
    bare = re.sub("(?s)<style>.*</style>|<script>.*</script>", " ", page)
    text = html.unescape(re.sub("(?s)<[^>]*>", " ", bare))
    return page, re.findall(r"<(\w+)", bare), " ".join(text.split())


def test_the_report_needs_no_other_file_and_tells_how_it_was_made(tmp_path):
    run = write_run(tmp_path, metrics={"bolt": {"purified": values(), "purification": FACTS}})
    page, tags, text = report(run)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(tags)
    (script,) = re.findall("(?s)<script>(.*)</script>", page)
    assert script == (ROOT / "llb" / "report.js").read_text(encoding="utf-8"), "the one that can be read"
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'\"" in page
    assert not re.search(r"https?:|url\(|@import|<[^>]* on\w+=|fetch|XMLHttp|innerHTML", page)
    targets = re.findall(r'<[^>]*\b(?:src|href|srcset|action|data)="([^"]*)', page)
    assert targets and all(target.startswith(("#", "data:image/")) for target in targets)
    for part in ("stage1_partition.py", "purified --steps 200 --batch-size 8", "evaluate.py --run", "Device CPU"):
        assert part in text
    assert "stage 1 75 s 1.0 GiB" in text
    assert report(run)[0] == page, "it depends on the run's files only"


def test_paths_categories_and_settings_are_escaped(tmp_path):
    name = "a&amp;b'c {{ 7 + 7 }}"
    _, tags, text = report(write_run(tmp_path, categories=(name,)), {name: ["<i>note</i>"]})
    assert not {"script", "b>images", "i"} & set(tags)
    assert all(part in text for part in (NASTY, name, "<b>images</b>", "<i>note</i>", "<i>dent"))


def test_every_tile_says_what_became_of_its_image_and_is_found_by_path_and_rank(tmp_path):
    page, _, text = report(write_run(tmp_path, metrics={"bolt": {"purified": values()}}))
    tiles = re.findall(r'<figure class="tile ([\w-]+)" data-path="([^"]*)" data-rank="(\d+)"', page)
    shown = {(frame, html.unescape(path), int(rank)) for frame, path, rank in tiles}
    assert {
        ("dropped", NASTY, 1),
        ("kept", "train/2.png", 3),
        ("found", NASTY, 1),
        ("missed", "train/1.png", 2),
    } <= shown
    first = page[page.index('class="suspects"') : page.index("</section>", page.index('class="suspects"'))]
    assert re.findall(r'data-rank="(\d+)"', first) == list("123456") and 'data-page="1"' in first
    assert "Just above the threshold" in text and "Missed, the lowest score first: 1" in text
    assert "0.85 . It is taken from the 4 training images that are not dropped" in text and "25.0%" in text
    assert "<i>dent 1 0.125 50.0%" in text and "hole 1 – –" in text
    few = detector_facts(tmp_path / "bolt", "purified", None, 2)
    assert len(few["groups"]["all"]["tiles"]) == 2 and few["groups"]["all"]["count"] == 6 and few["scale"] == ("0", "1")
    none = detector_facts(tmp_path / "bolt", "purified", None, 0)
    assert not none["groups"] and none["scale"] is None


@pytest.mark.parametrize(
    ("labels", "undefined", "reason"),
    [
        ((1, 1, 0, 0, 0, 0), {"pixel_ap": None}, "no defective image has a mask"),
        ((1,) * 6, {"image_ap": None}, "no image is normal"),
        (("",) * 6, values(None), "Nothing could be measured: it is not known which images are defective."),
    ],
)
def test_undefined_metrics_are_explained_and_the_ranking_is_shown(tmp_path, labels, undefined, reason):
    _, _, text = report(write_run(tmp_path, labels, metrics={"bolt": {"purified": values() | undefined}}))
    assert reason in text and ("AUPRO" in text) == (undefined != values(None)) == ("labelled defective" in text)
    assert "4 of 6" in text and "train/5.png" in text and "0.85" in text
    assert ("1 of 6 images score above it" in text) == ("" in labels)


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
    files = ("predictions-purified.csv", "tiles-purified.json", "tiles-suspects.json", "threshold-purified.json")
    for file in (*files, "kinds-purified.csv", "scores.csv"):
        (tmp_path / "bolt" / file).unlink()
        assert "no detector has been evaluated" in report(tmp_path)[2]
    outside = '{"low": 0, "high": 1, "tiles": {"a.png": {"image": "http://a", "heat": "data:image/webp;base64,"}}}'
    damaged = (("scores.csv", "path,score,kept,label\na.png,high,1,\n"), ("tiles-suspects.json", outside))
    for file, content in (*damaged, ("tiles-suspects.json", "{")):
        (tmp_path / "bolt" / file).write_text(content)
        with pytest.raises(UserError, match=file):
            write_report(tmp_path)
        (tmp_path / "bolt" / file).unlink()


def test_several_categories_get_links_a_mean_and_their_notes_at_the_top(tmp_path):
    metrics = {"bolt": {"purified": values(0.25)}, "nut": {"purified": values(0.75)}, "mean": {"purified": values(0.5)}}
    run = write_run(tmp_path, categories=("bolt", "nut"), metrics=metrics)
    page, _, text = report(run, {"nut": ["edited by hand"]})
    links = re.findall('href="#([^"]*)', page)
    assert set(links) <= set(re.findall(' id="([^"]*)', page)) and len(links) == 3, "two categories, and the suspects"
    assert "mean purified 0.500" in text and text.count("edited by hand") == 2


def test_the_commands_can_be_given_again():
    own = {"recipe": "dinomaly", "dropout": 0.2, "easy_factor": None}
    common = {"train_on": "clean", "image_score": "max", "released": None, "passes": None, "category_steps": None}
    stages = {
        "clean": common | {"detector": "dinomaly", "set": own, "steps": 30, "batch_size": 8, "learning_rate": 0.002},
        "clean-padim": common | {"detector": "padim", "set": {}, "steps": 1, "batch_size": 32, "learning_rate": 0.0},
    }
    first, trained, fitted, last = commands(Path("a b"), CONFIG | {"stage2": stages}, True)
    assert first == CONFIG["command"] and last == "python evaluate.py --run 'a b'"
    one, other = (parse_flags(Stage2, shlex.split(line)[2:]) for line in (trained, fitted))
    assert (one.run, one.train_on, one.set) == ("a b", "clean", "recipe=dinomaly,dropout=0.2") and one.steps == 30
    assert other.detector == "padim" and other.steps is other.learning_rate is None and other.batch_size == 32
    released = {
        "all": stages["clean"] | {"train_on": "all", "steps": 0, "released": "d.pth", "released_digest": "ab12"}
    }
    _, line = commands(Path("a"), CONFIG | {"stage2": released}, False)
    again = parse_flags(Stage2, shlex.split(line)[2:])
    assert again.released == "d.pth" and again.steps is again.batch_size is None, "nothing is trained"


def test_purification_is_compared_with_what_it_could_gain():
    def line(**aurocs):
        return comparison({name: {"image_auroc": value} for name, value in aurocs.items()})

    assert "makes good 75% of the loss" in line(purified=0.975, all=0.96, clean=0.98)
    assert "makes good 0% of the loss" in line(purified=0.8999, all=0.9, clean=0.95)
    assert "next to nothing" in line(purified=0.95, all=0.96, clean=0.962)
    assert "0.960 without" in line(purified=0.95, all=0.96) and "clean would show" in line(purified=0.95, all=0.96)
    assert line(purified=0.9, clean=0.9) is None and line(purified=0.9, all=None) is None


def histogram_of(scores, groups=1, threshold=None):
    scores = np.array(scores, float)
    stacked = {str(group): np.arange(len(scores)) % groups == group for group in range(groups)}
    return charts.histogram(scores, stacked, np.ones(len(scores), bool), threshold)


def test_the_histogram_draws_every_image_once_and_the_threshold_between_kept_and_dropped():
    scores = np.sort(np.random.default_rng(0).normal(1, 0.1, 200))
    keep = np.arange(200) < 150
    plot = charts.histogram(scores, {"kept": keep, "dropped": ~keep}, None, charts.between(scores, keep))
    kept, dropped = ([bar for bar in plot["bars"] if bar["kind"] == kind] for kind in ("kept", "dropped"))
    assert sum(bar["height"] for bar in kept) / sum(bar["height"] for bar in dropped) == pytest.approx(3, rel=0.02)
    assert scores[149] <= float(plot["threshold"]["label"]) <= scores[150] + 1e-3 and plot["outline"] is None
    assert dropped[0]["x"] <= plot["threshold"]["x"] <= kept[-1]["x"] + kept[-1]["width"] + 1e-2
    assert charts.between(scores, ~keep) is charts.between(scores, keep | ~keep) is None


@pytest.mark.parametrize(
    "scores", [[1.0], [0.0, 0.0], [2, 2, 2], [-1, 5], [1e-9, 1, 1e3], [0, 1e-300], [3, 3.0000001], [1000, 1000.5]]
)
def test_any_scores_can_be_drawn(scores):
    for threshold in (None, 4.0):
        plot = histogram_of(scores, 2, threshold)
        for bar in plot["bars"]:
            assert charts.LEFT <= bar["x"] and bar["x"] + bar["width"] <= charts.RIGHT + 0.1
            assert charts.TOP <= bar["y"] and bar["y"] + bar["height"] <= charts.BOTTOM + 0.1
        assert all(charts.LEFT - 0.1 <= x <= charts.RIGHT + 0.1 for x, _ in plot["x_ticks"])
        least, most = min([*scores, threshold or scores[0]]), max([*scores, threshold or scores[0]])
        assert plot["x_title"].endswith("(logarithmic)") == (0 < 3 * least <= most) and plot["outline"]
        assert len(plot["x_ticks"]) <= 12 and len(plot["y_ticks"]) >= 2
    both = np.array(scores, float)
    plot = charts.scatter(both, both, {"all": both > -9}, ("a", "b"))
    assert all(len({text for _, text in plot[axis]}) == len(plot[axis]) for axis in ("x_ticks", "y_ticks"))
    places = re.findall(r"M([\d.]+) ([\d.]+)h0", plot["dots"]["all"])
    assert len(places) == len(scores)
    assert all(charts.LEFT <= float(x) <= charts.RIGHT and charts.TOP <= float(y) <= charts.BOTTOM for x, y in places)


def test_submodels_agree_although_each_scores_what_it_has_seen_lower():
    random = np.random.default_rng(0)
    strange, subset = random.random(300), np.arange(300) % 3
    scores = strange[:, None] - 5.0 * (subset[:, None] == np.arange(3))
    scores[:, 2] += random.random(300)
    pairs = {(i, j): rho for i, j, rho in charts.agreement(subset, scores)}
    assert pairs[0, 1] == pytest.approx(1) and 0.5 < pairs[0, 2] < 0.9 and len(pairs) == 3
    assert charts.agreement(subset, np.ones((300, 2))) == charts.agreement(subset[:2], scores[:2]) == []


def test_the_report_says_what_the_keep_rule_said_of_its_choice(finished):
    assert "--keep auto: no clear group of outliers: all kept" in (finished / "report.html").read_text(encoding="utf-8")


def test_marks_made_by_the_labels_are_not_shown_as_a_persons(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    run_review(run, read_config(run, "", ""), Review(file=[], run=str(run), simulate=8))
    write_report(run)
    assert 'data-verdict="' not in (run / "report.html").read_text(encoding="utf-8")
    write_next_page(SimpleNamespace(run=run), None, None, None)  # nobody will look, so nothing is worked out
    config = read_config(run, "", "")
    config.pop("review")
    write_config(run, config)
    write_report(run)
    assert 'data-verdict="' in (run / "report.html").read_text(encoding="utf-8")
