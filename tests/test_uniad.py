"""UniAD equals an independent PyTorch implementation (tests/reference/uniad_reference.py), and keeps its promises."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llb.detectors import common, uniad
from llb.encoders.specs import SPECS, CnnSpec
from llb.files import UserError

STORED = dict(np.load(Path(__file__).parent / "reference" / "uniad.npz"))
SMALL = CnnSpec("small", "mbconv", stem=2, layers=((1, 2, 3, 1), (1, 3, 3, 2)))
KEY = jax.random.key(0)


def setup_of(spec=SMALL, size: int = 32, **settings) -> common.Setup:
    settings = uniad.Settings(**({"width": 8, "heads": 2, "layers": 2} | settings))
    rate = uniad.LEARNING_RATE
    return common.Setup(spec, uniad.STRIDES, size, settings, learning_rate=rate, steps=20, batch_size=2)


def stored(prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in STORED.items() if key.startswith(prefix)}


PARAMS = unflatten_dict(stored("params/"), sep="/")


def close(ours, theirs, tolerance: float, what: str = "") -> None:
    """The difference is small relative to the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=what)


def test_evaluation_equals_pytorch_tokens_rebuilt_map_and_score():
    setup = setup_of()

    @jax.jit
    def evaluate(variables):
        tokens = uniad.tokens_of(setup, STORED["features"])
        return (
            tokens,
            uniad.network(setup).apply(variables, tokens),
            uniad.distance(setup, variables, STORED["features"]),
        )

    tokens, rebuilt, distance = evaluate({"params": PARAMS})
    close(tokens, STORED["tokens"], 1e-5)
    close(rebuilt, STORED["rebuilt"], 1e-4)
    maps = common.anomaly_map(distance, 32, uniad.MAP)
    close(maps, STORED["map"], 1e-4)
    close(common.SCORES[uniad.SCORE](distance, maps), STORED["score"], 1e-4)


def test_the_jitter_the_loss_the_gradients_and_a_clipped_step_of_adamw_equal_pytorch(monkeypatch):
    setup = setup_of(dropout=0.0)
    close(uniad.jittered(STORED["tokens"], STORED["noise"], 20.0), STORED["noisy"], 1e-5)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: STORED["noise"])

    @jax.jit
    def step(params):
        loss, gradients = jax.value_and_grad(
            lambda params: uniad.loss(setup, {"params": params}, STORED["features"], KEY, 0)[0]
        )(params)
        optimizer = uniad.optimizer(setup, 7)
        return loss, gradients, optimizer.update(gradients, optimizer.init(params), params)[0]

    loss, *trees = step(PARAMS)
    close(loss, STORED["loss"], 1e-4)
    assert STORED["norm"] > 2 * uniad.CLIP
    for what, tree in zip(("gradients/", "update/"), trees):
        ours, theirs = flatten_dict(tree, sep="/"), stored(what)
        assert ours.keys() == theirs.keys()
        largest = max(np.abs(one).max() for one in theirs.values())
        for name, one in theirs.items():
            # Adam's first update is the sign of the gradient: of rounding error (the bias of keys) it says nothing
            sure = np.abs(STORED["gradients/" + name]) > 1e-5
            np.testing.assert_allclose(ours[name][sure], one[sure], rtol=1e-3, atol=1e-4 * largest, err_msg=name)


