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
from llb.learning import read_learning, read_losses

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
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # hundredths of a point
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


# ---- what the sub-models saw while they trained ----

PANELS, POINTS = 8, 60  # sub-models that are shown; points of a smoothed curve
WINDOW, WIDEST, FEWEST = 12, 0.15, 3  # values in a window of the smoothing, about; its largest share of the steps
GROUPS = {  # (label, kept) → name, colour, line; label −1: unknown
    (-1, True): ("kept later", KEPT, "-"),
    (-1, False): ("dropped later", DROPPED, "-"),
    (0, True): ("normal, kept later", KEPT, "-"),
    (1, False): ("defective, dropped later", DROPPED, "-"),
    (0, False): ("normal, dropped later", KEPT, "--"),
    (1, True): ("defective, kept later", DROPPED, "--"),
}


def smoothed(step: np.ndarray, value: np.ndarray, ends: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Values at steps, (n,) → POINTS steps, and the values' quartiles around each of them, (3, POINTS): in a window of
    about WINDOW values, at most a share WIDEST of the steps; not a number where it holds fewer than FEWEST, or reaches
    beyond an end: half a window would move the curve."""
    length = ends[1] - ends[0] + 1
    width = length * min(WIDEST, max(1 / POINTS, WINDOW / max(1, len(value))))
    centres = np.linspace(*ends, POINTS)
    windows = [value[np.abs(step - centre) <= width / 2] for centre in centres]
    quartiles = [np.quantile(one, (0.25, 0.5, 0.75)) if len(one) >= FEWEST else [np.nan] * 3 for one in windows]
    whole = (centres - width / 2 >= ends[0] - 0.5) & (centres + width / 2 <= ends[1] + 0.5)
    return centres, np.where(whole, np.array(quartiles).T, np.nan)


def learning_figure(table: dict[str, np.ndarray], columns: int = 2):
    """Learning bias: in a panel for each sub-model the distances of its images over the steps, those of images that are
    kept and dropped later apart; median and quartiles, coloured by the labels if all are known.

    table: of `llb.learning.read_learning`.
    """
    models = np.unique(table["submodel"])[:PANELS]
    label = table["label"] if (table["label"] >= 0).all() else np.full(len(table["label"]), -1)
    columns = min(columns, len(models))
    rows = -(-len(models) // columns)
    ends = int(table["step"].min()), int(table["step"].max())
    with house():
        size = {"width": 2.5 * columns if columns > 1 else 5.0, "height": 0.75 + 1.75 * rows}
        figure, panels = new_figure(rows, columns, **size, sharex=True, sharey=True)
        for panel in panels.ravel()[len(models) :]:
            panel.set_axis_off()
        shown = {}
        for panel, model in zip(panels.ravel(), models):
            for (of_label, kept), (name, colour, line) in GROUPS.items():
                those = (table["submodel"] == model) & (label == of_label) & (table["kept"] == kept)
                centres, quartiles = smoothed(table["step"][those], table["distance"][those], ends)
                if np.isfinite(quartiles).any():
                    panel.fill_between(centres, quartiles[0], quartiles[2], color=colour, alpha=0.2, linewidth=0)
                    (shown[name],) = panel.plot(centres, quartiles[1], line, color=colour)
            panel.set_title(f"sub-model {model}")
            ruled(panel, table["distance"])
        for panel in panels.ravel()[: len(models)][-columns:]:  # the lowest of each column
            panel.set_xlabel("step")
            panel.tick_params(labelbottom=True)
        for panel in panels[:, 0]:
            panel.set_ylabel("distance")
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=min(2, columns))
    return figure


def ruled(panel, values: np.ndarray) -> None:
    """A logarithmic axis with plain numbers for values that span much; else one as it is."""
    low, high = np.quantile(values, (0.01, 0.99))
    if 0 < 4 * low < high:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def learning_svg(folder: Path) -> str | None:
    """The picture of learning bias of a category; None if there is none. folder: RUN/<category>."""
    table = read_learning(folder)
    if table is None or not len(table["step"]):
        return None
    return svg_of(learning_figure(table), "Distances of kept and dropped training images over the steps of stage 1")


def loss_figure(curves: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Loss curves of final detectors, smoothed by medians. curves: by name, the steps and losses, (n,)."""
    with house():
        figure, panels = new_figure(height=1.9)
        panel = panels[0, 0]
        for (name, (step, loss)), colour in zip(curves.items(), COLOURS):
            centres, quartiles = smoothed(step, loss, (int(step.min()), int(step.max())))
            panel.plot(step, loss, color=colour, alpha=0.25, linewidth=0.6)
            panel.plot(centres, quartiles[1], color=colour, label=name)
        ruled(panel, np.concatenate([loss for _, loss in curves.values()]))
        panel.set(xlabel="step", ylabel="loss")
        panel.legend()
    return figure


def loss_svg(folder: Path, finals: Sequence[str]) -> str | None:
    """The loss curves of some final detectors of a category; None if there are none."""
    found = {final: read_losses(folder, final) for final in finals}
    curves = {final: curve for final, curve in found.items() if curve is not None and len(curve[0])}
    return svg_of(loss_figure(curves), "Losses of the final detectors over their steps") if curves else None
