"""The four objectives: which patches are hidden, what the model sees, and which weights the gradient reaches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llb.encoders.stem import ENERGIES
from llb.tiny import objectives
from llb.tiny.objectives import OBJECTIVES, PATCHES, MaskedAutoencoder, Predictor, hide_patches

pytestmark = pytest.mark.slow  # the workshop of `tiny`: compiles many training steps

IMAGES = np.random.default_rng(0).normal(3, 2, (4, PATCHES, ENERGIES)).astype(np.float32)  # energies
KEY = jax.random.key(5)


def init_params(objective: str, key: jax.Array) -> dict:
    """As the objectives' own; one program compiles faster than each of its operations."""
    return jax.jit(objectives.init_params, static_argnums=0)(objective, key)


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    """Half as many blocks, each a quarter as wide, are compiled in half the time."""
    monkeypatch.setattr(objectives, "SPEC", replace(objectives.SPEC, depth=3, width=48, groups=((1,), (2,))))


@pytest.mark.parametrize("objective", ("mae", "teacher", "replaced"))  # the last two contain "energies"
def test_the_gradient_reaches_every_weight_except_fixed_statistics_and_the_teacher(objective):
    params, teacher = (init_params(objective, jax.random.key(seed)) for seed in (0, 1))
    gradient = jax.jit(jax.grad(OBJECTIVES[objective], argnums=(0, 1)))
    of_params, of_teacher = gradient(params, teacher, IMAGES.astype(np.float16), KEY)
    for name, leaf in flatten_dict(of_params, sep="/").items():
        unused = name in ("vit/stem/mean", "vit/stem/std") or (objective == "mae" and name == "vit/mask_token")
        assert np.isfinite(leaf).all() and np.asarray(leaf).any() != unused, name
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_teacher))


def test_the_error_counts_hidden_patches_five_times_as_much():
    params = init_params("energies", jax.random.key(0))
    params["vit"]["stem"] |= {"mean": jnp.full(ENERGIES, 3.0), "std": jnp.full(ENERGIES, 2.0)}
    hidden = np.asarray(hide_patches(KEY, len(IMAGES)))
    predicted = np.asarray(jax.jit(Predictor().apply)({"params": params}, IMAGES, hidden))
    error = np.abs(predicted - (IMAGES - 3) / 2)
    huber = np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=-1)
    expected = sum(huber[hidden]) / hidden.size + 0.2 * sum(huber[~hidden]) / hidden.size
    assert jax.jit(objectives.energies_loss)(params, {}, IMAGES, KEY) == pytest.approx(expected, rel=1e-4)


def test_the_prediction_does_not_depend_on_hidden_patches():
    visible = np.sort(np.random.default_rng(1).permutation(PATCHES)[:80])
    hidden = np.ones((len(IMAGES), PATCHES), bool)
    hidden[:, visible] = False
    changed = np.where(hidden[..., None], 100.0, IMAGES)
    rows = np.tile(visible, (len(IMAGES), 1))
    for objective, model, where in (("energies", Predictor(), hidden), ("mae", MaskedAutoencoder(), rows)):
        params = init_params(objective, jax.random.key(0))
        apply = jax.jit(model.apply)
        predictions = [apply({"params": params}, energies, where) for energies in (IMAGES, changed)]
        np.testing.assert_allclose(*predictions, atol=1e-5, err_msg=objective)


def test_a_fifth_to_three_fifths_of_the_patches_are_hidden_half_of_the_time_in_regions():
    hidden = np.asarray(hide_patches(jax.random.key(0), 400))
    share = hidden.mean(axis=1)
    assert 0.2 <= share.min() < 0.25 and 0.55 < share.max() <= 0.605
    square = hidden.reshape(-1, 14, 14)  # in a region the right neighbour of a hidden patch is mostly hidden, too
    together = (square[:, :, 1:] & square[:, :, :-1]).sum(axis=(1, 2)) / square[:, :, :-1].sum(axis=(1, 2))
    assert 0.4 < np.mean(together > share + 0.15) < 0.6
