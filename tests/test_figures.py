"""Figures: the house style, and SVG that takes its ink from the page."""

import sys

import numpy as np
import pytest
from PIL import Image

from llb.figures import INK, house, learning_figure, learning_svg, loss_svg, new_figure, save, smoothed, svg_of
from llb.files import UserError


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


def seen(steps=40, labels=True):
    """Two sub-models; their images 0 to 4 are kept, 5 and 6 dropped, which lose more."""
    random = np.random.default_rng(0)
    step, image = np.repeat(np.arange(steps), 8), random.integers(0, 7, 8 * steps)
    loss = np.exp(-step / 10) + 0.05 + 0.3 * (image > 4) + 0.01 * random.random(len(step))
    label = (image == 6) * 1 if labels else np.full(len(step), -1)
    return {"step": step, "submodel": step % 2, "distance": loss, "kept": image < 5, "label": label}


def test_the_picture_of_learning_bias_has_a_panel_for_each_sub_model_and_a_curve_for_each_kind():
    known = {"normal, kept later", "defective, dropped later", "normal, dropped later"}
    for labels, names in ((False, {"kept later", "dropped later"}), (True, known)):
        figure = learning_figure(seen(labels=labels))
        assert [panel.get_title(loc="left") for panel in figure.axes] == ["sub-model 0", "sub-model 1"]
        assert {text.get_text() for text in figure.legends[0].get_texts()} == names
        for panel in figure.axes:
            kept, dropped = (line.get_ydata() for line in panel.lines[:2])
            assert np.nanmin((dropped - kept)[30:]) > 0.2 and np.nanmax(kept) > 0.8 and np.nanmin(kept) < 0.1  # medians


def test_a_smoothed_curve_is_a_median_and_has_gaps_where_nothing_is_known():
    step = np.array([0, 0, 0, 50, 50, 50, 50, 90, 90])
    centres, quartiles = smoothed(step, np.array([7.0, 7, 7, 1, 2, 3, 9, 5, 5]), (0, 99))
    nearest = np.abs(centres - 50).argmin()
    assert quartiles[:, nearest].tolist() == [1.75, 2.5, 4.5]
    assert np.isnan(quartiles[:, np.abs(centres - 30).argmin()]).all()  # nothing
    assert np.isnan(quartiles[:, np.abs(centres - 90).argmin()]).all()  # too few
    assert np.isnan(quartiles[:, 0]).all()  # the window reaches beyond the end


def test_figures_of_a_run_are_drawn_from_its_files(finished, tmp_path):
    folder = finished / "tile"
    text = learning_svg(folder)
    assert text.startswith("<svg") and "sub-model 2" in text and text == learning_svg(folder)
    assert "purified" in loss_svg(folder, ["purified", "all"]) and loss_svg(folder, ["clean"]) is None
    assert learning_svg(tmp_path) is None
    for name in ("scores.csv", "learning.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "learning.csv").write_text("step,submodel,path,distance\n0,0,gone.png,1\n")
    with pytest.raises(UserError, match="learning.csv is damaged"):
        learning_svg(tmp_path)
