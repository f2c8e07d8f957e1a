"""Lists give the right paths, labels and masks however they are written; noise is drawn as asked."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llb.data import categories, choose_categories, describe, load_category, reading_line
from llb.files import UserError
from llb.layouts import read_root

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


def put_json(root: Path, content: dict, split: str = SPLIT) -> None:
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / split / "cap.json").write_text(json.dumps(content))


def put_realiad(root: Path, train: list[dict], test: list[dict], split: str = SPLIT, size: str = "realiad_256") -> Path:
    """The split's cap.json, and every image and mask that it names."""
    meta = {"prefix": "cap/", "normal_class": "OK", "pre_transform": None}
    put_json(root, {"meta": meta, "train": train, "test": test}, split)
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
    assert read_root(MTD).layout == "real-iad" and categories(MTD) == ["magnetic_tile"]
    dataset = load_category(MTD, "magnetic_tile", ratio)
    assert Counter(record.label for record in dataset.train) == Counter({0: 600 - defective, 1: defective})
    assert Counter(record.label for record in dataset.test) == {0: 352, 1: 152}
    assert len({*paths_of(dataset.train), *paths_of(dataset.test)}) == 1104
    assert all(len(record.masks) == record.label for record in (*dataset.train, *dataset.test))


def test_the_class_and_not_the_path_labels_a_real_iad_image_and_masks_may_be_missing(tmp_path):
    train = [entry("OK/b.jpg", mask="None"), entry("NG/HS/unseen.jpg")]
    del train[1]["mask_path"]
    test = [entry("OK/marked.jpg", "ZW"), entry("NG/seen.jpg", "HS", "NG/seen.png"), entry("NG/n.jpg", "HS", "None")]
    dataset = load_category(put_realiad(tmp_path, train, test), "cap")
    assert paths_of(dataset.train) == ["realiad_256/cap/OK/b.jpg", "realiad_256/cap/NG/HS/unseen.jpg"]
    assert [(record.label, record.masks) for record in dataset.train] == [(0, ()), (0, ())]
    expected = [(1, "ZW", ()), (1, "HS", ("realiad_256/cap/NG/seen.png",)), (1, "HS", ())]
    assert [(record.label, record.kind, record.masks) for record in dataset.test] == expected


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
    for text in ("{", "[" * 99999, "[]", '{"meta": {}}', '{"meta": {}, "train": [{}], "test": []}'):
        (tmp_path / SPLIT / "cap.json").write_text(text)
        assert "cap.json" in error_of(load_category, tmp_path, "cap")


def test_an_mvtec_root_and_one_of_its_categories_are_both_recognised(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path / "set", "tile"), "bottle")
    (root / "licence").mkdir()
    assert (categories(root), categories(root / "tile")) == (["bottle", "tile"], ["tile"])
    dataset = load_category(root, "tile")
    assert paths_of(dataset.train) == [f"tile/train/good/{i:03}.png" for i in range(12)]
    assert Counter(record.kind for record in dataset.test) == {"good": 3, "crack": 4, "hole": 4}
    assert all(record.label == int(record.kind != "good") for record in dataset.test)
    single = load_category(root / "tile", "tile")
    assert [f"tile/{path}" for path in paths_of(single.train)] == paths_of(dataset.train)
    assert [record.label for record in single.test] == [record.label for record in dataset.test]


ROWS = [
    "object,split,label,image,mask",
    *(f"candle,train,normal,candle/Data/Images/Normal/{i}.JPG," for i in range(3)),
    "candle,test,normal,candle/Data/Images/Normal/3.JPG,",
    *(f"candle,test,anomaly,candle/Data/Images/Anomaly/{i}.JPG,candle/Data/Masks/Anomaly/{i}.png" for i in range(2)),
]


