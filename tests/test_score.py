"""Every image is scored once by every sub-model, and nothing depends on stacks, devices, batches or the data's size."""

import jax
import numpy as np
import pytest
from helpers import small_setup

from llb.detectors import dinomaly
from llb.features import Features
from llb.score import heat_maps, score, score_all
from llb.train import submodel_keys

IMAGES, SIDE = 23, 24
FEATURES = np.random.default_rng(3).normal(size=(IMAGES, 2, 11, 8)).astype(np.float16)
SETUP, GIVEN = small_setup("dinomaly"), Features(FEATURES.__getitem__, FEATURES.shape[1:])


def params_of(submodels: int):
    params = jax.jit(jax.vmap(lambda key: dinomaly.init(SETUP, key)))(submodel_keys(jax.random.key(1), submodels))
    return jax.tree.map(np.asarray, params)


def scores_of(params) -> np.ndarray:
    return score_all(params, SETUP, GIVEN, IMAGES, "test")


@pytest.mark.slow
def test_scores_of_a_stack_on_three_devices_are_those_of_its_members_on_one(monkeypatch):
    params = params_of(5)
    assert len(jax.local_devices()) == 3
    together = scores_of(params)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    for k in range(5):
        alone = scores_of(jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], params))
        np.testing.assert_allclose(together[:, k], alone[:, 0], rtol=1e-5)


def test_every_image_is_scored_once_and_the_last_batch_adds_nothing():
    params, order = params_of(5), np.random.default_rng(0).permutation(IMAGES)
    batches = list(score(params, SETUP, GIVEN, order, "test", with_maps=True))
    positions, scores, maps = (np.concatenate(parts) for parts in zip(*batches))
    assert positions.tolist() == list(range(IMAGES))
    np.testing.assert_allclose(scores, scores_of(params)[order], rtol=1e-5)
    assert maps.shape == (IMAGES, 5, SIDE, SIDE)
    highest = np.sort(maps.reshape(IMAGES, 5, -1))[..., -int(SIDE**2 * 0.01) :]
    np.testing.assert_allclose(scores, highest.mean(axis=-1), rtol=1e-5)
    shown = dict(heat_maps(params, SETUP, GIVEN, order[[5, 2]], "test"))
    assert list(shown) == order[[5, 2]].tolist()
    np.testing.assert_allclose(shown[order[2]], maps[2].mean(axis=0), rtol=1e-5)


def test_scoring_holds_the_features_of_a_few_batches_only():
    held = []

    def fetch(indices):
        held.append(sum(array.shape == (18, *FEATURES.shape[1:]) for array in jax.live_arrays()))
        return FEATURES[indices % IMAGES]

    score_all(params_of(5), SETUP, Features(fetch, GIVEN.shape), 40 * 18, "test")
    assert len(held) == 40 and 0 < max(held) <= 5
