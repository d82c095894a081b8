"""Charts as SVG, in one style."""

import io
from typing import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # neither dates nor links
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pkm_fairseq",  # the same ids every time
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4ab",
    "axes.labelcolor": "#39434a",
    "text.color": "#39434a",
    "xtick.color": "#39434a",
    "ytick.color": "#39434a",
    "axes.grid": True,
    "grid.color": "#e6eaed",
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def draw(plot: Callable[[Axes], None]) -> str:
    """Draw a chart as an SVG element that scales with the page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        plot(figure.subplots())
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata=NO_METADATA)
    return svg.getvalue()[svg.getvalue().index("<svg") :]
