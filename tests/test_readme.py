"""The README is true: its first command, its paths and its links."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import rows_of, succeed

from llb.detectors import DETECTORS
from llb.metrics import image_metrics

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_stage_1_at_its_defaults_finds_the_planted_defects(tmp_path):
    """As a user runs it: one CPU device, XLA at its usual level. .ci/run has just done so: LLB_DEMO_RUN is its run."""
    assert re.search(
        r"requirements\.txt && python stage1_partition\.py && python stage2_train\.py && python evaluate\.py\n", README
    )
    run = Path(os.environ.get("LLB_DEMO_RUN") or tmp_path / "runs" / "demo")
    if "LLB_DEMO_RUN" not in os.environ:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
        line = [sys.executable, ROOT / "stage1_partition.py"]
        done = subprocess.run(line, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("next: python stage2_train.py --run runs/demo")
    with open(run / "part" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert image_metrics(labels, scores)["image_auroc"] > 0.94  # over seeds 0.975 to 0.985
    dropped = [row["label"] == "1" for row in rows if row["kept"] == "0"]
    assert sum(dropped) >= 25 and sum(dropped) / len(dropped) > 0.8  # of 40 planted defects, and few normal images


def test_the_readme_is_short_and_the_paths_and_functions_that_it_names_are_there():
    assert len(README.splitlines()) <= 240
    for link in re.findall(r"\]\((?!http)([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", README):
        if link[0].startswith("#"):
            assert link[0][1:].replace("-", " ") in re.findall(r"^## (.*)$", README.lower(), re.M), link
        else:
            assert (ROOT / (link[0] or link[1])).exists(), link
    sources = {}
    for place in set(re.findall(r"`([\w/]+\.py)`", README)):
        sources[place] = (ROOT / place).read_text(encoding="utf-8")
    for row in README.splitlines():  # table rows that name functions beside a file
        files = re.findall(r"`([\w/]+\.py)`", row)
        if row.startswith("|") and files:
            names = re.findall(r"`([a-zA-Z_]\w+)`(?! option)", row.rsplit("|", 2)[1])
            text = "".join(sources[file] for file in files)
            for name in names:
                assert re.search(rf"\b(def|class) {name}\b|^{name}(:.*)? =", text, re.M), (name, files)
    room, code = "", (ROOT / "llb" / "README.md").read_text(encoding="utf-8")
    for line in code.split("## Code map")[1].split("`PYTHONPATH=. python tests")[0].splitlines():
        for word in re.findall(r"[\w./]+", re.split(" {3,}", line.strip())[0]):
            if word.endswith("/"):
                room = word
            path = word.removeprefix("llb/")
            candidates = [ROOT / word, ROOT / "llb" / path, ROOT / "llb" / f"{path}.py", ROOT / room / f"{word}.py"]
            assert any(candidate.exists() for candidate in candidates), word


def test_the_picture_of_the_method_is_drawn_by_the_projects_code():
    code = "import runpy; m = runpy.run_path('.github/draw_method.py'); "
    code += "[print(m['draw'](c), end='') for c in m['COLOURS'].values()]"
    drawn = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    assert drawn == "".join((ROOT / ".github" / f"method-{name}.svg").read_text() for name in ("light", "dark"))


def test_the_toy_detector_of_the_readme_runs_in_all_three_scripts(tmp_path, data, monkeypatch):
    (text,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "toy.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("llb.detectors.toy", tmp_path / "toy.py")
    toy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, toy)
    spec.loader.exec_module(toy)
    monkeypatch.setitem(DETECTORS, "toy", toy)
    run, flags = (
        tmp_path / "run",
        ("--noise-ratio", "0.25", "--encoder", "tiny", "--image-size", "32", "--set", "power=1"),
    )
    succeed("stage1_partition", "--data", data, "--out", run, "--detector", "toy", *flags)
    succeed("stage2_train", "--run", run)
    assert "tile     purified" in succeed("evaluate", "--run", run)
    rows = rows_of(run / "tile" / "scores.csv")
    assert (
        image_metrics([int(row["label"]) for row in rows], [float(row["score"]) for row in rows])["image_auroc"] > 0.8
    )
