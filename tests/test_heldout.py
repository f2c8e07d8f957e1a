"""The held-out materials: their layout, their masks, and that their code is independent of the pre-training images."""

from pathlib import Path

import numpy as np
import pytest

from llb.data import categories, load_category
from llb.masks import load_mask
from llb.tiny import heldout, textures
from llb.tiny.heldout import DEFECTS, MATERIALS, SIDE, VISIBLE, draw, write_heldout


def test_each_material_is_a_category_of_an_mvtec_root(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "MATERIALS", {name: MATERIALS[name] for name in ("bricks", "weave")})
    write_heldout(tmp_path)
    assert categories(tmp_path) == ["bricks", "weave"]
    dataset = load_category(tmp_path, "weave", 0.2)
    assert len(dataset.train) == 75 and sum(record.label for record in dataset.train) == 15
    assert len(dataset.test) == 30 + 8 * len(DEFECTS) // 2  # the other half is the noise pool
    for record in dataset.test:
        if record.label:
            assert 10 < load_mask(tmp_path / record.masks[0], SIDE).sum() < 0.12 * SIDE**2, record.path


@pytest.mark.parametrize("material", MATERIALS)
def test_normal_images_are_determined_by_their_seed_and_differ(material):
    images = [draw(material, seed)[0] for seed in (0, 0, 1, 2)]
    assert (images[0] == images[1]).all()
    assert all(np.abs(images[i].astype(int) - images[j]).mean() > 3 for i, j in ((1, 2), (2, 3)))


@pytest.mark.parametrize("kind", DEFECTS)
def test_the_mask_covers_the_pixels_that_the_defect_changes(kind):
    sizes = []
    for material in MATERIALS:
        normal, empty = draw(material, [5, 1])
        image, mask = draw(material, [5, 1], kind)
        change = np.abs(image.astype(int) - normal).max(axis=2)
        assert not empty.any()
        assert change[~mask].max(initial=0) < 8 * VISIBLE  # single pixels at the edge of a mask
        assert (change[~mask] > VISIBLE).sum() <= 0.3 * mask.sum()
        sizes.append(mask.sum())
    assert np.median(sizes) > 20


def test_the_code_shares_nothing_with_the_pre_training_images():
    source = Path(heldout.__file__).read_text(encoding="utf-8")
    assert not any("textures" in line for line in source.splitlines() if "import" in line)
    assert not set(MATERIALS) & set(textures.KINDS)
