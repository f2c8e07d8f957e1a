"""Every layout gives the right paths, labels and masks; noise is drawn as asked; bad input is one helpful line."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llb.data import categories, choose_categories, load_category, recognise
from llb.files import UserError

MTD = Path(__file__).resolve().parents[2] / "shared" / "data" / "mtd"
SPLIT = "realiad_jsons_fuiad_0.0"
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other names and links")


def put(*files: Path | str) -> None:
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "grey").save(file)


def put_mvtec(root: Path, category: str = "tile", good: int = 12, defective: int = 8) -> Path:
    base = root / category
    put(*(base / f"train/good/{i:03}.png" for i in range(good)), *(base / f"test/good/{i:03}.png" for i in range(3)))
    for kind in ("crack", "hole"):
        for i in range(defective // 2):
            put(base / f"test/{kind}/{i:03}.png", base / f"ground_truth/{kind}/{i:03}_mask.png")
    return root


def put_realiad(root: Path, train: list[dict], test: list[dict], split: str = SPLIT, size: str = "realiad_256") -> Path:
    """The split's cap.json, and every image and mask that it names."""
    meta = {"prefix": "cap/", "normal_class": "OK", "pre_transform": None}
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / split / "cap.json").write_text(json.dumps({"meta": meta, "train": train, "test": test}))
    named = [entry.get(name) for entry in (*train, *test) for name in ("image_path", "mask_path")]
    put(*(root / size / "cap" / path for path in named if path not in (None, "None")))
    return root


def entry(path: str, anomaly_class: str = "OK", mask: str | None = None) -> dict:
    return {"category": "cap", "anomaly_class": anomaly_class, "image_path": path, "mask_path": mask}


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def paths_of(records) -> list[str]:
    return [record.path for record in records]


@pytest.mark.skipif(not MTD.is_dir(), reason="the Magnetic Tile Defect set is not beside this checkout")
@pytest.mark.parametrize("ratio, defective", ((0.0, 0), (0.1, 60), (0.2, 120), (0.4, 240)))
def test_a_real_set_is_read_at_every_noise_ratio(ratio, defective):
    assert recognise(MTD) == "real-iad" and categories(MTD) == ["magnetic_tile"]
    dataset = load_category(MTD, "magnetic_tile", ratio)
    assert Counter(record.label for record in dataset.train) == Counter({0: 600 - defective, 1: defective})
    assert Counter(record.label for record in dataset.test) == {0: 352, 1: 152}
    assert len({*paths_of(dataset.train), *paths_of(dataset.test)}) == 1104
    assert all((record.mask is not None) == (record.label == 1) for record in (*dataset.train, *dataset.test))


def test_the_class_and_not_the_path_labels_a_real_iad_image_and_masks_may_be_missing(tmp_path):
    train = [entry("OK/b.jpg", mask="None"), entry("NG/HS/unseen.jpg")]
    del train[1]["mask_path"]
    test = [entry("OK/marked.jpg", "ZW"), entry("NG/seen.jpg", "HS", "NG/seen.png"), entry("NG/n.jpg", "HS", "None")]
    dataset = load_category(put_realiad(tmp_path, train, test), "cap")
    assert paths_of(dataset.train) == ["realiad_256/cap/OK/b.jpg", "realiad_256/cap/NG/HS/unseen.jpg"]
    assert [(record.label, record.mask) for record in dataset.train] == [(0, None), (0, None)]
    expected = [(1, "ZW", None), (1, "HS", "realiad_256/cap/NG/seen.png"), (1, "HS", None)]
    assert [(record.label, record.kind, record.mask) for record in dataset.test] == expected


def test_the_ratio_chooses_the_split_and_without_fuiad_the_plain_json_is_the_clean_one(tmp_path):
    for ratio in (0.1, 0.4):
        put_realiad(tmp_path, [entry(f"OK/{ratio}.jpg")], [], f"realiad_jsons_fuiad_{ratio}")
    for ratio in (0.1, 0.4):
        assert paths_of(load_category(tmp_path, "cap", ratio).train) == [f"realiad_256/cap/OK/{ratio}.jpg"]
    line = error_of(load_category, tmp_path, "cap", 0.2)
    assert "--noise-ratio 0.2" in line and "0.1, 0.4" in line
    for place, split in enumerate(("realiad_jsons", "realiad_jsons/realiad_jsons", SPLIT)):  # each precedes the former
        put_realiad(tmp_path, [entry(f"OK/{place}.jpg")], [], split)
        assert paths_of(load_category(tmp_path, "cap", 0.0).train) == [f"realiad_256/cap/OK/{place}.jpg"]


def test_the_largest_image_folder_short_of_raw_is_read(tmp_path):
    for size in ("realiad_raw", "realiad_256", "realiad_1024"):
        put_realiad(tmp_path, [entry("OK/0.jpg")], [], size=size)
        assert load_category(tmp_path, "cap").train[0].path.startswith(f"{size}/")


