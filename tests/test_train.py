"""K sub-models trained together are those trained alone, on any number of devices, interrupted or not."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import llb.train
from llb.checkpoint import open_checkpoints
from llb.dinomaly import Dinomaly
from llb.files import UserError
from llb.optimizer import RECIPES
from llb.train import Training, batches, place, plan, purposes, score, score_all, submodel_keys, train

IMAGES, PATCHES, PREFIX, WIDTH = 23, 9, 2, 8
FEATURES = np.random.default_rng(3).normal(size=(IMAGES, 2, PREFIX + PATCHES, WIDTH)).astype(np.float16)
SUBSETS = [np.arange(k, IMAGES, 3) for k in range(3)]  # 8, 8 and 7 images
KEYS = submodel_keys(jax.random.key(5), 3)


def training(recipe: str = "dinomaly", steps: int = 20) -> Training:
    model = Dinomaly(2, 2, PATCHES, 0.2, RECIPES[recipe].linear_init)
    return Training(model, RECIPES[recipe], RECIPES[recipe].learning_rate, steps, batch_size=3)


def run(folder, recipe="dinomaly", subsets=SUBSETS, keys=KEYS, devices=3, fetch=FEATURES.__getitem__, digest="images"):
    devices = jax.devices()[:devices]
    return train(training(recipe), fetch, subsets, keys, folder, digest, "test", devices)


def assert_trees_close(one, other, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@pytest.fixture(scope="module", params=RECIPES)
def each_alone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return request.param, [
        run(folder / str(k), request.param, [SUBSETS[k]], KEYS[k : k + 1], devices=1) for k in range(3)
    ]


@pytest.mark.parametrize("devices", (1, 2, 3))
def test_three_together_equal_each_alone_after_twenty_steps(tmp_path, each_alone, devices):
    recipe, alone = each_alone
    together = run(tmp_path, recipe, devices=devices)
    for k in range(3):
        assert_trees_close(jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], together), alone[k], 1e-5)


def test_sub_models_differ_from_one_another(tmp_path):
    kernel = run(tmp_path)["block_0"]["mlp"]["fc1"]["dense"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3 and np.abs(kernel[1] - kernel[2]).max() > 1e-3


def test_a_sub_model_sees_its_own_subset_only(tmp_path):
    spoiled = FEATURES.copy()
    spoiled[SUBSETS[1]] = np.nan  # sub-model 1 alone would notice
    with pytest.raises(UserError, match="sub-model 1 is not finite at step 0"):
        run(tmp_path, fetch=spoiled.__getitem__)


def test_a_last_update_that_is_not_finite_is_not_saved(tmp_path):
    """Each loss is finite, as it is of the parameters before the step."""
    with pytest.raises(UserError, match="parameters are not finite after step 1"):
        short = dataclasses.replace(training(steps=1), learning_rate=float("inf"))
        train(short, FEATURES.__getitem__, SUBSETS, KEYS, tmp_path, "images", "test")
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


def test_steps_in_a_compiled_loop_equal_steps_one_by_one(tmp_path, monkeypatch):
    fused = run(tmp_path / "fused")
    monkeypatch.setattr(llb.train, "CHUNK", 1)
    assert_trees_close(fused, run(tmp_path / "one"), 1e-6)


@pytest.mark.parametrize("resident", (False, True))
@pytest.mark.parametrize("start", (0, 5, 14))
def test_chunks_show_every_step_its_own_batch(monkeypatch, resident, start):
    """Whether features stay on the device or come with the chunk; chunks end at multiples of their length."""
    monkeypatch.setattr(llb.train, "CHUNK", 7)
    monkeypatch.setattr(llb.train, "fits_device", lambda size, placement: resident)
    fetched = []

    def fetch(indices):
        fetched.append(indices.shape)
        return FEATURES[indices]

    chunks, prepare = plan(training(), fetch, SUBSETS, KEYS, place(3, 3), start, FEATURES[0])
    first = {0: [range(7), range(7, 14)], 5: [range(5, 7), range(7, 14)], 14: []}[start]
    assert chunks == [*first, range(14, 20)]
    for steps in chunks:
        rows, positions = map(np.asarray, prepare(steps))
        for place_in_chunk, step in enumerate(steps):
            for k, subset in enumerate(SUBSETS):
                expected = FEATURES[batches(purposes(KEYS[k])[1], subset, 3)(step)]
                np.testing.assert_array_equal(rows[k][positions[k, place_in_chunk]], expected)
    assert fetched == 3 * [(1, 8)] if resident else [(1, 3 * len(steps)) for steps in chunks for _ in range(3)]


def test_a_chunk_of_large_features_is_short(monkeypatch):
    row = FEATURES[0].nbytes
    monkeypatch.setattr(llb.train, "CHUNK_BYTES", {"cpu": 2 * 3 * 3 * row})  # two steps, K = 3, B = 3
    chunks, _ = plan(training(), FEATURES.__getitem__, SUBSETS, KEYS, place(3, 3), 0, FEATURES[0])
    assert {len(steps) for steps in chunks} == {2}


@pytest.mark.parametrize("devices", (1, 3))
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path, monkeypatch, devices):
    whole = run(tmp_path / "whole", devices=devices)
    monkeypatch.setattr(llb.train, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(llb.train, "SAVE_SHARE", 1e9)
    calls = []

    def fetch(indices):
        calls.append(indices)
        if len(calls) == 2 + devices:  # a sample, a chunk of ten steps for each device, and the next chunk
            raise KeyboardInterrupt
        return FEATURES[indices]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", devices=devices, fetch=fetch)
    resumed = []
    params = run(tmp_path / "broken", devices=3, fetch=lambda indices: resumed.append(indices) or FEATURES[indices])
    assert len(resumed) == 1 + 3, "it went on from step 10"
    assert_trees_close(whole, params, 0 if devices == 3 else 1e-5)


def test_a_finished_training_is_read_not_repeated(tmp_path):
    params = run(tmp_path)

    def refuse(indices):
        assert indices.size == 1, "training again"
        return FEATURES[indices]

    assert_trees_close(params, run(tmp_path, fetch=refuse), 0)


def test_a_checkpoint_of_other_images_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="has changed"):
        run(tmp_path, digest="other images")


def test_every_pass_shows_each_image_once_and_passes_differ():
    subset = np.array([4, 8, 15, 16, 23])
    stream = batches(jax.random.key(0), subset, 3)
    seen = np.concatenate([stream(step) for step in range(10)]).reshape(6, 5)  # 30 = six passes of five
    assert (np.sort(seen, axis=1) == subset).all()
    assert len({tuple(row) for row in seen}) > 1
    np.testing.assert_array_equal(stream(7), batches(jax.random.key(0), subset, 3)(7))


def test_a_batch_larger_than_the_subset_is_still_full():
    assert batches(jax.random.key(0), np.arange(2), 5)(0).shape == (5,)


def test_a_batch_shared_out_to_several_devices_trains_the_same_sub_model(tmp_path):
    shared = run(tmp_path / "shared", "dinomaly", SUBSETS[:1], KEYS[:1], devices=3)
    assert dict(place(1, 3, jax.devices()).mesh.shape) == {"model": 1, "data": 3}
    assert_trees_close(shared, run(tmp_path / "alone", "dinomaly", SUBSETS[:1], KEYS[:1], devices=1), 1e-5)


@pytest.mark.parametrize(
    ("submodels", "rows"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4, 0])]
)
def test_any_number_of_sub_models_fits_three_devices(submodels, rows):
    assert place(submodels, 1, jax.devices()).rows.tolist() == rows


@pytest.mark.parametrize("submodels", (1, 4, 5))
def test_scores_of_a_stack_are_those_of_its_members(tmp_path, submodels):
    stack = training().model
    init = jax.vmap(stack.init, in_axes=(0, None))
    params = jax.tree.map(np.asarray, init(submodel_keys(jax.random.key(1), submodels), FEATURES[:1])["params"])
    together = score_all(params, stack, FEATURES.__getitem__, IMAGES, 24, "test")
    assert together.shape == (IMAGES, submodels)
    for k in range(submodels):
        one = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], params)
        alone = score_all(one, stack, FEATURES.__getitem__, IMAGES, 24, "test")
        np.testing.assert_allclose(together[:, k], alone[:, 0], rtol=1e-5)


def test_every_image_is_scored_once_and_the_last_batch_adds_nothing():
    model = training().model
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], model.init(jax.random.key(0), FEATURES[:1])["params"])
    order = np.random.default_rng(0).permutation(IMAGES)
    parts = list(score(params, model, FEATURES.__getitem__, order, 24, "test", with_maps=True))
    positions = np.concatenate([part[0] for part in parts])
    assert positions.tolist() == list(range(IMAGES))
    by_order = np.concatenate([part[1] for part in parts])[:, 0]
    np.testing.assert_allclose(
        by_order, score_all(params, model, FEATURES.__getitem__, IMAGES, 24, "t")[order, 0], rtol=1e-5
    )
    assert np.concatenate([part[2] for part in parts]).shape == (IMAGES, 1, 24, 24)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, as Linux counts it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@pytest.mark.slow  # reads 270 MB of features, since fewer would drown in what JAX itself needs
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted as Linux does")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Features that are read from disk are never held in memory, neither in training nor in scoring."""
    patches, width = 256, 64
    model = Dinomaly(2, 2, patches, 0.2, RECIPES["dinomaly"].linear_init)
    setting = Training(model, RECIPES["dinomaly"], 2e-3, steps=20, batch_size=4)

    def peak(images: int) -> tuple[int, int]:
        file = tmp_path / f"{images}.npy"
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(images, 2, patches, width))
        array, seen = np.load(file, mmap_mode="r"), []

        def fetch(indices):
            seen.append(anonymous_bytes())
            return array[indices]

        folder = tmp_path / f"checkpoints-{images}"
        params = train(setting, fetch, [np.arange(images)], KEYS[:1], folder, "d", "t", jax.devices()[:1])
        score_all(params, model, fetch, images, 16, "t")
        return max(seen), array.nbytes

    peak(40)  # compiles
    (small, _), (large, features) = peak(400), peak(4000)
    assert large - small < features / 4 and large < 1.2 * small