def test_the_window_is_pytorchs_and_blocks_16_to_49_of_196_keys_which_get_no_weight():
    np.testing.assert_array_equal(uniad.neighbourhood(8, 7), STORED["blocked"])
    blocked = uniad.neighbourhood(14, 7)
    counts = blocked.sum(axis=1)
    assert (counts.min(), counts.max()) == (16, 49) and blocked.diagonal().all()
    query, key = jax.random.normal(KEY, (2, 3, 196, 2, 4))
    weights = np.asarray(uniad.attention_weights(query, key, blocked, "float32"))
    assert (weights[:, :, blocked] == 0).all() and (weights[:, :, ~blocked] > 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("side", range(2, 20))
def test_every_query_keeps_a_key_however_small_the_grid(side):
    assert not uniad.neighbourhood(side, 7).all(axis=1).any()


@pytest.mark.parametrize(
    ("name", "size", "side", "channels"),
    [
        *(("efficientnet_b4", 224, 14, 272), ("resnet18", 224, 14, 448), ("efficientnet_lite0", 448, 14, 192)),
        *(("tiny", 112, 14, 384), ("dinov2_vitb14", 392, 14, 1536), ("dinov2_vits14", 518, 19, 768)),
    ],
)
def test_every_encoder_gives_tokens_on_an_affordable_grid(name, size, side, channels):
    setup = setup_of(SPECS[name], size)
    shape = (2, sum(np.prod(grid) for grid in setup.grids))
    if channels >= 384 and name != "resnet18":  # a ViT
        shape = (2, 2, setup.grids[0][0] ** 2 + 5, channels // 2)
    tokens = jax.eval_shape(lambda f: uniad.tokens_of(setup, f), jax.ShapeDtypeStruct(shape, jnp.float16))
    assert tokens.shape == (2, side**2, channels)


def test_on_a_vit_a_large_grid_is_averaged_two_by_two():
    setup = setup_of(replace(SPECS["tiny"], width=4), 24 * 8)
    features = np.random.default_rng(0).normal(0, 1, (1, 2, 5 + 24**2, 4)).astype(np.float16)
    tokens = uniad.tokens_of(setup, features)
    means = features[:, :, 5:].astype(np.float32).reshape(1, 2, 12, 2, 12, 2, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(tokens, means.transpose(0, 2, 3, 1, 4).reshape(1, 144, 8), atol=1e-5)


def test_in_bfloat16_what_is_compared_with_the_tokens_is_not_rounded():
    tokens = uniad.tokens_of(setup_of(), STORED["features"])
    rebuilt = uniad.network(replace(setup_of(), precision="bfloat16")).apply({"params": PARAMS}, tokens)
    assert rebuilt.dtype == jnp.float32 and (rebuilt != rebuilt.astype(jnp.bfloat16)).mean() > 0.5


@pytest.mark.parametrize("side", (42, 49, 56, 80))  # patches of 8 or 14 pixels at 336 to 1,120
def test_on_a_vit_every_patch_of_a_large_grid_counts(side):
    setup = setup_of(replace(SPECS["tiny"], width=1), side * 8)
    shape = (1, 2, 5 + side**2, 1)
    gradient = jax.grad(lambda features: uniad.tokens_of(setup, features).sum())(jnp.zeros(shape))[0, :, 5:, 0]
    assert (gradient > 0).all()


def test_all_layers_start_with_equal_projections_and_queries_but_other_dense_weights():
    params = jax.jit(lambda: uniad.init(setup_of(), KEY))()["params"]
    first, second = params["decoder_0"], params["decoder_1"]
    np.testing.assert_array_equal(first["query"], second["query"])
    for name in ("attention", "attention_output"):
        np.testing.assert_array_equal(first[name]["in_proj"], second[name]["in_proj"])
    assert (first["attention"]["in_proj"] != first["attention_output"]["in_proj"]).any()
    assert (first["attention"]["out_proj"]["kernel"] != second["attention"]["out_proj"]["kernel"]).any()
    assert (params["encoder_0"]["fc1"]["kernel"] != params["encoder_1"]["fc1"]["kernel"]).any()
    bound = (6 / (8 + 24)) ** 0.5
    assert 0.9 * bound < np.abs(first["attention"]["in_proj"]).max() <= bound


def test_the_published_model_has_7717392_parameters():
    setup = setup_of(SPECS["efficientnet_b4"], 224, width=256, heads=8, layers=4)
    params = jax.eval_shape(lambda: uniad.init(setup, KEY))["params"]
    assert sum(np.prod(one.shape) for one in jax.tree.leaves(params)) == 7_717_392


def test_the_rate_falls_to_a_tenth_after_four_fifths_of_the_steps():
    optimizer, params = uniad.optimizer(setup_of(), 7), {"a": jnp.ones(2)}
    state, sizes = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"a": jnp.ones(2)}, state, params)
        sizes.append(float(-updates["a"][0]))
    np.testing.assert_allclose(sizes, [1e-4] * 16 + [1e-5] * 4, rtol=1e-3)


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(UserError, match="^--set width=9: "):
        uniad.network(setup_of(width=9))