def put_visa(root: Path, text: str, encoding: str = "utf-8") -> Path:
    data = root / "candle/Data"
    put(*(data / f"Images/Normal/{i}.JPG" for i in range(4)))
    put(
        *(data / f"{place}/Anomaly/{i}.{end}" for i in range(2) for place, end in (("Images", "JPG"), ("Masks", "png")))
    )
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_bytes(text.encode(encoding))
    return root


# how VisA's CSV is written → the change of each line
SPELLINGS = {
    "as VisA writes it": lambda line: line,
    "semicolons": lambda line: line.replace(",", ";"),
    "tabs": lambda line: line.replace(",", "\t"),
    "quotes": lambda line: ", ".join(f'"{cell}"' for cell in line.split(",")),
    "blanks": lambda line: line.replace(",", " , "),
    "backslashes": lambda line: line.replace("/", "\\"),
    "capitals": lambda line: line.title().replace("Candle,", "candle,"),
    "0 and 1": lambda line: line.replace("normal,", "0,").replace("anomaly,", "1,"),
    "good and bad": lambda line: line.replace("normal,", "good,").replace("anomaly,", "bad,"),
    "paths with ./": lambda line: line.replace(",candle/", ",./candle/"),
    "paths from above": lambda line: line.replace(",candle/", ",VisA/candle/"),
    "paths in the category": lambda line: line.replace(",candle/", ","),
    "an index": lambda line: f"7,{line}" if "object" not in line else f",{line}",
    "nan for no mask": lambda line: f"{line}nan" if line.endswith(",") else line,
    "no comma for no mask": lambda line: line.rstrip(","),
    "a cell too many": lambda line: line if "object" in line else f"{line},",
    "empty lines": lambda line: f"{line}\n,,,,\n",
    "paths of another machine": lambda line: line.replace(",candle/", ",/home/me/VisA/candle/"),
    "words": lambda line: line.replace("normal,", "No defect,").replace("train", "training"),
    "a mask for a normal image": lambda line: f"{line}candle/Data/Masks/Anomaly/0.png" if line.endswith(",") else line,
}


