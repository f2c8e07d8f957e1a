"""CFlow-AD equals an independent PyTorch implementation (tests/reference/cflow_reference.py)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import assert_close, tree_of

from llb.detectors import cflow
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

STORED = dict(np.load(Path(__file__).parent / "reference" / "cflow.npz"))
SPEC = replace(SPECS["tiny"], width=8)
SETUP = Setup(SPEC, (), 16, cflow.Settings(waves=2), learning_rate=1e-2, steps=50, batch_size=3)  # grid 2 × 2


tree = partial(tree_of, STORED)


@partial(jax.jit, static_argnames="setup")
def step(variables, opt, features, key, number, setup=SETUP):
    (loss, (_, changed)), gradients = jax.value_and_grad(
        lambda params: cflow.loss(setup, variables | {"params": params}, features, key, number), has_aux=True
    )(variables["params"])
    updates, opt = cflow.optimizer(setup, 1).update(gradients, opt, variables["params"])
    return variables | changed | {"params": optax.apply_updates(variables["params"], updates)}, opt, loss


def trained(steps):
    variables = {"params": tree("before/"), "fixed": tree("fixed/"), "highest": jnp.zeros(2)}
    opt, losses = cflow.optimizer(SETUP, 1).init(variables["params"]), []
    for number in range(steps):
        variables, opt, loss = step(variables, opt, STORED["features"], jax.random.key(number), number)
        losses.append(loss)
    return variables, losses


def test_the_position_encoding_equals_the_reference():
    encoded = cflow.encoding(3, 5, 32).reshape(3, 5, 128)
    assert_close(encoded, STORED["encoding"].transpose(1, 2, 0), 1e-6)


def test_z_and_log_determinant_after_8_blocks_equal_pytorch_for_an_odd_number_of_channels():
    blocks = (tree("odd/params/"), STORED["odd/fixed"])
    z, log_det = jax.jit(cflow.flow)(blocks, STORED["odd/x"], STORED["odd/condition"])
    assert_close(z, STORED["odd/z"])
    assert_close(log_det, STORED["odd/log_det"])


def test_the_log_determinant_is_that_of_the_jacobian():
    blocks = (tree("before/")["level_0"], STORED["fixed/level_0"])
    x, condition = STORED["odd/x"][:4, :8], STORED["odd/condition"][:4]

    @jax.vmap
    def jacobian(x, condition):
        return jax.jacobian(lambda x: cflow.flow(blocks, x[None], condition[None])[0][0])(x)

    log_det = np.linalg.slogdet(jax.jit(jacobian)(x, condition)).logabsdet
    np.testing.assert_allclose(jax.jit(cflow.flow)(blocks, x, condition)[1], log_det, rtol=1e-4)


def test_on_wide_resnet50_2_as_many_numbers_are_trained_as_published():
    setup = Setup(SPECS["wide_resnet50_2"], cflow.STRIDES, 256, cflow.Settings())
    params = jax.eval_shape(partial(cflow.init, setup), jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 81_647_616


def test_a_new_flow_whose_networks_give_zero_is_a_rotation():
    variables = jax.jit(partial(cflow.init, SETUP))(jax.random.key(0))
    params, fixed = variables["params"]["level_1"], variables["fixed"]["level_1"]
    np.testing.assert_allclose(np.linalg.det(fixed), 1, rtol=1e-5)
    params["last"] = jax.tree.map(jnp.zeros_like, params["last"])
    x = STORED["odd/x"][:, :8]
    z, log_det = jax.jit(cflow.flow)((params, fixed), x, STORED["odd/condition"])
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_losses_and_parameters_of_5_adam_steps_equal_pytorch_with_one_optimiser_per_level():
    variables, losses = trained(5)
    np.testing.assert_allclose(losses, STORED["losses"], rtol=1e-4)
    assert_close(variables["params"], tree("after/"))
    assert_close(variables["fixed"], tree("fixed/"), 0)
    likelihoods = [STORED[f"likelihood/level_{level}"] for level in range(2)]
    highest = np.float32([-1.0, -2.0])
    distance = jax.jit(partial(cflow.distance, SETUP))(variables | {"highest": highest}, STORED["features"])
    shares = [np.minimum(1, np.exp(values - top)) for values, top in zip(likelihoods, highest)]
    # aligned corners: the corners of the image are those of the grid
    assert_close(distance[:, :: SETUP.image_size - 1, :: SETUP.image_size - 1], 2 - sum(shares))


def test_the_rate_equals_the_reference_at_every_step():
    tx, ones = cflow.optimizer(SETUP, 1), jnp.ones(1)

    def one(opt, _):
        updates, opt = tx.update(ones, opt)  # Adam's step at a constant gradient of 1 is the rate
        return opt, -updates[0]

    rates = jax.jit(lambda: jax.lax.scan(one, tx.init(ones), length=50)[1])()
    np.testing.assert_allclose(rates, STORED["rates"], rtol=1e-3, atol=1e-7)


def test_the_highest_likelihood_is_taken_over_the_last_tenth_of_the_steps():
    variables, _ = trained(1)

    @jax.jit
    def highest(before, number):
        given = variables | {"highest": jnp.full(2, before)}
        return cflow.loss(SETUP, given, jnp.asarray(STORED["features"]), jax.random.key(0), number)[1][1]["highest"]

    now = highest(1e3, 0)
    assert (now < 1e3).all()
    np.testing.assert_array_equal(highest(1e3, 45), now)  # the first of them starts it
    np.testing.assert_array_equal(highest(1e3, 46), 1e3)
    np.testing.assert_array_equal(highest(-1e3, 46), now)
