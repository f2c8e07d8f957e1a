"""The four objectives: what each may see, what it is asked, and what its gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llb.objectives
from llb.objectives import OBJECTIVES, PATCHES, MaskedAutoencoder, Predictor, energies_loss, hide, init, replace
from llb.stem import ENERGIES

KNOWN = np.random.default_rng(0).normal(3, 2, (4, PATCHES, ENERGIES)).astype(np.float32)
KEY = jax.random.key(5)


def gradients(objective: str) -> dict[str, np.ndarray]:
    params = init(objective, jax.random.key(0))
    teacher = init(objective, jax.random.key(1)) if objective == "teacher" else {}
    found = jax.jit(jax.grad(OBJECTIVES[objective]))(params, teacher, KNOWN.astype(np.float16), KEY)
    return flatten_dict(jax.tree.map(np.asarray, found), sep="/")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_reaches_every_weight_of_the_encoder_but_the_stems_statistics(objective):
    for name, gradient in gradients(objective).items():
        unused = name in ("vit/stem/mean", "vit/stem/std") or (objective == "mae" and name == "vit/mask_token")
        assert np.isfinite(gradient).all()
        assert gradient.any() != unused, name


def test_the_teacher_gets_no_gradient():
    params, teacher = (init("teacher", jax.random.key(seed)) for seed in (0, 1))
    gradient = jax.jit(jax.grad(OBJECTIVES["teacher"], argnums=1))(params, teacher, KNOWN, KEY)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_the_error_counts_hidden_patches_five_times_as_much():
    params = init("energies", jax.random.key(0))
    params["vit"]["stem"] |= {"mean": jnp.full(ENERGIES, 3.0), "std": jnp.full(ENERGIES, 2.0)}
    hidden = np.asarray(hide(KEY, len(KNOWN)))
    predicted = np.asarray(Predictor().apply({"params": params}, KNOWN, hidden))
    error = np.abs(predicted - (KNOWN - 3) / 2)
    huber = np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=-1)
    expected = sum(huber[hidden]) / hidden.size + 0.2 * sum(huber[~hidden]) / hidden.size
    assert energies_loss(params, {}, KNOWN, KEY) == pytest.approx(expected, rel=1e-4)


def test_what_is_hidden_does_not_leak_into_the_prediction():
    hidden = np.asarray(hide(KEY, len(KNOWN)))
    changed = np.where(hidden[..., None], 100.0, KNOWN)
    params = init("energies", jax.random.key(0))
    predict = jax.jit(lambda known: Predictor().apply({"params": params}, known, hidden))
    np.testing.assert_allclose(predict(KNOWN), predict(changed), atol=1e-5)

    visible = np.sort(np.random.default_rng(1).permutation(PATCHES)[:80])
    changed = np.full_like(KNOWN, 100.0)
    changed[:, visible] = KNOWN[:, visible]
    params = init("mae", jax.random.key(0))
    predict = jax.jit(lambda known: MaskedAutoencoder().apply({"params": params}, known, np.tile(visible, (4, 1))))
    np.testing.assert_allclose(predict(KNOWN), predict(changed), atol=1e-5)


@pytest.mark.parametrize("images", (1, 8))
def test_replaced_patches_come_from_elsewhere_and_the_others_stay(images):
    known = np.arange(images * PATCHES, dtype=np.float32).reshape(images, PATCHES, 1)  # each patch's number: its origin
    for seed in range(5):
        mixed, replaced = map(np.asarray, replace(jax.random.key(seed), known))
        assert (mixed[~replaced] == known[~replaced]).all() and (mixed[replaced] != known[replaced]).all()
        assert images == 1 or 0.05 < replaced.mean() < 0.3  # the share is drawn for each image
        for image in range(images):
            origins = mixed[image, replaced[image], 0] // PATCHES
            assert set(origins) <= {image} or set(origins) <= {(image - 1) % images}


def test_normalised_targets_have_unit_variance_over_each_image():
    tokens = np.random.default_rng(0).normal(4, 3, (2, PATCHES, 8)).astype(np.float32)
    unit = np.asarray(llb.objectives._unit(tokens))
    np.testing.assert_allclose(unit.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(unit.var(axis=1), 1, atol=1e-3)
