"""llb.tiny.measure: the commands it runs, the means it takes, its table and its verdicts."""

import numpy as np
import pytest

from llb.data import load_category
from llb.demo import write_set
from llb.encoders.stem import pool
from llb.files import UserError, read_json, write_json
from llb.tables import METRICS_FILE, Stage1Result, write_purified, write_scores
from llb.tiny import heldout, measure
from llb.tiny.measure import Measure, Set, list_sets, run_stage, verdicts
from llb.tiny.probe import compute_features, detector_metrics, load_images, nearest_neighbours

pytestmark = pytest.mark.slow  # the workshop of `tiny`: compiles many training steps

SCORES = {"image_auroc": 0.9, "pixel_auroc": 0.8, "pixel_aupro": None}


@pytest.fixture
def commands(monkeypatch):
    """The commands of a measurement. The scripts do not run, and evaluate.py's metrics are made up."""
    given = []

    def pretend(name, *flags):
        given.append([name, *map(str, flags)])
        if name == "evaluate.py":
            detectors = dict.fromkeys(("purified", "all", "clean"), SCORES)
            stage1 = {c: {"purification": {"train_auroc": auroc}} for c, auroc in (("a", 0.5), ("b", 0.9))}
            write_json(flags[1] / METRICS_FILE, stage1 | {"mean": detectors})

    monkeypatch.setattr(measure, "run_stage", pretend)
    monkeypatch.setattr(measure, "measure_neighbours", lambda *_: {"tiny": {"image_auroc": 0.7}})
    return given


def test_a_set_is_measured_by_the_three_scripts(commands, tmp_path):
    a_set = Set("own", tmp_path, ["a", "b"], 0.2, ["--data", "D"], ["--steps", "4"])
    values = measure.measure(a_set, 2, Measure(out=str(tmp_path), weights="w"))
    run = str(tmp_path / "own-2")
    assert commands == [
        ["stage1_partition.py", "--out", run, "--seed", "2", "--data", "D", "--weights", "w"],
        *(["stage2_train.py", "--run", run, "--train-on", t, "--steps", "4"] for t in ("purified", "all", "clean")),
        ["evaluate.py", "--run", run],
    ]
    assert values["purified"] == SCORES and values["purification"]["train_auroc"] == pytest.approx(0.7)
    assert values["nearest, tiny"] == {"image_auroc": 0.7}


def test_without_noise_there_is_no_training_on_all_images(commands, tmp_path):
    values = measure.measure(Set("own, clean", tmp_path, ["a"], 0.0), 0, Measure(out=str(tmp_path)))
    assert [c[4] for c in commands if c[0] == "stage2_train.py"] == ["purified", "clean"] and "all" not in values
    assert commands[0][2] == str(tmp_path / "own-clean-0")


def test_nearest_neighbours_are_means_over_the_categories_among_all_and_among_kept_images(tmp_path, monkeypatch):
    def extract(images):
        return pool(images, 8).reshape(len(images), 196, -1)

    monkeypatch.setattr(measure, "feature_kinds", lambda seed, weights: {"tiny": extract})
    kept, expected = np.arange(10) % 3 > 0, {"tiny": [], "tiny, purified": []}
    for name in ("bricks", "weave"):
        counts = {"train/good": 8, "test/good": 3, "test/hole": 5}
        write_set(tmp_path / name, counts, lambda seed, kind, name=name: heldout.draw(name, seed, kind), 0)
        records = load_category(tmp_path, name, 0.2).train
        scores = np.zeros(10)
        write_scores(tmp_path / "run" / name, records, Stage1Result(scores, scores[:, None], scores, kept))
        write_purified(tmp_path / "run" / name, records, kept)
        images = load_images(tmp_path, name, 0.2, 0)
        train, test = (compute_features(extract, part, "") for part in (images.train, images.test))
        expected["tiny"].append(detector_metrics(*nearest_neighbours(train, test), images))
        own, distances = nearest_neighbours(train[kept], test)
        expected["tiny, purified"].append(detector_metrics(own, distances, images, np.flatnonzero(kept)))
    values = measure.measure_neighbours(Set("own", tmp_path, ["bricks", "weave"], 0.2), 0, None, tmp_path / "run")
    for name, (first, second) in expected.items():
        for key in ("image_auroc", "pixel_auroc"):
            assert values[name][key] == pytest.approx((first[key] + second[key]) / 2)


def test_a_script_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(UserError, match="stage2_train.py --run .* failed"):
        run_stage("stage2_train.py", "--run", tmp_path / "none")


def test_a_set_that_cannot_be_measured_is_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(UserError, match="labelled"):
        list_sets(Measure(data=str(tmp_path), out=str(tmp_path / "out"), only=tmp_path.name))
    with pytest.raises(UserError, match="--only other: there is no such set; give one of demo; held-out, or --data"):
        list_sets(Measure(out=str(tmp_path / "out"), only="other"))
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_measurement_is_a_table_and_the_targets(tmp_path, monkeypatch, capsys):
    facts = {"train_auroc": 0.96, "contamination_before": 0.2, "contamination_after": 0.06}
    monkeypatch.setattr("sys.argv", ["measure", "--out", str(tmp_path), "--seeds", "2", "--only", "demo"])

    def made_up(a_set, seed, settings):
        return {"purified": SCORES | {"image_auroc": 0.9 + 0.1 * seed}, "all": SCORES, "purification": facts}

    monkeypatch.setattr(measure, "measure", made_up)
    measure.main()
    printed = capsys.readouterr().out.splitlines()
    assert "| purified | 0.950 ± 0.050 | 0.800 ± 0.000 |  |  |  |" in printed
    assert printed[-5:] == [
        "demo, ranking AUROC: 0.960 of 0.95, met",
        "demo, share of the contamination that is removed: 0.700 of 0.75, not met",
        "demo, purified, image AUROC: 0.950 of 0.97, not met",
        "demo, purified, pixel AUROC: 0.800 of 0.95, not met",
        "demo, share of seeds in which purified is above all in image AUROC: 0.500 of 1.00, not met",
    ]
    assert len(read_json(tmp_path / "measured.json", "")["demo"]) == 2 and not (tmp_path / "heldout").exists()


def test_verdicts_on_a_clean_set_take_the_best_detector():
    values = {
        "purified": {"image_auroc": 0.92, "pixel_auroc": 0.96},
        "nearest, tiny": {"image_auroc": 0.94, "pixel_auroc": 0.5},
        "nearest, random": {"image_auroc": 0.80, "pixel_auroc": 0.49},
    }
    lines = verdicts({"own, clean": [values]}).splitlines()
    assert "own, clean, best detector, image AUROC: 0.940 of 0.93, met" in lines
    assert "own, clean, best detector, pixel AUROC: 0.960 of 0.88, met" in lines
    assert lines[-1].endswith(": 0.010 of 0.02, not met")
