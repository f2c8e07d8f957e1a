"""Draw the README's picture of the method: `python .github/draw_method.py` writes method-light.svg and -dark.svg."""

from pathlib import Path

HERE = Path(__file__).parent
COLOURS = {
    "light": {"ink": "#23262b", "faint": "#6a6f78", "line": "#c9cbc6", "panel": "#f3f3f1", "ground": "#ffffff"},
    "dark": {"ink": "#e3e5e9", "faint": "#989eaa", "line": "#454a53", "panel": "#1f2227", "ground": "#0d1117"},
}
NORMAL, DEFECT = "#4a7fb5", "#e08a3c"
DEFECTS = {4, 11, 17}  # of the 24 drawn training images
SUBSET = [0, 2, 1, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0, 2, 0, 0, 1, 1, 2, 0, 2, 1]  # a shuffled deal to K = 3


def score(i: int, k: int) -> float:
    """Image i by sub-model k, 0 … 1: a defect scores high, even with the sub-model that was trained on it."""
    if i in DEFECTS:
        return 0.70 + 0.1 * ((7 * i + 3 * k) % 3) - 0.12 * (SUBSET[i] == k)
    return 0.08 + 0.04 * ((5 * i + 2 * k) % 6)


def draw(colours: dict[str, str]) -> str:
    """The whole SVG, 960 × 290."""
    parts = []

    def text(x: float, y: float, words: str, kind: str = "ink", size: int = 13, anchor: str = "middle") -> None:
        weight = ' font-weight="600"' if kind == "ink" and size > 12 else ""
        style = f'fill="{colours[kind]}" font-size="{size}"{weight} text-anchor="{anchor}"'
        parts.append(f'<text x="{x}" y="{y}" {style}>{words}</text>')

    def square(x: float, y: float, fill: str, side: float = 13) -> None:
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" rx="2" fill="{fill}"/>')

    def arrow(x0: float, y0: float, x1: float, y1: float) -> None:
        style = f'stroke="{colours["faint"]}" stroke-width="1.4" fill="none" marker-end="url(#tip)"'
        parts.append(f'<path d="M{x0} {y0}L{x1} {y1}" {style}/>')

    def panel(x: float, y: float, width: float, height: float) -> None:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colours["panel"]}" '
            f'stroke="{colours["line"]}"/>'
        )

    def colour(i: int) -> str:
        return DEFECT if i in DEFECTS else NORMAL

    # the unchecked training set
    text(62, 24, "training set")
    text(62, 41, "unchecked", "faint", 12)
    for i in range(24):
        square(20 + i % 4 * 22, 84 + i // 4 * 22, colour(i))

    # K subsets, one sub-model each
    text(195, 24, "1 partition")
    text(195, 41, "K = 3 subsets", "faint", 12)
    text(335, 24, "2 train")
    text(335, 41, "jointly, by vmap", "faint", 12)
    for k in range(3):
        middle = 90 + 60 * k
        arrow(112, 148, 143, middle + 10)
        panel(148, middle - 12, 96, 44)
        for place, i in enumerate(i for i in range(24) if SUBSET[i] == k):
            square(156 + place % 4 * 22, middle - 4 + place // 4 * 17, colour(i), 11)
        arrow(248, middle + 10, 283, middle + 10)
        panel(287, middle - 10, 96, 40)
        text(335, middle + 14, f"sub-model {k}", "ink", 12)
        arrow(387, middle + 10, 424, middle + 10)

    # N × K scores
    text(510, 24, "3 score")
    text(510, 41, "all images by all: N × K", "faint", 12)
    for i in range(24):
        for k in range(3):
            height = 44 * score(i, k)
            parts.append(
                f'<rect x="{432 + 6.6 * i:.1f}" y="{122 + 60 * k - height:.1f}" width="5" height="{height:.1f}" '
                f'rx="1" fill="{colour(i)}"/>'
            )
    for k in range(3):
        parts.append(f'<path d="M430 {122.5 + 60 * k}H592" stroke="{colours["line"]}"/>')

    # aggregate and select
    arrow(600, 160, 628, 160)
    text(712, 24, "4 aggregate, select")
    text(712, 41, "mean; drop the highest", "faint", 12)
    mean = [sum(score(i, k) for k in range(3)) / 3 for i in range(24)]
    for place, i in enumerate(sorted(range(24), key=mean.__getitem__)):
        height = 110 * mean[i]
        parts.append(
            f'<rect x="{636 + 6.6 * place:.1f}" y="{210 - height:.1f}" width="5" height="{height:.1f}" rx="1" '
            f'fill="{colour(i)}"/>'
        )
    parts.append(f'<path d="M634 210.5H796" stroke="{colours["line"]}"/>')
    parts.append(f'<path d="M773.2 96V222" stroke="{colours["ink"]}" stroke-width="1.3" stroke-dasharray="4 3"/>')
    text(703, 230, "kept", "faint", 12)
    text(787, 230, "dropped", "faint", 12)

    # the final detector
    arrow(804, 160, 832, 160)
    text(890, 24, "5 train again")
    text(890, 41, "on the kept images", "faint", 12)
    panel(837, 132, 106, 56)
    text(890, 156, "final detector", "ink", 12)
    text(890, 173, "from scratch", "faint", 11)

    # which script
    for x0, x1, script in ((20, 796, "stage1_partition.py"), (837, 943, "stage2_train.py")):
        parts.append(f'<path d="M{x0} 250v6H{x1}v-6" stroke="{colours["line"]}" fill="none"/>')
        text((x0 + x1) / 2, 276, script, "faint", 12)
    square(20, 56, NORMAL, 10)
    text(34, 65, "normal", "faint", 11, "start")
    square(76, 56, DEFECT, 10)
    text(90, 65, "hidden defect", "faint", 11, "start")

    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colours["faint"]}"/></marker>'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 290" font-family="system-ui, sans-serif" role="img" '
        'aria-label="Partition the training set, train K sub-models, score every image with each, keep the lowest">'
        f'<defs>{tip}</defs><rect width="960" height="290" fill="{colours["ground"]}"/>'
        + "\n".join(["", *parts, "</svg>\n"])
    )


if __name__ == "__main__":
    for name, colours in COLOURS.items():
        (HERE / f"method-{name}.svg").write_text(draw(colours), encoding="utf-8")
