"""Pre-training: drawing, the step, resuming, whitening, and the shipped weights."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llb.checkpoint import open_checkpoints, restore_params
from llb.encoders import TINY_WEIGHTS, load_encoder
from llb.encoders.stem import ENERGIES, energies
from llb.encoders.vit import LAYER_SCALE
from llb.features import normalise
from llb.tiny import objectives, pretrain, textures
from llb.tiny.objectives import PATCHES, init_params
from llb.tiny.pretrain import Pretrain, batch_indices, draw_energies, draw_image

pytestmark = pytest.mark.slow  # the workshop of `tiny`: compiles many training steps

IMAGES = np.random.default_rng(0).normal(3, 2, (12, PATCHES, ENERGIES)).astype(np.float16)  # energies
SETTINGS = Pretrain(images=12, steps=4, batch_size=2)
flat = partial(flatten_dict, sep="/")


@pytest.fixture(scope="module")
def small_encoder():
    """Half as many blocks, each a quarter as wide, are compiled in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "SPEC", replace(objectives.SPEC, depth=3, width=48, groups=((1,), (2,))))
        yield


@pytest.fixture(scope="module")
def trained(small_encoder, tmp_path_factory):
    return flat(pretrain.pretrain(SETTINGS, IMAGES, tmp_path_factory.mktemp("uninterrupted")))


def test_training_changes_every_weight_except_the_statistics_of_the_energies(trained, tmp_path):
    settings = Pretrain(images=12, steps=0)
    start = flat(pretrain.pretrain(settings, IMAGES, tmp_path))
    initial = flat(init_params("energies", jax.random.split(jax.random.key(settings.seed))[0])["vit"])
    values = IMAGES.astype(np.float32).reshape(-1, ENERGIES)
    for name in trained.keys() - {"stem/mean", "stem/std"}:
        np.testing.assert_allclose(start[name], initial[name], atol=1e-7, err_msg=name)
        assert (trained[name] != start[name]).any(), name
    for weights in (start, trained):
        np.testing.assert_allclose(weights["stem/mean"], values.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(weights["stem/std"], values.std(axis=0) + 1e-3, rtol=1e-5)


def test_an_interrupted_pre_training_ends_like_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    def stop_at_step_3(settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch_indices(settings, step)

    monkeypatch.setattr(pretrain, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "batch_indices", stop_at_step_3)
        pretrain.pretrain(SETTINGS, IMAGES, tmp_path)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
    resumed = flat(pretrain.pretrain(SETTINGS, IMAGES, tmp_path))
    with open_checkpoints(tmp_path) as checkpoints:
        saved = flat(restore_params(checkpoints))
    for name, value in trained.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_every_pass_shows_each_image_once():
    passes = np.concatenate([batch_indices(Pretrain(images=5, batch_size=3), step) for step in range(10)]).reshape(6, 5)
    assert (np.sort(passes, axis=1) == np.arange(5)).all() and len({tuple(order) for order in passes}) > 1


def test_whitened_samples_have_unit_covariance():
    samples = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[2.0, 1.0], [0.0, 1.0]])
    mean, matrix = pretrain.zca(samples, 1e-3)
    assert np.cov(((samples - mean) @ matrix).T) == pytest.approx(np.eye(2), abs=0.02)


def test_whitened_patches_of_both_groups_have_unit_covariance():
    encoder = load_encoder("tiny")
    images = normalise(np.stack([textures.draw(np.random.default_rng([9, i])) for i in range(24)]))
    params = encoder.params | {"whitening": pretrain.feature_whitening(encoder.params, np.asarray(energies(images)))}
    compiled = jax.jit(encoder.features)
    features = np.asarray(compiled(params, images))[:, :, -PATCHES:]
    for group in range(2):
        covariance = np.cov(features[:, group].reshape(-1, 192).T)
        assert 0.4 < np.diag(covariance).min() and np.diag(covariance).max() < 1.01
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.3
    # the shipped statistics come from other images
    features = np.asarray(compiled(encoder.params, images))[:, :, -PATCHES:]
    assert 0.3 < features.std() < 2 and abs(features.mean()) < 0.3


def test_the_shipped_weights_are_few_and_trained():
    params = load_encoder("tiny").params
    assert TINY_WEIGHTS.stat().st_size < 12e6 and sum(leaf.size for leaf in jax.tree.leaves(params)) < 6e6
    assert (np.asarray(params["stem"]["std"]) > 0.01).all() and np.abs(params["stem"]["mean"]).max() > 1
    assert np.abs(params["block_5"]["ls1"] - LAYER_SCALE).max() > 0.02


@pytest.mark.parametrize("kind", textures.KINDS)
def test_drawn_images_have_structure_follow_from_their_seed_and_differ(kind):
    one, again, other = (textures.draw(np.random.default_rng([seed, 3]), kinds=(kind,)) for seed in (0, 0, 1))
    assert one.shape == (112, 112, 3) and one.dtype == np.uint8 and one.std() > 2
    assert (one == again).all() and (one != other).any()


def test_an_interrupted_drawing_continues_after_the_last_complete_batch(tmp_path, monkeypatch):
    def stop_after_5(settings, first):
        yield from (draw_image(index, settings.seed, settings.mix) for index in range(first, 5))
        raise KeyboardInterrupt

    settings, file = Pretrain(images=7), tmp_path / "energies.npy"
    monkeypatch.setattr(pretrain, "DRAW_BATCH", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "draw_images", stop_after_5)
        draw_energies(settings, file)
    whole = np.array(draw_energies(settings, tmp_path / "whole.npy"))
    whole[0] = np.lib.format.open_memmap(file.with_suffix(".partial"), mode="r+")[0] = 1  # it is not drawn again
    np.testing.assert_array_equal(draw_energies(settings, file), whole)
    assert len(whole) == 7 and (whole != 0).any(axis=(1, 2)).all()


@pytest.mark.parametrize("command", ("pretrain --out", "pretrain --export", "probe --out", "measure --out"))
def test_a_bad_flag_ends_each_command_with_one_line_before_anything_is_drawn(command, tmp_path):
    (tmp_path / "file").touch()
    module, flag = command.split()
    given = {"--out": tmp_path / "run"} | {flag: tmp_path / "file" / "a"}
    command = [sys.executable, "-m", f"llb.tiny.{module}", *(str(word) for pair in given.items() for word in pair)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and flag in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("energies*"))
