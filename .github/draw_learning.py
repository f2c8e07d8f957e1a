"""Draw the README's picture of learning bias from a finished stage 1:

    python stage1_partition.py && python .github/draw_learning.py runs/demo/part

writes learning-light.svg and learning-dark.svg.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from llb.figures import learning_figure, svg_of  # noqa: E402 (the project is not installed)
from llb.learning import read_learning  # noqa: E402

INKS = {"light": "#23262b", "dark": "#e3e5e9"}
NAMES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
LETTERS = "font-family:system-ui,sans-serif"

figure = learning_figure(read_learning(Path(sys.argv[1])), columns=3)
inline = svg_of(figure)
for theme, ink in INKS.items():
    width, height = (round(128 * inches) for inches in figure.get_size_inches())
    size = f'width="{width}" height="{height}" style="color:{ink};{LETTERS}"'
    text = re.sub(r' style="[^"]*"', f" {NAMES} {size}", inline, count=1)
    (HERE / f"learning-{theme}.svg").write_text(text, encoding="utf-8")
