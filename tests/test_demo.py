"""The embedded set: the same everywhere, in the layout it claims, with masks that fit its defects."""

import hashlib

import numpy as np
import pytest

import llb.demo
from llb.data import categories, load_category, load_image, load_mask, recognise
from llb.demo import COUNTS, KINDS, MARKER, SIDE, VISIBLE, draw, write_demo

DIGEST = "dd99ea2b1a75eb1373955c80032bf1f0bd8d125e3932ed4df08e056d0aa26501"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "embedded"
    write_demo(folder)
    return folder


@pytest.fixture
def few(monkeypatch):
    """Two images of every kind: fast to draw."""
    monkeypatch.setattr(llb.demo, "COUNTS", dict.fromkeys(COUNTS, 2))


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_set_has_the_layout_and_the_numbers_it_claims(demo):
    assert recognise(demo) == "mvtec" and categories(demo) == ["part"]
    dataset = load_category(demo, "part")
    assert len(dataset.train) == 160 and len(dataset.test) == 50 + 44 + 12 * 5
    assert all((record.mask is not None) == (record.label == 1) for record in dataset.test)
    noisy = load_category(demo, "part", 0.2)
    assert sum(record.label for record in noisy.train) == 40 and len(noisy.train) == 200
    assert sum(record.label for record in noisy.test) >= 50
    assert sum(len(content) for content in files_of(demo).values()) < 10e6


def test_masks_cover_a_small_part_of_every_defective_image(demo):
    for record in load_category(demo, "part").test:
        if record.label:
            mask = load_mask(demo / record.mask, SIDE)
            assert 15 < mask.sum() < 0.05 * SIDE**2, record.path


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_holds_what_the_defect_changed_and_nothing_else(kind):
    for seed in range(8):
        normal, empty = draw(seed)
        image, mask = draw(seed, kind)
        change = np.abs(image.astype(int) - normal).max(axis=2)
        assert not empty.any() and mask.sum() > 15
        assert change[~mask].max() <= VISIBLE < np.median(change[mask])


def test_the_pixels_follow_from_the_seed_on_every_machine():
    digest = hashlib.sha256()
    for group, kind in enumerate(("good", *KINDS)):
        image, mask = draw([7, group], kind)
        again, _ = draw([7, group], kind)
        assert (image == again).all()
        digest.update(image.tobytes() + mask.tobytes())
    assert digest.hexdigest() == DIGEST


def test_two_folders_are_alike_and_another_seed_differs(few, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if "train" in name)


def test_images_of_a_set_are_all_different(demo):
    images = {content for name, content in files_of(demo).items() if "ground_truth" not in name}
    assert len(images) == sum(COUNTS.values()) + 1  # and the marker


def test_a_finished_set_is_left_and_an_unfinished_one_drawn_anew(few, tmp_path, monkeypatch):
    write_demo(tmp_path)
    whole = files_of(tmp_path)
    image = tmp_path / "part/train/good/000.png"
    image.write_bytes(b"touched")
    write_demo(tmp_path)
    assert image.read_bytes() == b"touched"

    (tmp_path / "part" / MARKER).unlink()
    (tmp_path / "part/train/good/stray.png").write_bytes(b"half an im")
    write_demo(tmp_path)
    assert files_of(tmp_path) == whole

    def interrupt(seed, kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(llb.demo, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path, seed=1)
    assert not (tmp_path / "part" / MARKER).exists()


def test_the_set_is_neither_trivial_nor_hopeless(demo):
    """Raw patches against the same place in train: a change of light should hide what an encoder is needed to find."""
    dataset = load_category(demo, "part")
    train, test = (
        np.stack([load_image(demo / record.path, 112) for record in records]).astype(np.float32)
        for records in (dataset.train, dataset.test)
    )

    def patches(images):  # (N, 112, 112, 3) → (196, N, 192)
        return images.reshape(-1, 14, 8, 14, 8, 3).transpose(1, 3, 0, 2, 4, 5).reshape(196, -1, 192)

    nearest = []
    for known, seen in zip(patches(train), patches(test)):
        square = (seen**2).sum(1)[:, None] + (known**2).sum(1) - 2 * seen @ known.T
        nearest.append(square.min(axis=1))
    scores = np.max(nearest, axis=0)
    labels = np.array([record.label for record in dataset.test])
    auroc = np.mean(scores[labels == 1][:, None] > scores[labels == 0])
    assert 0.55 < auroc < 0.95
