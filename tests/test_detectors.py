"""Whatever holds for every detector: K at once equal each alone, on any number of devices; leave-one-out by sums;
nothing depends on what fills a batch; images come in any order of subsets."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import small_setup

from llb.checkpoint import CheckpointFolder
from llb.config import Stage1, Stage2
from llb.defaults import resolve, resolve_final, with_sizes
from llb.detectors import DETECTORS, is_trained, read_settings
from llb.encoders import load_encoder
from llb.features import Features
from llb.files import UserError
from llb.fit import learn
from llb.run import command_line
from llb.score import score_all
from llb.stage import check_step, make_stage, state_bytes
from llb.train import Submodels, submodel_keys

IMAGES = 23
FEATURES = np.random.default_rng(3).normal(size=(IMAGES, 2, 11, 8)).astype(np.float16)
PICTURES = np.random.default_rng(4).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
THREE = Submodels([np.arange(k, IMAGES, 3) for k in range(3)], submodel_keys(jax.random.key(5), 3))  # 8, 8, 7 images


# of large networks, so that their programs compile soon
SMALLER = {"uniad": "width=16,heads=2,layers=1", "cflow": "blocks=2", "destseg": "width=8"}


def given(detector: str) -> tuple:
    """A small setup of the detector, and features for it."""
    if getattr(DETECTORS[detector], "IMAGES", False):
        from llb.encoders import load_encoder

        encoder = load_encoder("tiny", image_size=32)
        setup = dataclasses.replace(small_setup(detector), spec=encoder.spec, image_size=32)
        features = Features(PICTURES.__getitem__, PICTURES.shape[1:], encoder.params)
    else:
        setup, features = small_setup(detector), Features(FEATURES.__getitem__, FEATURES.shape[1:])
    setup = dataclasses.replace(setup, settings=read_settings(detector, SMALLER.get(detector), {}))
    # a BatchNorm over few positions amplifies rounding at a high rate, alone as together
    rate = min(1e-4, getattr(DETECTORS[detector], "LEARNING_RATE", 1e-4))
    # RD doubles differences of rounding every few steps
    steps = 10 if detector == "rd" else 20 if is_trained(detector) and not features.frozen else 3
    return dataclasses.replace(setup, learning_rate=rate, steps=steps, batch_size=3), features


def learned(folder, detector, submodels, devices=3):
    setup, features = given(detector)
    at = CheckpointFolder(folder, "images")
    params, seen = learn(setup, features, submodels, at, "test", jax.devices()[:devices])
    assert (seen is None) != is_trained(detector)
    if seen is not None:
        losses, images = seen[..., 0], seen[..., 1:]
        shown = ~np.isnan(images).all(axis=-1)  # DeSTSeg's second phase shows nothing of an image's own
        assert np.isfinite(losses).all() and (shown[:, 0].all() if detector == "destseg" else shown.all())
        assert np.isfinite(images[shown]).all() and images[shown].std(axis=-1).min() > 0  # each image has its own
    return params, score_all(params, setup, features, IMAGES, "test")


def fast(slow: bool) -> list[str]:
    """The detectors whose programs compile slowly, or the others."""
    return [name for name in DETECTORS if (is_trained(name) and name != "simplenet") == slow]


def one_of(submodels: Submodels, k: int) -> Submodels:
    return Submodels([submodels.images[k]], submodels.keys[k : k + 1])


@pytest.mark.parametrize(
    "detector", [*fast(False), *(pytest.param(name, marks=pytest.mark.slow) for name in fast(True))]
)
def test_three_together_equal_each_alone_on_one_and_on_three_devices(tmp_path, detector):
    alone = [learned(tmp_path / str(k), detector, one_of(THREE, k), devices=1)[1] for k in range(3)]
    alone = np.concatenate(alone, axis=1)  # (N, 3)
    for devices in (1, 3):
        _, together = learned(tmp_path / f"on {devices}", detector, THREE, devices)
        # Adam divides gradients that are rounding errors by themselves; a BatchNorm divides by small deviations
        tolerance = 1e-3 if detector in ("rd", "uniad", "destseg") else 1e-5
        np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance * np.abs(alone).max())
    assert np.isfinite(alone).all() and np.abs(alone[:, 0] - alone[:, 1]).max() > 1e-4 * np.abs(alone).max()


@pytest.mark.parametrize("detector", [name for name in DETECTORS if getattr(DETECTORS[name], "ADDITIVE", False)])
def test_leaving_one_subset_out_by_sums_equals_the_fit_to_the_others(tmp_path, detector):
    others = dataclasses.replace(THREE, others=True)
    _, together = learned(tmp_path / "together", detector, others)
    for k in range(3):
        assert not np.isin(THREE.subsets[k], others.images[k]).any() and len(others.images[k]) >= 15
        _, alone = learned(tmp_path / str(k), detector, one_of(others, k), devices=1)
        np.testing.assert_allclose(together[:, k], alone[:, 0], rtol=1e-3)


def test_settings_of_a_detector_are_read_by_name_and_refused_in_words():
    assert read_settings("padim", "ridge=0.5", {}).ridge == 0.5
    assert (
        read_settings("dinomaly", "attention=softmax,easy_fraction=0.5", {"dropout": 0.1, "recipe": None}).dropout
        == 0.1
    )
    for detector, text, words in (
        ("padim", "ridges=1", "padim has dimensions, ridge"),
        ("dinomaly", "attention=none", "one of linear, softmax"),
        ("dinomaly", "dropout=2", "from 0 to 1"),
        ("dinomaly", "dropout", "NAME=VALUE"),
    ):
        with pytest.raises(UserError, match=words):
            read_settings(detector, text, {})
    with pytest.raises(UserError, match="--dropout: padim has no dropout"):
        read_settings("padim", None, {"dropout": 0.1})
    with pytest.raises(UserError, match="--dropout 1.0: give from 0 to 0.9"):  # a flag of its own has the same bounds
        read_settings("uniad", None, {"dropout": 1.0})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"submodels": 3, "steps": 1000, "aggregate": "mean", "standardise": "no", "folds": "own", "dropout": 0.2}),
        ({"detector": "padim"}, {"steps": 1, "aggregate": "mean", "standardise": "yes", "folds": "others"}),
        ({"detector": "patchcore"}, {"steps": 1, "aggregate": "out-of-fold", "standardise": "yes", "folds": "own"}),
        ({"detector": "student"}, {"submodels": 1, "aggregate": "mean", "standardise": "no", "folds": "own"}),
        ({"detector": "padim", "submodels": 1}, {"aggregate": "mean", "standardise": "no", "folds": "own"}),
        ({"detector": "padim", "encoder": "resnet18"}, {"image_size": 224, "resize": 256, "image_score": "max"}),
        (
            {"protocol": "llbnad"},
            {"submodels": 5, "keep": 0.4, "steps": 1000, "recipe": "llbnad", "learning_rate": 0.005},
        ),
        ({"protocol": "llbnad", "submodels": 2}, {"submodels": 2, "keep": 0.4}),
        (
            {"protocol": "llbnad", "detector": "destseg"},
            {"submodels": 5, "keep": 0.4, "aggregate": "mean", "batch_size": 8, "image_score": "top-100"},
        ),
        ({"protocol": "dinomaly"}, {"resize": None, "image_score": "top-1%"}),  # the resize with the encoder's size
    ],
)
def test_defaults_are_the_detectors_the_encoders_and_the_protocols(given, expected):
    """Real-IAD's layout has no default of its own: a dropout of 0.4 is the multi-class script's."""
    settings = resolve(Stage1(**given), "real-iad")
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_detector_is_set_up_with_all_that_the_flags_say(tmp_path):
    given = {"recipe": "llbnad", "dropout": 0.4, "set": "attention=softmax", "image_score": "max"}
    numbers = {"learning_rate": 0.01, "steps": 7, "batch_size": 3}
    settings = with_sizes(resolve(Stage1(encoder="tiny", **given, **numbers), "mvtec"), 32)
    setup = make_stage(tmp_path, settings, load_encoder("tiny", image_size=32), vars(settings)).setup
    own = DETECTORS["dinomaly"].Settings(recipe="llbnad", dropout=0.4, attention="softmax")
    assert (setup.detector, setup.settings, setup.score) == ("dinomaly", own, "max")
    assert numbers == {name: getattr(setup, name) for name in numbers}


def test_the_demo_set_has_steps_and_batches_of_its_own():
    own = {layout: resolve(Stage1(detector="destseg"), layout) for layout in ("demo", "real-iad")}
    assert own["demo"].batch_size < own["real-iad"].batch_size and own["demo"].steps < own["real-iad"].steps
    assert resolve(Stage1(detector="destseg", batch_size=5), "demo").batch_size == 5


def test_another_final_detector_has_its_own_defaults_and_given_flags_win_over_the_protocol():
    def final(stage1: dict, **given):
        return resolve_final(Stage2(**given), vars(resolve(Stage1(data="D", **stage1), "mvtec")))

    behind = {"detector": "patchcore", "encoder": "wide_resnet50_2"}
    assert final(behind, detector="padim").image_score == "max"  # as stage 1 of padim has it on that encoder
    assert final(behind | {"encoder": "dinov2_vits14_reg"}, detector="padim").image_score == "top-1%"
    assert final({"encoder": "resnet18"}, detector="destseg").batch_size == 32
    assert (final({"protocol": "dinomaly"}).steps, final({"protocol": "dinomaly"}, passes=2).passes) == (5000, 2)
    assert final({"protocol": "dinomaly"}, passes=2).steps is None


@pytest.mark.parametrize(
    ("stage1", "given", "expected"),
    [
        ({"detector": "padim"}, {"detector": "dinomaly"}, ("llbnad", 5e-3, None, 2, 16, "max")),
        (
            {"detector": "padim"},
            {"detector": "dinomaly", "set": "recipe=dinomaly"},
            ("dinomaly", 2e-3, None, 2, 16, "max"),
        ),
        ({}, {"detector": "destseg"}, (None, 0.4, 5000, None, 8, "top-100")),
        ({}, {"set": "recipe=dinomaly"}, ("dinomaly", 2e-3, None, 2, 16, "max")),
        ({"learning_rate": 1e-4}, {"set": "recipe=dinomaly"}, ("dinomaly", 1e-4, None, 2, 16, "max")),
        ({"learning_rate": 1e-4}, {"set": "dropout=0"}, ("llbnad", 1e-4, None, 2, 16, "max")),
        ({}, {"released": "model.pth"}, ("llbnad", 0, 1, None, 16, "max")),
    ],
)
def test_a_final_detector_learns_by_its_own_recipe_and_a_protocols_numbers_are_dinomalys(stage1, given, expected):
    stage1 = Stage1(data="D", protocol="llbnad", **stage1)
    final = resolve_final(Stage2(**given), vars(resolve(stage1, "mvtec")) | {"command": command_line(stage1)})
    numbers = (final.learning_rate, final.steps, final.passes, final.batch_size, final.image_score)
    assert (final.set.get("recipe"), *numbers) == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"dropout": 0.4, "set": "dropout=0.1"}, "--set dropout=0.1 and --dropout 0.4 contradict each other: give one"),
        ({"recipe": "dinomaly", "set": "recipe=llbnad"}, "--set recipe=llbnad and --recipe dinomaly contradict"),
        ({"dropout": 0.4, "set": "noise=jitter"}, "--set noise=jitter and --dropout 0.4 contradict"),
    ],
)
def test_a_flag_and_set_that_contradict_each_other_are_refused(given, problem):
    with pytest.raises(UserError, match=problem):
        resolve(Stage1(**given), "mvtec")
    agreeing = Stage1(dropout=0.4, set="dropout=0.40,recipe=dinomaly", protocol="llbnad")
    assert resolve(agreeing, "mvtec").recipe == "dinomaly", "a protocol is no flag"


def test_a_cut_larger_than_the_encoders_own_size_is_refused():
    with pytest.raises(UserError, match="--resize 100: is smaller than the image size 112"):
        with_sizes(resolve(Stage1(resize=100), "demo"), 112)


@pytest.mark.parametrize("given", ({"steps": 7}, {"passes": 2}, {"batch_size": 9}, {"learning_rate": 3.0}))
def test_released_weights_take_no_settings_of_a_training(given):
    (name,) = given
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: --released takes the place of a training"):
        resolve_final(Stage2(released="model.pth", **given), vars(resolve(Stage1(data="D"), "mvtec")))


@pytest.mark.parametrize("name", ("simplenet", "uniad"))
def test_more_sub_models_than_memory_holds_are_refused_whatever_is_trained(name):
    setup = small_setup(name)
    params = jax.tree.leaves(DETECTORS[name].init(setup, jax.random.key(0))["params"])
    assert state_bytes(setup) == 4 * sum(leaf.nbytes for leaf in params)
    check_step(setup, 1)
    with pytest.raises(UserError, match="a step needs about .* GiB of memory"):
        check_step(setup, 10**9)


def test_a_fitted_detector_takes_no_steps():
    with pytest.raises(UserError, match="--steps: padim is fitted in closed form"):
        resolve(Stage1(detector="padim", steps=3), "mvtec")
