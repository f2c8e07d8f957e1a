"""Bad input ends with status 2 and one line that names the flag or the file."""

import json

import pytest
from helpers import LATER, SMALL, draw, draw_mvtec, refuse, succeed

from llb.runfiles import VERSION

# flags of stage 1, given in the folder that `bad` makes → what the line must mention
CASES = {
    "missing folder": ("--data nowhere", "nowhere"),
    "one image": ("--data single", "single"),
    "truncated image": ("--data truncated", "2.png"),
    "truncated mask": ("--data late", "005_mask.png"),
    "a category that is not there": ("--category bottle", "tile"),
    "an image outside the root": ("--data realiad --noise-ratio 0.1", "lies elsewhere"),
    "a category named like a file of the run": ("--data mean", "rename"),
    "a name that is not UTF-8": ("--data b\udcffd", "the name is not UTF-8"),
    "a ratio of a plain folder": ("--data truncated --noise-ratio 0.1", "noise-ratio"),
    "a ratio above the possible": ("--noise-ratio 0.9", "noise-ratio"),
    "infinite rate": ("--learning-rate inf", "--learning-rate"),
    "a seed beyond 32 bits": (f"--seed {2**32}", "--seed"),
    "a share above 1": ("--keep 1.5", "--keep"),
    "K above N": (
        "--submodels 10",
        "9 training images are too few for 10 sub-models; give more images, or --submodels",
    ),
    "K above N, not given": ("--data pair", "2 training images are too few for 3 sub-models"),
    "variance of one sub-model": ("--submodels 1 --aggregate max-var", "max-var"),
    "out-of-fold with one sub-model": ("--submodels 1 --aggregate out-of-fold", "out-of-fold"),
    "unknown encoder": ("--encoder resnet50", "dinov2_vitb14_reg"),
    "a CNN for Dinomaly": ("--encoder efficientnet_lite0 --image-size 64", "is a CNN; choose another"),
    "a setting that the detector has not": ("--detector padim --set k=3", "padim has dimensions"),
    "a recipe for another detector": ("--detector padim --recipe llbnad", "padim has no recipe"),
    "the others of one sub-model": ("--submodels 1 --folds others", "--folds others"),
    "a cut that is larger than the image": ("--resize 16 --image-size 32", "--resize 16"),
    "missing weights": ("--encoder dinov2_vits14 --image-size 28 --weights no.pth", "no.pth"),
    "more memory than there is": ("--image-size 4096 --batch-size 65536", "a smaller --batch-size"),
    "--out below a file": ("--out file/run", "--out"),
    "--out with other files": ("--out single", "holds other files"),
    "--out equal to --data": ("--out good/.", "is equal to --data"),
    "--out inside --data": ("--data .. --out runs/inside", "is inside --data"),
    "--out inside --data by a link": ("--data link --out good/run", "is inside --data"),
    "--out around --data": ("--out .", "is around --data"),
    "--cache inside --data": ("--cache good/cache", "--cache good/cache is inside --data"),
    "--cache around --data": ("--cache .", "--cache . is around --data"),
    "--cache that is a file": ("--cache file", "--cache file cannot be written"),
    "--layout of the demo set": ("--layout mvtec", "give --data too"),
    "a run that is a file": ("--out file", "--out file cannot be written"),
    "unknown flag": ("--epochs 3", "--epochs"),
    "two of three flags": ("--coordinator host:1 --processes 2", "belong together"),
    "a number beyond the processes": ("--coordinator host:1 --processes 2 --process-id 2", "--process-id 2"),
    "no port": ("--coordinator host --processes 2 --process-id 0", "--coordinator host"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with good images, and with much of what a user can do wrong."""
    root = tmp_path_factory.mktemp("bad")
    draw_mvtec(root / "good")
    draw(root / "single" / "0.png", 0)
    draw(root / "pair" / "0.png", 0)
    draw(root / "pair" / "1.png", 1)
    for i in range(4):
        draw(root / "truncated" / f"{i}.png", i)
        draw(root / "mean" / f"{i}.png", i)
    mask = draw_mvtec(root / "late") / "tile" / "ground_truth" / "square" / "005_mask.png"
    for file, size in ((root / "truncated" / "2.png", 600), (mask, 60)):
        file.write_bytes(file.read_bytes()[:size])
    (root / "file").touch()
    (root / "link").symlink_to("good")
    draw(root / "realiad" / "realiad_256" / "cap" / "0.jpg", 0)
    entry = {"category": "cap", "anomaly_class": "OK", "image_path": str(root / "single" / "0.png"), "mask_path": None}
    splits = root / "realiad" / "realiad_jsons_fuiad_0.1"
    splits.mkdir()
    (splits / "cap.json").write_text(json.dumps({"meta": {"normal_class": "OK"}, "train": [entry], "test": []}))
    return root


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_status_2_and_one_line_that_names_it(name, bad, monkeypatch):
    monkeypatch.chdir(bad)
    flags, mention = CASES[name]
    before = {file for file in bad.rglob("*") if "runs" not in file.parts}
    data = () if "demo" in name else ("--data", "good")
    assert mention in refuse("stage1_partition", *data, "--out", f"runs/{name}", *SMALL, *flags.split())
    assert {file for file in bad.rglob("*") if "runs" not in file.parts} == before


def test_a_run_that_is_missing_or_of_another_version_is_refused_and_the_line_says_what_to_do(bad, tmp_path):
    later = [(script, "--run", tmp_path) for script in LATER]
    for line in later:
        assert f"python stage1_partition.py --out {tmp_path}" in refuse(*line)
    (tmp_path / "config.json").write_text(
        json.dumps({"llb": VERSION, "command": "python stage1_partition.py --seed 7"})
    )
    for line in (("stage1_partition", "--data", bad / "good", "--out", tmp_path, *SMALL), *later):
        assert "of another version of llb" in (message := refuse(*line)) and "--overwrite" in message
    (tmp_path / "config.json").write_text('{"llb": 1}')  # before there were several detectors
    assert all("by another version of llb: make it again with another --out" in refuse(*line) for line in later)


def test_help_gives_a_default_for_every_flag():
    for script in ("stage1_partition", *LATER):
        out = succeed(script, "--help")
        assert out.count("(default:") == sum(line.startswith("  --") for line in out.splitlines()) >= 6
