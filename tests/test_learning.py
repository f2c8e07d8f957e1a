"""What is kept of a training: every step's own distances of every image, thinned, the same after an interruption."""

import dataclasses
from types import SimpleNamespace

import numpy as np
from helpers import rows_of
from test_train import IMAGES, SETUP, THREE

from llb.learning import learning_line, read_learning, write_learning
from llb.train import MOST_SEEN, batch_streams, seen_images, seen_steps


def test_a_long_training_is_thinned_evenly_to_whole_steps():
    for steps, batch, submodels, every in ((100, 8, 3, 1), (1000, 16, 3, 3), (5000, 16, 1, 4), (50, 64, 400, 50)):
        kept = seen_steps(dataclasses.replace(SETUP, steps=steps, batch_size=batch), submodels)
        assert kept == range(0, steps, every)
        assert len(kept) == 1 or len(kept) * batch * submodels <= MOST_SEEN


def test_each_distance_stands_beside_its_image(tmp_path):
    streams = batch_streams(THREE, SETUP.batch_size)
    seen = np.zeros((3, SETUP.steps, 1 + SETUP.batch_size), np.float32)
    for model, stream in enumerate(streams):
        for step in range(SETUP.steps):
            seen[model, step, 1:] = stream(step) + 100 * model + step / 64  # tells which image it is of
    seen[1, 4, 2] = np.nan  # the step has taken nothing of this image
    entries = seen_images(THREE, SETUP, seen)
    assert len(entries) == 3 * SETUP.steps * SETUP.batch_size - 1
    assert all(loss == image + 100 * model + step / 64 for step, model, image, loss in entries)
    write_learning(tmp_path, [SimpleNamespace(path=f"{i}.png") for i in range(IMAGES)], entries)
    rows = rows_of(tmp_path / "learning.csv")
    assert [row["path"] for row in rows] == [f"{image}.png" for _, _, image, _ in entries]
    assert list(rows[0]) == ["step", "submodel", "path", "distance"] and float(rows[0]["distance"]) == entries[0][3]


def test_the_line_compares_both_ends_of_the_training():
    entries = [(step, 0, image, (image + 1) / (step + 1)) for step in range(100) for image in (0, 1, 2)]
    line = learning_line(entries, np.array([True, True, False]))
    assert line.startswith("while training: kept images 0.268 → 0.0155, dropped images 0.55 → 0.0314 (median dist")
    assert "dropped images – → –" in learning_line(entries, np.array([True] * 3))


def test_a_run_keeps_what_its_stages_saw(finished):
    table = read_learning(finished / "tile")
    assert len(table["step"]) == 4 * 3 * 2 and set(table["submodel"]) == {0, 1, 2} and set(table["label"]) == {0, 1}
    subset = {row["path"]: row["subset"] for row in rows_of(finished / "tile" / "scores.csv")}
    rows = rows_of(finished / "tile" / "learning.csv")
    assert all(subset[row["path"]] == row["submodel"] for row in rows)
    assert all(0 < float(row["distance"]) < 2 for row in rows)
    for final in ("purified", "all"):
        losses = rows_of(finished / "tile" / f"loss-{final}.csv")
        assert [row["step"] for row in losses] == ["0", "1", "2"] and 0 < float(losses[0]["loss"]) < 2
