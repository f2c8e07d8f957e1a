"""The benchmark compares like with like: both ways get the same numbers, and it counts and reports them truly."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llb import bench, bench_gpu
from llb import bench_reference as reference
from llb.encoder import Spec
from llb.features import make_encode
from llb.files import UserError
from llb.metrics import pixel_metrics
from llb.optimizer import RECIPES, hard_positions
from llb.train import init_state, make_training, score_all, submodel_keys, train

TOY = Spec("toy", 4, 16, 3, 2, 2, True, 5, True, 24, ((0,), (1,)))
SETTINGS = bench.Bench(rounds=2, image_size=24, images=7, submodels=2, batch_size=3, steps=2, maps=8, reference_maps=6)


STILL = replace(RECIPES["dinomaly"], dropout=0.0)  # the two ways draw their dropout differently


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "dinomaly", STILL)
        return bench.measure(SETTINGS, TOY, "device: CPU", photo=32, product=16)


@pytest.mark.slow  # compiles encoder, step and scoring both ways; the other tests read the same results
def test_both_ways_agree_on_features_maps_and_scores(results):
    found = results["agreement"]["reference"]
    assert found["features"] < 1e-3  # llb's are float16
    assert found["maps"] < 1e-3 and found["scores"] < 1e-3
    assert max(found[name] for name in ("pixel_auroc", "pixel_ap", "pixel_f1_max")) < 1e-5


def test_sub_models_trained_one_after_the_other_score_as_those_trained_together(tmp_path, results):
    # `results` has compiled what is needed here
    encoder, images = bench.random_encoder(TOY, 24), np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), np.uint8)
    training = make_training(encoder, STILL, STILL.learning_rate, STILL.dropout, SETTINGS.steps, SETTINGS.batch_size)
    keys, subsets = submodel_keys(jax.random.key(0), 2), [np.array([0, 2, 4]), np.array([1, 3, 5])]
    features = make_encode(encoder)(images)
    together = train(training, features.__getitem__, subsets, keys, tmp_path, "digest", "test")
    expected = score_all(together, training.model, features.__getitem__, 6, 24, "test")

    first = init_state(keys, features[:1], training=training)
    for k, subset in enumerate(subsets):  # as large as a batch: every step sees all of it
        state = jax.tree.map(lambda leaf, k=k: jnp.array(leaf[k]), first)
        for step in range(training.steps):
            hard = np.int32(hard_positions(training.recipe, step, 3 * training.model.patches))
            state, _ = reference.train_step(
                encoder.params, state, images[subset], keys[k], np.int32(1), hard, spec=TOY, training=training
            )
        found = [
            reference.score(encoder.params, state["params"], part, TOY, training.model)
            for part in (images[:3], images[3:])
        ]
        np.testing.assert_allclose(np.concatenate(found), expected[:, k], rtol=2e-3)
    untrained = score_all(first["params"], training.model, features.__getitem__, 6, 24, "test")
    assert np.abs(untrained / expected - 1).max() > 0.01, "training changed the scores"


def test_the_references_aupro_tends_to_the_exact_one_as_thresholds_grow():
    masks, maps = bench.draw_maps(6, 56)
    exact = pixel_metrics(masks, maps)["pixel_aupro"]
    coarse, fine = (abs(reference.aupro(masks, maps, count) - exact) for count in (10, 400))
    assert 0 < fine < 1e-3 and fine < coarse / 10


def test_multiply_adds_are_counted_through_gradients_scans_and_convolutions():
    x, w = jnp.ones((5, 3)), jnp.ones((3, 7))
    assert bench.multiply_adds(jnp.matmul, x, w) == 5 * 3 * 7
    # of the gradient with respect to w alone: the product again, and xᵀ times what comes back
    assert bench.multiply_adds(jax.grad(lambda w: (x @ w).sum() ** 2), w) == 2 * 5 * 3 * 7
    assert bench.multiply_adds(lambda x: jax.lax.scan(lambda c, _: (c @ jnp.eye(3), None), x, length=4), x) == 4 * 45
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 6))
    convolution = jax.jit(
        lambda i, k: jax.lax.conv_general_dilated(i, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    assert bench.multiply_adds(convolution, image, kernel) == (2 * 2 * 2 * 6) * (4 * 4 * 3)


def test_the_counted_work_is_the_networks(results):
    tokens, patches, width, head = 39, 36, 16, 8  # 6 × 6 patches, class and 2 registers; two blocks of three are needed
    found = results["multiply_adds_per_image"]
    positions = 6 * 5 * 5 * width + 6 * 6 * 5 * width  # interpolated along one axis, then along the other
    embedding = patches * 4 * 4 * 3 * width
    blocks = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert found["encoder"] == embedding + blocks + positions
    assert found["sub-model"] == tokens * (8 * width**2 + 2 * (12 * width**2 + 2 * width * head))
    # backwards costs twice the forward pass, but for the input, whose gradient nothing needs
    assert found["sub-model and gradient"] == 3 * found["sub-model"] - tokens * 4 * width**2


def test_stage_1_is_the_sum_of_its_parts_and_llb_encodes_once(results):
    seconds = {part: {way: ways[way]["seconds"][1] for way in ways} for part, ways in results["parts"].items()}
    for way, encoded in (("llb", seconds["encoder"]["llb"]), ("reference", 0.0)):
        whole = 7 * (encoded + seconds["scoring"][way]) + 2 * seconds["training step"][way]
        assert seconds["stage 1"][way] == pytest.approx(whole)


def test_ratios_are_medians_within_rounds():
    slow, fast = bench.Timing([6.0, 20.0, 9.0]), bench.Timing([2.0, 4.0, 9.0])
    assert bench.ratio(slow, fast) == (3.0, 1.0, 5.0)


def test_ways_take_turns_and_only_the_warm_up_is_not_timed():
    calls = []
    parts = {"part": {name: bench.Way(lambda name=name: calls.append(name), 2) for name in "ab"}}
    timings = bench.take_turns(parts, 3)
    assert calls == list("ab" * 4)
    assert all(len(timing.seconds) == 3 for timing in timings["part"].values())


def test_a_process_of_the_others_that_fails_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="ended early"), bench.others(SETTINGS, TOY, [tmp_path / "missing.jpg"]):
        pass


def test_json_holds_targets_with_their_verdicts(results):
    found = json.loads(json.dumps(results, allow_nan=False))
    assert {"date", "command", "machine", "settings", "parts", "ratios", "targets"} <= set(found)
    assert "stage 1 / reference in JAX" in found["targets"]
    for target in found["targets"].values():
        assert set(target) == {"ratio", "target", "met"}
        assert target["met"] is (target["ratio"] >= target["target"])
    assert found["targets"]["maps / SciPy"]["ratio"] == found["ratios"]["maps"]["reference"][0]


def test_the_table_names_every_part_way_and_target(results):
    text = bench.table(results)
    for name in [*bench.UNITS, "llb", "reference", *results["targets"]]:
        assert name in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "tiny"}, "--encoder tiny"),
        ({"image_size": 30}, "--image-size 30"),
        ({"images": 2, "submodels": 3}, "--images 2"),
        ({"maps": 4, "reference_maps": 5}, "--reference-maps 5"),
    ],
)
def test_settings_that_cannot_be_end_with_one_line(changes, message):
    settings = bench.Bench(**changes)
    with pytest.raises(UserError, match=message):
        bench.measure(settings, bench.SPECS[settings.encoder], "device: CPU")


def test_help_lists_the_flags(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--help"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--json", "--against", "--gpu", "--rounds"))


@pytest.mark.parametrize("flags, word", ((["--json", "."], "--json"), (["--gpu"], "no accelerator")))
def test_what_cannot_be_is_said_before_anything_is_timed(flags, word, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    with pytest.raises(UserError, match=word):
        bench.main()


def test_the_references_maps_stay_in_float32():
    assert reference.heat_map(np.ones((2, 16), np.float32), 24).dtype == np.float32


def test_the_share_of_a_time_that_spans_cover_counts_overlaps_once():
    assert bench_gpu.covered([(0, 4), (2, 6), (3, 5), (8, 10)]) == 0.8
    assert bench_gpu.covered([]) is None
