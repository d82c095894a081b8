"""The chart of usage over draws per slot, for the usage page and the demo's report."""

import math
from typing import Any, Dict, Optional, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter


def draw_curves_of_draws(axes: Axes, counts: Sequence[Tuple[str, str, Dict[str, Any]]]) -> None:
    """Draw usage over draws per slot: expected usage for fewer draws, and its estimated limit.

    Args:
        axes: the axes to draw on.
        counts: for each memory its name, colour and ``MemoryUsage.summary``.
    """
    last = max(point["draws_per_slot"] for _, _, counted in counts for point in counted["curve"])
    for name, colour, counted in counts:
        draws = [point["draws_per_slot"] for point in counted["curve"]]
        for kind, style, mark in (("top1", "-", "o"), ("topk", ":", "s")):
            look = {"color": colour, "marker": mark, "markersize": 4}
            label = f"{name}, {kind.replace('top', 'top-')}"
            usage = [point[f"{kind}_usage"] for point in counted["curve"]]
            axes.plot(draws, usage, linestyle=style, label=label, **look)
            ever = counted["extrapolation"][kind]
            axes.errorbar(
                4 * last, ever["usage"], yerr=ever["error"], capsize=3, mfc="none", **look
            )
    at = [10 ** (step / 20) for step in range(-10, 1 + round(20 * math.log10(max(last, 1))))]
    uniform = [-math.expm1(-x) for x in at]
    axes.plot(at, uniform, color="#9aa4ab", linewidth=1, linestyle="--", label="uniform, top-1")
    axes.set_xscale("log")
    ticks = [x for x in (0.1, 1, 3, 10, 30, 100, 300, 1000, 3000) if x <= last]
    axes.set_xticks([*ticks, 4 * last], [*(f"{x:g}" for x in ticks), "ever\nmore"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="draws per slot", ylabel="slots used", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    below(axes)


def below(axes: Axes, handles: Optional[Sequence[Line2D]] = None) -> None:
    """Put the legend below the axes, where it hides nothing; for these lines, or for all."""
    shown = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.get_figure(root=True).legend(
        handles=shown, loc="outside lower center", ncols=2, fontsize=9
    )
