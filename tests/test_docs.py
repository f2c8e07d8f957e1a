"""The lessons of llb/docs are true: their commands are accepted, their Python draws their figures.

`PYTHONPATH=. python tests/test_docs.py [PAGE…]` runs the pages up to their figures; writes these, and what the Python
prints, anew.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT

from llb.config import Evaluate, Stage1, Stage2
from llb.defaults import resolve
from llb.flags import parse_flags

DOCS = ROOT / "llb" / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "README")
SCRIPTS = {"stage1_partition.py": Stage1, "stage2_train.py": Stage2, "evaluate.py": Evaluate}
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))


def test_a_page_is_short_and_has_a_figure_and_an_exercise():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) >= 8 and all(f"({page}.md)" in index for page in PAGES)
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60 and "## Exercise" in text and f"({page}.svg)" in text, page
        assert (DOCS / f"{page}.svg").stat().st_size < 40_000, page
        assert [kind for kind, _ in blocks(page)].count("text") == 1 and "```text\n```" not in text, page


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_have_the_flags_that_they_use(page):
    lines = [line for kind, text in blocks(page) if kind == "sh" for line in text.splitlines()]
    for line in lines:
        python, script, *words = shlex.split(line)
        assert python == "python"
        if script == "-m":
            name, *words = words
            settings = getattr(importlib.import_module(name), name.rpartition(".")[2].capitalize())
        else:
            settings = SCRIPTS[script]
        given = parse_flags(settings, words)
        if settings is Stage1:
            resolve(given, "demo")  # --set is read here


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_draws_its_figure(page, finished, tmp_path, monkeypatch):
    """On the run of a test in place of the page's own."""
    monkeypatch.chdir(tmp_path)
    (code,) = [text for kind, text in blocks(page) if kind == "python"]
    run = f"{(finished / 'tile').as_posix()}"
    exec(compile(re.sub(r"runs/[\w{}-]+/part", lambda _: run, code), f"{page}.md", "exec"), {"__name__": "lesson"})
    assert (tmp_path / f"{page}.svg").stat().st_size < 40_000


def renew(page: str, folder: Path) -> None:
    """Run a page in a folder, without its exercise, and write what came of it into the page."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    text, printed = (DOCS / f"{page}.md").read_text(encoding="utf-8"), ""
    before = [kind for kind, _ in blocks(page)].index("text")
    for kind, block in blocks(page)[:before]:
        if kind == "sh":
            for line in block.splitlines():
                _, script, *words = shlex.split(line)
                place = [script] if script == "-m" else [ROOT / script]
                subprocess.run([sys.executable, *place, *words], cwd=folder, env=environment, check=True)
        elif kind == "python":
            line = [sys.executable, "-c", block]
            printed = subprocess.run(
                line, cwd=folder, env=environment, check=True, capture_output=True, text=True
            ).stdout
            shutil.copy(folder / f"{page}.svg", DOCS)
    text = re.sub(r"```text\n.*?```", lambda _: f"```text\n{printed}```", text, flags=re.DOTALL)
    (DOCS / f"{page}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        for name in sys.argv[1:] or PAGES:
            renew(name, Path(top))
