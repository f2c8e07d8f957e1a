"""Features in memory, in shards on the disk, or computed each time are the same, and belong to the images asked for."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import llb.features
from llb import processes
from llb.encoders import load_encoder
from llb.features import Source, cached_features, make_encode, make_source, normalise, streamed_features
from llb.files import UserError
from llb.images import ImageFiles

TOY = SimpleNamespace(spec="", feature_shape=(2, 5, 4), image_size=8, weights_digest="", precision="", strides=())
SOME = np.array([[6, 0, 3], [3, 5, 2]])


class Encode(list):
    """An image's features are its brightness. It lists what it has encoded; beyond `limit` images it is interrupted."""

    limit = 100

    def __call__(self, images: np.ndarray) -> np.ndarray:
        values = images.mean(axis=(1, 2, 3))
        if len(self) + len(values) > self.limit:
            raise KeyboardInterrupt
        self += values.tolist()
        return np.broadcast_to(values.astype(np.float16)[:, None, None, None], (len(values), 2, 5, 4))


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Seven images of brightness 0 to 6; shards of two."""
    monkeypatch.setattr(llb.features, "ENCODE_BATCH", 2)
    monkeypatch.setattr(llb.features, "SHARD_BYTES", 2 * (2 * 5 * 4) * 2)
    files = [tmp_path / f"{value}.png" for value in range(7)]
    for value, file in enumerate(files):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file)
    return files


def cached(paths, encode, memory_gib=1.0, encoder=TOY, white=None):
    files = ImageFiles(tuple(paths), white or {})
    return cached_features(Source(encoder, encode), files, paths[0].parent / "cache", memory_gib, "test")


def brightness(given) -> list:
    features = given.fetch(SOME)
    assert features.shape == (2, 3, 2, 5, 4) and features.dtype == np.float16
    return features[..., 0, 0, 0].tolist()


@pytest.mark.parametrize(("memory_gib", "place"), [(1.0, "in memory"), (0.0, "read from disk")])
def test_features_belong_to_the_images_asked_for_and_are_computed_once(paths, memory_gib, place, capsys):
    encode = Encode()
    for _ in range(2):
        fetch = cached(paths, encode, memory_gib)
        assert brightness(fetch) == SOME.tolist() and encode == list(range(7))
        assert place in capsys.readouterr().out
    assert brightness(streamed_features(Source(TOY, encode), ImageFiles(tuple(paths)))) == SOME.tolist()


def test_an_interrupted_computation_continues_with_the_next_shard(paths):
    encode = Encode()
    encode.limit = 5
    with pytest.raises(KeyboardInterrupt):
        cached(paths, encode)
    encode.limit = 100
    assert brightness(cached(paths, encode)) == SOME.tolist() and encode == list(range(7))


def test_a_damaged_shard_alone_is_computed_again(paths, capsys):
    cached(paths, Encode())
    shard = paths[0].parent / "cache" / "00001.npy"
    whole = shard.read_bytes()
    for at in (3, 100, len(whole) - 9, len(whole) - 1):  # in NumPy's header, in the values, in the checksum
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        encode = Encode()
        assert brightness(cached(paths, encode, memory_gib=0.0)) == SOME.tolist() and encode == [2, 3]
        assert "1 of 4 shards are damaged and computed again" in capsys.readouterr().out
        assert shard.read_bytes() == whole
    for damaged in (b"", bytes(4), whole[:-50], whole[:-4]):
        shard.write_bytes(damaged)
        encode = Encode()
        assert brightness(cached(paths, encode)) == SOME.tolist() and encode == [2, 3]


def test_features_of_another_encoder_or_of_changed_images_are_not_used(paths):
    cached(paths, Encode())
    strangers = [paths[0].parent / "cache" / name for name in ("notes.txt", "photo.npy", "1.npy")]
    for file in strangers:
        file.touch()
    other, changed = Encode(), Encode()
    cached(paths, other, white={"integer": 4095})
    assert other == list(range(7)) and all(file.exists() for file in strangers)
    cached(paths, other, encoder=SimpleNamespace(**vars(TOY) | {"weights_digest": "x"}))
    assert other == 2 * list(range(7))
    Image.fromarray(np.full((8, 9, 3), 50, np.uint8)).save(paths[3])
    fetch = cached(paths, changed).fetch
    assert changed == [0, 1, 2, 50, 4, 5, 6] and fetch(np.array([3]))[0, 0, 0, 0] == 50


def test_features_that_no_disk_can_hold_are_computed_each_time(paths, capsys):
    encode = Encode()
    cached(paths, encode, encoder=SimpleNamespace(**vars(TOY) | {"feature_shape": (2, 10**15, 4)}))
    assert "computed each time" in capsys.readouterr().out and not encode


def test_several_processes_compute_every_shard_once_and_one_with_other_images_deletes_none(paths, monkeypatch):
    """Shards are dealt by number, so it does not matter that process 1 begins when process 0 has done its part."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "wait", lambda name: None)
    monkeypatch.setattr(processes, "agreed", bool)
    first, second = Encode(), Encode()
    with pytest.raises(FileNotFoundError):  # nothing waits here for the shards of process 1
        cached(paths, first)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    given = cached(paths, second)
    assert (first, second) == ([0, 1, 4, 5], [2, 3, 6]) and brightness(given) == SOME.tolist()
    monkeypatch.setattr(llb.features, "is_writer", lambda: False)
    with pytest.raises(UserError, match="other images"):
        cached(paths[:-1], Encode())
    assert len(list((paths[0].parent / "cache").glob("*.npy"))) == 4


def test_a_detector_that_gets_images_gets_them_unchanged_with_the_encoders_parameters(paths):
    source = make_source(SimpleNamespace(**vars(TOY) | {"params": "frozen"}), images=True)
    given = cached_features(source, ImageFiles(tuple(paths)), paths[0].parent / "cache", 1.0, "test")
    images = given.fetch(SOME)
    assert images.dtype == np.uint8 and images.shape == (2, 3, 8, 8, 3) and given.frozen == "frozen"
    np.testing.assert_array_equal(images[..., 0, 0, 0], SOME)


def test_encoding_equals_the_encoder_on_one_cpu_device_even_if_there_are_three():
    """On several, XLA's FFT can wait for ever."""
    encoder, before = load_encoder("tiny", image_size=32), {id(array) for array in jax.live_arrays()}
    encode = make_encode(encoder)
    placed = [array for array in jax.live_arrays() if id(array) not in before]
    assert len(jax.local_devices()) == 3 and {len(array.sharding.device_set) for array in placed} == {1}
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    expected = jax.jit(encoder.features)(encoder.params, normalise(images))
    np.testing.assert_allclose(encode(images).astype(np.float32), expected, rtol=1e-3, atol=1e-3)


def test_features_that_are_not_finite_are_refused():
    encoder = load_encoder("tiny", image_size=32)
    wrong = dataclasses.replace(encoder, params=jax.tree.map(lambda leaf: leaf * np.nan, encoder.params))
    with pytest.raises(UserError, match="--weights"):
        make_encode(wrong)(np.zeros((1, 32, 32, 3), np.uint8))
