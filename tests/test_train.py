"""K sub-models trained together equal each trained by itself, on any number of devices, interrupted or not."""

import dataclasses
import re
from functools import wraps

import jax
import numpy as np
import pytest
from helpers import small_setup

import llb.fit
import llb.train
from llb.checkpoint import CheckpointFolder, open_checkpoints
from llb.detectors.dinomaly import Settings
from llb.detectors.recipes import RECIPES
from llb.features import Features
from llb.files import UserError
from llb.fit import learn
from llb.placement import place_submodels
from llb.train import Submodels, batch_stream, init_state, key_for, submodel_keys, train, train_step

IMAGES, PATCHES, PREFIX, WIDTH = 23, 9, 2, 8
FEATURES = np.random.default_rng(3).normal(size=(IMAGES, 2, PREFIX + PATCHES, WIDTH)).astype(np.float16)
THREE = Submodels([np.arange(k, IMAGES, 3) for k in range(3)], submodel_keys(jax.random.key(5), 3))  # 8, 8, 7 images


def setup_of(recipe: str):
    rate = RECIPES[recipe].learning_rate
    return small_setup("dinomaly", settings=Settings(recipe=recipe), learning_rate=rate, steps=20, batch_size=3)


SETUP = setup_of("dinomaly")


def trained_and_seen(folder, setup=SETUP, submodels=THREE, devices=3, fetch=FEATURES.__getitem__, digest="images"):
    features = Features(fetch, FEATURES.shape[1:])
    at = CheckpointFolder(folder, digest)
    params, seen = train(setup, features, submodels, at, "test", jax.devices()[:devices])
    return {"params": params["params"], "seen": seen}


def trained(*arguments, **named):
    return trained_and_seen(*arguments, **named)["params"]


EXCHANGES = re.compile("all-(gather|reduce|to-all)|collective|reduce-scatter")


@pytest.mark.parametrize(
    ("module", "detector", "programs"),
    [
        (llb.train, "dinomaly", ("init_state", "train_step")),
        (llb.fit, "mutual", ("start_states", "add_batch", "finish_states")),
        (llb.fit, "patchcore", ("add_batch", "finish_states")),
    ],
)
def test_devices_exchange_nothing_while_they_learn(tmp_path, monkeypatch, module, detector, programs):
    """A device that waits for another holds a thread, and --no-cache encodes at the same time in the same threads."""
    texts = {}

    def watched(name, program):
        def run(*arguments, **named):
            texts.setdefault(name, program.lower(*arguments, **named).compile().as_text())
            return program(*arguments, **named)

        return run

    for name in programs:
        program = getattr(module, name)
        monkeypatch.setattr(module, name, wraps(program)(watched(name, program)))
    setup = SETUP if detector == "dinomaly" else small_setup(detector, batch_size=3)
    features = Features(FEATURES.__getitem__, FEATURES.shape[1:])
    learn(setup, features, THREE, CheckpointFolder(tmp_path, "images"), "test", jax.devices()[:3])
    assert texts.keys() == set(programs) and not any(map(EXCHANGES.search, texts.values()))


def member(tree, k):
    """Sub-model k of a stack, as a stack of one."""
    return jax.tree.map(lambda leaf: leaf[k : k + 1], tree)


