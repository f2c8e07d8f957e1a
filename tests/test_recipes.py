"""Both optimisers equal PyTorch over 40 steps, and treat each sub-model of a stack as if it were the only one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llb.detectors.recipes import RECIPES, hard_positions, make_optimizer, warmup_cosine

STORED = dict(np.load(Path(__file__).parent / "reference" / "optimizer.npz"))
START = {"a": STORED["start_0"], "b": STORED["start_1"]}
GRADIENTS = {"a": STORED["gradients_0"], "b": STORED["gradients_1"]}  # (40, …)


def path_of(recipe: str) -> np.ndarray:
    optimizer = make_optimizer(RECIPES[recipe], RECIPES[recipe].learning_rate, 40, 7)

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate([params["a"].ravel(), params["b"]])

    return jax.lax.scan(step, (START, optimizer.init(START)), GRADIENTS)[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_forty_steps_equal_pytorch(recipe):
    np.testing.assert_allclose(path_of(recipe), STORED[f"{recipe}/path"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_huge_gradient_in_one_sub_model_does_not_touch_the_others(recipe):
    optimizer = make_optimizer(RECIPES[recipe], 1e-3, 40, 7)
    params = {"w": jnp.ones((3, 4))}
    gradients = {"w": jnp.full((3, 4), 0.01).at[2].set(1e6)}
    state, update = jax.vmap(optimizer.init)(params), jax.jit(jax.vmap(optimizer.update))
    alone_params, alone_gradients = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (params, gradients))
    alone_state, update_alone = optimizer.init(alone_params), jax.jit(optimizer.update)
    for _ in range(3):
        together, state = update(gradients, state, params)
        alone, alone_state = update_alone(alone_gradients, alone_state, alone_params)
    np.testing.assert_allclose(together["w"][0], alone["w"], rtol=1e-6)


def test_the_dinomaly_schedule_rises_then_falls_to_a_tenth():
    schedule = warmup_cosine(2e-3, 2e-4, 100, 5000)
    rates = np.array([schedule(step) for step in (0, 50, 99, 100, 2550, 5000)])
    np.testing.assert_allclose(rates, [0, 2e-3 * 50 / 99, 2e-3, 2e-3, 1.1e-3, 2e-4], rtol=1e-4)


def test_hard_mining_counts_are_those_of_exact_arithmetic():
    assert hard_positions(RECIPES["llbnad"], 0, 1000) == 100  # in doubles 1000 · (1 − 0.9) is 99.99…
    assert hard_positions(RECIPES["llbnad"], 0, 12544) == 1254
    assert hard_positions(RECIPES["dinomaly"], 0, 12544) == 12544
    assert hard_positions(RECIPES["dinomaly"], 500, 1000) == 550
    assert hard_positions(RECIPES["dinomaly"], 4000, 1000) == 100
    assert hard_positions(RECIPES["llbnad"], 0, 4) == 1
