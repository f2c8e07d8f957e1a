"""Any picture becomes 8-bit RGB, any mask becomes bool, upright and square; what cannot be read is named."""

import numpy as np
import pytest
from PIL import Image

from llb.data import Record
from llb.files import UserError
from llb.images import load_image, load_mask, load_masks

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # dark above and bright below
PALETTE = [10, 20, 30, 200, 100, 50]


def saved(file, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, **options)
    return file


def grey(pixels):
    return np.repeat(pixels[..., None], 3, axis=2)


def coloured() -> Image.Image:
    """An image with a palette of two colours: the first above, the second below."""
    image = Image.fromarray(RAMP // 128).convert("P")
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [
        (".png", RAMP),
        (".png", RAMP.astype(np.uint16) * 257),
        (".tif", RAMP.astype(np.uint16) * 257),
        (".tif", (RAMP.astype(np.uint16) * 257).astype(">u2")),
        (".pgm", RAMP.astype(np.uint16) * 257),
        (".tif", RAMP.astype(np.int32) * 257),
        (".tif", RAMP.astype(np.float32) / 255),
        (".tif", RAMP.astype(np.float32)),
        (".tif", RAMP.astype(np.float32) * 257),
        (".tif", np.interp(RAMP, [0, 1, 254, 255], [-0.002, 1 / 255, 254 / 255, 1.004]).astype(np.float32)),
        (".png", Image.merge("LA", (Image.fromarray(RAMP), Image.new("L", (16, 16), 255)))),
    ],
)
def test_greyscale_of_any_depth_is_scaled_and_not_clipped(suffix, pixels, tmp_path):
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"deep{suffix}", pixels), 16), grey(RAMP))


def test_a_dark_16_bit_image_stays_dark_and_values_of_no_picture_are_refused(tmp_path):
    assert (load_image(saved(tmp_path / "dark.png", np.full((4, 4), 514, np.uint16)), 4) == 2).all()
    for value in (-1.0, 1e6, float("nan")):
        with pytest.raises(UserError, match="odd.tif has values from"):
            load_image(saved(tmp_path / "odd.tif", np.full((4, 4), value, np.float32)), 4)


def test_bilevel_palette_and_cmyk_become_rgb(tmp_path):
    bits = load_image(saved(tmp_path / "1.png", RAMP > 99), 16)
    np.testing.assert_array_equal(bits, grey(np.where(RAMP > 99, 255, 0)))
    palette = load_image(saved(tmp_path / "p.png", coloured()), 16)
    assert [*palette[0, 0], *palette[-1, -1]] == PALETTE
    cmyk = saved(tmp_path / "cmyk.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))
    assert load_image(cmyk, 4)[0, 0].tolist() == [255, 0, 0]


def test_an_opaque_alpha_changes_nothing_and_a_transparent_one_shows_white(tmp_path):
    colours = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=2)
    opaque = np.concatenate([colours, np.full((16, 16, 1), 255, np.uint8)], axis=2)
    np.testing.assert_array_equal(load_image(saved(tmp_path / "opaque.png", opaque), 16), colours)
    opaque[0, :, 3] = 0
    transparent = load_image(saved(tmp_path / "transparent.png", opaque), 16)
    assert (transparent[0] == 255).all() and (transparent[1:] == colours[1:]).all()
    palette = load_image(saved(tmp_path / "p.png", coloured(), transparency=bytes([0, 255])), 16)
    assert [*palette[0, 0], *palette[-1, -1]] == [255, 255, 255, *PALETTE[3:]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_images_and_masks(orientation, tmp_path):
    # how a camera stores the pixels of orientations 2 to 8
    stored = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    upright = grey(RAMP // 128 * 255)
    upright[:4, :4] = 255  # so that no two orientations look alike
    image, exif = Image.fromarray(upright), Image.Exif()
    if orientation > 1:
        image = image.transpose(Image.Transpose[stored[orientation - 2]])
    exif[0x0112] = orientation
    file = saved(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(load_image(file, 16), upright)
    np.testing.assert_array_equal(load_mask(file, 16), upright[..., 0] > 0)


def test_images_are_resized_to_a_square_by_averaging(tmp_path):
    stripes = np.tile(np.array([0, 200], np.uint8), (30, 100))  # (30, 200)
    square = load_image(saved(tmp_path / "wide.png", stripes), 20)
    assert square.shape == (20, 20, 3) and square.dtype == np.uint8
    assert abs(square.astype(int) - 100).max() <= 10  # nearest or unfiltered sampling would give 0 or 200


@pytest.mark.parametrize("suffix", (".png", ".jpg", ".tif", ".bmp"))
def test_a_truncated_damaged_or_missing_image_is_named(suffix, tmp_path):
    file = saved(tmp_path / f"broken{suffix}", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for content in (file.read_bytes()[: file.stat().st_size // 2], b"no image", b""):
        file.write_bytes(content)
        for read in (load_image, load_mask):
            with pytest.raises(UserError, match=f"broken{suffix} cannot be read .*: remove or replace it$"):
                read(file, 16)
    with pytest.raises(UserError, match="absent.png is not there"):
        load_image(tmp_path / "absent.png", 16)


def test_large_photographs_are_read_and_absurd_ones_refused(tmp_path):
    large = saved(tmp_path / "large.png", Image.new("1", (10_000, 10_000)))  # Pillow would warn: an error in tests
    assert load_image(large, 8).shape == (8, 8, 3)
    (tmp_path / "absurd.pbm").write_bytes(b"P4 40000 40000\n")
    with pytest.raises(UserError, match="absurd.pbm has 1600 megapixels"):
        load_image(tmp_path / "absurd.pbm", 8)


def test_every_positive_pixel_of_a_mask_is_defective(tmp_path):
    faint = (RAMP >= 80).astype(np.uint8)  # VisA numbers its kinds of defect 1, 2, …
    palette = Image.fromarray(faint).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    masks = {
        "faint.png": faint,
        "bits.png": faint > 0,
        "deep.png": faint.astype(np.uint16),
        "palette.png": palette,
        "rgb.png": np.stack([0 * faint, 0 * faint, faint], axis=2),
        "alpha.png": np.stack([0 * faint + 200] * 3 + [faint * 255], axis=2),
        "ringing.jpg": faint * 255,
    }
    for name, mask in masks.items():
        np.testing.assert_array_equal(load_mask(saved(tmp_path / name, mask), 16), faint > 0, err_msg=name)
    records = [Record("a.png", 1, "faint.png", "hole"), Record("b.png", 0, None, "good")]
    np.testing.assert_array_equal(load_masks(tmp_path, records, 16), [faint > 0, np.zeros((16, 16), bool)])
    for unjudged in (Record("c.png", None, None, ""), Record("c.png", 1, None, "hole")):
        assert load_masks(tmp_path, [*records, unjudged], 16) is None


def test_a_resized_mask_keeps_its_area_and_never_vanishes(tmp_path):
    block, speck = np.zeros((300, 200), np.uint8), np.zeros((300, 300), np.uint8)
    block[60:180, 50:150] = 255
    mask = load_mask(saved(tmp_path / "block.png", block), 40)
    assert mask.dtype == bool and mask.mean() == pytest.approx(0.2, abs=0.02) and mask[8:24, 10:30].all()
    assert not load_mask(saved(tmp_path / "none.png", speck), 30).any()
    speck[150, 220] = 255
    mask = load_mask(saved(tmp_path / "speck.png", speck), 30)
    assert 1 <= mask.sum() <= 4 and mask[15, 22]
