"""Figures: the house style, and SVG that takes its ink from the page."""

import sys

import numpy as np
from PIL import Image

from llb.figures import INK, house, new_figure, save, svg_of


def drawn():
    with house():
        figure, panels = new_figure(columns=2, sharey=True)
        panels[0, 0].plot([0, 1, 2], [1, 3, 2], label="<script>$x$ & y")
        panels[0, 0].legend()
        panels[0, 1].fill_between([0, 1], [0, 0], [1, 2], alpha=0.3)
    return figure


def test_an_inline_figure_is_the_same_each_time_and_inert():
    text = svg_of(drawn(), 'two "curves"')
    assert text == svg_of(drawn(), 'two "curves"')
    assert text.startswith("<svg viewBox=") and 'aria-label="two &quot;curves&quot;"' in text.split(">")[0]
    assert "currentColor" in text and INK not in text and "#ffffff" not in text  # no ground of its own
    assert "&lt;script&gt;$x$ &amp; y</text>" in text  # text is text, and a $ begins no formula
    assert "http" not in text and "<script" not in text and 'id="figure' not in text
    assert "matplotlib.pyplot" not in sys.modules


def test_a_figure_as_a_file_stands_on_white(tmp_path):
    files = tmp_path / "one.png", tmp_path / "one.svg"
    save(drawn(), *files)
    assert np.asarray(Image.open(files[0]).convert("RGB"))[0, 0].tolist() == [255, 255, 255]
    before = [file.read_bytes() for file in files]
    save(drawn(), *files)
    assert before == [file.read_bytes() for file in files] and INK.encode() in before[1]
