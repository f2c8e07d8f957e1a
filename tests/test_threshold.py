"""The threshold comes from the purified images alone, and labels only judge it."""

import json

import numpy as np
import pytest

from llb import tables
from llb.files import UserError
from llb.threshold import by_kind, threshold_facts


def test_labels_judge_the_threshold_and_do_not_move_it():
    purified, scores = np.arange(101.0), np.array([98, 99, 99.5, 200, 3, 150])
    known = threshold_facts(purified, [0, 0, 0, 0, 1, 1], scores)
    assert known["threshold"] == 99 and known["images"] == 101
    assert known["false_alarm_rate"] == 0.5 and known["missed_rate"] == 0.5, "99 itself is normal"
    for labels in ([1, 1, 1, 1, 0, 0], [0, None, 0, 0, 1, 1]):
        assert threshold_facts(purified, labels, scores)["threshold"] == 99
    assert threshold_facts(purified, [0, None], scores[:2])["false_alarm_rate"] is None
    only_normal = threshold_facts(purified, [0, 0], scores[:2])
    assert only_normal["false_alarm_rate"] == 0 and only_normal["missed_rate"] is None
    assert set(threshold_facts(None, [0, 1], scores[:2]).values()) == {None, 0, 0.99}


def test_the_threshold_reads_back_and_a_damaged_file_is_named(tmp_path):
    assert tables.read_threshold(tmp_path, "all") is None
    facts = threshold_facts(np.random.default_rng(0).random(50, np.float32), [0, 1], np.array([0.1, 2.0]))
    tables.write_threshold(tmp_path, "all", facts)
    assert tables.read_threshold(tmp_path, "all") == facts
    assert "0.0% of the normal test images are false alarms, 0.0% of the defective" in tables.threshold_line(facts)
    line = tables.threshold_line(facts | {"false_alarm_rate": None, "missed_rate": None})
    assert line.endswith(" (99% quantile of the scores of the 50 purified images)")  # 98% lie below it
    tables.write_threshold(tmp_path, "all", threshold_facts(None, [], np.empty(0)))
    assert tables.read_threshold(tmp_path, "all") is None
    null = json.dumps(facts | {"quantile": None})
    for text in ("[]", '{"threshold": "high"}', '{"threshold": 1.0}', null, "{}", "{"):
        (tmp_path / "threshold-all.json").write_text(text)
        with pytest.raises(UserError, match=r"threshold-all\.json"):
            tables.read_threshold(tmp_path, "all")


def test_the_scores_of_the_submodels_read_back_exactly(tmp_path):
    assert tables.read_submodels(tmp_path)[1].shape[0] == 0
    scores = np.random.default_rng(0).random((4, 3), np.float32)
    records = [tables.Record(f"{i}.png", None, (), "") for i in range(4)]
    subset = np.array([2, 0, 1, 0], np.int32)
    tables.write_scores(tmp_path, records, tables.Stage1Result(subset, scores, scores[:, 0], scores[:, 0] > 0))
    for actual, expected in zip(tables.read_submodels(tmp_path), (subset, scores)):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


def test_kinds_are_judged_one_by_one_against_all_normal_images(tmp_path):
    kinds, labels = ["good", "good", "dent", "dent", "hole", ""], [0, 0, 1, 1, 1, 1]
    rows = by_kind(kinds, labels, np.array([1, 3, 2, 4, 5, 0]), 2.5)
    assert rows == [("", 1, 0.0, 0.0), ("dent", 2, 0.75, 0.5), ("hole", 1, 1.0, 1.0)]
    assert by_kind(kinds, labels, np.arange(6), None)[0][3] is None and by_kind(["a"], [1], np.ones(1), 0)[0][2] is None
    assert by_kind(kinds, [None, *labels[1:]], np.arange(6), 2.5) == []
    tables.write_kinds(tmp_path, "all", [*rows, ("none", 1, None, None)])
    read = tables.read_table(tmp_path / tables.kinds_file("all"), tables.KINDS)
    assert [tuple(row.values()) for row in read] == [*rows, ("none", 1, None, None)]
