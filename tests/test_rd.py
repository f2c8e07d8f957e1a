"""RD equals an independent PyTorch implementation (tests/reference/rd_reference.py), and keeps its promises."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llb.detectors import common, rd
from llb.encoders.specs import SPECS, CnnSpec

STORED = dict(np.load(Path(__file__).parent / "reference" / "rd.npz"))
SMALL = CnnSpec("small", "bottleneck", stem=4, layers=((1, 4, 3, 1), (1, 6, 3, 2), (1, 8, 3, 2)))
KEY = jax.random.key(0)


def setup_of(spec, size: int, **settings) -> common.Setup:
    settings = rd.Settings(**settings)
    return common.Setup(spec, rd.STRIDES, size, settings, learning_rate=rd.LEARNING_RATE, steps=20, batch_size=2)


def stored(prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in STORED.items() if key.startswith(prefix)}


SETUP = setup_of(SMALL, 48)
VARIABLES = {name: stored(f"{name}/") for name in ("params", "batch_stats")}


@pytest.fixture
def few_blocks(monkeypatch) -> None:
    """As many as the reference has; they compile faster."""
    monkeypatch.setattr(rd, "CODE_BLOCKS", 1)
    monkeypatch.setattr(rd, "DECODER_BLOCKS", (1, 1, 2))


def step(state, features):
    """A step of one sub-model: the state after it; its loss, decoded maps and gradients."""
    variables, opt = state

    def loss(params):
        results, model = [], rd.network(SETUP)
        keeping = SimpleNamespace(apply=lambda *args, **how: results.append(model.apply(*args, **how)) or results[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rd, "network", lambda setup: keeping)
            value, (_, changed) = rd.loss(SETUP, {**variables, "params": params}, features, KEY, 0)
        return value, (changed, results[0][0])

    (value, (changed, decoded)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    updates, opt = rd.optimizer(SETUP, 7).update(gradients, opt, variables["params"])
    variables = {"params": optax.apply_updates(variables["params"], updates), **changed}
    return (variables, opt), {"loss": value, "decoded": decoded, "gradients": gradients}


one_step, three_steps = jax.jit(step), jax.jit(jax.vmap(step))


def start(variables):
    return variables, rd.optimizer(SETUP, 7).init(variables["params"])


def close(ours, theirs, tolerance: float, what: str = "") -> None:
    """The difference is small relative to the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=what)


def test_training_equals_pytorch_decoded_maps_loss_gradients_and_statistics_also_on_an_odd_grid(few_blocks):
    assert [grid[0] for grid in SETUP.grids] == [12, 6, 3]
    (variables, _), ours = one_step(start(VARIABLES), STORED["features"])
    for level, one in enumerate(ours["decoded"]):
        close(one, STORED[f"training/{level}"], 1e-4)
    close(ours["loss"], STORED["loss"], 1e-5)
    statistics = variables["batch_stats"]
    assert ours["gradients"].keys() == VARIABLES["params"].keys() and statistics.keys() == stored("changed/").keys()
    largest = max(np.abs(one).max() for one in stored("gradients/").values())
    for name, one in stored("gradients/").items():
        np.testing.assert_allclose(ours["gradients"][name], one, rtol=1e-3, atol=1e-4 * largest, err_msg=name)
    for name, one in stored("changed/").items():
        close(statistics[name], one, 1e-4, name)


def test_evaluation_equals_pytorch_and_scipy_decoded_maps_anomaly_map_and_score(few_blocks):
    @jax.jit
    def evaluate(variables):
        maps, model = common.maps_of(SETUP, STORED["features"]), rd.network(SETUP)
        return model.apply(variables, maps), rd.distance(SETUP, variables, STORED["features"])

    decoded, distance = evaluate(VARIABLES)
    for level, one in enumerate(decoded):
        close(one, STORED[f"evaluation/{level}"], 1e-4)
    maps = common.anomaly_map(distance, 48, rd.MAP)
    close(maps, STORED["map"], 1e-4)
    close(common.SCORES[rd.SCORE](distance, maps), STORED["score"], 1e-4)


