"""Features in memory, in shards on the disk, or computed each time are the same, and belong to the images asked for."""

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import llb.cache
import llb.features
from llb import processes
from llb.cache import make_room
from llb.encoders import load_encoder
from llb.features import (
    Source,
    cached_features,
    feature_kind,
    make_encode,
    make_source,
    normalise,
    streamed_features,
)
from llb.files import UserError, size_and_time
from llb.images import ImageFiles

TOY = SimpleNamespace(
    spec=SimpleNamespace(name="toy"), feature_shape=(2, 5, 4), image_size=8, weights_digest="", precision="", strides=()
)
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


def files_of(paths, white=None):
    states = ((*size_and_time(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
    return ImageFiles(tuple(paths), white or {}, states=tuple(states))


def cached(paths, encode, memory_gib=1.0, encoder=TOY, limit_gib=1.0, white=None):
    """In the cache beside the images."""
    cache = paths[0].parent / "cache"
    return cached_features(Source(encoder, encode), files_of(paths, white), cache, memory_gib, limit_gib, "test")


def shards(paths):
    """The shards of the cache, those of the first images first."""
    return sorted(
        (paths[0].parent / "cache").glob(f"features/toy-8-*/{32 * '?'}.npy"), key=lambda file: np.load(file).flat[0]
    )


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


def test_an_image_that_changes_after_its_digest_is_taken_is_refused_and_its_shard_is_not_stored(paths):
    files = files_of(paths)
    changed = paths[3].with_name("new.png")
    Image.fromarray(np.full((8, 8, 3), 50, np.uint8)).save(changed)
    os.replace(changed, paths[3])
    with pytest.raises(UserError, match=r"3\.png was changed while it was read: give the same command again"):
        cached_features(Source(TOY, Encode()), files, paths[0].parent / "cache", 1.0, 1.0, "test")
    assert len(shards(paths)) == 1, "the images before it stay"
    encode = Encode()
    assert brightness(cached(paths, encode)) == [[6, 0, 50], [50, 5, 2]] and encode == [2, 50, 4, 5, 6]


def test_a_damaged_shard_alone_is_computed_again(paths, capsys):
    cached(paths, Encode())
    shard = shards(paths)[1]
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


def test_features_belong_to_contents_so_other_names_orders_and_lists_encode_only_what_is_new(paths):
    cached(paths[:5], Encode())
    twin, encode = paths[0].with_name("twin.png"), Encode()
    paths[2].rename(twin)
    order = [paths[6], twin, paths[0], paths[0]]
    for memory_gib in (1.0, 0.0):
        given = cached(order, encode, memory_gib).fetch(np.arange(4))
        assert given[:, 0, 0, 0].tolist() == [6, 2, 0, 0] and encode == [6]
    Image.fromarray(np.full((8, 9, 3), 50, np.uint8)).save(paths[3])
    given, changed = cached([*paths[:2], twin, *paths[3:]], changed := Encode()), changed
    assert brightness(given) == [[6, 0, 50], [50, 5, 2]] and changed == [50, 5]


def test_features_of_another_encoder_or_other_settings_are_not_used(paths):
    cached(paths, Encode())
    other = Encode()
    cached(paths, other, white={"integer": 4095})
    assert other == list(range(7))
    cached(paths, other, encoder=SimpleNamespace(**vars(TOY) | {"weights_digest": "x"}))
    assert other == 2 * list(range(7)) and len(shards(paths)) == 12


def test_whatever_features_depend_on_gives_them_a_folder_of_their_own(monkeypatch):
    def kind(white=None, resize=None, **changes):
        return feature_kind(Source(SimpleNamespace(**vars(TOY) | changes), None), ImageFiles((), white or {}, resize))

    spec = SimpleNamespace(name="toy", release=True)  # a --protocol's positions
    changes = [{"weights_digest": "x"}, {"precision": "bfloat16"}, {"strides": (8,)}, {"spec": spec}, {"image_size": 9}]
    kinds = [kind(), *(kind(**change) for change in changes), kind(resize=9), kind({"float": 1}), kind({"float": 255})]
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="another")])
    kinds.append(kind())
    monkeypatch.setattr(llb.features, "digest_of_files", lambda *_: "other sources")
    assert len({*kinds, kind()}) == len(kinds) + 1


def test_the_shards_used_longest_ago_make_room_and_nothing_else_is_deleted(paths, monkeypatch):
    cached(paths[:6], Encode())
    first, second, third = shards(paths)
    strangers = [first.with_name(name) for name in ("notes.txt", "photo.npy", "0" * 32 + ".txt")]
    remains = first.with_name(f".{first.stem}.tmp-{'0' * 32}.npy")  # of a killed command
    for file in (*strangers, remains):
        file.write_bytes(bytes(300))
    for age, file in enumerate((second, remains, first, third, *strangers)):  # the first is the oldest
        os.utime(file, (age, age))
    size, cache = first.stat().st_size, paths[0].parent / "cache"
    assert not make_room(cache, 10**18, 0) and len(shards(paths)) == 3  # no deletion would be enough
    assert make_room(cache, size, 4 * size) and shards(paths) == [first, third]
    assert make_room(cache, 0, 2 * size + 300) and remains.exists()
    encode = Encode()
    assert brightness(cached(paths, encode, limit_gib=0.0)) == SOME.tolist() and encode == [2, 3, 6]
    assert first.exists() and third.exists() and not remains.exists() and all(file.exists() for file in strangers)


@pytest.mark.parametrize("memory_gib", (1.0, 0.0))
def test_shards_that_another_command_deletes_meanwhile_are_encoded_again(paths, monkeypatch, memory_gib):
    monkeypatch.setattr(
        llb.features, "load_shard", lambda shard, load=llb.cache.load_shard: shard.unlink() or load(shard)
    )
    encode = Encode()
    assert brightness(cached(paths, encode, memory_gib)) == SOME.tolist()
    assert set(encode[7:]) == (set(range(7)) if memory_gib else {0, 2, 3, 5, 6})


def test_features_that_no_disk_can_hold_are_computed_each_time(paths, capsys):
    encode = Encode()
    cached(paths, encode, encoder=SimpleNamespace(**vars(TOY) | {"feature_shape": (2, 10**15, 4)}))
    assert "computed each time" in capsys.readouterr().out and not encode


def test_two_commands_may_compute_the_same_shards_at_once(paths, monkeypatch):
    both = Barrier(2)  # each has written its file before one of them is renamed
    monkeypatch.setattr(os, "fsync", lambda file: both.wait(30))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(partial(cached, paths), (Encode(), Encode()))
    assert brightness(first) == brightness(second) == SOME.tolist()
    assert len(list(shards(paths)[0].parent.iterdir())) == 4


def test_several_processes_compute_every_shard_once_as_process_0_deals_them(paths, monkeypatch):
    """Process 1 begins when process 0 has done its part, and hears what process 0 had missed."""
    heard = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "wait", lambda name: None)
    monkeypatch.setattr(processes, "agreed", lambda value: heard.append(value) or value)
    first, second = Encode(), Encode()
    cached(paths, first, 0.0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "agreed", lambda value: heard.pop(0))
    given = cached(paths, second)
    assert (first, second) == ([0, 1, 4, 5], [2, 3, 6]) and brightness(given) == SOME.tolist()
    assert len(shards(paths)) == 4


def test_a_detector_that_gets_images_gets_them_unchanged_with_the_encoders_parameters(paths):
    source = make_source(SimpleNamespace(**vars(TOY) | {"params": "frozen"}), images=True)
    given = cached_features(source, files_of(paths), paths[0].parent / "cache", 1.0, 1.0, "test")
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