@pytest.mark.parametrize("encoding, end", (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n")))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_visas_csv_is_read_however_it_is_written(spelling, encoding, end, tmp_path):
    root = put_visa(tmp_path, end.join(map(SPELLINGS[spelling], ROWS)), encoding)
    assert read_root(root).layout == "visa" and categories(root) == ["candle"]
    dataset = load_category(root, "candle")
    assert paths_of(dataset.train) == [f"candle/Data/Images/Normal/{i}.JPG" for i in range(3)]
    assert [(record.label, record.kind, record.masks) for record in dataset.train] == [(0, "good", ())] * 3
    masks = [(), *((f"candle/Data/Masks/Anomaly/{i}.png",) for i in range(2))]
    assert [(record.label, record.masks) for record in dataset.test] == list(zip((0, 1, 1), masks, strict=True))


# a line in place of VisA's second → words of the one line that refuses it
BAD_LINES = {
    "../up,train,normal,candle/Data/Images/Normal/0.JPG,": "1cls.csv, line 2: '../up' is no name",
    "a\\b,train,normal,candle/Data/Images/Normal/0.JPG,": "line 2",
    ",train,normal,candle/Data/Images/Normal/0.JPG,": "line 2: '' is no name",
    "Metrics.json,train,normal,candle/Data/Images/Normal/0.JPG,": "line 2: a run has a Metrics.json of its own",
    "candle,holdout,normal,candle/Data/Images/Normal/0.JPG,": "line 2: the split is holdout",
    "candle,train,,candle/Data/Images/Normal/0.JPG,": "line 2: the class is empty",
    "candle,train,NaN,candle/Data/Images/Normal/0.JPG,": "line 2: the class is NaN",
    "candle,train,#N/A,candle/Data/Images/Normal/0.JPG,": "line 2: the class is #N/A",
    "candle,train,normal?,candle/Data/Images/Normal/0.JPG,": "line 2: the class is normal?",
    "candle,train,-1,candle/Data/Images/Normal/0.JPG,": "line 2: the class is -1",
    "candle,train,not labeled,candle/Data/Images/Normal/0.JPG,": "line 2: the class is not labeled",
    "candle,train,normal,,": "line 2 names no image",
    "candle,train,normal,../outside.JPG,": "line 2: ../outside.JPG is listed, but lies elsewhere",
    "candle,train,normal,/etc/0.JPG,": "lies elsewhere",
    "candle,train,normal,./candle/Data/Images/Normal/1.JPG,": "Normal/1.JPG twice",
    "candle,train,normal,candle/Data/Images/Normal/9.JPG,": "1 of 8 files",
    "candle,train,normal,a,b,c,d": "line 2 has more cells",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_line_of_visas_csv_that_cannot_be_meant_is_refused_by_its_number(line, tmp_path):
    root = put_visa(tmp_path, "\n".join([ROWS[0], line, *ROWS[2:]]))
    assert BAD_LINES[line] in error_of(load_category, root, "candle")


def test_a_csv_that_is_not_visas_is_refused_and_validation_is_left_out(tmp_path):
    put_visa(tmp_path, "\n".join(ROWS).replace("train", "val", 1))
    root = read_root(tmp_path)
    dataset = load_category(root, "candle")
    assert len(dataset.train) == 2
    assert reading_line(describe(root, [dataset])).endswith(
        "left out: for validation: 1 (candle/Data/Images/Normal/0.JPG)"
    )
    (tmp_path / "candle").rename(tmp_path / "my candle")  # the CSV lies above
    assert f"give --data {tmp_path} --category 'my candle'" in error_of(read_root, tmp_path / "my candle")
    for text in (b"image,label\nx,y\n", b"", ROWS[0].encode(), b"object,split,label,image,mask\n\xff\xff\n"):
        (tmp_path / "split_csv/1cls.csv").write_bytes(text)
        assert "1cls.csv" in error_of(categories, tmp_path)


@pytest.mark.parametrize("prefix", ("cap/", None, "", "cap\\", "realiad_256/cap/"))
@pytest.mark.parametrize(
    "path", ("OK/{}.jpg", "OK\\{}.jpg", "cap/OK/{}.jpg", "realiad_256/cap/ok/{}.JPG", "D:\\x\\cap\\OK\\{}.jpg")
)
def test_real_iads_paths_are_found_from_wherever_they_are_written(prefix, path, tmp_path):
    put(*(tmp_path / f"realiad_256/cap/OK/{i}.jpg" for i in range(3)))
    entries = [entry(path.format(i), ("ok", " good ", "OK")[i], float("nan")) for i in range(3)]
    put_json(tmp_path, {"meta": {"prefix": prefix}, "train": entries[:1], "test": entries[1:2], "val": entries[2:]})
    dataset = load_category(tmp_path, "cap")
    assert paths_of((*dataset.train, *dataset.test)) == [f"realiad_256/cap/OK/{i}.jpg" for i in range(2)]
    assert {record.label for record in (*dataset.train, *dataset.test)} == {0}
    assert dataset.left_out == {"for validation": ["realiad_256/cap/OK/2.jpg"]}


@pytest.mark.parametrize("word", (None, "", "null", float("nan"), []))
def test_an_entry_without_a_class_is_refused_by_name(word, tmp_path):
    put_realiad(tmp_path, [entry("OK/0.jpg"), entry("OK/1.jpg", word)], [])
    assert "cap.json, train 1 (OK/1.jpg)" in error_of(load_category, tmp_path, "cap")


def test_single_view_lists_are_read_where_there_are_no_others_or_when_asked_for(tmp_path):
    put_realiad(tmp_path, [entry("OK/single.jpg")], [], "realiad_jsons/realiad_jsons_sv")
    assert read_root(tmp_path).layout == "real-iad-sv"
    assert paths_of(load_category(tmp_path, "cap").train) == ["realiad_256/cap/OK/single.jpg"]
    put_realiad(tmp_path, [entry("OK/five.jpg")], [])
    assert read_root(tmp_path).layout == "real-iad"
    for layout, name in ((None, "five"), ("real-iad-sv", "single")):
        assert paths_of(load_category(read_root(tmp_path, layout), "cap").train) == [f"realiad_256/cap/OK/{name}.jpg"]


@pytest.mark.parametrize("ratio, moved", ((0.0, 0), (0.05, 1), (0.1, 1), (0.2, 3), (0.25, 4)))
def test_noise_is_the_asked_share_and_the_test_set_is_the_same_at_every_ratio(ratio, moved, tmp_path):
    root = put_mvtec(tmp_path)
    before, after = load_category(root, "tile"), load_category(root, "tile", ratio, 1, "half")
    noise = [record for record in after.train if record.label == 1]
    assert len(noise) == moved and set(after.train) == {*before.train, *noise} and len(after.train) == 12 + moved
    aside = {*noise, *after.reserve}
    assert Counter(record.kind for record in aside) == {"crack": 2, "hole": 2} and len(aside) == moved + len(
        after.reserve
    )
    assert list(after.test) == [record for record in before.test if record not in aside]
    assert after.test == load_category(root, "tile", 0.25, 1).test and set(noise) <= set(before.test)
    line = reading_line(describe(read_root(root), [after]))
    rest = f"the rest of the noise pool: {4 - moved}"
    assert (rest in line) == (moved < 4) and before.reserve == () and len(before.test) == 11


def test_a_larger_ratio_takes_the_same_images_and_more_and_a_larger_pool_the_same_noise(tmp_path):
    root = put_mvtec(tmp_path, good=30, defective=40)

    def parts(ratio, pool):
        dataset = load_category(root, "tile", ratio, 0, pool)
        return {record for record in dataset.train if record.label}, set(dataset.test)

    (few, test), (more, same), (again, smaller) = parts(0.1, 20), parts(0.3, 20), parts(0.3, 30)
    assert few < more == again and test == same > smaller and len(test) - len(smaller) == 10
    assert parts(0.0, 7)[0] == set() and len(parts(0.0, 7)[1]) == 3 + 33


def test_noise_depends_on_the_seed_and_the_category_only_and_the_order_does_not_tell_it(tmp_path):
    root = put_mvtec(put_mvtec(tmp_path, "tile", 60, 80), "tube", 60, 80)

    def noise(category, seed):
        train = load_category(root, category, 0.2, seed).train
        return [record.path.removeprefix(category) for record in train if record.label]

    assert noise("tile", 0) == noise("tile", 0)
    assert set(noise("tile", 0)) != set(noise("tile", 1)) and set(noise("tile", 0)) != set(noise("tube", 0))
    # drawn the same on every machine and in every process: no salted hash may take part
    assert sorted(noise("tile", 0))[:3] == ["/test/crack/009.png", "/test/crack/020.png", "/test/crack/021.png"]
    places = [i for i, record in enumerate(load_category(root, "tile", 0.4).train) if record.label == 1]
    assert len(places) == 40 and min(places) < 20 and 35 < np.mean(places) < 65


def test_a_ratio_or_pool_that_cannot_be_had_is_refused_with_the_largest_possible(tmp_path):
    root = put_mvtec(tmp_path, good=13, defective=8)
    line = error_of(load_category, root, "tile", 0.3)
    assert "--noise-ratio 0.3" in line and line.endswith("give --noise-pool 6, or at most 0.235")
    line = error_of(load_category, root, "tile", 0.5, 0, 8)
    assert "needs 13" in line and "8 of 8" in line and line.endswith("give at most 0.38")
    assert sum(record.label for record in load_category(root, "tile", 0.38, 0, 8).train) == 8
    assert "--noise-pool 9: tile has 8" in error_of(load_category, root, "tile", 0.0, 0, 9)
    defective = put_visa(tmp_path / "visa", "\n".join(ROWS).replace("test,anomaly", "train,anomaly", 1))
    assert "defective training images of its own" in error_of(load_category, defective, "candle", 0.2)
    put_realiad(tmp_path / "iad", [entry("OK/0.jpg")], [])
    assert "--noise-pool 1: Real-IAD" in error_of(load_category, tmp_path / "iad", "cap", 0.0, 0, 1)
    for ratio in (-0.1, 1.0, 1.5, float("nan")):
        assert "--noise-ratio" in error_of(load_category, root, "tile", ratio)


def test_a_plain_folder_is_read_whole_sorted_and_without_labels(tmp_path):
    root = tmp_path / "parts"
    names = ["B.png", "Data/Images/0.png", "a/1.tiff", "a/2.JPG", "a/deep/x.bmp", "b.png"]  # Data/Images as in VisA
    put(*(root / name for name in (*reversed(names), ".hidden.png", ".cache/c.png", "run/suspects.png")))
    (root / "run/config.json").write_text('{"submodels": 3}')  # pictures of a run are no data
    (root / "a/config.json").write_text('{"camera": 7}')
    (root / "fake.png").mkdir()
    assert read_root(root).layout == "folder" and categories(root) == ["parts"]
    dataset = load_category(root, "parts")
    assert paths_of(dataset.train) == names and dataset.test == ()
    assert {(record.label, record.masks, record.kind) for record in dataset.train} == {(None, (), "")}
    assert "has no labels" in error_of(load_category, root, "parts", 0.1)


@posix
@pytest.mark.parametrize("name", ("a\nb.png", " a.png", "a\udcff.png"))
def test_a_name_that_no_list_can_hold_is_refused(name, tmp_path):
    put(tmp_path / "0.png")
    (tmp_path / "0.png").rename(tmp_path / name)
    assert "rename the file" in error_of(load_category, tmp_path, tmp_path.name)


def test_a_root_that_lacks_something_says_what_was_expected(tmp_path):
    assert "nowhere" in error_of(read_root, tmp_path / "nowhere")
    put(tmp_path / "one.png", tmp_path / "images/realiad_512/cap/OK/0.jpg")
    assert "is a file" in error_of(read_root, tmp_path / "one.png")
    assert "realiad_jsons_fuiad_" in error_of(categories, tmp_path / "images")
    assert "realiad_1024" in error_of(load_category, put_realiad(tmp_path / "jsons", [], []), "cap")
    (tmp_path / "jsons/realiad_1024").write_text("../far")  # a link, as git writes it where there are none
    assert "realiad_1024 is a file of 6 bytes" in error_of(load_category, tmp_path / "jsons", "cap")
    (tmp_path / "empty/deep").mkdir(parents=True)
    assert all(word in error_of(read_root, tmp_path / "empty") for word in ("empty", "Real-IAD", "MVTec", "VisA"))


def test_categories_are_chosen_by_name_list_or_all(tmp_path):
    for name in ("cap", "bolt", "nut"):
        put_mvtec(tmp_path, name)
    assert choose_categories(tmp_path, "nut") == ["nut"]
    assert choose_categories(tmp_path, "nut, CAP,nut") == ["cap", "nut"], "whatever the order"
    assert choose_categories(tmp_path, "all") == ["bolt", "cap", "nut"]
    assert choose_categories(tmp_path / "nut", None) == ["nut"]
    put_mvtec(tmp_path, "nut, left")
    assert choose_categories(tmp_path, "nut, left") == ["nut, left"]
    for wanted in (None, "screw", "nut,screw", ",", "../nut"):
        assert "bolt, cap, nut, nut, left" in error_of(choose_categories, tmp_path, wanted)
    assert "--category screw" in error_of(load_category, tmp_path, "screw")
