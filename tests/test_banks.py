"""PatchCore, SoftPatch and mutual scoring equal PyTorch's and scikit-learn's arithmetic (banks_reference.py)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb.detectors import banks, mutual, patchcore, softpatch
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

with np.load(Path(__file__).parent / "reference" / "banks.npz") as file:
    STORED = {name: jnp.asarray(values) for name, values in file.items()}
MODULES = [patchcore, softpatch, mutual]
IMAGES = 7  # of the small trials; the last batch is filled up to 8
RANDOM = np.random.default_rng(0)
FEATURES = (RANDOM.normal(size=(1, 2, 17, 8)) + 0.5 * RANDOM.normal(size=(IMAGES, 2, 17, 8))).astype(np.float16)


def setup_of(module, width=8, image_size=32, **settings):
    if module is softpatch:
        settings = {"lof_neighbours": 3} | settings  # of 7 images
    return Setup(replace(SPECS["tiny"], width=width), (), image_size, module.Settings(**settings))


@partial(jax.jit, static_argnames=("module", "setup"))
def fit(module, setup, features, weight, key):
    """As llb.fit does it: in batches of 4, the last one filled up with garbage of weight 0."""
    count, first_and_last = len(features), jax.random.split(key)
    weight = jnp.pad(weight, (0, -count % 4))
    features = jnp.pad(features, ((0, -count % 4), (0, 0), (0, 0), (0, 0)), constant_values=50)
    state = module.start(setup, first_and_last[0], len(features))
    for place in range(0, count, 4):
        batch = slice(place, place + 4)
        state = module.add(setup, state, features[batch], weight[batch], jnp.int32(place))
    return module.finish(setup, state, first_and_last[1])


@partial(jax.jit, static_argnames=("module", "setup"))
def distance(module, setup, params, features=FEATURES):
    return module.distance(setup, params, jnp.asarray(features))


ALL, KEY = np.ones(IMAGES, np.float32), jax.random.key(0)


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- against the reference ----


def test_the_embedding_is_unfold_and_adaptive_pooling():
    setup = Setup(SPECS["wide_resnet50_2"], patchcore.STRIDES, 32, patchcore.Settings())
    rows = [STORED[name][0].transpose(1, 2, 0).ravel() for name in ("fine", "coarse")]
    embedded = jax.jit(partial(banks.embedding, setup))(jnp.concatenate(rows)[None])[0]
    assert embedded.shape == banks.patch_shape(setup) == (16, 1024)
    assert_close(embedded[:, STORED["columns"]], STORED["embedded"])


@pytest.mark.parametrize("together", [7, 256])
def test_the_coreset_is_chosen_as_by_one_pass_for_each_choice(together, monkeypatch):
    monkeypatch.setattr(patchcore, "TOGETHER", together)
    rows, starts = STORED["rows"], STORED["starts"]
    allowed = np.ones(900, bool)
    chosen, used = patchcore.coreset(rows.reshape(9, 100, 8), allowed, starts, jnp.int32(450), 500)
    assert (chosen[:450] == STORED["chosen"]).all() and used.sum() == 450 and used[:450].all()


def test_chosen_values_never_rise_and_only_allowed_patches_are_chosen():
    rows, allowed = STORED["rows"], np.arange(900) % 3 > 0
    chosen, used = patchcore.coreset(rows.reshape(9, 100, 8), allowed, STORED["starts"], jnp.int32(700), 700)
    chosen = np.asarray(chosen)[used]
    assert len(chosen) == len(set(chosen)) == 600 and allowed[chosen].all()  # 700 are wanted, 600 are there
    value = np.linalg.norm(rows[:, None] - rows[STORED["starts"]], axis=2).mean(axis=1)
    values = []
    for row in chosen:
        values.append(value[row])
        value = np.minimum(value, np.linalg.norm(rows - rows[row], axis=1))
    assert (np.diff(values) <= 1e-5).all()


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("block", [32, 2048])
def test_the_search_finds_the_nearest_entries_that_are_used(neighbours, block, monkeypatch):
    monkeypatch.setattr(banks, "BLOCK", block)
    unused = np.repeat(STORED["queries"][:1], 5, axis=0)
    entries = np.concatenate([unused, STORED["entries"]])
    norms = np.where(np.arange(75) < 5, np.inf, (entries**2).sum(axis=1))
    squared, numbers = banks.nearest(STORED["queries"], entries, norms, neighbours)
    assert_close(squared, STORED["nearest"][:, :neighbours])
    assert (numbers - 5 == STORED["number"][:, :neighbours]).all()


@pytest.mark.parametrize("neighbours", [5, 6])
def test_the_outlier_factor_is_that_of_scikit_learn(neighbours):
    cloud, there = np.insert(STORED["cloud"], 20, 0.0, axis=0), np.arange(61) != 20  # one place is empty
    factor = jax.jit(softpatch.outlier_factor, static_argnums=3)(cloud, there, jnp.arange(61), neighbours)
    assert_close(factor[there], STORED[f"lof{neighbours}"], 1e-4)


def test_fewer_entries_than_neighbours_count_once():
    queries, entries = STORED["queries"], STORED["entries"][:4]
    norms = np.array([1.0, 1.0, np.inf, np.inf]) * (entries**2).sum(axis=1)
    squared, _ = banks.nearest(queries, entries, norms, 3)
    expected = np.sort(((queries[:, None] - entries[:2]) ** 2).sum(axis=2), axis=1)
    assert_close(squared[:, :2], expected)
    assert np.isinf(squared[:, 2]).all()
    setup = setup_of(patchcore, neighbours=3)
    bank = fit(patchcore, setup, FEATURES[:1], jnp.ones(1), KEY)  # one image: a bank of one patch or two
    assert np.isfinite(distance(patchcore, setup, bank)).all()


def test_few_images_are_judged_by_those_that_are_there_and_one_alone_by_none():
    cloud, there = STORED["cloud"][:8], np.arange(8) < 4
    few = softpatch.outlier_factor(cloud, there, jnp.arange(8), 6)[:4]
    assert_close(few, softpatch.outlier_factor(cloud[:4], there[:4], jnp.arange(4), 3), 1e-5)
    assert softpatch.outlier_factor(cloud, np.arange(8) < 1, jnp.arange(8), 6)[0] == 1
    setup = setup_of(mutual)
    alone = distance(mutual, setup, fit(mutual, setup, FEATURES[:1], jnp.ones(1), KEY))
    assert (alone[0] == 0).all() and np.isfinite(alone).all() and (alone[1:] > 0).any()


def test_mutual_scores_are_those_of_every_image_against_all_others():
    images = STORED["images"]
    setup = setup_of(mutual, 6, 24, sides="1+3+5")
    scores = distance(mutual, setup, fit(mutual, setup, images, jnp.ones(11), KEY), images)
    assert_close(scores.reshape(11, 9), STORED["mutual"], 1e-3)  # the references are float16


# ---- what a weight of 0, the stream and K change: nothing ----


@pytest.mark.parametrize("module", MODULES)
def test_an_image_of_weight_0_changes_nothing(module):
    setup, weight = setup_of(module), (np.arange(IMAGES) != 2).astype(np.float32)
    other = np.where(weight[:, None, None, None] > 0, FEATURES, np.float16(-9))
    one, two = (fit(module, setup, features, weight, KEY) for features in (FEATURES, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.isfinite(distance(module, setup, one)).all()
    used = one["there"] if module is mutual else np.isfinite(one["norms"])
    assert used.sum() == (6 if module is mutual else int(6 * 16 * 0.1))


# ---- what the detectors are for ----


def test_a_bank_scores_what_it_holds_with_zero():
    setup = setup_of(patchcore)
    params = fit(patchcore, setup, FEATURES, ALL, KEY)
    scores = np.sort(distance(patchcore, setup, params), axis=None)
    held = int(IMAGES * 16 * 0.1)
    assert np.isfinite(params["norms"]).sum() == held
    assert scores[held - 1] < 1e-5 * scores[held]


def test_settings_bound_the_bank_and_the_references_and_say_how_many_neighbours_count(monkeypatch):
    setup, asked = setup_of(patchcore, fraction=0.5, most=9, neighbours=3), []
    params = fit(patchcore, setup, FEATURES, ALL, KEY)
    assert params["entries"].shape == (9, 16) and np.isfinite(params["norms"]).all()
    patches = np.asarray(banks.embedding(setup, jnp.asarray(FEATURES))).reshape(-1, 16)
    squared = ((patches[:, None] - np.asarray(params["entries"])) ** 2).sum(axis=2)
    assert_close(distance(patchcore, setup, params).ravel(), np.sort(squared, axis=1)[:, :3].mean(axis=1))

    def outlier_factor(patches, real, others, neighbours, whole=softpatch.outlier_factor):
        asked.append((others.shape, neighbours))
        return whole(patches, real, others, neighbours)

    monkeypatch.setattr(softpatch, "outlier_factor", outlier_factor)
    fit(softpatch, setup_of(softpatch, references=4, lof_neighbours=2), FEATURES, ALL, KEY)
    assert set(asked) == {((4,), 2)}


def test_a_planted_outlier_is_in_the_bank_of_patchcore_and_not_of_softpatch():
    features = FEATURES.copy()
    features[3, :, -8:] += 30  # half of one image's patches, 7 % of all
    planted, defect = [], []
    for module in (patchcore, softpatch):
        setup = setup_of(module)
        params = fit(module, setup, features, ALL, KEY)
        entries = np.asarray(params["entries"])[np.isfinite(params["norms"])]
        planted.append((entries.mean(axis=1) > 5).any())
        defect.append(distance(module, setup, params, features)[3].max())
    assert planted == [True, False]
    assert defect[1] > 10 * defect[0]


def test_softpatch_multiplies_the_distance_by_the_factor_of_the_nearest_entry():
    setup = setup_of(softpatch)
    params = fit(softpatch, setup, FEATURES, ALL, KEY)
    used = np.isfinite(params["norms"])
    entries, factors = np.asarray(params["entries"])[used], np.asarray(params["factors"])[used]
    patches = np.asarray(banks.embedding(setup, jnp.asarray(FEATURES))).reshape(-1, 16)
    squared = ((patches[:, None] - entries) ** 2).sum(axis=2)
    expected = squared.min(axis=1) * factors[squared.argmin(axis=1)]
    assert_close(distance(softpatch, setup, params).ravel(), expected)
    assert np.ptp(factors) > 0.01


def test_the_references_are_distinct_images_and_a_copy_of_an_image_is_not_its_reference():
    setup = setup_of(mutual, references=4, share=1.0)
    state = mutual.start(setup, KEY, IMAGES)
    state = jax.jit(partial(mutual.add, setup))(state, FEATURES, ALL, 0)
    smallest = np.argsort(state["numbers"][:IMAGES])[:4]
    kept = np.asarray(state["kept"][0]).reshape(4, -1)
    assert {row.tobytes() for row in kept} == {FEATURES[image, 0, -16:].tobytes() for image in smallest}
    params = jax.jit(partial(mutual.finish, setup))(state, KEY)
    for image in smallest:
        place = int((kept == FEATURES[image, 0, -16:].ravel()).all(axis=1).argmax())
        without = params | {"there": params["there"].at[place].set(False)}
        scored = [distance(mutual, setup, there)[image] for there in (params, without)]
        np.testing.assert_array_equal(*scored)
        assert (scored[0] > 0).all()
