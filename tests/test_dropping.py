"""The figures of when dropping pays: rankings that labels make better or worse, and finished runs as points."""

import shutil
import sys

import numpy as np
import pytest
from helpers import refuse, rows_of
from test_compare import made

from llb import dropping
from llb.config import Evaluate
from llb.files import UserError, write_json
from llb.runfiles import read_config, write_config
from llb.tables import read_metrics


def test_a_moved_ranking_is_better_or_worse_and_the_best_threshold_is_the_best_of_all(finished, monkeypatch):
    def aurocs(stage, dataset, kept):
        defects = np.array([record.label == 1 for record in dataset.train])
        return [1 - (each & defects).sum() / 100 for each in kept]  # every hidden defect costs a hundredth

    def overlapping(folder, dataset):
        defects = np.array([record.label == 1 for record in dataset.train])
        return {"score": np.exp(0.1 * (np.random.default_rng(0).normal(size=len(defects)) + defects))}

    monkeypatch.setattr(dropping, "final_aurocs", aurocs)
    monkeypatch.setattr(dropping, "read_scores", overlapping)
    table = dropping.gains(finished, Evaluate(run=str(finished), cache=str(finished.parent / "cache")))
    ranking, auto, best, clean, kept = table.T
    assert (np.diff(ranking) >= 0).all() and ranking[-1] > 0.9 > ranking[dropping.MOVES.index(0.0)] > ranking[0]
    assert (auto <= clean).all() and (best >= 0).all() and (best <= clean).all() and best[-1] > best[0]
    assert np.ptp(clean) < 1e-9 < clean[0] and ((0 < kept) & (kept <= 1)).all()


def test_the_figure_is_made_by_runs_of_stage_1_alone(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    config = read_config(run, "", "")
    write_config(run, {name: value for name, value in config.items() if name != "stage2"})
    settings = Evaluate(run=str(run), cache=str(finished.parent / "cache"))
    ((stage, dataset, score),) = dropping.stages_of(run, settings)
    assert stage.setup.steps == 4 and len(dataset.train) == len(score)  # of stage 1: there is no other


def test_final_detectors_trained_at_once_are_judged_as_stage_2_and_evaluation_do(finished):
    cache = str(finished.parent / "cache")
    ((stage, dataset, _),) = dropping.stages_of(finished, Evaluate(run=str(finished), cache=cache))
    kept = np.ones((2, len(dataset.train)), bool)
    kept[1] = [record.label == 0 for record in dataset.train]
    first, other = dropping.final_aurocs(stage, dataset, list(kept))
    assert first == read_metrics(finished)["tile"]["all"]["image_auroc"] and 0 <= other <= 1


def test_finished_runs_are_points_and_those_without_all_three_are_left_out(tmp_path, monkeypatch, capsys):
    grid = tmp_path / "grid"
    for seed, gain in ((0, 0.02), (1, -0.01)):
        run = grid / f"seed={seed}"
        made(run, seed, finals=("purified", "all"), detector="padim")
        entry = {"purified": 0.8 + gain, "all": 0.8, "clean": 0.85}
        write_json(run / "metrics.json", {"mean": {name: {"image_auroc": value} for name, value in entry.items()}})
        config = read_config(run, "", "")
        finals = {name: {"train_on": name, "set": {}, "detector": "padim"} for name in entry}
        write_config(run, config | {"stage2": finals, "layout": "demo", "noise_ratio": 0.2})
    made(grid / "seed=2", 2, detector="padim")
    monkeypatch.setattr(sys, "argv", ["dropping", "--grid", str(grid), "--plot", str(tmp_path / "points")])
    dropping.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    titles, own, everything = rows[0], *(row for row in rows if row[4:5] == ["2"])
    assert titles[5:] == [
        "ranking AUROC",
        "auto − all",
        "best − all",
        "best, random order − all",
        "clean − all",
        "lowest auto − all",
    ]
    assert own[1:3] == ["part", "padim"] and own[6:] == everything[6:] == ["+0.0050", "–", "–", "+0.0500", "-0.0100"]
    assert (tmp_path / "points.png").stat().st_size and (tmp_path / "points.svg").stat().st_size
    config = read_config(grid / "seed=1", "", "")
    write_config(grid / "seed=1", config | {"keep": 0.6})
    with pytest.raises(UserError, match="runs that differ in keep"):  # no mean over seeds
        dropping.main()


@pytest.mark.parametrize(
    ("flags", "problem"),
    (
        ("--best", "--best belongs to --grid: give both"),
        ("--grid D --cache C", "--cache belongs to --best: give both"),
        ("--grid D --seed 1", "--seed is of the demo sets, and --grid takes their place"),
    ),
)
def test_a_flag_that_would_have_no_effect_is_refused(flags, problem):
    assert problem in refuse("llb.dropping", *flags.split())


def test_the_best_threshold_of_a_finished_run_is_the_best_of_all_on_its_own_ranking(finished, monkeypatch):
    seen, best = [], iter((0.83, 0.82, 0.83, 0.84, 0.81, 0.80))  # by the ranking, by a random order, in turns

    def aurocs(stage, dataset, kept):
        assert stage.final == "all" and stage.setup.steps == 3  # those of its final detector, not of its sub-models
        seen.append(kept)
        return [0.8, 0.7, next(best), *([0.5] * (len(kept) - 3))]

    monkeypatch.setattr(dropping, "final_aurocs", aurocs)
    gain = dropping.best_threshold(finished, str(finished.parent / "cache"), "dinomaly")
    assert gain == pytest.approx((0.03, 0.02)) and [len(kept) for kept in seen] == [len(dropping.SHARES)] * 2
    score = np.array([float(row["score"]) for row in rows_of(finished / "tile" / "scores.csv")])
    own, random = seen
    assert own[0].all() and all(score[each].max() < score[~each].min() for each in own[1:])
    assert all(a.sum() == b.sum() for a, b in zip(own, random)) and any((a != b).any() for a, b in zip(own, random))
    datasets = dropping.load_datasets(finished, read_config(finished, "", ""), Evaluate())
    monkeypatch.setattr(dropping, "load_datasets", lambda *_: datasets * 2)  # of two categories: the mean
    gain = dropping.best_threshold(finished, str(finished.parent / "cache"), "dinomaly")
    assert gain == pytest.approx((0.02, 0.02))
