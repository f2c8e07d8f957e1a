"""DeSTSeg equals a small PyTorch model (tests/reference/destseg_reference.py), and paints sensible damage."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference.drawn import draw

from llb.detectors import destseg, layers
from llb.detectors.common import SCORES, Setup, anomaly_map
from llb.detectors.damage import damage
from llb.encoders import parameter_shapes
from llb.encoders.specs import SPECS, CnnSpec
from llb.files import UserError

STORED = dict(np.load(Path(__file__).parent / "reference" / "destseg.npz"))
SMALL = CnnSpec(name="small", block="basic", stem=4, layers=((1, 4, 3, 1), (1, 8, 3, 2), (1, 16, 3, 2)))
CNN = {"strides": destseg.STRIDES, "settings": destseg.Settings(width=4, student_share=0.5)}
STEPS = {"learning_rate": 0.001, "steps": 4, "batch_size": 3}


class Given(Setup):
    """The teacher's maps are given in place of the encoder's parameters."""

    def encode(self, params, images):
        return params


SETUP = Given(SMALL, image_size=40, **CNN, **STEPS)
TEACHERS = [tuple(STORED[f"teacher_{phase}_{level}"] for level in range(3)) for phase in (0, 1)]


def leaves(variables: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}


@pytest.fixture(scope="module")
def variables() -> dict:
    shapes = flatten_dict(jax.eval_shape(partial(destseg.init, SETUP), jax.random.key(0)), sep="/")
    return unflatten_dict({name: draw(name, leaf.shape) for name, leaf in shapes.items()}, sep="/")


@pytest.fixture(scope="module")
def trained(variables) -> tuple[list[dict], np.ndarray, str]:
    """Three stacked sub-models, the first with the reference's weights, the others with other ones: their variables
    before and after each of 4 steps on given images, the losses, and the program's text."""

    def one(variables: dict, opt, images, teacher, step):
        def loss_of(params: dict):
            return destseg.loss(SETUP, variables | {"params": params}, (images, teacher), jax.random.key(0), step)

        (loss, (_, changed)), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, opt = destseg.optimizer(SETUP, 1).update(gradients, opt, variables["params"])
        return variables | changed | {"params": optax.apply_updates(variables["params"], updates)}, opt, loss

    factors = np.array([1, 0.9, 0.7], np.float32)
    state = jax.tree.map(lambda x: np.stack([x * factor for factor in factors]), variables)
    images = np.stack([STORED["images"]] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destseg, "RES_RATE", 30)
        patch.setattr(destseg, "HEAD_RATE", 40)
        patch.setattr(destseg, "damage", lambda key, images, share: (images, STORED["masks"]))
        opt = jax.vmap(destseg.optimizer(SETUP, 1).init)(state["params"])
        steps = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)))
        lowered = steps.lower(state, opt, images, TEACHERS[0], np.int32(0))
    compiled, states, losses = lowered.compile(), [state], []
    for step in range(4):
        state, opt, loss = compiled(state, opt, images, TEACHERS[step // 2], np.int32(step))
        states.append(state)
        losses.append(np.asarray(loss))
    return states, np.stack(losses), lowered.as_text()


def assert_close(actual, expected, tolerance=1e-4, name=""):
    """To a part of the largest value."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def test_student_segmentation_and_top_100_score_equal_pytorch(variables):
    seen = destseg.normalise(STORED["images"].astype(np.float32) / 255)

    @jax.jit
    def outputs(variables):
        distance = destseg.distance(SETUP, variables, (STORED["images"], TEACHERS[1]))
        maps = anomaly_map(distance, 40, destseg.MAP)
        return destseg.apply(SETUP, variables, "student", seen)[0], distance, SCORES[destseg.SCORE](distance, maps)

    student, distance, score = outputs(variables)
    for level in range(3):
        assert_close(student[level], STORED[f"student_{level}"])
    assert_close(distance, STORED["distance"])
    assert_close(score, STORED["top-100"])


@pytest.mark.slow
def test_losses_and_trained_numbers_of_two_steps_of_each_phase_equal_pytorch(trained):
    states, losses, _ = trained
    assert_close(losses[:, 0], STORED["losses"], 1e-3)
    for step in (2, 4):
        now, prefix = leaves(states[step]), f"after_{step}/"
        expected = {name.removeprefix(prefix): x for name, x in STORED.items() if name.startswith(prefix)}
        assert len(expected) > 40
        for name, value in expected.items():
            assert_close(
                now[name][0].ravel()[:: max(1, now[name][0].size // 64)], value, 1e-3, name
            )  # in float64 they agree to 4e-5


@pytest.mark.slow
def test_each_phase_leaves_the_other_part_and_its_batch_statistics_as_they_are(trained):
    start, middle, end = (leaves(trained[0][step]) for step in (0, 2, 4))
    for name in start:
        student = name.split("/")[1] == "student"
        assert np.array_equal(start[name], middle[name]) != student, name
        assert np.array_equal(middle[name], end[name]) == student, name


@pytest.mark.slow
def test_under_vmap_a_step_computes_one_phase_only(trained):
    assert trained[2].count("stablehlo.case") == 2  # forward and backward


def test_products_of_equal_maps_sum_to_minus_one():
    maps = destseg.unit(TEACHERS[0])
    joined = np.asarray(destseg.products(maps, maps))
    for part in np.split(joined, np.cumsum([4, 8]), axis=-1):
        np.testing.assert_allclose(part.sum(axis=-1), -1, rtol=1e-5)


def test_for_resnet18_at_256_pixels_there_are_as_many_parameters_as_published():
    setup = Setup(SPECS["resnet18"], destseg.STRIDES, 256, destseg.Settings())
    params = jax.eval_shape(partial(destseg.init, setup), jax.random.key(0))["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}
    assert counts["student"] == 24_665_024 and counts["res"] + counts["head"] == 7_706_369


def test_all_biases_start_at_zero_but_the_last_layers_which_is_drawn():
    params = flatten_dict(jax.jit(partial(destseg.init, SETUP))(jax.random.key(0))["params"], sep="/")
    drawn = {name for name, leaf in params.items() if name.endswith("bias") and leaf.any()}
    assert drawn == {"head/logit/bias"} and np.abs(params["head/logit/bias"]) <= 16**-0.5


def test_in_bfloat16_what_is_compared_with_the_teachers_maps_is_not_rounded():
    grids = tuple(one.shape[1:] for one in TEACHERS[0])
    student, images = destseg.Student(4, grids, True, "bfloat16"), STORED["images"][:1]
    maps, _ = jax.jit(lambda: student.init_with_output(jax.random.key(0), images, False))()
    for one in maps:
        assert one.dtype == jnp.float32 and (one != one.astype(jnp.bfloat16)).mean() > 0.5


def test_one_image_a_step_has_no_variance_and_is_refused():
    with pytest.raises(UserError, match="^--batch-size 1: "):
        destseg.loss(replace(SETUP, batch_size=1), {}, (), jax.random.key(0), jnp.int32(0))
    jax.eval_shape(partial(destseg.init, replace(SETUP, batch_size=1)), jax.random.key(0))  # an old one may be scored


def test_the_rates_are_those_published_each_in_its_phase():
    setup = Setup(SMALL, image_size=40, **CNN, learning_rate=destseg.LEARNING_RATE, steps=2, batch_size=2)
    params = {part: {"kernel": jnp.ones(1)} for part in ("student", "res", "head")}
    optimizer = destseg.optimizer(setup, 1)
    update, opt = jax.jit(optimizer.update), optimizer.init(params)
    for expected in ([-0.4, 0, 0], [0, -0.1, -0.01]):
        updates, opt = update(params, opt, params)
        moved = [updates[part]["kernel"][0] for part in ("student", "res", "head")]
        np.testing.assert_allclose(moved, np.multiply(expected, 1.0001), rtol=1e-5)  # with the decay


@pytest.mark.parametrize("name, side, grid", [("tiny", 120, 15), ("efficientnet_lite0", 72, 18)])
def test_other_encoders_give_one_distance_for_each_position_of_their_finest_map(name, side, grid):
    setup = Setup(SPECS[name], destseg.STRIDES, side, destseg.Settings(width=2), **STEPS)

    def both(key, images, frozen):
        variables = destseg.init(setup, key)
        features = (images, frozen)
        return destseg.distance(setup, variables, features), destseg.loss(setup, variables, features, key, 3)[0]

    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.uint8)
    distance, loss = jax.eval_shape(both, jax.random.key(0), images, parameter_shapes(SPECS[name]))
    assert distance.shape == (2, grid, grid) and loss.shape == ()


@pytest.mark.parametrize("size, stride, dilation", [(3, 2, 1), (7, 2, 1), (3, 1, 6)])
def test_convolutions_as_matrix_products_and_their_gradients_equal_jax_own(size, stride, dilation):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 8, 3)).astype("f"), rng.normal(size=(size, size, 3, 4)).astype("f")

    def own(x, kernel):
        reach, layout = size // 2 * dilation, ("NHWC", "HWIO", "NHWC")
        at = {"rhs_dilation": (dilation, dilation), "dimension_numbers": layout}
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(reach, reach)] * 2, **at)

    @jax.jit
    def all_of(x, kernel):
        return [
            jax.value_and_grad(lambda x, kernel: (function(x, kernel) ** 2).sum(), (0, 1))(x, kernel)  # noqa: B023
            for function in (lambda x, kernel: layers.convolve(x, kernel, stride, dilation), own)
        ]

    for ours, theirs in zip(*map(jax.tree.leaves, all_of(x, kernel))):
        assert_close(ours, theirs, 1e-5)


@pytest.fixture(scope="module")
def painted() -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    images = np.random.default_rng(0).uniform(size=(64, 32, 32, 3)).astype(np.float32)
    paint = jax.jit(partial(damage, noise_share=0.5))
    results = [paint(jax.random.key(seed), images) for seed in (0, 0, 1)]
    return images, [tuple(map(np.asarray, result)) for result in results]


def test_pixels_outside_of_the_mask_are_unchanged_and_those_inside_are_changed(painted):
    images, ((damaged, masks), *_) = painted
    changed = (damaged != images).any(axis=-1)
    assert not changed[~masks].any() and changed[masks].mean() > 0.99
    assert damaged.min() >= 0 and damaged.max() <= 1


def test_masks_cover_some_percent_of_the_images_and_may_be_empty(painted):
    shares = np.concatenate([masks.mean(axis=(1, 2)) for _, masks in painted[1][1:]])
    assert 0.02 < shares.mean() < 0.1 and shares.max() < 0.5
    assert 0 < (shares == 0).mean() < 0.2


def test_the_same_key_paints_the_same_damage_and_another_key_another(painted):
    (first, _), (again, _), (other, _) = painted[1]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
