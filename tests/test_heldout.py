"""The held-out materials: the layout they claim, masks that fit, nothing in common with what `tiny` learned from."""

from pathlib import Path

import numpy as np
import pytest

import llb.heldout
import llb.textures
from llb.data import categories, load_category, load_mask
from llb.heldout import DEFECTS, MATERIALS, SIDE, VISIBLE, draw, write_heldout


def test_each_material_is_a_category_of_an_mvtec_root(tmp_path, monkeypatch):
    monkeypatch.setattr(llb.heldout, "MATERIALS", {name: MATERIALS[name] for name in ("bricks", "weave")})
    write_heldout(tmp_path)
    assert categories(tmp_path) == ["bricks", "weave"]
    dataset = load_category(tmp_path, "weave", 0.2)
    assert len(dataset.train) == 75 and sum(record.label for record in dataset.train) == 15
    assert len(dataset.test) == 30 + 8 * len(DEFECTS) - 15
    for record in dataset.test:
        if record.label:
            assert 10 < load_mask(tmp_path / record.mask, SIDE).sum() < 0.12 * SIDE**2, record.path


@pytest.mark.parametrize("material", MATERIALS)
def test_normal_images_follow_from_their_seed_and_are_all_different(material):
    images = [draw(material, seed)[0] for seed in (0, 0, 1, 2)]
    assert (images[0] == images[1]).all()
    assert all(np.abs(images[i].astype(int) - images[j]).mean() > 3 for i, j in ((1, 2), (2, 3)))


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_mask_holds_what_the_defect_changed(kind):
    sizes = []
    for material in MATERIALS:
        normal, empty = draw(material, [5, 1])
        image, mask = draw(material, [5, 1], kind)
        change = np.abs(image.astype(int) - normal).max(axis=2)
        assert not empty.any()
        assert change[~mask].max(initial=0) < 8 * VISIBLE  # a lone pixel at the edge of a mask
        assert (change[~mask] > VISIBLE).sum() <= 0.3 * mask.sum()
        sizes.append(mask.sum())
    assert np.median(sizes) > 20


def test_no_code_is_shared_with_what_tiny_learned_from():
    imports = [line for line in Path(llb.heldout.__file__).read_text(encoding="utf-8").splitlines() if "import" in line]
    assert not any("textures" in line for line in imports)
    assert not set(MATERIALS) & set(llb.textures.KINDS)
