"""The cache of features: in memory, on the disk in shards, or computed each time, it gives the same rows."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import llb.features
from llb import processes
from llb.encoder import load_encoder
from llb.features import by_image, cached, make_encode
from llb.files import UserError

IMAGES = 7
ENCODER = SimpleNamespace(
    spec=SimpleNamespace(name="toy", width=4), tokens_per_image=5, image_size=8, weights_digest="", precision=""
)
SOME = np.array([[6, 0, 3], [3, 5, 2]])


class Encode:
    """An image's features are its brightness; counts what it is asked for, and can be interrupted."""

    def __init__(self, limit: int = 10**9) -> None:
        self.seen, self.limit = [], limit

    def __call__(self, images: np.ndarray) -> np.ndarray:
        values = images.mean(axis=(1, 2, 3))
        if len(self.seen) + len(values) > self.limit:
            raise KeyboardInterrupt
        self.seen += values.tolist()
        return np.broadcast_to(values.astype(np.float16)[:, None, None, None], (len(values), 2, 5, 4))


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Seven images of brightness 0 to 6; shards of two."""
    monkeypatch.setattr(llb.features, "ENCODE_BATCH", 2)
    monkeypatch.setattr(llb.features, "SHARD_BYTES", 2 * (2 * 5 * 4) * 2)
    files = [tmp_path / f"{value}.png" for value in range(IMAGES)]
    for value, file in enumerate(files):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file)
    return files


def brightness(fetch) -> list:
    rows = fetch(SOME)
    assert rows.shape == (2, 3, 2, 5, 4) and rows.dtype == np.float16
    return rows[..., 0, 0, 0].tolist()


@pytest.mark.parametrize("memory_gib", (1.0, 0.0))
def test_rows_are_those_of_the_images_asked_for(paths, tmp_path, memory_gib, capsys):
    encode = Encode()
    fetch = cached(ENCODER, encode, paths, tmp_path / "cache", memory_gib, "test")
    assert brightness(fetch) == SOME.tolist() and encode.seen == list(range(IMAGES))
    assert ("in memory" if memory_gib else "read from disk") in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "cache").glob("*.npy")) == [f"0000{n}.npy" for n in range(4)]
    assert isinstance(np.load(tmp_path / "cache" / "00000.npy", mmap_mode="r"), np.memmap)


def test_an_interrupted_computation_goes_on_with_the_next_shard(paths, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached(ENCODER, Encode(limit=5), paths, tmp_path / "cache", 1.0, "test")
    encode = Encode()
    assert brightness(cached(ENCODER, encode, paths, tmp_path / "cache", 1.0, "test")) == SOME.tolist()
    assert encode.seen == [4, 5, 6]
    again = Encode()
    cached(ENCODER, again, paths, tmp_path / "cache", 1.0, "test")
    assert not again.seen


def test_features_of_another_encoder_or_of_changed_images_are_not_used(paths, tmp_path):
    cached(ENCODER, Encode(), paths, tmp_path / "cache", 1.0, "test")
    other, changed = Encode(), Encode()
    cached(SimpleNamespace(**vars(ENCODER) | {"weights_digest": "x"}), other, paths, tmp_path / "cache", 1.0, "test")
    assert other.seen == list(range(IMAGES))
    Image.fromarray(np.full((8, 9, 3), 50, np.uint8)).save(paths[3])
    fetch = cached(ENCODER, changed, paths, tmp_path / "cache", 1.0, "test")
    assert changed.seen == [0, 1, 2, 50, 4, 5, 6] and fetch(np.array([3]))[0, 0, 0, 0] == 50


def test_without_room_on_the_disk_they_are_computed_each_time(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=300))  # they need 560 bytes
    encode = Encode()
    fetch = cached(ENCODER, encode, paths, tmp_path / "cache", 1.0, "test")
    assert "computed each time" in capsys.readouterr().out and not encode.seen
    assert brightness(fetch) == brightness(fetch) == SOME.tolist()
    assert len(encode.seen) == 12 and not list((tmp_path / "cache").glob("*.npy"))


def test_several_processes_compute_every_shard_once(paths, tmp_path, monkeypatch):
    """Also when one begins after another has finished its part: shards are dealt by number."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "wait", lambda name: None)
    monkeypatch.setattr(processes, "agreed", bool)
    seen = []
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        if number == 0:
            with pytest.raises(FileNotFoundError):  # it does not wait here, and process 1 has not begun
                cached(ENCODER, first := Encode(), paths, tmp_path / "cache", 1.0, "test")
            seen += first.seen
        else:
            fetch = cached(ENCODER, second := Encode(), paths, tmp_path / "cache", 1.0, "test")
            seen += second.seen
    assert seen == [0, 1, 4, 5, 2, 3, 6] and brightness(fetch) == SOME.tolist()


def test_a_process_that_sees_other_images_deletes_nothing(paths, tmp_path, monkeypatch):
    cached(ENCODER, Encode(), paths, tmp_path / "cache", 1.0, "test")
    before = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    monkeypatch.setattr(processes, "first", lambda: False)
    with pytest.raises(UserError, match="other images"):
        cached(ENCODER, Encode(), paths[:-1], tmp_path / "cache", 1.0, "test")
    assert before == {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}


def test_image_by_image_is_the_batch_at_once(monkeypatch):
    images = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)

    def function(batch):
        return {"sum": batch.sum(axis=1), "largest": batch.max(axis=(1, 2))}

    assert by_image(function) is not function, "these tests run on a CPU"
    found = jax.jit(by_image(function))(images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, function(images))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert by_image(function) is function


def test_a_batch_is_shared_out_to_the_devices(monkeypatch):
    """Sixteen images are filled up to eighteen on three devices: the features are those of one device alone."""
    encoder = load_encoder("tiny", image_size=32)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    seen = []
    together = make_encode(encoder)
    monkeypatch.setattr(jax, "device_put", lambda *args, put=jax.device_put: seen.append(put(*args)) or seen[-1])
    shared = together(images)
    assert len(seen[-1].sharding.device_set) == len(jax.local_devices()) == 3
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    np.testing.assert_array_equal(shared, make_encode(encoder)(images))
