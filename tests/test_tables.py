"""Tables read back as they were written, and undefined values stay undefined."""

import csv

import numpy as np
import pytest

from llb import tables
from llb.data import Dataset, Record
from llb.files import UserError
from llb.learning import read_learning, write_learning
from llb.marks import choose_images

FACTS = {"n": 57840, "kept": 57840, "contamination_before": 1 / 3, "contamination_after": 0.25, "train_auroc": 0.875}


def values(value):
    return dict.fromkeys(tables.METRICS, value)


def test_scores_and_the_purified_list_read_back_exactly(tmp_path):
    records = tuple(Record(f'{i}, "ä".png', None, None, "") for i in range(4))
    dataset = Dataset(tmp_path, "folder", "bolt", records, ())
    for record in records:
        (tmp_path / record.path).touch()
    scores, kept = np.random.default_rng(0).random((4, 2), np.float32), np.array([True, False, True, True])
    tables.write_scores(tmp_path, records, tables.Stage1Result(np.zeros(4, int), scores, scores[:, 0], kept))
    tables.write_purified(tmp_path, records, kept)
    table, purified = tables.read_scores(tmp_path, dataset), choose_images("purified", tmp_path, dataset)
    assert (table["score"] == scores[:, 0]).all() and (table["kept"] == kept).all()
    assert purified.indices.tolist() == [0, 2, 3] and purified.note is None
    with pytest.raises(UserError, match="clean needs labels"):
        choose_images("clean", tmp_path, dataset)


def test_means_over_categories_are_of_detectors_that_all_have_and_leave_undefined_values_out():
    some = {"purified": values(0.2) | {"pixel_aupro": None}}
    others = {"purified": values(0.4) | {"pixel_ap": None, "pixel_aupro": None}, "all": values(0.9)}
    means = tables.mean_metrics({"a": some, "b": others}, ["a", "b"])
    expected = values(0.3) | {"pixel_ap": 0.2, "pixel_aupro": None}
    assert list(means) == ["purified"], "an interrupted evaluation has left `all` out in a"
    assert means["purified"] == {name: value and pytest.approx(value) for name, value in expected.items()}


def test_the_metric_of_samples_has_a_column_only_where_it_is_defined(tmp_path):
    def tables_of(value):
        metrics = {"a": {"all": values(0.5) | {"sample_auroc": value}}, "b": {"all": values(0.5)}}
        metrics["mean"] = tables.mean_metrics(metrics, ["a", "b"])
        tables.write_metrics_csv(tmp_path / "metrics.csv", metrics)
        with open(tmp_path / "metrics.csv", newline="") as file:
            return metrics["mean"]["all"], tables.summary_table(metrics), list(csv.DictReader(file))

    mean, table, rows = tables_of(0.75)
    assert mean["sample_auroc"] == 0.75 and [row["sample_auroc"] for row in rows] == ["0.75", "", "0.75"]
    title, names, a, b, *_ = table.splitlines()
    place = title.index("sample")
    assert (a[place:][:5], b[place:][:5]) == ("0.750", tables.UNDEFINED + " " * 4) and title.index("pixel") == place + 7
    for value in (None, 0.75):
        _, table, rows = tables_of(value)
        assert ("sample" in table) == ("sample_auroc" in rows[0]) == (value is not None)


def test_missing_masks_are_kept_beside_the_detectors_until_there_are_none(tmp_path):
    entry = {"all": values(0.5), "purification": FACTS}
    tables.write_json(tmp_path / "metrics.json", {"bolt": entry})
    tables.write_missing_masks(tmp_path, "bolt", ["a.png"])
    metrics = tables.read_metrics(tmp_path)
    assert metrics == {"bolt": entry | {"missing_masks": ["a.png"]}}
    assert tables.summary_table(metrics) == tables.summary_table({"bolt": entry})
    tables.write_missing_masks(tmp_path, "bolt", [])
    assert tables.read_metrics(tmp_path) == {"bolt": entry}
    assert "1 of 9 defective test images has" in tables.missing_masks_line(["a.png"], 9)
    assert "5 of 9 defective test images have no mask (a, a, a, …)" in tables.missing_masks_line(["a"] * 5, 9)


def test_the_summary_fits_100_columns_and_shows_undefined_values():
    long = {"purified": values(1.0), "clean": values(None), "purification": FACTS}
    table = tables.summary_table({"a" * 90: long, "b": {"all": values(0.1234)}, "mean": {"purified": values(1.0)}})
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100 and "1.000" in table and "\nmean " in table
    assert "kept 57840 of 57840 images, contamination 33.3% → 25.0%, ranking AUROC 0.875" in table
    columns = {line.index(text) for line in lines for text in ("–", "0.123") if text in line}
    assert len(columns) == 1
    assert "mean" not in tables.summary_table({"only": {"all": values(0.5)}, "mean": {"all": values(0.5)}})


def test_metrics_csv_has_a_row_for_each_category_and_detector_and_reads_back_exactly(tmp_path):
    entry = {"purified": values(1 / 3) | {"pixel_ap": None}, "all": values(0.25), "purification": FACTS}
    tables.write_metrics_csv(tmp_path / "metrics.csv", {"a,b": entry, "mean": {"purified": values(0.5)}})
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        first, second, third = csv.DictReader(file)
    names = [f"{row['category']} {row['train_on']}" for row in (first, second, third)]
    assert names == ["a,b purified", "a,b all", "mean purified"]
    assert float(first["image_auroc"]) == 1 / 3 and first["pixel_ap"] == third["purification_kept"] == ""
    assert first["purification_kept"] == "57840"


def test_no_cell_is_a_formula_and_paths_read_back(tmp_path):
    paths = ["=1+1.png", "-a/b.png", "@c.png", "+d.png", "\te.png", "plain.png", "./x.png", "'-1.png"]
    records = [Record(path, None, (), "") for path in paths]
    tables.write_predictions(tmp_path, "all", records, np.full(len(paths), -0.5, np.float32))
    tables.write_metrics_csv(tmp_path / "metrics.csv", {"=cmd()": {"all": values(0.5)}, "-1": {"all": values(0.5)}})
    for file in ("predictions-all.csv", "metrics.csv"):
        with open(tmp_path / file, newline="") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        assert not [cell for cell in cells if cell.startswith(tuple("=@+-\t")) and cell not in ("-0.5", "-1")]
    assert "'=cmd()" in cells
    read = tables.read_table(tmp_path / "predictions-all.csv", ("path", "score"))
    assert [row["path"] for row in read] == paths and read[0]["score"] == -0.5
    scores = np.zeros((len(paths), 2), np.float32)
    tables.write_scores(
        tmp_path, records, tables.Stage1Result(np.zeros(len(paths), int), scores, scores[:, 0], scores[:, 0] < 1)
    )
    write_learning(tmp_path, records, [(0, 1, 0, 0.5)])
    assert read_learning(tmp_path)["distance"].tolist() == [0.5]
