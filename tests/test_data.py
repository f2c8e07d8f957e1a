"""Layouts, labels, noise, images and masks, on folders made for the test."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llb.data
from llb.data import categories, choose_categories, load_category, load_image, load_mask, recognise
from llb.files import UserError

MTD = Path(__file__).resolve().parents[2] / "shared" / "data" / "mtd"


def put(file: Path, image: Image.Image | None = None, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), "grey")).save(file, **options)
    return file


def put_mvtec(root: Path, category: str = "tile", good: int = 12, defective: int = 8) -> Path:
    for i in range(good):
        put(root / category / "train/good" / f"{i:03}.png")
    for i in range(3):
        put(root / category / "test/good" / f"{i:03}.png")
    for kind in ("crack", "hole"):
        for i in range(defective // 2):
            put(root / category / "test" / kind / f"{i:03}.png")
            put(root / category / "ground_truth" / kind / f"{i:03}_mask.png")
    return root


def put_realiad(root: Path, splits: dict[str, dict], size: str = "realiad_256") -> Path:
    """Folder → content of its cap.json; every image and mask that is named is put there."""
    for folder, content in splits.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "cap.json").write_text(json.dumps(content))
        for entry in (*content["train"], *content["test"]):
            put(root / size / "cap" / entry["image_path"])
            if entry["mask_path"] not in (None, "None"):
                put(root / size / "cap" / entry["mask_path"])
    return root


def entry(path: str, anomaly_class: str = "OK", mask: str | None = None) -> dict:
    return {"category": "cap", "anomaly_class": anomaly_class, "image_path": path, "mask_path": mask}


def split(train: list[dict], test: list[dict]) -> dict:
    return {"meta": {"prefix": "cap/", "normal_class": "OK", "pre_transform": None}, "train": train, "test": test}


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- Real-IAD ----


@pytest.mark.skipif(not MTD.is_dir(), reason="the Magnetic Tile Defect set is not beside this checkout")
@pytest.mark.parametrize("ratio, defective", ((0.0, 0), (0.1, 60), (0.2, 120), (0.4, 240)))
def test_a_real_set_is_read_at_every_noise_ratio(ratio, defective):
    assert recognise(MTD) == "real-iad" and categories(MTD) == ["magnetic_tile"]
    dataset = load_category(MTD, "magnetic_tile", ratio, seed=0)
    assert Counter(record.label for record in dataset.train) == Counter({0: 600 - defective, 1: defective})
    assert Counter(record.label for record in dataset.test) == {0: 352, 1: 152}
    records = (*dataset.train, *dataset.test)
    assert len({record.path for record in records}) == 1104
    assert all((record.mask is not None) == (record.label == 1) for record in records)
    assert load_mask(MTD / next(r.mask for r in dataset.test if r.mask), 64).any()


def test_the_class_and_not_the_path_labels_a_real_iad_image(tmp_path):
    hidden = entry("NG/HS/unseen.jpg")
    visible = entry("NG/HS/seen.jpg", "HS", "NG/HS/seen.png")
    odd = entry("OK/marked.jpg", "ZW")
    root = put_realiad(tmp_path, {"realiad_jsons_fuiad_0.0": split([entry("OK/b.jpg"), hidden], [odd, visible])})
    dataset = load_category(root, "cap")
    assert [record.label for record in dataset.train] == [0, 0]
    assert [(record.label, record.kind, record.mask) for record in dataset.test] == [
        (1, "ZW", None),
        (1, "HS", "realiad_256/cap/NG/HS/seen.png"),
    ]
    assert [record.path for record in dataset.train] == ["realiad_256/cap/OK/b.jpg", "realiad_256/cap/NG/HS/unseen.jpg"]


def test_masks_of_normal_images_may_be_null_or_the_word_none_or_missing(tmp_path):
    entries = [entry("OK/0.jpg"), entry("OK/1.jpg", mask="None"), entry("OK/2.jpg")]
    content = split(entries, [entry("NG/3.jpg", "HS", "None")])
    root = put_realiad(tmp_path, {"realiad_jsons_fuiad_0.0": content})
    del entries[2]["mask_path"]
    (root / "realiad_jsons_fuiad_0.0/cap.json").write_text(json.dumps(content))
    dataset = load_category(root, "cap")
    assert [record.mask for record in (*dataset.train, *dataset.test)] == [None] * 4


def test_the_ratio_picks_the_split_and_a_missing_one_lists_what_there_is(tmp_path):
    splits = {
        f"realiad_jsons_fuiad_{ratio}": split([entry(f"OK/{ratio}.jpg")], [entry("OK/t.jpg")]) for ratio in (0.1, 0.4)
    }
    root = put_realiad(tmp_path, splits)
    for ratio in (0.1, 0.4):
        assert load_category(root, "cap", ratio).train[0].path.endswith(f"OK/{ratio}.jpg")
    line = error_of(load_category, root, "cap", 0.2)
    assert "--noise-ratio 0.2" in line and "0.1, 0.4" in line


@pytest.mark.parametrize("folder", ("realiad_jsons", "realiad_jsons/realiad_jsons"))
def test_without_a_fuiad_split_the_plain_json_is_the_clean_one(folder, tmp_path):
    root = put_realiad(tmp_path, {folder: split([entry("OK/plain.jpg")], [])})
    assert load_category(root, "cap", 0.0).train[0].path == "realiad_256/cap/OK/plain.jpg"
    put_realiad(root, {"realiad_jsons_fuiad_0.0": split([entry("OK/fuiad.jpg")], [])})
    assert load_category(root, "cap", 0.0).train[0].path == "realiad_256/cap/OK/fuiad.jpg"


def test_the_largest_image_folder_short_of_raw_is_read(tmp_path):
    content = split([entry("OK/0.jpg")], [])
    put_realiad(tmp_path, {"realiad_jsons_fuiad_0.0": content}, "realiad_raw")
    for size in ("realiad_256", "realiad_1024"):
        put(tmp_path / size / "cap/OK/0.jpg")
        assert load_category(tmp_path, "cap").train[0].path.startswith(f"{size}/")


def test_missing_and_repeated_files_of_a_json_are_named_before_anything_is_trained(tmp_path):
    content = split([entry(f"OK/{i}.jpg") for i in range(3)], [entry("NG/3.jpg", "HS", "NG/3.png")])
    root = put_realiad(tmp_path, {"realiad_jsons_fuiad_0.0": content})
    for name in ("OK/1.jpg", "NG/3.png"):
        (root / "realiad_256/cap" / name).unlink()
    line = error_of(load_category, root, "cap")
    assert "OK/1.jpg" in line and "2 of 5" in line
    content["test"].append(content["train"][0])
    (root / "realiad_jsons_fuiad_0.0/cap.json").write_text(json.dumps(content))
    assert "OK/0.jpg twice" in error_of(load_category, root, "cap")


@pytest.mark.parametrize("text", ("{", "[]", '{"meta": {}}', '{"meta": {}, "train": [{}], "test": []}'))
def test_a_damaged_json_is_named(text, tmp_path):
    root = put_realiad(tmp_path, {"realiad_jsons_fuiad_0.0": split([entry("OK/0.jpg")], [])})
    (root / "realiad_jsons_fuiad_0.0/cap.json").write_text(text)
    assert "cap.json" in error_of(load_category, root, "cap")


def test_half_a_real_iad_root_says_which_half_is_missing(tmp_path):
    put(tmp_path / "images/realiad_512/cap/OK/0.jpg")
    assert "realiad_jsons_fuiad_" in error_of(categories, tmp_path / "images")
    folder = tmp_path / "jsons/realiad_jsons_fuiad_0.1"
    folder.mkdir(parents=True)
    (folder / "cap.json").write_text(json.dumps(split([], [])))
    assert "realiad_1024" in error_of(load_category, tmp_path / "jsons", "cap", 0.1)


# ---- MVTec AD and VisA ----


def test_an_mvtec_root_and_one_of_its_categories_are_both_recognised(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path / "set", "tile"), "bottle")
    (root / "licence").mkdir()
    assert recognise(root) == "mvtec" and categories(root) == ["bottle", "tile"]
    dataset = load_category(root, "tile")
    assert [record.path for record in dataset.train] == [f"tile/train/good/{i:03}.png" for i in range(12)]
    assert Counter(record.kind for record in dataset.test) == {"good": 3, "crack": 4, "hole": 4}
    assert all(record.label == int(record.kind != "good") for record in dataset.test)

    alone = load_category(root / "tile", "tile")
    assert categories(root / "tile") == ["tile"]
    assert [f"tile/{record.path}" for record in alone.train] == [record.path for record in dataset.train]
    assert [record.label for record in alone.test] == [record.label for record in dataset.test]


def test_masks_are_paired_by_name_and_not_by_position(tmp_path):
    root = put_mvtec(tmp_path)
    masks = root / "tile/ground_truth"
    (masks / "crack/001_mask.png").unlink()
    (masks / "hole/002_mask.png").rename(masks / "hole/002.bmp")
    put(root / "tile/test/crack/photo.JPG")
    put(masks / "crack/photo.png")
    found = {record.path: record.mask for record in load_category(root, "tile").test}
    assert found["tile/test/crack/000.png"] == "tile/ground_truth/crack/000_mask.png"
    assert found["tile/test/crack/001.png"] is None
    assert found["tile/test/crack/002.png"] == "tile/ground_truth/crack/002_mask.png"
    assert found["tile/test/crack/photo.JPG"] == "tile/ground_truth/crack/photo.png"
    assert found["tile/test/hole/002.png"] == "tile/ground_truth/hole/002.bmp"
    assert found["tile/test/good/000.png"] is None


def put_visa(root: Path) -> Path:
    rows = ["object,split,label,image,mask"]
    for i in range(6):
        put(root / f"candle/Data/Images/Normal/{i}.JPG")
        rows.append(f"candle,{'train' if i < 4 else 'test'},normal,candle/Data/Images/Normal/{i}.JPG,")
    for i in range(3):
        put(root / f"candle/Data/Images/Anomaly/{i}.JPG")
        put(root / f"candle/Data/Masks/Anomaly/{i}.png")
        rows.append(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i}.JPG,candle/Data/Masks/Anomaly/{i}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root


def test_raw_visa_follows_its_csv(tmp_path):
    root = put_visa(tmp_path)
    assert recognise(root) == "visa" and categories(root) == ["candle"]
    dataset = load_category(root, "candle")
    assert [record.label for record in dataset.train] == [0] * 4
    assert [record.label for record in dataset.test] == [0, 0, 1, 1, 1]
    assert dataset.test[-1].mask == "candle/Data/Masks/Anomaly/2.png"
    assert len(load_category(root, "candle", 0.2).train) == 5


def test_a_plain_folder_may_hold_a_folder_called_as_visas_is(tmp_path):
    for i in range(3):
        put(tmp_path / f"Data/Images/{i}.png")
    assert recognise(tmp_path) == "folder"


def test_raw_visa_without_its_csv_says_which_file_is_missing(tmp_path):
    root = put_visa(tmp_path)
    assert "split_csv" in error_of(categories, root / "candle")
    (root / "split_csv/1cls.csv").write_text("image,label\nx,y\n")
    assert "object,split,label,image,mask" in error_of(categories, root)
    (root / "split_csv/1cls.csv").unlink()
    assert "1cls.csv" in error_of(categories, root)


# ---- noise ----


@pytest.mark.parametrize("ratio, moved", ((0.0, 0), (0.05, 1), (0.1, 1), (0.2, 3), (0.25, 4), (0.4, 8)))
def test_noise_is_the_asked_share_and_leaves_test(ratio, moved, tmp_path):
    root = put_mvtec(tmp_path)
    before, after = load_category(root, "tile"), load_category(root, "tile", ratio, seed=1)
    noise = [record for record in after.train if record.label == 1]
    assert len(noise) == moved and len(after.train) == 12 + moved
    assert set(noise) <= set(before.test)  # with their paths, kinds and masks
    assert set(after.train).isdisjoint(after.test)
    assert set(after.train) | set(after.test) == set(before.train) | set(before.test)
    kept = [record for record in before.test if record not in noise]
    assert list(after.test) == kept


def test_noise_depends_on_the_seed_and_the_category_alone(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path, "tile", 60, 40), "tube", 60, 40)

    def noise(category, seed):
        dataset = load_category(root, category, 0.2, seed)
        return [record.path.removeprefix(category) for record in dataset.train if record.label]

    assert noise("tile", 0) == noise("tile", 0)
    assert set(noise("tile", 0)) != set(noise("tile", 1))
    assert set(noise("tile", 0)) != set(noise("tube", 0))
    # drawn the same on every machine and in every process: no salted hash may take part
    assert sorted(noise("tile", 0))[:3] == ["/test/crack/000.png", "/test/crack/007.png", "/test/crack/008.png"]


def test_the_order_of_train_does_not_tell_what_was_moved(tmp_path):
    train = load_category(put_mvtec(tmp_path, "tile", 60, 40), "tile", 0.4).train
    places = [i for i, record in enumerate(train) if record.label == 1]
    assert len(places) == 40 and min(places) < 20 and 35 < np.mean(places) < 65


def test_more_noise_than_test_has_names_the_largest_ratio(tmp_path):
    root = put_mvtec(tmp_path, good=13, defective=8)
    line = error_of(load_category, root, "tile", 0.5)
    assert "--noise-ratio 0.5" in line and line.endswith("at most 0.38")
    assert sum(record.label for record in load_category(root, "tile", 0.38).train) == 8


@pytest.mark.parametrize("ratio", (-0.1, 1.0, 1.5, float("nan")))
def test_a_ratio_that_is_no_share_is_refused(ratio, tmp_path):
    assert "--noise-ratio" in error_of(load_category, put_mvtec(tmp_path), "tile", ratio)


# ---- plain folders ----


def test_a_plain_folder_is_read_whole_sorted_and_without_labels(tmp_path):
    root = tmp_path / "parts"
    for name in ("b.png", "a/2.JPG", "a/1.tiff", "a/deep/x.bmp", ".hidden.png", ".cache/c.png", "B.png"):
        put(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "fake.png").mkdir()
    assert recognise(root) == "folder" and categories(root) == ["parts"]
    dataset = load_category(root, "parts")
    assert [record.path for record in dataset.train] == ["B.png", "a/1.tiff", "a/2.JPG", "a/deep/x.bmp", "b.png"]
    assert {(record.label, record.mask, record.kind) for record in dataset.train} == {(None, None, "")}
    assert dataset.test == ()
    assert "--noise-ratio" in error_of(load_category, root, "parts", 0.1)


def test_pictures_of_a_run_among_the_images_are_no_data(tmp_path):
    put(tmp_path / "0.png")
    put(tmp_path / "runs/demo/parts/suspects.png")
    (tmp_path / "runs/demo/config.json").write_text('{"submodels": 3}')
    put(tmp_path / "other/1.png")
    (tmp_path / "other/config.json").write_text('{"camera": 7}')
    assert [record.path for record in load_category(tmp_path, tmp_path.name).train] == ["0.png", "other/1.png"]


def link(target: Path, name: Path) -> None:
    try:
        name.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system does not let us make links")


def test_linked_sets_work_and_a_circle_of_links_ends(tmp_path):
    put_mvtec(tmp_path / "real")
    link(tmp_path / "real", tmp_path / "linked")
    assert len(load_category(tmp_path / "linked", "tile").test) == 11
    put(tmp_path / "far/1.png")
    put(tmp_path / "folder/0.png")
    link(tmp_path / "far", tmp_path / "folder/near")
    link(tmp_path / "folder", tmp_path / "folder/circle")
    paths = [record.path for record in load_category(tmp_path / "folder", "folder").train]
    assert paths == ["0.png", "near/1.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ("a\nb.png", " a.png", "a\udcff.png"))
def test_a_name_that_no_list_can_hold_is_refused(name, tmp_path):
    try:
        put(tmp_path / "0.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system refuses the name itself")
    assert "rename the file" in error_of(load_category, tmp_path, tmp_path.name)


# ---- errors of the root and the category ----


def test_a_root_without_images_says_what_was_expected(tmp_path):
    assert "nowhere" in error_of(recognise, tmp_path / "nowhere")
    file = put(tmp_path / "one.png")
    assert "is a file" in error_of(recognise, file)
    (tmp_path / "empty/deep").mkdir(parents=True)
    line = error_of(recognise, tmp_path / "empty")
    assert "empty" in line and "Real-IAD" in line and "MVTec" in line and "VisA" in line


@pytest.mark.parametrize("call", ("listdir", "access"))
def test_an_unreadable_folder_is_named(call, tmp_path, monkeypatch):
    put(tmp_path / "open/0.png")
    put(tmp_path / "locked/1.png")
    real = getattr(os, call)

    def refuse(folder, *mode):
        if Path(folder).name != "locked":
            return real(folder, *mode)
        if call == "access":
            return False
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(llb.data.os, call, refuse)
    line = error_of(load_category, tmp_path, tmp_path.name)
    assert "locked" in line and "Permission denied" in line


def test_categories_are_chosen_by_name_list_or_all(tmp_path):
    root = tmp_path
    for name in ("cap", "bolt", "nut"):
        put_mvtec(root, name)
    assert choose_categories(root, "nut") == ["nut"]
    assert choose_categories(root, "nut, cap,nut") == ["nut", "cap"]
    assert choose_categories(root, "all") == ["bolt", "cap", "nut"]
    assert choose_categories(root / "nut", None) == ["nut"]
    for wanted in (None, "screw", "nut,screw", ","):
        assert "bolt, cap, nut" in error_of(choose_categories, root, wanted)
    assert "--category screw" in error_of(load_category, root, "screw")


# ---- images ----


def ramp() -> np.ndarray:
    """uint8 (16, 16): 0…255, dark above and bright below."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2)