def assert_trees_close(one, other, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


def asks_for(step: int, indices: np.ndarray) -> bool:
    """Whether the batch of this step for sub-model 0 is among the indices."""
    batch = batch_stream(key_for("batches", THREE.keys[0]), THREE.subsets[0], 3)(step)
    return bool((indices == batch).all(axis=-1).any())


@pytest.mark.slow
def test_with_unequal_passes_three_together_equal_each_alone(tmp_path):
    """llbnad's rate falls after each pass over a sub-model's own images. (test_detectors.py: every detector.)"""
    setup = setup_of("llbnad")
    singles = [Submodels([subset], THREE.keys[k : k + 1]) for k, subset in enumerate(THREE.subsets)]
    alone = [trained(tmp_path / str(k), setup, single, devices=1) for k, single in enumerate(singles)]
    together = trained(tmp_path / "together", setup, devices=2)
    for k in range(3):  # by XLA's usual emitters to 1e-5; by the quick ones of conftest.py rounding differs
        assert_trees_close(member(together, k), alone[k], 2e-4)
    kernel = together["block_0"]["mlp"]["fc1"]["dense"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3 and np.abs(kernel[1] - kernel[2]).max() > 1e-3


def test_a_sub_model_sees_its_own_subset_only(tmp_path):
    other_images = FEATURES.copy()
    other_images[THREE.subsets[1]] *= -1
    one, other = trained(tmp_path / "one"), trained(tmp_path / "other", fetch=other_images.__getitem__)
    assert_trees_close(member(one, 0), member(other, 0), 0)
    assert_trees_close(member(one, 2), member(other, 2), 0)
    assert np.abs(one["block_0"]["norm1"]["scale"] - other["block_0"]["norm1"]["scale"])[1].max() > 1e-5


@pytest.mark.parametrize(("others", "passes"), [(False, [3, 3, 3]), (True, [5, 5, 6])])
def test_a_pass_shows_all_images_that_a_sub_model_learns_from(tmp_path, monkeypatch, others, passes):
    def stop(state, batch, each, shared, **static):
        raise UserError(str(each["steps_per_pass"].tolist()))

    monkeypatch.setattr(llb.train, "train_step", stop)
    with pytest.raises(UserError, match=re.escape(str(passes))):  # llbnad's rate falls after each
        trained(tmp_path, submodels=dataclasses.replace(THREE, others=others))


def test_each_sub_model_and_each_purpose_has_a_key_of_its_own_and_each_step_other_noise():
    few, many = (jax.random.key_data(submodel_keys(jax.random.key(5), count)).tolist() for count in (3, 5))
    assert many[:3] == few and len(set(map(tuple, many))) == 5
    purposes = [key_for(purpose, THREE.keys[0]) for purpose in ("weights", "batches", "noise")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in (*purposes, THREE.keys[0])}) == 4
    placement = place_submodels(3)
    each = {"key": placement.spread_keys(THREE.keys), "steps_per_pass": placement.spread(np.full(3, 3, np.int32))}
    batch, losses = placement.spread(np.stack([FEATURES[:3]] * 3)), []
    for step in (0, 0, 1):
        state = init_state(each["key"], setup=SETUP, sharding=placement.sharding)
        _, seen = train_step(state, batch, each, (None, np.int32(step)), setup=SETUP, mesh=placement.mesh)
        losses.append(np.asarray(seen)[:, 0])
    assert (losses[0] == losses[1]).all() and (losses[0] != losses[2]).all(), "the dropout of a step is its own"


def test_a_diverging_training_is_not_saved(tmp_path):
    spoiled = FEATURES.copy()
    spoiled[THREE.subsets[1]] = np.nan
    with pytest.raises(UserError, match="sub-model 1 is not finite at step 0"):
        trained(tmp_path, fetch=spoiled.__getitem__)
    # the loss of the only step is finite, as it belongs to the parameters before the step
    diverging = dataclasses.replace(SETUP, steps=1, learning_rate=float("inf"))
    with pytest.raises(UserError, match="parameters are not finite after step 1"):
        trained(tmp_path, diverging)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize("devices", (1, 3))
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path, devices, monkeypatch, capsys):
    def interrupting(indices):
        if asks_for(7, indices):
            raise KeyboardInterrupt
        return FEATURES[indices]

    with monkeypatch.context() as after_every_step, pytest.raises(KeyboardInterrupt):
        after_every_step.setattr(llb.train, "SAVE_SECONDS", 0.0)
        after_every_step.setattr(llb.train, "SAVE_FRACTION", 1e9)
        trained(tmp_path / "broken", devices=devices, fetch=interrupting)
    with pytest.raises(UserError, match="has changed"):
        trained(tmp_path / "broken", digest="other images")
    asked = []
    resumed = trained_and_seen(tmp_path / "broken", fetch=lambda indices: asked.append(indices) or FEATURES[indices])
    assert "continues from step 7 of 20" in capsys.readouterr().out
    assert not any(asks_for(step, indices) for step in range(7) for indices in asked)
    whole = trained_and_seen(tmp_path / "whole", devices=devices)
    assert_trees_close(whole, resumed, 0 if devices == 3 else 1e-5)
    assert np.isfinite(whole["seen"]).all() and whole["seen"].shape == (3, 20, 4)
    assert_trees_close(whole, trained_and_seen(tmp_path / "whole"), 0)  # read from the finished checkpoint


def test_a_finished_training_is_read_and_not_repeated_unless_the_images_changed(tmp_path):
    params = trained(tmp_path)

    def none(indices):
        raise AssertionError("a batch is fetched, so it trains again")

    assert_trees_close(params, trained(tmp_path, fetch=none), 0)
    with pytest.raises(UserError, match="has changed"):
        trained(tmp_path, digest="other images")


def test_every_pass_shows_each_image_once_and_passes_differ():
    subset = np.array([4, 8, 15, 16, 23])
    stream = batch_stream(jax.random.key(0), subset, 3)
    passes = np.concatenate([stream(step) for step in range(10)]).reshape(6, 5)  # 30 images are six passes of five
    assert (np.sort(passes, axis=1) == subset).all()
    assert len({tuple(one) for one in passes}) > 1
    np.testing.assert_array_equal(stream(7), batch_stream(jax.random.key(0), subset, 3)(7))
    assert batch_stream(jax.random.key(0), np.arange(2), 5)(0).shape == (5,)  # larger than the subset, and still full


@pytest.mark.parametrize(
    ("submodels", "model_of_row"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4, 0])]
)
def test_any_number_of_sub_models_fits_three_devices(submodels, model_of_row):
    placement = place_submodels(submodels)
    assert placement.model_of_row.tolist() == model_of_row
    values = np.arange(submodels) + 0.5
    spread = placement.spread({"leaf": values})
    assert spread["leaf"].tolist() == values[model_of_row].tolist()
    assert len({shard.data.shape for shard in spread["leaf"].addressable_shards}) == 1  # devices hold equally many
    assert placement.gather(spread, submodels)["leaf"].tolist() == values.tolist()
    assert placement.local_values(spread["leaf"]) == dict(enumerate(values.tolist()))
    indices = np.random.default_rng(0).integers(0, IMAGES, (submodels, 2))
    features = placement.spread_features(FEATURES.__getitem__, indices, FEATURES.shape[1:])
    np.testing.assert_array_equal(features, FEATURES[indices[model_of_row]])
