"""Pre-training: what is hidden, what moves, going on, and the file that is shipped."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import llb.objectives
import llb.pretrain
from llb import load_encoder, textures
from llb.checkpoint import restore_params
from llb.encoder import SPECS, ViT
from llb.files import UserError
from llb.objectives import PATCHES, Predictor, hide
from llb.pretrain import Pretrain, batch, draw_energies, draw_images, feature_whitening, pretrain, zca
from llb.stem import ENERGIES, energies, normalise

KNOWN = np.random.default_rng(0).normal(3, 2, (12, PATCHES, ENERGIES)).astype(np.float16)
SETTINGS = Pretrain(images=12, steps=4, batch_size=2)


def flat(params: dict) -> dict[str, np.ndarray]:
    return flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return flat(pretrain(SETTINGS, KNOWN, tmp_path_factory.mktemp("whole")))


def test_between_a_fifth_and_three_fifths_of_the_patches_are_hidden():
    hidden = np.asarray(hide(jax.random.key(0), 400))
    share = hidden.mean(axis=1)
    assert 0.2 <= share.min() < 0.25 and 0.55 < share.max() <= 0.605
    # blobs: in half of the images a hidden patch's right neighbour is mostly hidden, too
    square = hidden.reshape(-1, 14, 14)
    together = (square[:, :, 1:] & square[:, :, :-1]).sum(axis=(1, 2)) / square[:, :, :-1].sum(axis=(1, 2))
    assert 0.4 < np.mean(together > share + 0.15) < 0.6


def test_everything_is_trained_but_the_stems_statistics(trained, tmp_path):
    rows = KNOWN.astype(np.float32).reshape(-1, ENERGIES)
    np.testing.assert_allclose(trained["stem/mean"], rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(trained["stem/std"], rows.std(axis=0) + 1e-3, rtol=1e-5)
    start = flat(pretrain(Pretrain(images=12, steps=1, batch_size=2), KNOWN, tmp_path))
    for name in trained.keys() - {"stem/mean", "stem/std"}:
        assert (trained[name] != start[name]).any(), name


def test_without_a_step_the_weights_are_those_that_training_starts_from(tmp_path, monkeypatch):
    settings = Pretrain(images=12, steps=0)
    weights = flat(pretrain(settings, KNOWN, tmp_path))
    key = jax.random.split(jax.random.key(settings.seed))[0]
    for name, value in flat(llb.objectives.init("energies", key)["vit"]).items():
        if name not in ("stem/mean", "stem/std"):
            np.testing.assert_allclose(weights[name], value, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(weights["stem/mean"], KNOWN.astype(np.float32).mean(axis=(0, 1)), rtol=1e-5)
    monkeypatch.setattr(llb.pretrain, "save", None)  # found finished
    again = flat(pretrain(settings, KNOWN, tmp_path))
    assert all((again[name] == value).all() for name, value in weights.items())


def test_an_interrupted_pre_training_ends_as_if_it_had_not_been(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(llb.pretrain, "SAVE_SECONDS", 0.0)

    taken = []

    def stop_once_at_step_3(settings, step):
        taken.append(step)
        if taken == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return batch(settings, step)

    monkeypatch.setattr(llb.pretrain, "batch", stop_once_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(SETTINGS, KNOWN, tmp_path)
    resumed = flat(pretrain(SETTINGS, KNOWN, tmp_path))
    assert taken == [0, 1, 2, 3, 3]
    for name, value in trained.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    with llb.pretrain.open_checkpoints(tmp_path) as checkpoints:
        assert flat(restore_params(checkpoints)).keys() == trained.keys()


def test_the_teacher_follows_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(llb.pretrain, "SAVE_SECONDS", 0.0)
    saved = []
    monkeypatch.setattr(llb.pretrain, "save", lambda checkpoints, step, state, digest: saved.append(state))
    pretrain(Pretrain(objective="teacher", images=12, steps=4, batch_size=2), KNOWN, tmp_path)
    second, third = (jax.tree.leaves(state["teacher"]) for state in saved[1:3])
    params = jax.tree.leaves(saved[2]["params"])
    for before, after, now in zip(second, third, params):
        np.testing.assert_allclose(after, 0.99 * before + 0.01 * now, atol=1e-6)


def test_a_batch_in_parts_is_the_batch_at_once(tmp_path, monkeypatch):
    """Without anything random in the loss, the mean over parts of four is the mean over the batch."""

    def loss(params, teacher, known, key):
        predicted = Predictor().apply({"params": params}, known.astype(np.float32), np.zeros(known.shape[:2], bool))
        return (predicted**2).mean()

    monkeypatch.setitem(llb.pretrain.OBJECTIVES, "energies", loss)
    settings = Pretrain(images=12, steps=2, batch_size=12)
    in_parts = flat(pretrain(settings, KNOWN, tmp_path / "parts"))
    monkeypatch.setattr(llb.pretrain, "PART", 12)
    for name, value in flat(pretrain(settings, KNOWN, tmp_path / "whole")).items():
        np.testing.assert_allclose(in_parts[name], value, atol=2e-4, err_msg=name)


def test_every_pass_shows_each_image_once():
    seen = np.concatenate([batch(Pretrain(images=5, batch_size=3), step) for step in range(10)]).reshape(6, 5)
    assert (np.sort(seen, axis=1) == np.arange(5)).all() and len({tuple(row) for row in seen}) > 1


def test_energies_in_place_of_images_give_the_same_tokens():
    encoder = load_encoder("tiny")
    images = np.random.default_rng(1).normal(size=(1, 112, 112, 3)).astype(np.float32)
    tokens = ViT(SPECS["tiny"]).apply({"params": encoder.params}, energies(images))
    np.testing.assert_allclose(tokens[-1], encoder(images)[-1], atol=1e-4)


def test_whitened_patches_of_both_groups_have_unit_covariance():
    encoder = load_encoder("tiny")
    images = np.stack([textures.draw(np.random.default_rng([9, i])) for i in range(24)])
    images = normalise(images)
    known = np.asarray(energies(images))
    fresh = encoder.params | {"whitening": feature_whitening(encoder.params, known)}
    features = np.asarray(encoder.features(fresh, images))[:, :, -PATCHES:]
    for group in range(2):
        covariance = np.cov(features[:, group].reshape(-1, 192).T)
        assert 0.4 < np.diag(covariance).min() and np.diag(covariance).max() < 1.01
        assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.3
    # the shipped statistics, on images that they were not made of
    features = np.asarray(encoder.features(encoder.params, images))[:, :, -PATCHES:]
    assert 0.3 < features.std() < 2 and abs(features.mean()) < 0.3


def test_whitened_features_have_unit_covariance():
    rows = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[2.0, 1.0], [0.0, 1.0]])
    mean, matrix = zca(rows, 1e-3)
    assert np.cov(((rows - mean) @ matrix).T) == pytest.approx(np.eye(2), abs=0.02)


def test_drawn_images_follow_from_their_seed_and_differ():
    one, again, other = (textures.draw(np.random.default_rng([seed, 5])) for seed in (0, 0, 1))
    assert one.shape == (112, 112, 3) and one.dtype == np.uint8
    assert (one == again).all() and (one != other).any()


@pytest.mark.parametrize("kind", textures.KINDS)
def test_every_kind_of_drawing_has_structure(kind):
    image = textures.draw(np.random.default_rng(3), kinds=(kind,))
    assert image.std() > 2


def test_the_shipped_file_is_small_and_no_random_network():
    assert llb.encoder.TINY_WEIGHTS.stat().st_size < 12e6
    encoder = load_encoder("tiny")
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder.params)) < 6e6
    statistics = encoder.params["stem"]
    assert (np.asarray(statistics["std"]) > 0.01).all() and np.abs(statistics["mean"]).max() > 1
    assert np.abs(encoder.params["block_5"]["ls1"] - llb.encoder.LAYER_SCALE).max() > 0.02  # where training began


def test_an_interrupted_drawing_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(llb.pretrain, "DRAW_BATCH", 2)
    begun, stop_at = [], 4

    def drawn(settings, first):
        begun.append(first)
        for index in range(first, settings.images):
            if index == stop_at:
                raise KeyboardInterrupt
            yield textures.draw(np.random.default_rng([settings.seed, index]))

    monkeypatch.setattr(llb.pretrain, "draw_images", drawn)
    settings = Pretrain(images=7)
    with pytest.raises(KeyboardInterrupt):
        draw_energies(settings, tmp_path / "energies.npy")
    stop_at = None
    known = draw_energies(settings, tmp_path / "energies.npy")
    assert begun == [0, 4]
    whole = draw_energies(settings, tmp_path / "whole.npy")
    np.testing.assert_array_equal(known, whole)
    assert len(whole) == 7 and (whole != 0).any(axis=(1, 2)).all()


def test_workers_draw_the_images_in_order():
    settings = Pretrain(images=5, seed=3)
    with closing(draw_images(settings, 2)) as images:
        drawn = list(images)
    assert len(drawn) == 3
    for index, image in enumerate(drawn, 2):
        np.testing.assert_array_equal(image, llb.pretrain.draw_image(index, 3, settings.mix))


def test_a_training_that_diverges_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(llb.pretrain, "save", None)
    never = {"energies": lambda params, *_: np.nan * params["vit"]["cls_token"].sum()}
    monkeypatch.setattr(llb.pretrain, "OBJECTIVES", never)
    with pytest.raises(UserError, match="--learning-rate"):
        pretrain(SETTINGS, KNOWN, tmp_path)


def pretraining(*flags) -> subprocess.Popen:
    command = [sys.executable, "-m", "llb.pretrain", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes)


def test_bad_flags_end_with_one_line_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    for flags, word in (
        (("--out", tmp_path / "file"), "--out"),
        (("--out", tmp_path / "run", "--export", tmp_path), "--export"),
        (("--out", tmp_path / "run", "--export", tmp_path / "file" / "tiny.safetensors"), "--export"),
        (("--out", tmp_path / "damaged"), "give another --out"),
        (("--out", tmp_path / "run", "--seed", 2**63), "--seed"),
    ):
        process = pretraining(*flags)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2 and len(err.splitlines()) == 1 and word in err, (flags, err)
        assert "Traceback" not in out


def test_ctrl_c_while_drawing_ends_with_one_line(tmp_path):
    process = pretraining("--out", tmp_path / "run", "--images", 100_000)
    for _ in range(1200):
        if (tmp_path / "run" / "energies.partial").exists():
            break
        time.sleep(0.1)
    time.sleep(2)  # workers have started, or are starting
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers, too
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and [line for line in err.splitlines() if line] == [
        "interrupted: the same command goes on from here"
    ], err
