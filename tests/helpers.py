"""What several test files share: small images, the three scripts as a user runs them, the files of a run."""

import csv
import dataclasses
import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from llb.console import run_script
from llb.detectors import DETECTORS
from llb.detectors.common import Setup
from llb.encoders.specs import SPECS

ROOT = Path(__file__).resolve().parent.parent
LATER = ("stage2_train", "evaluate")
# another size or another number of steps is another program to compile, so most tests share these
SMALL = ("--encoder", "tiny", "--image-size", "32", "--batch-size", "2", "--steps", "4")
TILE = ("--noise-ratio", "0.25", *SMALL)  # stage 1 of the fixture `finished`


def small_setup(detector: str, side: int = 24, **others) -> Setup:
    """A detector on features (2, 11, 8) of 9 patches (side 24 pixels), of a ViT with one register."""
    sizes = {"width": 8, "heads": 2, "registers": 1, "groups": ((0,), (1,)), "filter_bank": False}
    module = DETECTORS[detector]
    known = {"settings": module.Settings(), "detector": detector, "score": module.SCORE, "map_rule": module.MAP}
    return Setup(dataclasses.replace(SPECS["tiny"], **sizes), (), side, **known | others)


def tree_of(stored: dict[str, np.ndarray], prefix: str) -> dict:
    """The stored arrays whose names begin so, as a tree by the rest of their names."""
    flat = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return unflatten_dict(flat, sep="/")


def assert_close(actual, expected, tolerance=1e-4):
    """Trees of arrays, to a part of the largest value of each."""
    actual, expected = flatten_dict({"": actual}), flatten_dict({"": expected})
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=str(name))


def draw(file: Path, seed: int, defect: bool = False) -> None:
    """A 40 × 40 picture: stripes with noise, and a bright square where it is defective."""
    random = np.random.default_rng(seed)
    pixels = 120 + 40 * np.sin(np.arange(40) / 2)[:, None, None] + random.normal(0, 6, (40, 40, 3))
    if defect:
        pixels[8:20, 22:34] += 90
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


def draw_mvtec(root: Path, category: str = "tile", good: int = 9) -> Path:
    """An MVTec-style root: `good` normal training images; for test 3 normal and 6 defective ones with masks."""
    masks = root / category / "ground_truth" / "square"
    masks.mkdir(parents=True)
    for seed, place, count in ((0, "train/good", good), (100, "test/good", 3), (200, "test/square", 6)):
        for i in range(count):
            draw(root / category / place / f"{i:03}.png", seed + i, defect=place == "test/square")
    for i in range(6):
        Image.fromarray(np.pad(np.full((12, 12), 255, np.uint8), ((8, 20), (22, 6)))).save(masks / f"{i:03}_mask.png")
    return root


def command(script: str, *arguments) -> tuple[int, str, str]:
    """Run a script's main in this process, which keeps the compiled steps: status, standard output and error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        patch.setattr("llb.figures.svg_of", lambda figure, label="": "")  # half a second each; test_figures draws
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as stop:
            status = stop.code or 0
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def succeed(*line) -> str:
    """Run a script that must succeed: its standard output."""
    status, out, err = command(*line)
    assert status == 0, err
    return out


def refuse(*line) -> str:
    """Run a script that must end with status 2 and one line: that line."""
    status, out, err = command(*line)
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, out, err)
    return lines[0]


def child(*line, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, on one CPU device. environment: changes; None takes a variable away."""
    changed = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    kept = {name: str(value) for name, value in changed.items() if value is not None}
    line = [sys.executable, *map(str, line)]
    return subprocess.run(line, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=timeout)


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def contents(run: Path) -> dict[str, bytes]:
    """The tables and pictures of the categories of a run, by path."""
    files = [file for file in run.glob("*/*") if file.suffix in (".csv", ".png", ".txt")]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def dates(folder: Path) -> dict[Path, int]:
    """When each file below a folder was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