def colours() -> Image.Image:
    return Image.fromarray(np.stack([ramp(), ramp().T, ramp()[::-1]], axis=2))


def overshooting() -> np.ndarray:
    return np.interp(ramp(), [0, 1, 254, 255], [-0.002, 1 / 255, 254 / 255, 1.004]).astype(np.float32)


DEEP = {
    "16-bit png": (".png", ramp().astype(np.uint16) * 257),
    "16-bit tiff": (".tif", ramp().astype(np.uint16) * 257),
    "16-bit big-endian tiff": (".tif", (ramp().astype(np.uint16) * 257).astype(">u2")),
    "16-bit pgm": (".pgm", ramp().astype(np.uint16) * 257),
    "32-bit tiff": (".tif", ramp().astype(np.int32) * 257),
    "float 0…1": (".tif", ramp().astype(np.float32) / 255),
    "float 0…255": (".tif", ramp().astype(np.float32)),
    "float 0…65535": (".tif", ramp().astype(np.float32) * 257),
    "float 0…1, overshooting": (".tif", overshooting()),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled_and_not_clipped(name, tmp_path):
    suffix, pixels = DEEP[name]
    file = put(tmp_path / f"deep{suffix}", Image.fromarray(pixels))
    np.testing.assert_array_equal(load_image(file, 16), grey(ramp()))


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    file = put(tmp_path / "dark.png", Image.fromarray(np.full((4, 4), 514, np.uint16)))
    assert (load_image(file, 4) == 2).all()


def test_values_that_are_no_picture_are_refused(tmp_path):
    for value in (-1.0, 1e6, float("nan")):
        file = put(tmp_path / "odd.tif", Image.fromarray(np.full((4, 4), value, np.float32)))
        assert "odd.tif" in error_of(load_image, file, 4)


def test_greyscale_bilevel_palette_and_cmyk_become_rgb(tmp_path):
    np.testing.assert_array_equal(load_image(put(tmp_path / "l.png", Image.fromarray(ramp())), 16), grey(ramp()))
    bits = Image.fromarray(ramp() > 99)
    assert bits.mode == "1"
    expected = grey(np.where(ramp() > 99, 255, 0))
    np.testing.assert_array_equal(load_image(put(tmp_path / "1.png", bits), 16), expected)
    palette = Image.fromarray(ramp() // 128).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    loaded = load_image(put(tmp_path / "p.png", palette), 16)
    assert loaded[0, 0].tolist() == [10, 20, 30] and loaded[-1, -1].tolist() == [200, 100, 50]
    cmyk = put(tmp_path / "cmyk.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))
    assert load_image(cmyk, 4)[0, 0].tolist() == [255, 0, 0]


def test_an_opaque_alpha_changes_nothing_and_a_transparent_one_shows_white(tmp_path):
    rgb = load_image(put(tmp_path / "rgb.png", colours()), 16)
    opaque = colours()
    opaque.putalpha(255)
    np.testing.assert_array_equal(load_image(put(tmp_path / "rgba.png", opaque), 16), rgb)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.putpixel((0, 0), (9, 8, 7, 255))
    loaded = load_image(put(tmp_path / "half.png", half), 4)
    assert loaded[0, 0].tolist() == [9, 8, 7] and loaded[3, 3].tolist() == [255, 255, 255]
    la = Image.merge("LA", (Image.fromarray(ramp()), Image.new("L", (16, 16), 255)))
    np.testing.assert_array_equal(load_image(put(tmp_path / "la.png", la), 16), grey(ramp()))
    palette = Image.fromarray(ramp() // 128).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    loaded = load_image(put(tmp_path / "p.png", palette, transparency=bytes([0, 255])), 16)
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[-1, -1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_images_and_masks(orientation, tmp_path):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the stored pixels; a viewer turns them back clockwise
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(grey(ramp() // 128 * 255))
    upright.paste((255, 255, 255), (0, 0, 4, 4))  # so that no two orientations look alike
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = put(tmp_path / "turned.png", stored, exif=exif)
    np.testing.assert_array_equal(load_image(file, 16), np.asarray(upright))
    np.testing.assert_array_equal(load_mask(file, 16), np.asarray(upright)[..., 0] > 0)


def test_images_are_resized_to_a_square_by_averaging(tmp_path):
    stripes = np.tile(np.array([0, 200], np.uint8), (30, 100))  # (30, 200)
    loaded = load_image(put(tmp_path / "wide.png", Image.fromarray(stripes)), 20)
    assert loaded.shape == (20, 20, 3) and loaded.dtype == np.uint8
    assert abs(loaded.astype(int) - 100).max() <= 10  # nearest or unfiltered sampling would give 0 or 200


@pytest.mark.parametrize("suffix", (".png", ".jpg", ".tif", ".bmp"))
def test_a_truncated_image_is_named(suffix, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    file = put(tmp_path / f"broken{suffix}", noise)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = error_of(load_image, file, 16)
    assert f"broken{suffix} cannot be read" in line and line.endswith("remove or replace it")
    assert "truncated" in line or suffix != ".jpg"


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.png", "empty.jpg", "absent.png"):
        assert name in error_of(load_image, tmp_path / name, 16)
        assert name in error_of(load_mask, tmp_path / name, 16)


def test_large_photographs_are_read_and_absurd_ones_refused(tmp_path, monkeypatch):
    file = put(tmp_path / "large.png", Image.new("1", (10_000, 10_000)))  # Pillow would warn, and warnings are errors
    assert load_image(file, 8).shape == (8, 8, 3)
    monkeypatch.setattr(llb.data, "MAX_PIXELS", 10**7)
    line = error_of(load_image, file, 8)
    assert "large.png" in line and "100 megapixels" in line


# ---- masks ----


def test_every_positive_pixel_of_a_mask_is_defect(tmp_path):
    faint = (ramp() >= 80).astype(np.uint8)  # VisA numbers its kinds of defect 1, 2, …
    palette = Image.fromarray(faint).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    masks = {
        "faint.png": Image.fromarray(faint),
        "bits.png": Image.fromarray(faint > 0),
        "deep.png": Image.fromarray(faint.astype(np.uint16)),
        "palette.png": palette,
        "rgb.png": Image.fromarray(np.stack([0 * faint, 0 * faint, faint], axis=2)),
        "alpha.png": Image.fromarray(np.stack([0 * faint + 200] * 3 + [faint * 255], axis=2)),
        "ringing.jpg": Image.fromarray(faint * 255),
    }
    for name, mask in masks.items():
        np.testing.assert_array_equal(load_mask(put(tmp_path / name, mask), 16), faint > 0, err_msg=name)


def test_a_resized_mask_keeps_its_area_and_never_vanishes(tmp_path):
    block = np.zeros((300, 200), np.uint8)
    block[60:180, 50:150] = 255
    mask = load_mask(put(tmp_path / "block.png", Image.fromarray(block)), 40)
    assert mask.dtype == bool and mask.shape == (40, 40)
    assert mask.mean() == pytest.approx(0.2, abs=0.02) and mask[8:24, 10:30].all()

    speck = np.zeros((300, 300), np.uint8)
    speck[150, 220] = 255
    mask = load_mask(put(tmp_path / "speck.png", Image.fromarray(speck)), 30)
    assert 1 <= mask.sum() <= 4 and mask[15, 22]
    assert not load_mask(put(tmp_path / "none.png", Image.new("L", (300, 300))), 30).any()
