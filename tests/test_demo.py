"""The demo set follows from its seed, has the layout and the numbers that it claims, and masks that fit its defects."""

import hashlib
import os
from collections import Counter

import numpy as np
import pytest
from helpers import refuse, succeed
from PIL import Image

import llb.demo as demo_module
from llb.config import DEMO_BATCH, DEMO_FINAL_STEPS, DEMO_STEPS
from llb.data import categories, load_category
from llb.demo import COUNTS, FAULTY, KINDS, MARKER, NORMAL, SIDE, VISIBLE, demo_in, draw, write_demo, write_set
from llb.files import typed
from llb.layouts import read_root
from llb.masks import load_mask

DIGEST = "2f9659c236c467ddcb87802394553ba60904465ac3bf4f8e6b674c79264e8b2d"
FEW = dict.fromkeys(COUNTS, 2)  # images of each kind: fast to draw


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_set_has_the_layout_and_the_numbers_it_claims_and_no_two_equal_images(demo):
    assert read_root(demo).layout == "mvtec" and categories(demo) == ["part"]
    whole = load_category(demo, "part")
    assert len(whole.train) == NORMAL and len(whole.test) == 50 + FAULTY * len(KINDS)
    tests = set()
    for ratio in (0.0, 0.1, 0.2, 0.4):  # half of every kind is the noise pool, enough for all of them
        noisy = load_category(demo, "part", ratio, 0, "half")
        assert abs(np.mean([record.label for record in noisy.train]) - ratio) < 0.003
        assert Counter(r.kind for r in noisy.test) == {"good": 50} | dict.fromkeys(KINDS, FAULTY // 2)
        tests.add(noisy.test)
    assert len(tests) == 1
    files = files_of(demo)
    images = {content for name, content in files.items() if "ground_truth" not in name and name.endswith(".png")}
    assert len(images) == sum(COUNTS.values()) and sum(map(len, files.values())) < 12e6


def test_masks_cover_a_small_part_of_every_defective_image(demo):
    for record in load_category(demo, "part").test:
        assert len(record.masks) == record.label
        if record.label:
            assert 15 < load_mask(demo / record.masks[0], SIDE).sum() < 0.05 * SIDE**2, record.path


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_holds_what_the_defect_changed_and_nothing_else(kind):
    for seed in range(8):
        normal, empty = draw(seed)
        image, mask = draw(seed, kind, recurring=seed % 2 == 0)
        change = np.abs(image.astype(int) - normal).max(axis=2)
        assert not empty.any() and mask.sum() > 15
        assert change[~mask].max() <= VISIBLE < np.median(change[mask])


def test_recurring_defects_lie_at_one_place_the_others_anywhere_and_strength_is_their_contrast():
    def places(recurring):
        return np.array([np.argwhere(draw(seed, "stain", recurring)[1]).mean(axis=0) for seed in range(12)])

    assert places(True).std(axis=0).max() < 8 < 15 < places(False).std(axis=0).min()

    def change(strength):
        image = draw(3, "stain", strength=strength)[0].astype(int)
        return np.abs(image - draw(3)[0]).sum()

    assert change(0.5) == pytest.approx(change(1) / 2, rel=0.1) and change(2) == pytest.approx(2 * change(1), rel=0.1)


def test_the_pixels_follow_from_the_seed_on_every_machine(tmp_path):
    digest = hashlib.sha256()
    for group, kind in enumerate(("good", *KINDS)):
        image, mask = draw([7, group], kind)
        digest.update(image.tobytes() + mask.tobytes())
    assert digest.hexdigest() == DIGEST
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_set(tmp_path / name, FEW, draw, seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and all(a[name] != c[name] for name in a if "train" in name)


def test_a_finished_set_is_left_and_an_unfinished_one_is_drawn_from_scratch(tmp_path):
    folder = tmp_path / "part"
    write_set(folder, FEW, draw, 0)
    whole, image = files_of(folder), folder / "train/good/000.png"
    image.write_bytes(b"changed")
    write_set(folder, FEW, draw, 0)
    assert image.read_bytes() == b"changed"

    def interrupted(seed, kind):
        if kind == "dent":
            raise KeyboardInterrupt
        return draw(seed, kind)

    with pytest.raises(KeyboardInterrupt):
        write_set(folder, FEW, interrupted, 1)
    assert "not finished" in (folder / MARKER).read_text()
    write_set(folder, FEW, draw, 0)
    assert files_of(folder) == whole


def test_the_command_draws_the_asked_share_of_recurring_defects_and_spares_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "COUNTS", {"train/good": 1, "test/stain": 4})
    place, line = tmp_path / "set", ("llb.demo", "--out", tmp_path / "set")
    said = succeed(*line, "--recurring", 0.25, "--strength", 1.5)
    assert f"--data {typed(place)} --noise-ratio 0.2" in said and f"--steps {DEMO_FINAL_STEPS} --train-on" in said
    assert f"--steps {DEMO_STEPS} --batch-size {DEMO_BATCH}" in said
    for index in range(4):
        expected = draw([0, 1, index], "stain", index == 3, 1.5)[0]
        assert (np.asarray(Image.open(place / f"part/test/stain/{index:03}.png")) == expected).all()
    before = files_of(place)
    succeed(*line, "--recurring", 0.25, "--strength", 1.5)
    assert files_of(place) == before
    succeed(*line)  # other defects: drawn again
    assert (np.asarray(Image.open(place / "part/test/stain/000.png")) == draw([0, 1, 0], "stain")[0]).all()
    (tmp_path / "mine/part").mkdir(parents=True)
    (tmp_path / "mine/part/note").touch()
    assert "--out" in refuse("llb.demo", "--out", tmp_path / "mine") and files_of(tmp_path / "mine") == {
        "part/note": b""
    }


def test_the_set_in_the_cache_is_drawn_once_and_appears_whole_even_if_another_command_is_faster(tmp_path, monkeypatch):
    def write(folder):
        for place in (folder, folder.with_name(folder.name[1:17]))[: 1 + faster]:
            place.mkdir(parents=True)
            (place / "image.png").write_text(place.name[0])

    for faster in (False, True):
        cache = tmp_path / str(faster)
        monkeypatch.setattr(demo_module, "write_demo", write)
        folder = demo_in(cache)
        assert (folder / "image.png").read_text() == (folder.name[0] if faster else ".")
        monkeypatch.setattr(demo_module, "write_demo", None)  # not called again
        assert demo_in(cache) == folder and os.listdir(cache / "demo") == [folder.name]
