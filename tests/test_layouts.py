"""Each public image set is read as it unpacks, by names alone; one with masks or known defects is no plain folder."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llb.data import categories, choose_categories, describe, load_category, reading_line
from llb.files import UserError
from llb.layouts import LAYOUTS, read_root
from llb.tree import walk

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other names and links")


def spelled(text: str) -> list[str]:
    """Words, with a{b,c} for ab ac."""
    match = re.search(r"(\S*)\{([^}]*)\}(\S*)", text)
    if not match:
        return text.split()
    several = " ".join(f"{match[1]}{middle}{match[3]}" for middle in match[2].split(","))
    return spelled(text[: match.start()] + several + text[match.end() :])


def plant(root: Path, text: str) -> Path:
    """Draw the images that `text` names, grey; -name: black; name=: an empty file of any kind."""
    for name in spelled(text):
        file = root / name.removeprefix("-").removesuffix("=")
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("="):
            file.touch()
        else:
            Image.new("L", (4, 4), 0 if name.startswith("-") else 99).save(file, "PNG")
    return root


# set → files, layout and categories, training images with the defective ones, normal test images,
# defective test images with their masks, and how many are left out for what
SETS = {
    "MVTec AD": (
        "{a/train/good/{0,1},b/train/good/0,b/test/0,a/test/{good,cut}/0,a/ground_truth/cut/0_mask}.png a/readme.txt=",
        ("mvtec a b", 2, 0, 1, "a/test/cut/0.png a/ground_truth/cut/0_mask.png", {"not images": 1}),
    ),
    "one category of it": (
        "train/good/{0,1}.png test/{good,cut}/0.png ground_truth/cut/0_mask.png",
        ("mvtec set", 2, 0, 1, "test/cut/0.png ground_truth/cut/0_mask.png", {}),
    ),
    "MVTec LOCO": (
        "a/{train,validation,test}/good/{0,1}.png a/test/cut/{0,1}.png a/ground_truth/cut/{0/{0,1},1/0}.png",
        (
            "mvtec a",
            *(2, 0, 2),
            "a/test/cut/0.png a/ground_truth/cut/0/0.png+a/ground_truth/cut/0/1.png "
            "a/test/cut/1.png a/ground_truth/cut/1/0.png",
            {"for validation": 2},
        ),
    ),
    "MVTec 3D-AD": (
        "a/{train,test}/{good,cut}/{rgb/0.png,xyz/0.tiff} a/test/{good,cut}/gt/0.png",
        (
            "mvtec a",
            *(1, 0, 1),
            "a/test/cut/rgb/0.png a/test/cut/gt/0.png",
            {"outside the layout": 3, "in train, defective by their folder": 2, "masks of normal images": 1},
        ),
    ),
    "MVTec AD 2": (
        "a/a/{train,validation,test_public}/good/0.png a/a/test_public/bad/0.png a/a/test_private/0.png "
        "a/a/test_public/ground_truth/bad/0_mask.png b/b/train/good/0.png",
        (
            "mvtec a b",
            *(1, 0, 1),
            "a/a/test_public/bad/0.png a/a/test_public/ground_truth/bad/0_mask.png",
            {"for validation": 1, "for test without labels": 1},
        ),
    ),
    "BTAD": (
        "01/train/ok/0.bmp 01/test/{ok,ko}/0.bmp 01/ground_truth/ko/0.png",
        ("mvtec 01", 1, 0, 1, "01/test/ko/0.bmp 01/ground_truth/ko/0.png", {}),
    ),
    "BMAD": (
        "a/train/good/{0,1}.png a/test/{good,Ungood}/{img,label}/0.png",
        ("mvtec a", 2, 0, 1, "a/test/Ungood/img/0.png a/test/Ungood/label/0.png", {"masks of normal images": 1}),
    ),
    "VAD": (
        "a/{train,test}/{good,bad}/{0,1}.png a/test/bad/scratch.png",
        (
            "mvtec a",
            *(2, 0, 2),
            "a/test/bad/0.png - a/test/bad/1.png - a/test/bad/scratch.png -",
            {"in train, defective by their folder": 2},
        ),
    ),
    "AeBAD": (
        "a/train/good/{u,v}/0.png a/test/{good,cut}/u/0.png a/ground_truth/cut/u/0.png",
        ("mvtec a", 2, 0, 1, "a/test/cut/u/0.png a/ground_truth/cut/u/0.png", {}),
    ),
    "AeBAD, a video": (
        "a/train/good/u/0.png a/test/{u,v}/{good,cut}/0.png a/test/hole/{rgb,normals}/0.png a/test/bad/ok/1.png "
        "a/test/{good,dent}/normal/2.png "
        "a/ground_truth/v/cut/0.png",
        (
            "mvtec a",
            *(1, 0, 3),
            "a/test/bad/ok/1.png - a/test/dent/normal/2.png - a/test/hole/rgb/0.png - "
            "a/test/u/cut/0.png - a/test/v/cut/0.png a/ground_truth/v/cut/0.png",
            {"outside the layout": 1},
        ),
    ),
    "ImageFolder, and other capitals": (
        "Train/{Normal,Cut}/0.PNG Test/{Normal,Cut}/0.PNG Ground_Truth/CUT/0_Mask.PNG",
        (
            "mvtec set",
            *(1, 0, 1),
            "Test/Cut/0.PNG Ground_Truth/CUT/0_Mask.PNG",
            {"in train, defective by their folder": 1},
        ),
    ),
    "categories below the parts": (
        "{train,test}/{a,b}/good/0.png test/a/{cut,hole}/0.png masks/a/cut/0-mask.png",
        ("mvtec a b", 1, 0, 1, "test/a/cut/0.png masks/a/cut/0-mask.png test/a/hole/0.png -", {}),
    ),
    "masks that lie in no kind's folder, or by the images": (
        "a/train/good/{0,1}.png a/test/{cut,hole}/{images,anomaly_mask}/0.png a/test/dent/1{,_seg}.png a/test/x/2.png "
        "a/ground_truth/2.png a/test/bad_label/mask_3.png a/test/bad_label/3.png a/train/good/{u/masks,msk,lbl}/0.png",
        (
            "mvtec a",
            *(2, 0, 0),
            "a/test/bad_label/3.png a/test/bad_label/mask_3.png "
            "a/test/cut/images/0.png a/test/cut/anomaly_mask/0.png a/test/dent/1.png a/test/dent/1_seg.png "
            "a/test/hole/images/0.png a/test/hole/anomaly_mask/0.png a/test/x/2.png a/ground_truth/2.png",
            {"masks of normal images": 3},
        ),
    ),
    "other words for normal and defective": (
        "a/training/{gut,Ausschuss}/0.png a/testing/{gut,No_Defect,OK_01,不良品}/0.png b/train/良品/0.png "
        "c/train/i.O./0.png d/train/okParts/{0,1}/2.png",
        ("mvtec a b c d", 1, 0, 3, "a/testing/不良品/0.png -", {"in train, defective by their folder": 1}),
    ),
    "categories that are called like parts": (
        "{test,mask}/train/good/0.png {test,mask}/test/cut/0.png {test,mask}/ground_truth/cut/0_mask.png",
        ("mvtec mask test", 1, 0, 0, "mask/test/cut/0.png mask/ground_truth/cut/0_mask.png", {}),
    ),
    "VisA without its CSV": (
        "a/Data/Images/Normal/{00,01,02,03,04,05,06,07,08,09,10,11}.JPG a/Data/{Images,Masks}/Anomaly/0.png a/a.csv=",
        ("visa a", 10, 0, 2, "a/Data/Images/Anomaly/0.png a/Data/Masks/Anomaly/0.png", {"not images": 1}),
    ),
    "KolektorSDD2": (
        "{train,test}/{1,2}.png -{train,test}/1_GT.png {train,test}/2_GT.png train/3.png Val/{4,4_GT}.png",
        (
            "ksdd2 set",
            *(2, 1, 1),
            "test/2.png test/2_GT.png",
            {"for validation": 2, "without a mask that gives the label": 1},
        ),
    ),
    "KolektorSDD": (
        "kos01/Part{0,1}.jpg -kos01/Part0_label.bmp kos01/Part1_label.bmp",
        ("ksdd set", 2, 1, 0, "", {}),
    ),
    "DAGM 2007": (
        "Class{1,2}/{Train,Test}/{1,2}.PNG Class1/{Train,Test}/Label/2_label.PNG Class1/Train/Label/Labels.txt=",
        ("dagm Class1 Class2", 2, 1, 1, "Class1/Test/2.PNG Class1/Test/Label/2_label.PNG", {"not images": 1}),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_as_it_unpacks(name, tmp_path):
    files, expected = SETS[name]
    root = read_root(plant(tmp_path / "set", files))
    names = categories(root)
    dataset = load_category(root, names[0])
    test = [f"{record.path} {'+'.join(record.masks) or '-'}" for record in dataset.test if record.label]
    left_out = {reason: of_reason["count"] for reason, of_reason in describe(root, [dataset])["left_out"].items()}
    labels = [record.label for record in dataset.train]
    normal = Counter(record.label for record in dataset.test)[0]
    assert (" ".join([root.layout, *names]), len(labels), sum(labels), normal, " ".join(test), left_out) == expected
    assert all((record.kind == "good") == (record.label == 0) for record in (*dataset.train, *dataset.test))
    assert all(record.masks == () for record in dataset.test if not record.label)


# what a tree looks like → files, and words of the one line that refuses it
REFUSED = {
    "masks in a folder": ("{img,ground_truth}/{0,1}.png", "masks in ground_truth/ (2 of the images)"),
    "masks beside images": ("{0,1}.png {0,1}_mask.png", "masks beside images (0_mask.png; 2 of the images)"),
    "masks in short": ("{images,msk}/{0,1}.png", "masks in msk/ (2 of the images)"),
    "labels in short, beside images": ("{0,1}.jpg {0,1}_lbl.png", "masks beside images (0_lbl.png; 2 of the images)"),
    "annotations in MATLAB's format": (
        "image/{0,1}.jpg groundTruth/{0,1}.mat=",
        "annotations in groundTruth/ (of 2 images",
    ),
    "annotations of two kinds": ("x/{0,1}.jpg x/Annotations/cut/{0,1,2}.xml=", "in x/Annotations/cut/ (of 2 images)"),
    "maps drawn over images": ("{images,heatmaps}/{0,1}.png", "masks in heatmaps/ (2 of the images)"),
    "such maps beside images": ("{0,1}.jpg {0,1}_overlay.png", "masks beside images (0_overlay.png"),
    "such maps in train/good": ("a/train/good/{0,overlay/0}.png", "a/train/good: masks in overlay/", "--layout mvtec"),
    "such maps in a defect's kind": ("a/train/good/0.png a/test/cut/{0,overlay/0}.png", "a/test/cut: masks beside"),
    "depth": ("{rgb,depth}/{0,1}.png", "depth/ beside rgb/"),
    "points": ("rgb/{0,1}.png xyz/{0,1}.tiff", "maps in xyz/ beside rgb/"),
    "depth beside images": ("{0,1}_{image_0,depth}.png", "maps of depth or normals beside images (0_depth.png; 2 of"),
    "depth below images": ("x/{0,1,depth/0}.png", "maps in x/depth/ beside x/0.png"),
    "normals are maps": ("x/{color,normals}/0.png", "maps in x/normals/ beside x/color/", "images alone, or"),
    "normals of the surface": ("{rgb,depth,normal}/{0,1}.png", "maps in depth/ beside rgb/. Give", "images alone, or"),
    "normals are images beside images": ("images/{0,1}.png normals/{2,3}.png", "normals/", "as --data {root}/normals"),
    "normals are images": ("{normals,defects}/0.png", "normals/ beside defects/", "{root}/normals"),
    "depth in train/good": (
        "a/train/good/{color,infrared,depth}/0.png",
        "a/train/good/color: maps in depth/ beside color/",
    ),
    "normals in train/good": ("a/train/good/{0,0_normals}.png", "beside images (0_normals.png; 1 of the images)"),
    "masks of any name": ("x/images/u/{0,1,2}.jpg x/binary/u/{1,2}.png", "image and mask (x/binary/ and x/images/)"),
    "masks of the same name": ("cut/{0,1}.{jpg,png}", "cut/0.*; 2 pairs"),
    "train beside test": ("train/{0,1}.png test/0.png", "train/ beside test/", "{root}/train"),
    "a classification set": ("{train,val}/{cat,dog}/0.png", "train/ beside val/"),
    "OK beside NG of train": ("x/{train_ok,train_ng}/{0,1}.png", "train_ok/ beside x/train_ng/", "{root}/x/train_ok"),
    "good beside bad of test": ("{Good_test,Bad_test}/0.png", "Good_test/ beside Bad_test/"),
    "train and labels in names": ("train_{ok,ng}_1.png", "train_ok_1.png and train_ng_1.png"),
    "defects for test": ("{0,1}.png test_defects/0.png", "defects in test_defects/ (1 of the images)"),
    "OK beside NG": ("{OK,NG}/{0,1}.png", "OK/ beside NG/", "{root}/OK", "--layout folder"),
    "ok beside not ok": ("{ok,not_ok}/{0,1}.png", "ok/ beside not_ok/"),
    "good beside kinds": ("x/{good,cut,hole}/{0,1}.png", "x/good/ beside x/cut/"),
    "good beside images": ("good/{0,1}.png 2.png", "good/ beside 2.png"),
    "a folder of defects": ("{0,1}.png x/defects/0.png", "defects in x/defects/ (1 of the images)"),
    "classes of other names": ("MT_{Blowhole,Free}/0.jpg", "MT_Blowhole/"),
    "in German": ("{iO,niO}/0.png", "iO/ beside niO/", "{root}/iO"),
    "in Chinese": ("{合格,不合格}/0.png", "{root}/合格"),
    "a word for not": ("{nonDefective,Defective}/0.png", "{root}/nonDefective"),
    "SDNET2018": ("D/{CD,UD}/{0,1}.jpg W/{CW,UW}/0.jpg", "D/CD/ beside D/UD/, W/CW/ beside W/UW/"),
    "a part of SDNET2018": ("x/W/{CW,UW}/0.jpg x/0.jpg", "x/W/CW/ beside x/W/UW/"),
    "yes and no": ("{yes,no}/0.png", "no/ beside yes/"),
    "good parts beside bad": ("{goodparts,badparts}/0.png", "goodparts/ beside badparts/", "{root}/goodparts"),
    "parts in Chinese": ("{OK品,NG品}/0.png", "OK品/ beside NG品/"),
    "samples in Chinese": ("x/{无瑕疵样本,瑕疵样本}/0.png", "x/无瑕疵样本/ beside x/瑕疵样本/", "{root}/x/无瑕疵样本"),
    "pictures in Chinese": ("{OK图,NG图片}/0.png", "OK图/ beside NG图片/"),
    "one sign": ("{良,不良}/0.png", "良/ beside 不良/"),
    "regular": ("{regular,irregular}/0.png", "regular/ beside irregular/"),
    "a golden sample": ("{golden,test}/0.png", "golden/ beside test/", "{root}/golden"),
    "classes by number": ("x/{0,1}/{0,1}.png", "x/0/ beside x/1/"),
    "templates": ("x/{0,1}_{temp,test}.jpg", "templates beside x/0_test.jpg"),
    "labels in names": ("cast_{ok,def}_0.png", "cast_ok_0.png and cast_def_0.png"),
    "defects in names": ("part_{0,1,2}{,_scratch}.jpg", "defects by name (part_0_scratch.jpg; 3 of 6)"),
    "masks in camel case": ("{JPEGImages,SegmentationClass}/0.png", "masks in SegmentationClass/"),
    "years in names": ("{train2017,val2017}/0.png", "{root}/train2017"),
    "masks in parts, too": ("{gtFine,leftImg8bit}/{train,val}/0.png", "{root}/leftImg8bit/train,"),
    "kinds in train": ("{train,test}/{ok_front,def_front}/0.png", "{root}/train/ok_front,"),
    "defects in train/good": ("a/train/good/{OK,NG}/0.png", "a/train/good/NG: OK/ beside NG/", "--layout mvtec"),
    "defects in names there": ("a/train/good/{0,0_bad}.png", "a/train/good: defects by name (0_bad.png; 1 of 2)"),
    "masks in train/good": ("a/train/good/{0,1}.{jpg,png}", "a/train/good: two files of one name"),
    "one level too high": ("mvtec/a/train/good/0.png", "{root}/mvtec (mvtec)"),
    "one level too high, to be quoted": ("m(1)/a/train/good/0.png", "--data '{root}/m(1)' (mvtec)"),
    "OK beside NG, to be quoted": ("x(1)/{OK,NG}/0.png", "--data '{root}/x(1)/OK',"),
    "two levels too high": ("x/y/kos01/Part0{,_label}.jpg", "{root}/x/y (ksdd)"),
    "two sets": ("x/a/train/good/0.png y/a/Data/Images/Normal/0.jpg", "{root}/x (mvtec)", "{root}/y (visa)"),
    "two layouts": ("a/train/good/0.png b/Data/Images/Normal/0.jpg", "--layout mvtec or visa"),
    "a category in a category": ("{,a/}train/good/0.png", "train and a/train", "move"),
    "Real-IAD without its lists": ("a/OK/S0001/a_0001_OK_C1_2023.jpg", "without its JSON files", "--layout folder"),
    "one mask for two images": ("a/train/good/0.png a/test/b/0.{png,jpg} a/ground_truth/b/0_mask.png", "rename"),
    "no image that is read": ("a/{0,1}.heic=", "holds no images (in a format that is not read: 2"),
    "a run": ("part/{scores.csv,purified.txt}= part/suspects.png config.json=", "is a run of llb"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tree_that_looks_like_more_than_a_folder_of_images_is_refused_in_one_line(name, tmp_path):
    files, *words = REFUSED[name]
    plant(tmp_path, files)
    if name == "a run":
        (tmp_path / "config.json").write_text('{"llb": 1}')
    with pytest.raises(UserError) as caught:
        choose_categories(tmp_path, "all")
    assert all(word.format(root=tmp_path) in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert name != "defects in train/good" or len(read_root(tmp_path, "mvtec").sets["a"][0]) == 2
    if "looks like" in str(caught.value):  # said outright, every image is one for training
        dataset = load_category(read_root(tmp_path, "folder"), tmp_path.name)
        images = [name for name in spelled(files) if not name.endswith("=")]
        assert len(dataset.train) == len(images) and {record.label for record in dataset.train} == {None}


@pytest.mark.parametrize(
    ("files", "kinds", "note"),
    [
        ("test/bent/{normal,dark}/0.png ground_truth/bent/{normal,dark}/0.png", {"bent": 2, "good": 1}, ""),
        ("test/hole/normal/0.png", {"hole": 1, "good": 1}, ""),
        ("test/bent/{normal,dark}/0.png", {"good": 2, "dark": 1}, "test/bent"),
        ("test/{u/{good,cut},v/good}/{a,b}/0.png", {"good": 5, "cut": 2}, "test/u, test/v"),
    ],
    ids=["a kind's lights, by the masks", "its only light", "a camera, or lights", "cameras, one without defects"],
)
def test_a_camera_among_the_kinds_is_said_and_is_none_by_masks_of_its_normal_images(files, kinds, note, tmp_path):
    root = read_root(plant(tmp_path, f"{{train,test}}/good/0.png {files}"))
    _, test = root.sets[tmp_path.name]
    assert Counter(record.kind for record in test) == kinds
    assert root.notes == ((f"read as a video or camera, its folders as kinds: {note}",) if note else ())


def test_image_sets_below_a_root_that_is_one_are_named_as_not_read(tmp_path):
    plant(tmp_path, "cap/{train,test}/{good,cut}/{rgb,xyz}/0.png sets/{a,b}/train/good/0.png k/train/0{,_GT}.png")
    root = read_root(tmp_path)
    assert list(root.sets) == ["cap"]
    assert root.notes == (f"not read: --data {tmp_path}/k (ksdd2), --data {tmp_path}/sets (mvtec)",)
    assert root.notes[0] in reading_line(describe(root, [load_category(root, "cap")]))
    assert read_root(tmp_path / "cap").notes == read_root(tmp_path / "sets").notes == ()


def test_masks_among_the_images_of_a_category_that_is_not_chosen_stop_nothing(tmp_path):
    plant(tmp_path, "{cap,nut}/train/good/{0,1}.png cap/train/good/0_heatmap.png")
    assert choose_categories(tmp_path, "nut") == ["nut"] and len(load_category(tmp_path, "nut").train) == 2
    for choose in (choose_categories, load_category):
        with pytest.raises(UserError, match="0_heatmap.png; 1 of the images.*or leave cap out with --category"):
            choose(tmp_path, "cap")


# files, the folder of them that is given, and words of the line that refuses it, for what lies around it
AROUND = {
    "masks": ("bottle/{train/good,ground_truth/cut}/0.png", "bottle/ground_truth", "hold masks", "{root}/bottle;"),
    "a kind's masks": ("bottle/{train/good,ground_truth/cut}/0.png", "bottle/ground_truth/cut", "{root}/bottle;"),
    "masks beside images": (
        "images/1.png Mask_images/0.png",
        "Mask_images",
        "hold masks, as it lies beside images/: give --data {root}/images;",
    ),
    "labels of images": ("images/{a/0,a/1,2}.png seg/{a/{0,1}_seg,x}.png", "seg/a", "seg/ seems to hold masks, as it"),
    "images for test": (
        "{train/images,valid}/0.png",
        "valid",
        "hold the images for test",
        "beside train/",
        "{root}/train;",
    ),
    "a kind for test": ("a/{train/good,test/cut,test/good}/0.png", "a/test/good", "test/ seems to hold", "{root}/a;"),
    "a kind's masks below its images": (
        "a/train/good/0.png a/test/cut/{rgb,gt}/0.png",
        "a/test/cut/gt",
        "gt/ seems to hold masks, as it lies beside rgb/: give --data {root}/a;",
    ),
    "masks of images for test": ("test/cut/{rgb,gt}/0.png", "test/cut/gt", "rgb/: give the folder of the training"),
    "defects beside no images": ("fail/0.png good/x.txt=", "fail", "beside good/: give the folder of the training"),
    "good ones for test": ("a/{train/good,test_public/{bad,good}}/0.png", "a/test_public", "--data {root}/a;"),
    "defects": ("{OK,NG}/0.png", "NG", "hold defects, as it lies beside OK/: give --data {root}/OK; --layout folder"),
    "defects beside training images": ("{train_images,bad}/0.png", "bad", "defects, as it lies beside train_images/"),
    "defects on a side": ("{ok_front,crack_front}/0.png", "crack_front", "hold defects, as it lies beside ok_front/"),
    "a kind of defects": ("{good,broken_large}/0.png", "broken_large", "hold defects, as it lies beside good/"),
    "defects for test": (
        "test/cracks/0.png",
        "test/cracks",
        "hold defects, as it lies in test/: give the folder of the training images; --layout folder",
    ),
    "MVTec 3D-AD's train": (
        "a/train/good/{rgb,xyz}/0.png",
        "a/train",
        "is a part of an image set: give --data {root}/a,",
    ),
    "SDNET2018's walls": ("W/{CW,UW}/0.png", "W", "CW/ beside UW/"),
    "VAD's train": (
        "a/train/{good,bad}/0.png",
        "a/train",
        "--data {root}/a, or",
        "alone, as --data {root}/a/train/good;",
    ),
    "KolektorSDD's item": ("kos01/Part{0,1}{,_label}.png", "kos01", "is a part of an image set: give --data {root},"),
    "VisA's data": (
        "a/Data/Images/{Normal,Anomaly}/0.png",
        "a/Data",
        "is a part of an image set: give --data {root}/a,",
    ),
    "Real-IAD's images": (
        "realiad_1024/cap/0.png realiad_jsons/cap.json=",
        "realiad_1024",
        "Real-IAD: give --data {root}",
    ),
    "an item of them": ("realiad_1024/cap/0.png realiad_jsons/cap.json=", "realiad_1024/cap", "Real-IAD: give --data"),
    "Real-IAD's lists": ("realiad_1024/cap/0.png realiad_jsons/cap.json=", "realiad_jsons", "Real-IAD: give --data"),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_folder_that_is_a_part_of_an_image_set_is_refused_by_its_name_and_those_beside_it(name, tmp_path):
    files, given, *words = AROUND[name]
    plant(tmp_path / "set", files)
    with pytest.raises(UserError) as caught:
        read_root(tmp_path / "set" / given)
    assert all(word.format(root=tmp_path / "set") in str(caught.value) for word in words), caught.value
    messages = [str(caught.value)]
    refused = {*(tmp_path / "set" / given).rglob("*")} if "seems to hold" in messages[0] else set()
    while messages:  # what it names is read, and what that names
        for folder in re.findall(r"(?:give|as) --data (.+?)[,;]", messages.pop()):
            try:
                root = read_root(folder)
            except UserError as refusal:
                messages.append(str(refusal))
            else:
                train = [record for split in (root.sets or {}).values() for record in split[0]]
                assert not {root.path / record.path for record in train} & refused, folder
    if "Real-IAD" not in name and "them" not in name:
        assert read_root(tmp_path / "set" / given, "folder").layout == "folder"


def test_a_folder_whose_name_alone_says_defects_or_test_is_a_plain_folder(tmp_path):
    places = "label_printing_machine test_parts/images defects_unsorted dev/parts".split()
    plant(tmp_path / "set", " ".join(f"{place}/0.png" for place in places))
    plant(tmp_path / "lines", "train_station/0.png testing/0.png bad_bolts/0.png")
    plant(tmp_path, "{dev/parts,training,crack_detector,golden_gate,products/labels/x,products/caps}/0.png")
    plant(tmp_path / "shop", "{label_images,seg/cam1,Ann/2024}/{0,1,2}.png images/{0,a}.png {test,data,ok}/x.txt=")
    plant(tmp_path / "home", "{valid_parts,test/photos,damaged_parts}/0.png train/slides.pdf= training/notes.txt=")
    given = [f"shop/{place}" for place in "label_images seg seg/cam1 Ann/2024".split()]
    given += [f"home/{place}" for place in "valid_parts test/photos damaged_parts".split()]
    given += [f"set/{place}" for place in places] + ["lines/testing", "lines/bad_bolts", "dev/parts", "crack_detector"]
    for place in [*given, "training", "products/labels", "products/labels/x"]:
        assert read_root(tmp_path / place).layout == "folder", place


def test_no_folder_with_masks_or_defects_is_named_as_that_of_the_training_images(tmp_path):
    plant(tmp_path, "{train,val}/{images,masks}/0.png")
    with pytest.raises(UserError, match="train/ beside val/. Give the folder of the training images alone, or arrange"):
        read_root(tmp_path)


def test_folders_that_say_nothing_of_defects_are_a_plain_folder(tmp_path):
    plant(tmp_path, "cams/ok_cam{1,2}/0.png monday/{a,b}.png train/0.jpg gold/maskless.png 0.{png,jpg} labels.csv=")
    plant(
        tmp_path,
        "{inox,nonwoven,wireless,no_flash,2024-05-01,clean_room,pass_2,Nr_1}/SN1_ok.png",
    )
    plant(tmp_path, "x/a/{0,1,2}.jpg x/b/{2,3,4}.png y/a/0.jpg y/b/0.png")  # few of one name
    plant(tmp_path, "many/{0,1,2,3,4,5,6,7,8,9,a,b}/{0,1}.png many/c/{0,1}.jpg")
    plant(tmp_path, "numbers/{0,1,2}/0.png others/{0,1,.}/0.png pieces/{image,sample}/0.png")
    plant(tmp_path, "shift/{0,1}.png shift/labels/{0,classes,notes}.txt= shift/{0,1}.xml=")
    plant(tmp_path, "views/{abc,xyz}/{0,1}.png sides/{depth,width}/{0,1}.png sides/{a,b}_{width,depth,height}.png")
    plant(tmp_path, "screw/screw_{head,depth,tip}.png moves/{up,cp}/0.png depths/depth/{0,1}.png depths/README.png")
    plant(tmp_path, "lines/{0,1}_normals.png lines/2.png drill/deep/{depth,0}.png tilt/normals/0.png")
    assert read_root(tmp_path).layout == "folder"
    assert read_root(plant(tmp_path / "crack_detector", "crack_{0,1}.png")).layout == "folder"  # all are named so


def test_labels_of_objects_beside_images_refuse_nothing_and_are_said(tmp_path):
    plant(tmp_path, "images/{0,1}.png labels/{0,1}.json= anno/{0,1}.txt=")
    root = read_root(tmp_path)
    note = "not read: annotations in anno/ (of 2 images), annotations in labels/ (of 2 images)"
    assert root.layout == "folder" and root.notes == (note,)


def test_a_layout_said_outright_that_does_not_fit_says_where_the_images_lie(tmp_path):
    plant(tmp_path, "x/{0,1}.png")
    for layout in set(LAYOUTS) - {"folder"}:
        with pytest.raises(UserError) as caught:
            categories(read_root(tmp_path, layout))
        assert "x/0.png" in str(caught.value) or "realiad_jsons" in str(caught.value)


# masks and images of one kind → which mask each image has
PAIRS = {
    "0 1": ({"0_mask": "0", "1": "1"}),
    "1 1_mask": ({"1_mask": "1", "1_mask_mask": "1_mask"}),  # MVTec's way, as all masks show
    "1_mask 1": ({"1_mask": "1_mask", "1": "1"}),  # VisA's way
    "2 2_mask": ({"2_mask": "2"}),
    "part.v1 Ä": ({"part.v1_mask": "part.v1", "a\u0308_MASK": "Ä"}),
    "0 00": ({"0_mask_1": "0", "0_mask_2": "0", "000_mask": None, "00_gt": "00"}),
    "A a": ({"A_mask": "A", "a_mask": "a"}),
}


@pytest.mark.parametrize("images", PAIRS)
def test_masks_are_paired_by_name_and_never_by_position(images, tmp_path):
    if os.path.normcase("A") == "a" and images == "A a":
        pytest.skip("names in capitals are the same names here")
    masks = [f"a/ground_truth/cut/{mask}.png" for mask in PAIRS[images]]
    plant(tmp_path, " ".join(["a/train/good/0.png", *(f"a/test/cut/{name}.png" for name in images.split()), *masks]))
    records = load_category(tmp_path, "a").test
    paired = {Path(mask).stem: Path(record.path).stem for record in records for mask in record.masks if "truth" in mask}
    assert paired == {mask: image for mask, image in PAIRS[images].items() if image}


def test_masks_beside_images_are_no_images(tmp_path):
    plant(tmp_path, "a/train/good/{0,0_mask}.png a/test/cut/{0,0_mask}.png a/test/good/{0,1}.png")
    dataset = load_category(tmp_path, "a")
    assert [record.path for record in dataset.train] == ["a/train/good/0.png"]
    assert [(record.path, record.masks) for record in dataset.test if record.label] == [
        ("a/test/cut/0.png", ("a/test/cut/0_mask.png",))
    ]


# ---- the walk ----


def test_litter_and_files_of_other_kinds_are_left_out_and_said(tmp_path):
    plant(tmp_path, "{a.png,b.JFIF,c.jpe,d.tga,e.avif,f.pnm,.hidden.png,h.heic,i.npy,Thumbs.db=,j,k.png.part}")
    plant(
        tmp_path,
        "{.cache,@eaDir,$RECYCLE.BIN,lost+found,__MACOSX,thumbnails}/0.png sub/run/x/{scores.csv=,suspects.png}",
    )
    root = read_root(tmp_path)
    dataset = load_category(root, tmp_path.name)
    assert [record.path for record in dataset.train] == ["a.png", "b.JFIF", "c.jpe", "d.tga", "e.avif", "f.pnm"]
    line = reading_line(describe(root, [dataset]))
    for part in (
        f"data: {tmp_path}, layout folder, 1 category ({tmp_path.name}): 6 training images, 0 test images, labels none",
        "hidden: 2 (.cache, .hidden.png)",
        "system folders: 5 ($RECYCLE.BIN, @eaDir, __MACOSX, …)",
        "not images: 3 (Thumbs.db, j, k.png.part)",
        "in a format that is not read: 2 (h.heic, i.npy)",
        "runs of llb: 1 (sub/run/x)",
    ):
        assert part in line


@posix
def test_links_pipes_and_depth_end_quickly(tmp_path):
    plant(tmp_path, "{0,1}.png far/2.png")
    for i in range(30):  # 2³⁰ ways to the last folder
        (tmp_path / f"mesh/{i}").mkdir(parents=True)
        for name in ("left", "right"):
            (tmp_path / f"mesh/{i}/{name}").symlink_to(tmp_path / f"mesh/{i + 1}")
    plant(tmp_path, "mesh/30/3.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    plant(tmp_path, "/".join(["n"] * 70) + "/4.png")
    tree = walk(tmp_path)
    assert tree.images == ("0.png", "1.png", "far/2.png", "mesh/30/3.png")
    counts = {reason.split()[0]: len(paths) for reason, paths in tree.left_out.items()}
    assert counts == {"links": 61, "broken": 1, "neither": 1, "deeper": 1}


@posix
def test_two_categories_may_share_their_training_images_by_a_link(tmp_path):
    plant(tmp_path, "a/train/good/{0,1}.png {a,b}/test/cut/0.png")
    (tmp_path / "b/train").symlink_to(tmp_path / "a/train")
    assert categories(tmp_path) == ["a", "b"]
    assert [record.path for record in load_category(tmp_path, "b").train] == [
        "b/train/good/0.png",
        "b/train/good/1.png",
    ]
