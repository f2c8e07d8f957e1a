"""Figures for people: the house style of Matplotlib, and inline SVG for the report. No JAX, and no window system.

    with house():
        figure, panels = new_figure(rows=1, columns=2, width=5, height=1.8)
        panels[0, 0].plot(…)
    text = svg_of(figure)            # or: save(figure, Path("curve.png"))

An inline SVG takes its ink and its letters from the page, so it is readable in the light and in the dark.
"""

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path

import numpy as np

from llb.files import atomic

INK = "#23262b"  # of letters and lines; `svg_of` puts the page's colour in its place
KEPT, DROPPED = "#4a7fb5", "#e08a3c"  # as in the report; readable on light and on dark ground
COLOURS = (KEPT, DROPPED, "#5b9a68", "#b0629f", "#8a7fd0", "#a08a4a", "#4fa3a5", "#c8605a")  # of curves, in this order
LINES = ("-", "--", ":", "-.")
LETTERS = 11  # size of text in points; 5 inches are 360 points, about the width of a phone
LARGEST_SCALE = 1.4  # an inline figure grows with the page to so many pixels for a point

STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "text.parse_math": False,  # names may hold a $
    "font.size": LETTERS,
    "axes.titlesize": LETTERS,
    "axes.titlelocation": "left",
    "axes.labelsize": LETTERS,
    "xtick.labelsize": LETTERS - 1,
    "ytick.labelsize": LETTERS - 1,
    "legend.fontsize": LETTERS - 1,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": f"{INK}80",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": f"{INK}80",
    "ytick.color": f"{INK}80",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llb",  # names in the file are the same each time
}


@contextmanager
def house() -> Iterator[None]:
    """The house style, for what is drawn and written inside. A person's own matplotlibrc changes nothing."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells when it lists the fonts, or cannot keep the list
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcParams.update(matplotlib.rcParamsDefault | STYLE | {"backend": "agg"})
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
        yield


def new_figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 2.4, **shared):
    """A figure of rows × columns panels and the array of its axes, (rows, columns). Call it in `house`.

    width, height: of the whole, in inches; shared: of matplotlib's `subplots`, such as sharey=True.
    """
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def spread_figure(panels: Mapping[str, Mapping[tuple[str, str], Mapping[str, Sequence[float]]]], along: str):
    """Means as points, standard deviations as bars: panel → (colour, line) → place on the x-axis → values. Curves with
    the same name for the colour have the same colour, likewise lines; "" is the first line.

    along: the name of the x-axis. Call it in `house`.
    """
    colours, lines = (list(dict.fromkeys(names)) for names in zip(*(key for panel in panels.values() for key in panel)))
    lines = [line for line in lines if line] or [""]
    places = list(dict.fromkeys(place for panel in panels.values() for points in panel.values() for place in points))
    figure, axes = new_figure(1, len(panels), 3.2 * len(panels), 3.6)
    known = {}
    for axis, (title, panel) in zip(axes[0], panels.items()):
        for (colour, line), points in panel.items():
            where, means = [places.index(place) for place in points], list(map(np.mean, points.values()))
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in points.values()]
            kind = LINES[lines.index(line or lines[0]) % len(LINES)]
            style = {"color": COLOURS[colours.index(colour) % len(COLOURS)], "linestyle": kind, "marker": "o"}
            known[", ".join(filter(None, (colour, line or lines[0])))] = axis.errorbar(
                where, means, spread, markersize=4, capsize=2, **style
            )
        axis.set(title=title, xlabel=along)
        axis.set_xticks(range(len(places)), places, rotation=30 if max(map(len, places)) > 7 else 0)
    if len(known) > 1:
        figure.legend(known.values(), known, loc="outside lower center", ncols=min(len(known), 4))
    return figure


def svg_of(figure, label: str = "") -> str:
    """The figure as SVG to stand in a page: no ground, the page's ink and letters. The same figure, the same text.

    label: what the figure shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with house():
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<(metadata|defs)>\s*(<style.*?</style>|<rdf.*?</rdf:RDF>)\s*</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)  # a page has others
    pixels = round(72 * LARGEST_SCALE * figure.get_figwidth())
    style = f'style="width:100%;max-width:{pixels}px;height:auto"'
    about = f'role="img" aria-label="{escape(label)}"' if label else ""
    box = re.search(r'viewBox="[^"]*"', text)[0]
    return f"<svg {box} {style} {about}>{text[text.index('>') + 1 :]}"


def save(figure, *files: Path) -> None:
    """Write the figure as files, PNG or SVG by their endings, on white ground."""
    with house():
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            atomic(file, lambda temporary, metadata=metadata: figure.savefig(temporary, metadata=metadata))
