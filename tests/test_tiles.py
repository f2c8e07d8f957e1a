"""Which images the report shows, and that their pictures are kept; times are recorded and never in the way."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from llb import tiles
from llb.files import UserError
from llb.times import read_times, timed


def test_the_threshold_lies_between_two_groups():
    rank, kept = np.random.default_rng(0).permutation(200) + 1, np.ones(200, bool)
    kept[rank <= 40] = False
    labels = [int(place in (1, 2, 41, 190)) for place in rank]
    groups = {name: rank[indices].tolist() for name, indices in tiles.shown_suspects(rank, kept, labels).items()}
    assert groups["dropped first"] == list(range(31, 41)) and groups["kept last"] == list(range(41, 51))
    assert groups["defects kept"] == [41, 190] and groups["normal dropped"] == list(range(3, 27))
    unknown = tiles.shown_suspects(rank, np.ones(200, bool), [None] * 200)
    assert unknown.keys() == {"dropped first", "kept last"} and not len(tiles.united(unknown)), "there is no threshold"


def test_missed_defects_and_false_alarms_are_shown_the_clearest_first():
    scores, labels = np.array([5, 1, 3, 2, 4, 6.0]), [0, 1, 0, 1, 1, 0]
    groups = {name: shown.tolist() for name, shown in tiles.shown_tests(scores, labels, 2.5).items()}
    assert groups == {"missed": [1, 3], "false alarms": [5, 0, 2], "all": [5, 0, 4, 2, 3, 1]}
    for known, threshold in (([None] * 6, 2.5), (labels, None)):
        groups = tiles.shown_tests(scores, known, threshold)
        assert not len(groups["missed"]) and not len(groups["false alarms"]) and len(groups["all"]) == 6
    assert len(tiles.shown_tests(np.arange(1000.0), [None] * 1000, None)["all"]) == tiles.LARGEST
    assert tiles.outcome(1, 2.5, 2.5) == "missed" and tiles.outcome(0, 2.5, 2.5) == "passed"


def test_tiles_are_small_and_show_the_image_the_heat_and_the_outline_of_the_mask(tmp_path):
    image, mask = np.full((400, 400, 3), 120, np.uint8), np.zeros((400, 400), bool)
    mask[150:250, 150:250] = True
    heat = np.zeros((400, 400), np.float32)
    heat[:200] = 3
    tiles.write_tiles(tmp_path / "tiles-all.json", [("a.png", image, heat, mask), ("b.png", image, heat, None)])
    read = tiles.read_tiles(tmp_path / "tiles-all.json")
    assert read["high"] == 3 and (tmp_path / "tiles-all.json").stat().st_size < 40_000

    def pixels(path, name):
        content = base64.b64decode(read["tiles"][path][name].partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content))).astype(int)

    plain, outlined, hot = pixels("b.png", "image"), pixels("a.png", "image"), pixels("b.png", "heat")
    assert plain.shape == (tiles.SIDE, tiles.SIDE, 3) and np.abs(plain - 120).max() < 8
    coloured = np.ptp(outlined, axis=2) > 60
    assert coloured.any() and not coloured[65:95, 65:95].any() and not coloured[:50].any(), "around the mask only"
    assert np.ptp(hot, axis=2)[:70].mean() > 3 * np.ptp(hot, axis=2)[90:].mean()
    assert tiles.read_tiles(tmp_path / "none.json")["tiles"] == {}
    for place in range(100, 110):  # a defect of one pixel has an outline, too
        small = np.zeros((400, 400), bool)
        small[place, place] = True
        assert (tiles.outlined(np.zeros((160, 160, 3), np.uint8), small) == tiles.OUTLINE).all(axis=2).any()
    for name, advice in (
        (tiles.tiles_file("suspects"), "delete it and run stage 1 again$"),  # --overwrite would delete the run
        (tiles.tiles_file("all"), "delete it and run evaluate.py again, with --overwrite$"),
        (tiles.next_tiles_file("reviewed"), "delete it and run evaluate.py again, with --overwrite$"),
    ):
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=advice):
            tiles.read_tiles(tmp_path / name)


def test_times_add_up_over_interruptions_and_a_damaged_file_counts_as_empty(tmp_path):
    with timed(tmp_path, "bolt", "stage 1"):
        pass
    first = read_times(tmp_path)["bolt"]["stage 1"]
    with pytest.raises(KeyboardInterrupt), timed(tmp_path, "bolt", "stage 1"):
        raise KeyboardInterrupt
    with timed(tmp_path, "nut", "stage 1"):
        pass
    times = read_times(tmp_path)
    assert times["bolt"]["stage 1"]["seconds"] > first["seconds"] > 0 and times.keys() == {"bolt", "nut"}
    for text in ("{", "[]", '{"bolt": {"stage 1": {"seconds": "x"}}}', '{"bolt": 3}'):
        (tmp_path / "times.json").write_text(text)
        assert read_times(tmp_path) == {}
        with timed(tmp_path, "bolt", "stage 1", anew=True):
            pass
        assert read_times(tmp_path)["bolt"]["stage 1"]["seconds"] < 5
