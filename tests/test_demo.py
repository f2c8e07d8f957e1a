"""The demo set follows from its seed, has the layout and the numbers that it claims, and masks that fit its defects."""

import hashlib

import numpy as np
import pytest

from llb.data import categories, load_category
from llb.demo import COUNTS, KINDS, MARKER, SIDE, VISIBLE, draw, write_demo, write_set
from llb.layouts import read_root
from llb.masks import load_mask

DIGEST = "dd99ea2b1a75eb1373955c80032bf1f0bd8d125e3932ed4df08e056d0aa26501"
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
    dataset = load_category(demo, "part")
    assert len(dataset.train) == 160 and len(dataset.test) == 50 + 44 + 12 * 5
    noisy = load_category(demo, "part", 0.2)
    assert sum(record.label for record in noisy.train) == 40 and len(noisy.train) == 200
    files = files_of(demo)
    images = {content for name, content in files.items() if "ground_truth" not in name and name.endswith(".png")}
    assert len(images) == sum(COUNTS.values()) and sum(map(len, files.values())) < 10e6


def test_masks_cover_a_small_part_of_every_defective_image(demo):
    for record in load_category(demo, "part").test:
        assert len(record.masks) == record.label
        if record.label:
            assert 15 < load_mask(demo / record.masks[0], SIDE).sum() < 0.05 * SIDE**2, record.path


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_holds_what_the_defect_changed_and_nothing_else(kind):
    for seed in range(8):
        normal, empty = draw(seed)
        image, mask = draw(seed, kind)
        change = np.abs(image.astype(int) - normal).max(axis=2)
        assert not empty.any() and mask.sum() > 15
        assert change[~mask].max() <= VISIBLE < np.median(change[mask])


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
    assert not (folder / MARKER).exists()
    write_set(folder, FEW, draw, 0)
    assert files_of(folder) == whole
