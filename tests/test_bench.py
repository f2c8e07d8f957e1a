"""llb.bench compares like with like: both ways get the same numbers, and it counts and reports them truly."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb.bench import __main__ as bench
from llb.bench import cpu, gpu, reference
from llb.bench.common import Sizes, Timing, Way, draw_maps, make_setup, multiply_adds, random_encoder, ratio, take_turns
from llb.bench.detectors import bank_ways
from llb.bench.process import Task, other_process
from llb.checkpoint import CheckpointFolder
from llb.detectors.dinomaly import loss, network, recipe_of
from llb.detectors.recipes import hard_positions
from llb.encoders.specs import Spec
from llb.features import make_source
from llb.files import UserError
from llb.metrics import pixel_metrics
from llb.score import score_all
from llb.train import Submodels, init_state, submodel_keys, train

VIT = {"width": 16, "depth": 3, "heads": 2, "registers": 2, "layer_scale": True, "groups": ((0,), (1,))}
TOY = Spec(name="toy", patch=4, native_grid=5, antialias=True, image_size=24, **VIT)
SIZES = Sizes(TOY, 24, images=7, submodels=2, batch_size=3, steps=2, maps=8, reference_maps=6, photo=32, product=8)


@pytest.mark.slow  # compiles encoder, step and scoring both ways
def test_both_ways_agree_on_features_maps_and_scores():
    results = cpu.measure(SIZES, "device: CPU", rounds=1)
    json.dumps(results, allow_nan=False)  # --json can write it
    differences = results["agreement"]["reference"]
    assert differences["features"] < 1e-3  # llb's are float16
    assert differences["maps"] < 1e-3 and differences["scores"] < 1e-3
    assert max(differences[name] for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max")) < 1e-5


@pytest.mark.slow
def test_sub_models_trained_one_after_the_other_score_as_those_trained_together(tmp_path):
    encoder, images = random_encoder(TOY, 24), np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), np.uint8)
    setup = make_setup(encoder, 2, 3, dropout=0.0)  # the two ways draw their dropout differently
    submodels = Submodels([np.array([0, 2, 4]), np.array([1, 3, 5])], submodel_keys(jax.random.key(0), 2))
    source = make_source(encoder)
    features = source.features(source.encode(images).__getitem__)
    together, seen = train(setup, features, submodels, CheckpointFolder(tmp_path, "digest"), "test")
    expected = score_all(together, setup, features, 6, "test")

    first, positions = init_state(submodels.keys, setup=setup), 3 * network(setup).patches
    apart = []
    for k, subset in enumerate(submodels.subsets):  # as large as a batch: every step sees all of it
        state = jax.tree.map(lambda leaf, k=k: jnp.array(leaf[k]), first | first["params"])
        for step in range(setup.steps):
            hard = np.int32(hard_positions(recipe_of(setup), step, positions))
            own = {"key": submodels.keys[k], "steps_per_pass": np.int32(1), "hard": hard}
            state, value = reference.train_step(encoder.params, state, images[subset], own, setup=setup)
            assert step > 0 or float(value) == pytest.approx(seen[k, 0, 0], rel=2e-5)
        params, halves = state["params"], (images[:3], images[3:])
        scores = [reference.score(encoder.params, params, batch, setup) for batch in halves]
        apart.append(np.abs(np.concatenate(scores) / expected[:, k] - 1).max())
    untrained = score_all(jax.device_get(first["params"]), setup, features, 6, "test")
    # Adam's first steps divide gradients that are rounding errors by themselves, and the suite's programs round more
    assert max(apart) < 0.05 * np.abs(untrained / expected - 1).max(), "a twentieth of what training changed"


def test_the_gradients_of_both_ways_agree_where_easy_positions_count_less():
    """Adam's first steps hide the size of a gradient, so trained sub-models do not show it."""
    setup, key = make_setup(random_encoder(TOY, 24), 1, 3, dropout=0.0), jax.random.key(0)
    params, model, recipe = init_state(key[None], setup=setup)["params"]["params"], network(setup), recipe_of(setup)
    params = jax.tree.map(lambda leaf: leaf[0], params)
    tokens = 1 + TOY.registers + model.patches
    features = np.random.default_rng(0).normal(size=(3, len(TOY.groups), tokens, TOY.width)).astype(np.float32)
    step = recipe.ramp_steps
    ours = jax.jit(jax.grad(lambda params: loss(setup, {"params": params}, features, key, step)[0]))(params)
    hard = hard_positions(recipe, step, 3 * model.patches)
    assert 0 < hard < 0.2 * 3 * model.patches and recipe.easy_factor < 1
    theirs = jax.jit(jax.grad(reference.loss), static_argnums=(2, 3, 4))(
        params, features, model, hard, recipe.easy_factor, key
    )
    apart = jax.tree.map(lambda own, one: np.linalg.norm(own - one) / np.linalg.norm(one), ours, theirs)
    assert max(jax.tree.leaves(apart)) < 1e-4, apart


