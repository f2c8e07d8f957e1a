"""Pages of suspects and marks: what a person looks at, and says."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llb import next_page
from llb.data import Dataset
from llb.files import UserError
from llb.head import Headed
from llb.layouts import Record
from llb.marks import DEFECT, FINE, UNSAID, read_marks, write_marks
from llb.pages import DRAWN, PAGE, suspect_pages
from llb.runfiles import VERSION, write_config


def ranks_of(images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(images) + 1


@pytest.mark.parametrize("images", [1, 20, 21, 22, 24, 25, 100, 450])
def test_every_image_is_on_one_page_and_pages_are_full(images):
    pages = suspect_pages(ranks_of(images), 0)
    assert np.array_equal(np.sort(np.concatenate([page.images for page in pages])), np.arange(images))
    assert all(len(page.images) == PAGE for page in pages[:-1])


def test_a_page_holds_the_highest_of_what_is_left_and_a_few_drawn_ones():
    rank, shown = ranks_of(300), np.zeros(300, bool)
    for page in suspect_pages(rank, 0, 240):
        left = np.flatnonzero(~shown)
        expected = left[np.argsort(rank[left])][: PAGE - DRAWN]
        assert np.array_equal(page.images[~page.drawn], expected) and page.drawn.sum() == DRAWN
        assert np.all(np.diff(rank[page.images]) > 0)
        shown[page.images] = True


def test_the_first_pages_do_not_depend_on_how_many_there_are_but_on_the_seed():
    rank = ranks_of(300)
    few, many, other = (suspect_pages(rank, seed, most) for seed, most in ((3, 50), (3, 300), (4, 50)))
    assert [len(page.images) for page in few] == [24, 24, 2]
    for one, two in zip(few[:2], many):
        assert np.array_equal(one.images, two.images) and np.array_equal(one.drawn, two.drawn)
    assert not np.array_equal(few[0].images, other[0].images)


def test_every_image_outside_the_highest_is_drawn_with_the_same_chance():
    rank = np.arange(1, 63)
    draws = [suspect_pages(rank, seed, PAGE)[0] for seed in range(2000)]
    times = np.bincount(np.concatenate([page.images[page.drawn] for page in draws]), minlength=62)
    expected = 2000 * DRAWN / (62 - 21)
    assert not times[:21].any()
    assert np.abs(times[21:] - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("known", [False, True])
def test_the_next_page_holds_the_unseen_images_that_score_highest_the_first_suspect_first(tmp_path, monkeypatch, known):
    images, scores = dataset(*(f"{i}.png" for i in range(60))), np.random.default_rng(0).permutation(60) / 60
    marks = np.where(np.arange(60) % 3, UNSAID, FINE).astype(np.int8)
    write_config(tmp_path, {"llb": VERSION})
    write_marks(tmp_path / "c", images, marks)
    shown = []
    monkeypatch.setattr(next_page, "load_features", lambda *_: None)
    monkeypatch.setattr(next_page, "score_some", lambda _p, _s, _f, unseen, _t: scores[unseen][:, None])
    monkeypatch.setattr(next_page, "heat_maps", lambda _p, _s, _f, first, _t: ((i, None) for i in first))
    monkeypatch.setattr(next_page, "tile_to_judge", lambda stage, dataset, index, heat: int(index))
    monkeypatch.setattr(next_page, "write_tiles", lambda file, tiles, side: shown.append((file.name, tiles)))
    stage = SimpleNamespace(run=tmp_path, final="reviewed-padim", setup=None)
    for params in (Headed(None, None), None):  # without a head stage 1's order is the better one
        next_page.write_next_page(stage, images, params, scores if known else None)
    unseen = [i for i in np.argsort(-scores).tolist() if marks[i] == UNSAID]
    assert shown == [("tiles-next-reviewed-padim.json", tiles) for tiles in (unseen[:PAGE], [])]


def dataset(*paths: str) -> Dataset:
    return Dataset(Path(), "folder", "c", tuple(Record(path, None, (), "") for path in paths), ())


def test_marks_are_read_back_and_none_are_unsaid(tmp_path):
    images = dataset("a, b.png", "=c.png", 'd "e".png', "f.png")
    assert np.array_equal(read_marks(tmp_path, images), np.full(4, UNSAID))
    marks = np.array([DEFECT, FINE, UNSAID, DEFECT], np.int8)
    write_marks(tmp_path, images, marks)
    assert np.array_equal(read_marks(tmp_path, images), marks)


@pytest.mark.parametrize(
    "row, says", [("x.png,fine", "not a training image"), ("a.png,fine", "twice"), ("b.png,bad", "bad")]
)
def test_damaged_marks_are_refused(tmp_path, row, says):
    (tmp_path / "marks.csv").write_text(f"path,verdict\na.png,defect\n{row}\n")
    with pytest.raises(UserError, match=says):
        read_marks(tmp_path, dataset("a.png", "b.png"))
