"""Any picture becomes 8-bit RGB, any mask becomes bool, upright and square; what cannot be read is named."""

import errno
import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from llb.data import Dataset, Record
from llb.files import UserError
from llb.images import find_white, load_image, white_line
from llb.masks import MaskRule, is_black, load_mask, load_masks

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # dark above and bright below
TWELVE = RAMP.astype(np.uint16) << 4 | RAMP >> 4  # the same in 12 bits
PALETTE = [10, 20, 30, 200, 100, 50]


def saved(file, pixels, **options):
    if isinstance(pixels, bytes):
        file.write_bytes(pixels)
    else:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(file, **options)
    return file


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(pixels, extra=b""):
    """A PNG of 16 bits: grey with alpha, colours, or colours with alpha. pixels: uint16 (H, W, 2 to 4)."""
    height, width, channels = pixels.shape
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(pixels, *patches):
    """A TIFF by Pillow. patches: pairs of a tag's old and new value, or of bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF")
    data = file.getvalue()
    for old, new in patches:
        old, new = (part if isinstance(part, bytes) else struct.pack("<HHII", *part) for part in (old, new))
        assert data.count(old) == 1
        data = data.replace(old, new)
    return data


def tiff16(pixels, planes=1):
    """A TIFF of colours of 16 bits, made of one of 8 bits with twice the width. pixels: uint16 (H, W, 3)."""
    eights, sixteens = struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)
    width = pixels.shape[1]
    patches = [((256, 4, 1, 2 * width), (256, 4, 1, width)), (eights, sixteens)]
    patches += [((284, 3, 1, 1), (284, 3, 1, planes))] if planes > 1 else []
    return tiff(pixels.astype("<u2").view(np.uint8).reshape(len(pixels), 2 * width, 3), *patches)


def packed_12_bits(values):
    """uint16 (H, W) whose bytes are the values in 12 bits each, with zeros behind them."""
    first, second = values.ravel()[::2], values.ravel()[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    return np.frombuffer(packed.ljust(values.nbytes, b"\0"), "<u2").reshape(values.shape).copy()


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
        # 8, 10, 12 and 14 bits in files of 16 and 32, grey or in colours
        (".png", RAMP.astype(np.uint16)),
        (".tif", RAMP.astype(np.int32)),
        (".tif", RAMP.astype(np.uint16) << 2 | RAMP >> 6),
        (".png", TWELVE),
        (".tif", TWELVE),
        (".tif", TWELVE << 2 | TWELVE >> 10),
        (".png", png16(np.dstack([TWELVE] * 3))),
        (".tif", tiff16(np.dstack([TWELVE] * 3))),
        (".ppm", b"P6 16 16 65535\n" + np.dstack([TWELVE] * 3).astype(">u2").tobytes()),
        (".png", png16(np.dstack([RAMP.astype(np.uint16) * 257] * 3))),
        (".png", png16(np.dstack([RAMP.astype(np.uint16) * 257, np.full((16, 16), 65535)]))),
        # what the file declares
        (".tif", tiff(packed_12_bits(TWELVE), ((258, 3, 1, 16), (258, 3, 1, 12)))),
        (".pgm", b"P5 16 16 4095\n" + TWELVE.astype(">u2").tobytes()),
        (".pgm", b"P2 # text\n16 16 4095\n" + b" ".join(b"%d" % value for value in TWELVE.ravel())),
        (".ppm", b"P6 16 16 4095\n" + np.dstack([TWELVE] * 3).astype(">u2").tobytes()),
        (".tif", tiff(65535 - RAMP.astype(np.uint16) * 257, ((262, 3, 1, 1), (262, 3, 1, 0)))),
    ],
)
def test_greyscale_of_any_depth_is_scaled_and_not_clipped(suffix, pixels, tmp_path):
    np.testing.assert_array_equal(load_image(saved(tmp_path / f"deep{suffix}", pixels), 16), grey(RAMP))


def test_all_images_of_a_category_have_one_white_and_it_is_said(tmp_path):
    images = {
        "bright.png": TWELVE,
        "dark.png": TWELVE // 8,  # by itself an image of 10 bits
        "dark_colours.png": png16(np.dstack([TWELVE // 8] * 3)),
        "declared.pgm": b"P5 16 16 1000\n" + (TWELVE // 8).astype(">u2").tobytes(),
        "declared.png": png16(np.dstack([TWELVE // 8] * 3), extra=chunk(b"sBIT", b"\x0c" * 3)),  # scaled to 16 bits
        "float.tif": np.full((4, 4), 200, np.float32),
        "float_dark.tif": np.full((4, 4), 1, np.float32),
        "bits_8.png": RAMP,
    }
    for name, pixels in images.items():
        saved(tmp_path / name, pixels)

    def category(*names):
        records = [Record(name, None, (), "") for name in names]
        return find_white(Dataset(tmp_path, "folder", "set", tuple(records[:1]), tuple(records[1:])))

    everything = category(*images)
    assert everything.white == {"integer": 4095, "float": 255}
    assert white_line(everything) == (
        "set: floating-point images (largest value 255 is white), images of 12 bits (largest value 4095 is white)"
    )
    brightest = {name: load_image(tmp_path / name, 16, everything.white).max() for name in images}
    assert list(brightest.values()) == [255, 32, 32, 130, 1, 200, 1, 255]
    assert load_image(tmp_path / "bright.png", 16, {"integer": 1023}).max() == 255
    assert (
        category("bits_8.png").white == category("declared.pgm").white == {}
        and white_line(category("bits_8.png")) is None
    )
    saved(tmp_path / "full.png", RAMP.astype(np.uint16) * 257)
    full = category("dark.png", "full.png")
    assert full.white == {"integer": 65535} and white_line(full) is None
    assert load_image(tmp_path / "dark.png", 16, full.white).max() == 2
    with pytest.raises(UserError, match="absent.png is not there"):
        category("bits_8.png", "absent.png")


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
    for alpha in (np.zeros((16, 16)), 255 - RAMP // 2):  # zero everywhere, or nowhere: it cuts nothing out
        opaque[..., 3] = alpha
        np.testing.assert_array_equal(load_image(saved(tmp_path / "whole.png", opaque), 16), colours)
    deep = saved(tmp_path / "deep.png", Image.fromarray(RAMP.astype(np.uint16) * 257), transparency=0)
    assert (load_image(deep, 16)[..., 0] == np.where(RAMP == 0, 255, RAMP)).all()


@pytest.mark.parametrize("suffix", (".png", ".tif"))
@pytest.mark.parametrize("orientation", range(5, 9))
def test_a_mask_without_exif_that_has_the_size_of_the_stored_image_is_turned_with_it(orientation, suffix, tmp_path):
    stored = np.zeros((24, 48), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("image.png", f"image{suffix}"):
        saved(tmp_path / name, Image.fromarray(stored), exif=exif)
    saved(tmp_path / "mask.png", Image.fromarray(stored))
    with Image.open(tmp_path / "image.png") as image:
        saved(tmp_path / "upright.png", ImageOps.exif_transpose(image))
    expected = load_image(tmp_path / "upright.png", 48)
    np.testing.assert_array_equal(load_image(tmp_path / f"image{suffix}", 48), expected)  # Pillow garbles such a TIFF
    records = [Record(f"image{suffix}", 1, (mask,), "") for mask in ("mask.png", "upright.png")]
    masks, _ = load_masks(tmp_path, records, 48)
    assert (masks == (expected[..., 0] >= 128)).all() and masks.any()


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
    with pytest.raises(UserError, match=f"broken{suffix} cannot be read .it is empty"):
        load_image(file, 16)
    with pytest.raises(UserError, match="absent.png is not there"):
        load_image(tmp_path / "absent.png", 16)


def test_large_photographs_are_read(tmp_path):
    large = saved(tmp_path / "large.png", Image.new("1", (10_000, 10_000)))  # Pillow would warn: an error in tests
    assert load_image(large, 8).shape == (8, 8, 3)


def test_previews_beside_an_image_are_not_read(tmp_path):
    small = Image.new("L", (8, 8))
    for suffix, kind in ((".tif", "TIFF"), (".jpg", "MPO")):
        file = saved(tmp_path / f"a{suffix}", Image.fromarray(RAMP), format=kind, save_all=True, append_images=[small])
        assert abs(load_image(file, 16)[..., 0].astype(int) - RAMP).max() < 20, kind


PAGES = {"save_all": True, "append_images": [Image.fromarray(RAMP.T)]}


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        *((f"a.{kind}", RAMP, PAGES, "several frames or pages") for kind in ("gif", "tif", "png", "webp")),
        ("small_first.tif", RAMP[:8, :8], PAGES, "several frames or pages"),
        ("many.tif", RAMP, {"save_all": True, "append_images": [Image.new("L", (2, 2))] * 40}, "several frames"),
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", {}, "no image format"),
        (
            "lfs.png",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            {},
            "git-LFS .*git lfs pull$",
        ),
        ("a.pgm", b"P5\n16 16#" + b"x" * 5_000_000 + b"\n255\n" + bytes(256), {}, "comments in its header"),
        ("a.pgm", b"P2 1000 1000 255\n" + b"#\n" * 500_000 + b"9 " * 1_000_000, {}, "text"),
        ("a.pbm", b"P4 40000 40000\n", {}, "1600 megapixels, more than 1000"),
        ("a.pfm", b"Pf 16000 16000 -1\n", {}, "256 megapixels, more than 250"),
        ("a.pgm", b"P5 31000 31000 255\n", {}, "19 bytes do not hold 961 megapixels"),
        ("x" * 300 + ".png", None, {}, "File name too long"),
        ("planes.tif", tiff16(np.dstack([TWELVE] * 3), planes=2), {}, "separate planes"),
        ("la.png", png16(np.dstack([TWELVE, TWELVE])), {}, "transparency, and values up to 4095 in 16 bits"),
        ("rgba.png", png16(np.dstack([TWELVE] * 4)), {}, "transparency, and values up to 4095 in 16 bits"),
        ("clear.png", png16(np.dstack([TWELVE] * 3), chunk(b"tRNS", bytes(6))), {}, "transparency, and values"),
        ("lab.tif", Image.new("LAB", (4, 4)), {}, "LAB"),
        ("scans.jpg", RAMP, {"comment": b"\xff\xda" * 101}, "more than 100 scans"),
        *(("a.tif", np.full((4, 4), value, np.float32), {}, "has values from") for value in (-1, 1e6, np.nan)),
        ("a.tif", np.full((4, 4), 65536, np.int32), {}, "has values from"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_in_one_line_and_quickly(name, content, options, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        saved(file, content, **options)
    start = time.perf_counter()
    for read in (load_image, load_mask):
        with pytest.raises(UserError, match=message) as error:
            read(file, 16)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert time.perf_counter() - start < 1


def test_an_image_that_may_not_be_read_is_not_to_be_removed(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    file = saved(tmp_path / "0.png", RAMP)
    monkeypatch.setattr("llb.images._check_text", denied)  # who runs the tests may be allowed everything
    with pytest.raises(UserError, match="0.png cannot be read .Permission denied.: grant access to it$"):
        load_image(file, 16)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "device.png")
    for name, reason in (("folder", "a folder"), ("fifo", "no regular file"), ("device", "no regular file")):
        with pytest.raises(UserError, match=f"{name}.png cannot be read .it is {reason}"):
            load_image(tmp_path / f"{name}.png", 16)


def jpeg_saved_again(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return Image.open(file)


FAINT = np.pad(np.ones((20, 21), np.uint8), ((13, 31), (27, 16)))  # VisA numbers its kinds of defect 1, 2, …


def palette_mask(colours):
    image = Image.fromarray(FAINT).convert("P")
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        ("faint.png", FAINT, {}),
        ("bits.png", FAINT > 0, {}),
        ("deep.png", FAINT.astype(np.uint16), {}),
        ("full.png", FAINT * np.uint16(65535), {}),
        ("float.tif", FAINT.astype(np.float32), {}),
        ("palette.png", palette_mask([0, 0, 0, 128, 0, 0]), {}),
        ("on_white.png", palette_mask([255, 255, 255, 255, 0, 0]), {}),
        ("rgb.png", np.dstack([0 * FAINT, 0 * FAINT, FAINT]), {}),
        ("alpha.png", np.dstack([0 * FAINT + 200] * 3 + [FAINT * 255]), {}),
        ("alpha_0.png", np.dstack([FAINT * 255] * 3 + [FAINT * 0]), {}),
        # kinds, and 255 for a margin between them: no traces of a compression
        ("kinds.png", FAINT + FAINT.T * 254, {}),
        ("more_kinds.png", FAINT * (np.arange(64, dtype=np.uint8) % 5 + 1) | FAINT.T * 255, {}),
        ("ringing.jpg", FAINT * 255, {}),
        ("grey.jpg", FAINT * 100, {}),
        ("jpeg.png", FAINT * 255, {"format": "JPEG"}),
        ("mpo.jpg", FAINT * 255, {"format": "MPO", "save_all": True, "append_images": [Image.new("L", (64, 64))]}),
        ("again.png", jpeg_saved_again(FAINT * 255), {}),
        ("again_grey.png", jpeg_saved_again(FAINT * 100), {}),
        ("lossy.webp", FAINT * 255, {"quality": 60}),
        ("lossless.webp", FAINT, {"lossless": True, "exact": True}),
        ("lossy.jp2", FAINT * 255, {"quality_mode": "rates", "quality_layers": [10]}),
    ],
)
def test_every_positive_pixel_of_a_mask_is_defective_but_no_trace_of_a_compression(name, mask, options, tmp_path):
    expected = FAINT | FAINT.T if "kinds" in name else FAINT
    file = saved(tmp_path / name, mask, **options)
    np.testing.assert_array_equal(load_mask(file, 64), expected > 0)
    assert not is_black(file)


@pytest.mark.parametrize(
    ("name", "mask", "options", "message"),
    [
        ("faint.jpg", FAINT, {}, "largest value of . may be a trace"),
        ("tiny.jp2", FAINT * 255, {"quality_mode": "rates", "quality_layers": [40]}, "compressed too much"),
        ("inverted.png", 255 - FAINT * 255, {}, "the whole border"),
        ("grey.png", 128 + FAINT * 127, {}, "the whole border"),
    ],
)
def test_a_mask_that_cannot_be_told_from_its_background_is_refused(name, mask, options, message, tmp_path):
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load_mask(saved(tmp_path / name, mask, **options), 64)


def test_several_masks_are_united_and_only_known_pixels_are_judged(tmp_path):
    for name, mask in {"one.png": FAINT, "two.png": FAINT.T, "black.png": 0 * FAINT, "all.png": 1 - 0 * FAINT}.items():
        saved(tmp_path / name, mask)
    for name in "abcdef":
        saved(tmp_path / f"{name}.png", FAINT)
    records = [
        Record("a.png", 1, ("one.png", "black.png", "two.png"), "hole"),
        Record("b.png", 0, (), "good"),
        Record("c.png", 1, ("all.png",), "hole"),
        Record("d.png", 1, (), "hole"),
        Record("e.png", 1, ("black.png",), "hole"),
        Record("f.png", None, (), ""),
    ]
    masks, judged = load_masks(tmp_path, records, 64)
    assert masks.dtype == judged.dtype == bool and judged.tolist() == [True, True, True, False, False, False]
    np.testing.assert_array_equal(masks[0], (FAINT | FAINT.T) > 0)
    assert masks[2].all() and not masks[[1, 3, 4, 5]].any()
    assert is_black(tmp_path / "black.png")


def test_a_resized_mask_keeps_its_area_and_never_vanishes(tmp_path):
    block, speck = np.zeros((300, 200), np.uint8), np.zeros((300, 300), np.uint8)
    block[60:180, 50:150] = 255
    mask = load_mask(saved(tmp_path / "block.png", block), 40)
    assert mask.dtype == bool and mask.mean() == pytest.approx(0.2, abs=0.02) and mask[8:24, 10:30].all()
    assert not load_mask(saved(tmp_path / "none.png", speck), 30).any()
    speck[150, 220] = 255
    mask = load_mask(saved(tmp_path / "speck.png", speck), 30)
    assert 1 <= mask.sum() <= 4 and mask[15, 22]


def test_an_image_resized_beyond_its_size_shows_its_centre_and_so_does_its_mask(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    file, mask = saved(tmp_path / "a.png", pixels), saved(tmp_path / "mask.png", pixels[..., 0] // 128 * 255)
    assert (load_image(file, 32, resize=32) == load_image(file, 32)).all()
    for size, resize, start in ((28, 32, 2), (25, 32, 4), (29, 32, 2)):  # round half to even, as Python and torchvision
        shown = slice(start, start + size)
        assert (load_image(file, size, resize=resize) == load_image(file, resize)[shown, shown]).all()
        assert (load_mask(mask, size, MaskRule(resize)) == load_mask(mask, resize)[shown, shown]).all()


def test_a_mask_by_dinomalys_rule_is_that_of_its_release(tmp_path):
    marks = np.zeros((120, 120), np.uint8)
    marks[30:70, 41:90] = marks[118, 118] = 255
    file = saved(tmp_path / "a.png", marks)
    whole = np.asarray(Image.fromarray(marks).resize((64, 64), Image.Resampling.BILINEAR)) > 0  # Resize, ToTensor, > 0
    picked = np.floor(np.arange(32) * 56 / 32).astype(int)  # torch.nn.functional.interpolate, "nearest"
    rule = MaskRule(resize=64, any_share=True, side=32)
    mask = load_mask(file, 56, rule)
    np.testing.assert_array_equal(mask, whole[4:60, 4:60][picked][:, picked])
    assert mask.sum() > load_mask(file, 56, MaskRule(resize=64, side=32)).sum()
    # marked only outside the centre: every pixel that is shown is normal, and is judged
    saved(tmp_path / "border.png", np.pad(np.zeros((110, 110), np.uint8), ((0, 10), (0, 10)), constant_values=255))
    records = [Record("a.png", 1, ("border.png",), "hole"), Record("b.png", 0, (), "good")]
    masks, judged = load_masks(tmp_path, records, 56, MaskRule(resize=80, side=32))
    assert masks.shape == (2, 32, 32) and not masks.any() and judged.tolist() == [True, True]
