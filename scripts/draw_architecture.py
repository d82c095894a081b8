#!/usr/bin/env python3
"""Draw docs/architecture.svg: a block with a memory beside its feed-forward, and the search."""

import argparse
import io
from pathlib import Path
from typing import List, Tuple

from _script import run

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from pkm_fairseq.analysis.svg import NO_METADATA, STYLE
from pkm_fairseq.memory.files import write_file

FILE = Path(__file__).resolve().parents[1] / "docs" / "architecture.svg"
INK, BLUE, ORANGE, GREY = "#1d2730", "#0072b2", "#d55e00", "#e6eaed"
N_KEYS, KNN = 6, 3  # of the drawing
FIRST, SECOND = (4, 1, 3), (2, 5, 0)  # the best sub-keys of each half, in order
BEST = ((4, 2), (1, 2), (4, 5))  # the slots with the highest sums


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: docs/)")
    write_file(parser.parse_args().out, picture())


def picture() -> str:
    """The drawing as SVG, the same bytes every time."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "font.size": 10}):
        figure = Figure(figsize=(9.0, 4.2), facecolor="white")
        draw_block(panel(figure, (0.0, 0.0, 0.42, 1.0), (0, 10), (0, 12)))
        draw_search(panel(figure, (0.42, 0.0, 0.58, 1.0), (0, 14), (0, 12)))
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=NO_METADATA)
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def panel(
    figure: Figure,
    place: Tuple[float, float, float, float],
    x: Tuple[float, float],
    y: Tuple[float, float],
) -> Axes:
    """Axes without frame."""
    axes = figure.add_axes(place)
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, text: str, colour: str = GREY, width: float = 3.4) -> None:
    """A box with text, centred at a point."""
    edge = INK if colour == GREY else colour
    style = "round,pad=0.05,rounding_size=0.25"
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.6), width, 1.2, boxstyle=style, fc="white", ec=edge, lw=1.5
        )
    )
    axes.text(x, y, text, ha="center", va="center", color=edge)


def arrow(axes: Axes, *points: Tuple[float, float], colour: str = INK) -> None:
    """A line through points, with a head at its end."""
    *way, before, end = points
    for a, b in zip([*way, before], [*way[1:], before], strict=False):
        axes.plot([a[0], b[0]], [a[1], b[1]], color=colour, lw=1.3, solid_capstyle="round")
    axes.annotate(
        "", end, before, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0}
    )


def draw_block(axes: Axes) -> None:
    """A post-LN block: LN(h + dropout(FFN(h)) + dropout(memory(h)))."""
    axes.text(5, 11.5, "ResM: a memory beside the feed-forward", ha="center", weight="bold")
    arrow(axes, (5, 0.2), (5, 0.9))
    box(axes, 5, 1.5, "self-attention, LN", width=4.6)
    arrow(axes, (5, 2.1), (5, 3.2), (2.6, 3.2), (2.6, 4.4))
    arrow(axes, (5, 3.2), (7.4, 3.2), (7.4, 4.4), colour=BLUE)
    arrow(axes, (5, 3.2), (5, 7.55))
    axes.text(5.15, 2.5, "h", style="italic")
    box(axes, 2.6, 5.0, "feed-forward", width=3.2)
    box(axes, 7.4, 5.0, "memory", BLUE, width=3.2)
    arrow(axes, (2.6, 5.6), (2.6, 8.0), (4.55, 8.0))
    arrow(axes, (7.4, 5.6), (7.4, 8.0), (5.45, 8.0), colour=BLUE)
    axes.plot([5], [8.0], "o", ms=17, mfc="white", mec=INK, mew=1.5)
    axes.text(5, 7.97, "+", ha="center", va="center", size=14)
    axes.text(2.45, 6.9, "dropout", ha="right", size=9)
    axes.text(7.55, 6.9, "dropout", ha="left", size=9, color=BLUE)
    arrow(axes, (5, 8.45), (5, 9.1))
    box(axes, 5, 9.7, "LN", width=2.2)
    arrow(axes, (5, 10.3), (5, 11.1))


def draw_search(axes: Axes) -> None:
    """Two halves of a query, the best sub-keys of each, the slots as their pairs."""
    axes.text(7, 11.5, "The search: a slot is a pair of sub-keys", ha="center", weight="bold")
    left, bottom, size = 4.1, 1.9, 1.15
    for i in range(N_KEYS):
        for j in range(N_KEYS):
            y = bottom + (N_KEYS - 1 - i) * size
            is_candidate = i in FIRST and j in SECOND and (i, j) in candidates()
            colour = ORANGE if (i, j) in BEST else "#f9d9c3" if is_candidate else "white"
            axes.add_patch(
                Rectangle((left + j * size, y), size, size, fc=colour, ec="#c4ccd2", lw=0.8)
            )
    for rank, i in enumerate(FIRST):
        y = bottom + (N_KEYS - 1 - i) * size + size / 2
        axes.text(left - 0.25, y, f"{rank + 1}.", ha="right", va="center", color=BLUE)
    for rank, j in enumerate(SECOND):
        x = left + j * size + size / 2
        axes.text(x, bottom + N_KEYS * size + 0.25, f"{rank + 1}.", ha="center", color=BLUE)
    axes.text(
        left - 1.2, bottom + 3 * size, "first half:\nits best\nsub-keys", ha="right", va="center"
    )
    axes.text(
        left + 3 * size, bottom + N_KEYS * size + 1.0, "second half: its best sub-keys", ha="center"
    )
    axes.text(
        left + N_KEYS * size + 0.3,
        bottom + 3 * size,
        "S² slots,\n2 S products",
        va="center",
        size=9,
    )
    axes.text(
        7, 0.95, "dark: the K best slots of all;  pale: the other candidates", ha="center", size=9
    )
    axes.text(7, 0.3, "read = Σ softmax(score) · value of the slot", ha="center", color=BLUE)


def candidates() -> List[Tuple[int, int]]:
    """Pairs that can be among the K best: of ranks i, j with (i + 1)(j + 1) <= K."""
    return [
        (first, second)
        for i, first in enumerate(FIRST)
        for j, second in enumerate(SECOND)
        if (i + 1) * (j + 1) <= KNN
    ]


if __name__ == "__main__":
    run(main)