@pytest.mark.slow  # compiles the detectors' loops
def test_fitted_detectors_are_timed_beside_other_ways_and_judged(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "bank_ways", partial(bank_ways, images=3, patches=9, fraction=0.5))
    monkeypatch.setattr(cpu, "gaussian_ways", dict)  # which take long: no sizes but the published ones
    monkeypatch.setattr(cpu, "FITTED", {part: cpu.FITTED[part] for part in ("coreset", "search")})
    results = cpu.measure_detectors("device: CPU", rounds=1)
    json.dumps(results, allow_nan=False)
    printed = capsys.readouterr().out
    for part in cpu.FITTED:
        assert len(results["parts"][part]["llb"]["seconds"]) == 3 and f"{part} / NumPy" in results["targets"]
        assert f"\n{part} " in printed and len(results["ratios"][part]["NumPy"]) == 3


@pytest.mark.slow  # compiles the steps of one and two sub-models
def test_an_accelerators_figures_come_part_by_part():
    reports = []
    gpu.measure(SIZES, "device: CPU", keep=lambda results: reports.append(list(results["measured"])), largest=1)
    names = ["bf16", "encoder", "step, K = 2", "stage 1", "stage 1, reference", "profile", "step, K = 1"]
    assert reports == [names[: number + 1] for number in range(len(names))]


def test_the_references_aupro_tends_to_the_exact_one_as_thresholds_grow():
    masks, maps = draw_maps(6, 56)
    exact = pixel_metrics(masks, maps)["pixel_aupro"]
    coarse, fine = (abs(reference.aupro(masks, maps, thresholds) - exact) for thresholds in (10, 400))
    assert 0 < fine < 1e-3 and fine < coarse / 10


def test_multiply_adds_are_counted_through_gradients_scans_and_convolutions():
    x, w = jnp.ones((5, 3)), jnp.ones((3, 7))
    assert multiply_adds(jnp.matmul, x, w) == 5 * 3 * 7
    # of the gradient with respect to w only: the product again, and xᵀ times the incoming gradient
    assert multiply_adds(jax.grad(lambda w: (x @ w).sum() ** 2), w) == 2 * 5 * 3 * 7
    assert multiply_adds(lambda x: jax.lax.scan(lambda c, _: (c @ jnp.eye(3), None), x, length=4), x) == 4 * 45
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 6))
    convolution = jax.jit(
        lambda i, k: jax.lax.conv_general_dilated(i, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    assert multiply_adds(convolution, image, kernel) == (2 * 2 * 2 * 6) * (4 * 4 * 3)


def test_the_counted_work_is_the_networks():
    work = reference.count_work(make_setup(random_encoder(TOY, 24), 2, 3))
    tokens, patches, width, head = 39, 36, 16, 8  # 6 × 6 patches, class and 2 registers; two blocks of three are needed
    positions = 6 * 5 * 5 * width + 6 * 6 * 5 * width  # interpolated along one axis, then along the other
    embedding = patches * 4 * 4 * 3 * width
    blocks = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert work["encoder"] == embedding + blocks + positions
    assert work["sub-model"] == tokens * (8 * width**2 + 2 * (12 * width**2 + 2 * width * head))
    # the backward pass costs twice the forward pass, without the gradient of the input, which nothing needs
    assert work["sub-model and gradient"] == 3 * work["sub-model"] - tokens * 4 * width**2


def test_ratios_are_medians_within_rounds():
    assert ratio(Timing([6.0, 20.0, 9.0]), Timing([2.0, 4.0, 9.0])) == (3.0, 1.0, 5.0)


def test_ways_take_turns_and_only_the_warm_up_is_not_timed():
    calls = []
    timings = take_turns({"part": {name: Way(lambda name=name: calls.append(name), 2) for name in "ab"}}, 3)
    assert calls == list("ab" * 4)
    assert all(len(timing.seconds) == 3 for timing in timings["part"].values())


def test_the_references_maps_stay_in_float32():
    assert reference.heat_map(np.ones((2, 16), np.float32), 24).dtype == np.float32


def test_the_share_of_a_time_that_spans_cover_counts_overlaps_once():
    assert gpu.covered([(0, 4), (2, 6), (3, 5), (8, 10)]) == 0.8
    assert gpu.covered([]) is None


@pytest.mark.slow  # starts a process
def test_a_failure_of_the_other_process_ends_the_benchmark_with_one_line(tmp_path):
    with pytest.raises(UserError, match="ended early"), other_process(Task(SIZES, [tmp_path / "no.jpg"], 2, False)):
        pass


@pytest.mark.parametrize("flags", ["--image-size 30", "--images 2", "--maps 4 --reference-maps 5", "--json .", "--gpu"])
def test_bad_settings_end_with_one_line_before_anything_is_timed(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", *flags.split()])
    with pytest.raises(UserError, match=" ".join(flags.split()[-2:])) as error:
        bench.main()
    assert "\n" not in str(error.value)
