"""SimpleNet equals an independent PyTorch implementation (tests/reference/simplenet_reference.py)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from helpers import assert_close, tree_of

from llb.detectors import simplenet
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

STORED = dict(np.load(Path(__file__).parent / "reference" / "simplenet.npz"))
SPEC = replace(SPECS["tiny"], width=12)  # joined: 24, as wide as the reference
SETUP = Setup(SPEC, (), 32, simplenet.Settings(hidden=16), learning_rate=2e-2, steps=20, batch_size=2)
EMBEDDED = STORED["embedding"].reshape(-1, 24)


tree = partial(tree_of, STORED)


def start(key):
    variables = simplenet.init(SETUP, key)
    return variables, simplenet.optimizer(SETUP, 1).init(variables["params"])


def step(variables, opt, compute):
    """One step of the optimiser; compute: variables → loss, (each, changed collections)."""
    (loss, (_, changed)), gradients = jax.value_and_grad(
        lambda params: compute(variables | {"params": params}), has_aux=True
    )(variables["params"])
    updates, opt = simplenet.optimizer(SETUP, 1).update(gradients, opt, variables["params"])
    return variables | changed | {"params": optax.apply_updates(variables["params"], updates)}, opt, loss


def test_means_before_upsampling_equal_the_released_embedding_by_unfolding_and_adaptive_pooling():
    assert_close(jax.jit(simplenet.embedding)((STORED["fine"], STORED["coarse"])), STORED["embedding"], 1e-6)


def test_on_a_vit_the_embedding_is_the_mean_over_3_by_3_patches_of_each_group():
    maps = np.random.default_rng(0).normal(size=(2, 1, 3, 3, 4)).astype(np.float32)
    x = np.asarray(jax.jit(simplenet.embedding)(tuple(maps)))
    np.testing.assert_allclose(x[0, 1, 1], maps.mean(axis=(2, 3)).ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x[0, 0, 0], maps[:, :, :2, :2].sum(axis=(2, 3)).ravel() / 9, rtol=1e-5, atol=1e-6)


def test_the_distance_is_minus_the_discriminators_output_with_running_statistics():
    # a ViT's maps whose 3 × 3 mean is known: one position, so the mean is a ninth
    setup = replace(SETUP, image_size=8)
    features = (9 * EMBEDDED.reshape(-1, 2, 1, 12)).astype(np.float16)
    expected = -STORED["scores_running"].reshape(-1, 1, 1)
    distance = jax.jit(partial(simplenet.distance, setup))(tree("before/"), features)
    np.testing.assert_allclose(distance, expected, rtol=0, atol=2e-3 * np.abs(expected).max())  # float16 features


def test_training_mode_normalises_true_and_noisy_features_as_one_batch():
    variables = tree("before/")
    q = EMBEDDED @ variables["params"]["adaptor"]["kernel"]
    model = simplenet.Discriminator(16, "float32")
    collections = {"params": variables["params"]["discriminator"], "batch_stats": variables["batch_stats"]}
    apply = jax.jit(partial(model.apply, train=True, mutable="batch_stats"))
    scores, _ = apply(collections, np.concatenate([q, q + STORED["noise"][0]]))
    assert_close(scores, STORED["scores_batch"])


def test_scores_in_bfloat16_are_not_rounded_to_it_so_that_few_are_equal():
    q = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)
    model = simplenet.Discriminator(16, "bfloat16")
    scores = jax.jit(model.apply)(model.init(jax.random.key(0), q), q)
    assert len(np.unique(scores)) > 195


def test_three_steps_with_given_noise_equal_pytorchs_two_optimisers_and_running_statistics():
    variables = tree("before/")
    opt = simplenet.optimizer(SETUP, 1).init(variables["params"])
    given = jax.jit(lambda v, opt, noise: step(v, opt, lambda v: simplenet.margin_loss(SETUP, v, EMBEDDED, noise)))
    for noise, expected in zip(STORED["noise"], STORED["losses"]):
        variables, opt, loss = given(variables, opt, noise)
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_close(variables, tree("after/"))


def test_without_noise_the_loss_is_at_least_1_whatever_the_weights():
    features = np.random.default_rng(1).normal(size=(2, 2, 16, 12)).astype(np.float16)
    setup = replace(SETUP, settings=simplenet.Settings(noise=0.0))

    def loss(key):
        return simplenet.loss(setup, simplenet.init(setup, key), features, key, 0)[0]

    assert jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(0), 5)).min() >= 1 - 1e-6


def test_on_wide_resnet50_2_sizes_and_noise_are_the_published_ones():
    setup = Setup(SPECS["wide_resnet50_2"], simplenet.STRIDES, 32, simplenet.Settings())
    shapes = jax.eval_shape(partial(simplenet.init, setup), jax.random.key(0))["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert counts == {"adaptor": 2_360_832 - 1536, "discriminator": 1_576_960 - 1024}  # without biases
    assert simplenet.noise_deviation(setup, EMBEDDED) == 0.015


def test_on_other_encoders_the_noise_is_a_tenth_of_the_embeddings_standard_deviation():
    x = 5 + 3 * np.random.default_rng(0).normal(size=(4000, 24)).astype(np.float32)
    setup = replace(SETUP, settings=simplenet.Settings())
    np.testing.assert_allclose(simplenet.noise_deviation(setup, x), 0.3, rtol=0.01)