def test_missing_and_repeated_files_and_a_damaged_json_are_named_before_any_training(tmp_path):
    train, test = [entry(f"OK/{i}.jpg") for i in range(3)], [entry("NG/3.jpg", "HS", "NG/3.png")]
    put_realiad(tmp_path, train, test)
    for name in ("OK/1.jpg", "NG/3.png"):
        (tmp_path / "realiad_256/cap" / name).unlink()
    line = error_of(load_category, tmp_path, "cap")
    assert "OK/1.jpg" in line and "2 of 5" in line
    assert "OK/0.jpg twice" in error_of(load_category, put_realiad(tmp_path, train, [*test, train[0]]), "cap")
    for text in ("{", "[]", '{"meta": {}}', '{"meta": {}, "train": [{}], "test": []}'):
        (tmp_path / SPLIT / "cap.json").write_text(text)
        assert "cap.json" in error_of(load_category, tmp_path, "cap")


def test_an_mvtec_root_and_one_of_its_categories_are_both_recognised(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path / "set", "tile"), "bottle")
    (root / "licence").mkdir()
    assert (recognise(root), categories(root), categories(root / "tile")) == ("mvtec", ["bottle", "tile"], ["tile"])
    dataset = load_category(root, "tile")
    assert paths_of(dataset.train) == [f"tile/train/good/{i:03}.png" for i in range(12)]
    assert Counter(record.kind for record in dataset.test) == {"good": 3, "crack": 4, "hole": 4}
    assert all(record.label == int(record.kind != "good") for record in dataset.test)
    single = load_category(root / "tile", "tile")
    assert [f"tile/{path}" for path in paths_of(single.train)] == paths_of(dataset.train)
    assert [record.label for record in single.test] == [record.label for record in dataset.test]


def test_masks_are_paired_by_name_and_not_by_position(tmp_path):
    masks = put_mvtec(tmp_path) / "tile/ground_truth"
    (masks / "crack/001_mask.png").unlink()
    (masks / "hole/002_mask.png").rename(masks / "hole/002.bmp")
    put(tmp_path / "tile/test/crack/photo.JPG", masks / "crack/photo.png")
    mask_of = {record.path: record.mask for record in load_category(tmp_path, "tile").test}
    assert mask_of["tile/test/crack/000.png"] == "tile/ground_truth/crack/000_mask.png"
    assert mask_of["tile/test/crack/001.png"] is None and mask_of["tile/test/good/000.png"] is None
    assert mask_of["tile/test/crack/002.png"] == "tile/ground_truth/crack/002_mask.png"
    assert mask_of["tile/test/crack/photo.JPG"] == "tile/ground_truth/crack/photo.png"
    assert mask_of["tile/test/hole/002.png"] == "tile/ground_truth/hole/002.bmp"


def test_raw_visa_follows_its_csv_and_says_what_is_wrong_with_it(tmp_path):
    images, csv = tmp_path / "candle/Data", tmp_path / "split_csv/1cls.csv"
    rows = ["object,split,label,image,mask"]
    for i in range(6):
        put(images / f"Images/Normal/{i}.JPG", images / f"Images/Anomaly/{i}.JPG", images / f"Masks/Anomaly/{i}.png")
        rows.append(f"candle,{'train' if i < 4 else 'test'},normal,candle/Data/Images/Normal/{i}.JPG,")
        rows.append(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i}.JPG,candle/Data/Masks/Anomaly/{i}.png")
    csv.parent.mkdir()
    csv.write_text("\n".join(rows) + "\n")
    assert recognise(tmp_path) == "visa" and categories(tmp_path) == ["candle"]
    dataset = load_category(tmp_path, "candle")
    assert [record.label for record in dataset.train] == [0] * 4
    assert [record.label for record in dataset.test] == [1, 1, 1, 1, 0, 1, 0, 1]
    assert dataset.test[-1].mask == "candle/Data/Masks/Anomaly/5.png"
    assert len(load_category(tmp_path, "candle", 0.2).train) == 5
    assert "split_csv" in error_of(categories, tmp_path / "candle")
    csv.write_text("image,label\nx,y\n")
    assert "object,split,label,image,mask" in error_of(categories, tmp_path)
    csv.unlink()
    assert "1cls.csv" in error_of(categories, tmp_path)


@pytest.mark.parametrize("ratio, moved", ((0.0, 0), (0.05, 1), (0.1, 1), (0.2, 3), (0.25, 4), (0.4, 8)))
def test_noise_is_the_asked_share_and_leaves_test(ratio, moved, tmp_path):
    root = put_mvtec(tmp_path)
    before, after = load_category(root, "tile"), load_category(root, "tile", ratio, seed=1)
    noise = [record for record in after.train if record.label == 1]
    assert len(noise) == moved and set(after.train) == {*before.train, *noise} and len(after.train) == 12 + moved
    assert list(after.test) == [record for record in before.test if record not in noise]
    assert set(noise) <= set(before.test)  # with their paths, kinds and masks


