"""Heat maps show where a map is hot, and contact sheets have room for every image and caption."""

import numpy as np
import pytest

from llb.pictures import contact_sheet, heat_overlay


def test_heat_colours_the_hot_places_and_leaves_the_rest_grey():
    heat = np.zeros((8, 8), np.float32)
    heat[2, 3], heat[5, 5] = 1, 5  # at the top of the scale and above it
    overlay = heat_overlay(np.full((8, 8, 3), (90, 140, 120), np.uint8), heat, 0, 1)
    colourfulness = np.ptp(overlay.astype(int), axis=2)
    assert overlay.dtype == np.uint8 and colourfulness[0, 0] < 20 < colourfulness[2, 3]
    assert (overlay[2, 3] == overlay[5, 5]).all() and (overlay[0] == overlay[7]).all()


def test_a_sheet_has_room_for_every_pair_and_puts_the_image_left_of_its_heat():
    red, level = np.full((30, 30, 3), (255, 0, 0), np.uint8), np.zeros((30, 30), np.float32)  # a map without spread
    tiles = [(red, level, (f"{i}. 0.5", "a/b.png")) for i in range(7)]
    one, seven = contact_sheet(tiles[:1], columns=3, side=50), contact_sheet(tiles, columns=3, side=50)
    assert one.width >= 100 and 300 <= seven.width < 3 * one.width
    assert 2.5 * one.height < seven.height <= 3 * one.height
    pixels = np.asarray(seven).astype(int)
    pure_red = (pixels == (255, 0, 0)).all(axis=2)
    assert pure_red.sum() == 7 * 50 * 50  # every image is whole; its heat map is grey
    heat = pixels[20, np.flatnonzero(pure_red[20])[49] + 10]  # ten pixels right of the first image
    assert np.ptp(heat) < 40 < heat.mean()


@pytest.mark.parametrize("path", ("very/" * 80 + "deep.png", "x" * 500, "line\nbreak\udcff.png", "日本/画像.png", ""))
def test_captions_stay_inside_their_tile_whatever_the_path(path):
    image, heat = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.float32)
    tiles = [(image, heat, ("1. 0.9 " + "long headline " * 9, path)), (image, heat, ("", ""))]
    sheet = np.asarray(contact_sheet(tiles, side=60)).astype(int)
    assert (sheet[:, -10:] == sheet[0, 0]).all() and (sheet[-30:, 155:] == sheet[0, 0]).all()
