"""llb.measure: which commands it gives, what it makes of their metrics, and its verdicts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import llb.measure
from llb.files import UserError, read_json, write_json
from llb.measure import Measure, Set, list_sets, measure, script, spread, table, verdicts
from llb.report import mean_defined
from llb.run import METRICS

SCORES = {"image_auroc": 0.9, "pixel_auroc": 0.8, "pixel_aupro": None}


@pytest.fixture
def commands(monkeypatch):
    """The scripts are not run; evaluate.py's metrics are made up."""
    given = []

    def pretend(name, *flags):
        given.append([name, *map(str, flags)])
        if name == "evaluate.py":
            entry = dict.fromkeys(("purified", "all", "clean"), SCORES)
            facts = {"train_auroc": 0.7, "contamination_before": 0.2, "contamination_after": 0.1}
            write_json(flags[1] / METRICS, {"a": {"purification": facts}, "b": {"purification": facts}, "mean": entry})

    monkeypatch.setattr(llb.measure, "script", pretend)
    monkeypatch.setattr(llb.measure, "features", lambda seed, weights: {"tiny": None})
    monkeypatch.setattr(
        llb.measure, "load_images", lambda root, category, *_: SimpleNamespace(dataset=category, train=None, test=None)
    )
    monkeypatch.setattr(llb.measure, "apply", lambda *_: None)
    monkeypatch.setattr(llb.measure, "read_purified", lambda folder, dataset: (f"{folder.name}, kept", None))
    worth = {"a": 0.6, "b": 0.8, "a, kept": 0.7, "b, kept": 0.9}

    def pretend_probe(known, seen, images, seed, chosen=None):
        return {"image_auroc": worth[chosen or images.dataset]}

    monkeypatch.setattr(llb.measure, "probe", pretend_probe)
    return given


def test_a_set_is_measured_by_the_three_scripts(commands, tmp_path):
    a_set = Set("own", tmp_path, ["a", "b"], 0.2, ["--data", "D"], ["--steps", "4"])
    found = measure(a_set, 2, Measure(out=str(tmp_path), weights="w"))
    folder = str(tmp_path / "own-2")
    assert commands == [
        ["stage1_partition.py", "--out", folder, "--seed", "2", "--data", "D", "--weights", "w"],
        *(["stage2_train.py", "--run", folder, "--train-on", t, "--steps", "4"] for t in ("purified", "all", "clean")),
        ["evaluate.py", "--run", folder],
    ]
    assert found["purified"] == SCORES and found["purification"]["train_auroc"] == pytest.approx(0.7)
    assert found["nearest, tiny"]["image_auroc"] == pytest.approx(0.7)
    assert found["nearest, tiny, purified"]["image_auroc"] == pytest.approx(0.8)


def test_data_that_cannot_be_measured_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match="labelled"):
        list_sets(Measure(data=str(tmp_path), out=str(tmp_path / "out"), only=tmp_path.name))


def test_without_noise_all_is_clean_and_is_not_trained_twice(commands, tmp_path):
    found = measure(Set("own, clean", tmp_path, ["a"], 0.0), 0, Measure(out=str(tmp_path)))
    assert [c[4] for c in commands if c[0] == "stage2_train.py"] == ["purified", "clean"] and "all" not in found
    assert "nearest, tiny, purified" not in found
    assert "own-clean-0" in commands[0][2]


def test_a_script_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(UserError, match="stage2_train.py --run .* failed"):
        script("stage2_train.py", "--run", tmp_path / "none")


def test_only_what_is_asked_for_is_drawn_and_a_name_that_is_none_says_which_there_are(tmp_path):
    assert [a_set.name for a_set in list_sets(Measure(out=str(tmp_path), only="embedded"))] == ["embedded"]
    assert not (tmp_path / "heldout").exists()
    with pytest.raises(UserError, match="--only part: no such set; give one of embedded, held-out; more with --data"):
        list_sets(Measure(out=str(tmp_path), only="part"))


def test_means_leave_out_what_is_undefined():
    assert mean_defined([{"x": 1.0, "y": None}, {"x": 2.0, "y": 3.0}]) == {"x": 1.5, "y": 3.0}
    assert mean_defined([{"x": None}]) == {"x": None}


def test_the_table_shows_mean_and_deviation_over_seeds():
    assert spread([0.5, 0.7]) == "0.600 ± 0.100" and spread([0.5, None]) == ""
    text = table("own", [{"purified": {"image_auroc": value}} for value in (0.5, 0.7)])
    assert text.splitlines()[2] == "| purified | 0.600 ± 0.100 |  |  |  |  |"


def seeds_of(purified: list[float], after: float) -> list[dict]:
    facts = {"train_auroc": 0.96, "contamination_before": 0.2, "contamination_after": after}
    return [
        {
            "purified": SCORES | {"image_auroc": score, "pixel_auroc": 0.96},
            "all": SCORES | {"image_auroc": 0.975},
            "purification": facts,
        }
        for score in purified
    ]


@pytest.mark.parametrize(
    "purified, after, unmet", [([0.98, 0.98], 0.04, 0), ([0.97, 0.99], 0.04, 1), ([0.9, 0.9], 0.06, 3)]
)
def test_verdicts_on_the_embedded_set(purified, after, unmet):
    text = verdicts({"embedded": seeds_of(purified, after)})
    assert text.count("not met") == unmet and text.count("met") == 5


def test_the_best_detector_is_asked_for_where_one_is_wanted():
    seed = seeds_of([0.92], 0.04)[0]
    seed["nearest, tiny"] = {"image_auroc": 0.94, "pixel_auroc": 0.5}
    seed["nearest, random"] = {"image_auroc": 0.80, "pixel_auroc": 0.49}
    lines = verdicts({"own, clean": [seed]}).splitlines()
    assert "own, clean, best detector, image_auroc: 0.940 of 0.93, met" in lines
    assert "own, clean, best detector, pixel_auroc: 0.960 of 0.88, met" in lines
    assert lines[-1].endswith(": 0.010 of 0.02, not met")


def test_one_set_can_be_measured_alone(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["measure", "--out", str(tmp_path), "--seeds", "2", "--only", "embedded"])
    # the made-up metrics know the categories a and b
    monkeypatch.setattr(llb.measure, "Set", lambda name, *_: Set(name, tmp_path, ["a", "b"], 0.2))
    llb.measure.main()
    assert {Path(command[2]).name.rsplit("-")[0] for command in commands} == {"embedded"}
    assert "| embedded | image AUROC" in capsys.readouterr().out
    assert len(read_json(tmp_path / "measured.json", "")["embedded"]) == 2