def test_noise_depends_on_the_seed_and_the_category_only_and_the_order_does_not_tell_it(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path, "tile", 60, 40), "tube", 60, 40)

    def noise(category, seed):
        train = load_category(root, category, 0.2, seed).train
        return [record.path.removeprefix(category) for record in train if record.label]

    assert noise("tile", 0) == noise("tile", 0)
    assert set(noise("tile", 0)) != set(noise("tile", 1)) and set(noise("tile", 0)) != set(noise("tube", 0))
    # drawn the same on every machine and in every process: no salted hash may take part
    assert sorted(noise("tile", 0))[:3] == ["/test/crack/000.png", "/test/crack/007.png", "/test/crack/008.png"]
    places = [i for i, record in enumerate(load_category(root, "tile", 0.4).train) if record.label == 1]
    assert len(places) == 40 and min(places) < 20 and 35 < np.mean(places) < 65


def test_a_ratio_that_cannot_be_had_is_refused_with_the_largest_possible(tmp_path):
    root = put_mvtec(tmp_path, good=13, defective=8)
    line = error_of(load_category, root, "tile", 0.5)
    assert "--noise-ratio 0.5" in line and line.endswith("at most 0.38")
    assert sum(record.label for record in load_category(root, "tile", 0.38).train) == 8
    for ratio in (-0.1, 1.0, 1.5, float("nan")):
        assert "--noise-ratio" in error_of(load_category, root, "tile", ratio)


def test_a_plain_folder_is_read_whole_sorted_and_without_labels(tmp_path):
    root = tmp_path / "parts"
    names = ["B.png", "Data/Images/0.png", "a/1.tiff", "a/2.JPG", "a/deep/x.bmp", "b.png"]  # Data/Images as in VisA
    put(*(root / name for name in (*reversed(names), ".hidden.png", ".cache/c.png", "run/suspects.png")))
    (root / "run/config.json").write_text('{"submodels": 3}')  # pictures of a run are no data
    (root / "a/config.json").write_text('{"camera": 7}')
    (root / "fake.png").mkdir()
    assert recognise(root) == "folder" and categories(root) == ["parts"]
    dataset = load_category(root, "parts")
    assert paths_of(dataset.train) == names and dataset.test == ()
    assert {(record.label, record.mask, record.kind) for record in dataset.train} == {(None, None, "")}
    assert "--noise-ratio" in error_of(load_category, root, "parts", 0.1)


@posix
def test_linked_sets_work_and_a_circle_of_links_ends(tmp_path):
    put_mvtec(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert len(load_category(tmp_path / "linked", "tile").test) == 11
    put(tmp_path / "far/1.png", tmp_path / "folder/0.png")
    (tmp_path / "folder/near").symlink_to(tmp_path / "far")
    (tmp_path / "folder/circle").symlink_to(tmp_path / "folder")
    assert paths_of(load_category(tmp_path / "folder", "folder").train) == ["0.png", "near/1.png"]


@posix
@pytest.mark.parametrize("name", ("a\nb.png", " a.png", "a\udcff.png"))
def test_a_name_that_no_list_can_hold_is_refused(name, tmp_path):
    put(tmp_path / "0.png")
    (tmp_path / "0.png").rename(tmp_path / name)
    assert "rename the file" in error_of(load_category, tmp_path, tmp_path.name)


def test_a_root_that_lacks_something_says_what_was_expected(tmp_path):
    assert "nowhere" in error_of(recognise, tmp_path / "nowhere")
    put(tmp_path / "one.png", tmp_path / "images/realiad_512/cap/OK/0.jpg")
    assert "is a file" in error_of(recognise, tmp_path / "one.png")
    assert "realiad_jsons_fuiad_" in error_of(categories, tmp_path / "images")
    assert "realiad_1024" in error_of(load_category, put_realiad(tmp_path / "jsons", [], []), "cap")
    (tmp_path / "empty/deep").mkdir(parents=True)
    assert all(word in error_of(recognise, tmp_path / "empty") for word in ("empty", "Real-IAD", "MVTec", "VisA"))


def test_categories_are_chosen_by_name_list_or_all(tmp_path):
    for name in ("cap", "bolt", "nut"):
        put_mvtec(tmp_path, name)
    assert choose_categories(tmp_path, "nut") == ["nut"]
    assert choose_categories(tmp_path, "nut, cap,nut") == ["nut", "cap"]
    assert choose_categories(tmp_path, "all") == ["bolt", "cap", "nut"]
    assert choose_categories(tmp_path / "nut", None) == ["nut"]
    for wanted in (None, "screw", "nut,screw", ","):
        assert "bolt, cap, nut" in error_of(choose_categories, tmp_path, wanted)
    assert "--category screw" in error_of(load_category, tmp_path, "screw")