def test_bottleneck_and_decoder_of_wide_resnet_have_the_published_number_of_parameters():
    params = jax.eval_shape(lambda: rd.init(setup_of(SPECS["wide_resnet50_2"], 256), KEY))["params"]
    sizes = {name: np.prod(one.shape) for name, one in params.items()}
    decoder = sum(size for name, size in sizes.items() if name.startswith("decoder"))
    assert (sum(sizes.values()) - decoder, decoder) == (58_885_120, 24_917_504)


@pytest.mark.parametrize(
    ("name", "grid"), [("resnet18", 1), ("efficientnet_lite0", 7), ("tiny", 7), ("tiny", 14), ("dinov2_vitb14", 37)]
)
def test_every_encoder_fits_on_even_and_odd_grids_and_the_code_is_smaller_than_the_maps(name, grid, few_blocks):
    setup = setup_of(SPECS[name], SPECS[name].patch * grid)
    maps = tuple(jax.ShapeDtypeStruct((2, *shape), jnp.float32) for shape in setup.grids)
    variables = jax.eval_shape(lambda: rd.init(setup, KEY))
    decoded = jax.eval_shape(rd.network(setup).apply, variables, maps)
    assert [one.shape for one in decoded] == [one.shape for one in maps]
    code = variables["params"]["code_0_3_kernel"].shape[-1] * (-(-setup.grids[-1][0] // 2)) ** 2
    assert code < sum(np.prod(shape) for shape in setup.grids) / 4


def test_on_a_vit_the_distance_is_the_sum_over_its_two_maps_on_their_grid(few_blocks):
    setup = setup_of(replace(SPECS["tiny"], width=8), 40)  # 5 × 5 patches
    features = np.random.default_rng(0).normal(0, 1, (2, 2, 30, 8)).astype(np.float16)

    shapes = jax.eval_shape(lambda: rd.init(setup, KEY))
    variables = jax.tree.map(lambda leaf: np.random.default_rng(1).uniform(0.1, 1, leaf.shape), shapes)

    @jax.jit
    def both(features):
        maps = common.maps_of(setup, features)
        decoded = rd.network(setup).apply(variables, maps)
        levels = common.cosine_distance(jnp.stack(decoded), jnp.stack(maps))
        rounded = rd.network(replace(setup, precision="bfloat16")).apply(variables, maps)
        return rd.distance(setup, variables, features), levels, jnp.stack(rounded)

    distance, levels, rounded = both(features)
    assert levels.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(distance, levels.sum(axis=0), atol=1e-5)
    assert (rounded != rounded.astype(jnp.bfloat16)).mean() > 0.5, "in bfloat16 what is compared is not rounded"


@pytest.mark.parametrize(("loss", "expected"), [("flattened", STORED["loss"]), ("positions", STORED["loss_positions"])])
def test_identical_maps_lose_nothing_opposite_ones_two_a_level_and_both_losses_equal_pytorch(
    monkeypatch, loss, expected
):
    setup, given = setup_of(SMALL, 48, loss=loss), [STORED[f"training/{level}"] for level in range(3)]

    def loss_if_decoded(make):
        model = SimpleNamespace(apply=lambda variables, maps, train, mutable: (make(maps), {}))
        monkeypatch.setattr(rd, "network", lambda setup: model)
        return float(rd.loss(setup, {}, STORED["features"], KEY, 0)[0])

    assert loss_if_decoded(lambda maps: maps) == pytest.approx(0, abs=1e-5)
    assert loss_if_decoded(lambda maps: [-one for one in maps]) == pytest.approx(6, abs=1e-5)
    assert loss_if_decoded(lambda maps: given) == pytest.approx(expected, rel=1e-5)
