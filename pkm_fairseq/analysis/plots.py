"""Charts of the reads and weights of slots."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
from jinja2.filters import do_forceescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from .draws import draw_curves_of_draws
from .readers import times_uniform
from .svg import draw

# Okabe and Ito, which colour-blind people can tell apart; black last
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6770", "#000000")
GREY = "#9aa4ab"
MOST_BINS = 256  # of the heat map, each way
POINTS = 600  # of a curve of sorted masses


class Chart(NamedTuple):
    """A chart for the page: its title, what it shows, and the picture with its description."""

    title: str
    caption: str
    svg: Markup


def chart(title: str, caption: str, alt: str, plot: Callable[[Axes], None]) -> Chart:
    """Draw a chart; ``alt`` describes it in words."""
    svg = draw(plot)
    opening = f'<svg role="img" aria-label="{do_forceescape(alt)}"'
    return Chart(title, caption, Markup(svg.replace("<svg", opening, 1)))


def plain(text: str) -> str:
    """Escape a name, so that matplotlib shows it literally and does not hide it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def mass_chart(layer: int, masses: Dict[str, Tensor]) -> Chart:
    """Sorted weight of the slots of a layer, of one or more checkpoints."""
    sorted_masses = {name: _sorted_mass(mass) for name, mass in masses.items()}

    def plot(axes: Axes) -> None:
        for i, (name, heights) in enumerate(sorted_masses.items()):
            used = heights[heights > 0]
            at = _thin(len(used))
            axes.plot((at + 1) / len(heights), used[at], color=COLOURS[i % len(COLOURS)],
                      label=plain(name))  # fmt: skip
        axes.axhline(1, color=GREY, linewidth=1, linestyle="--", label="uniform")
        axes.set_yscale("log")
        axes.set(xlabel="slots, the heaviest first", ylabel="weight, multiple of uniform")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()

    heaviest = "; ".join(
        f"{name}: the heaviest slot has {heights[0]:.3g} times the uniform weight, "
        f"{100 * float((heights > 0).mean()):.1f} % of the slots have any"
        for name, heights in sorted_masses.items()
    )
    return chart(
        f"Layer {layer}: weight of the slots",
        "Softmax weight of each slot, sorted; 1 is the weight under uniform use. If a line ends "
        "early, the remaining slots received no weight.",
        f"Sorted weight of the slots of layer {layer}. {heaviest}.",
        plot,
    )


def heads_chart(layer: Dict[str, Any], title: str) -> Chart:
    """Top-1 and top-k usage of each head, with the ceiling of uniform routing.

    Args:
        layer: the layer's part of a report.
        title: the chart's title.
    """
    rows = [*layer["heads"], layer]
    names = [f"head {head}" for head in range(len(layer["heads"]))] + ["all heads"]

    def plot(axes: Axes) -> None:
        places = np.arange(len(rows))
        for shift, kind in ((-0.2, "top1"), (0.2, "topk")):
            axes.bar(places + shift, [row[f"{kind}_usage"] for row in rows], width=0.38,
                     color=COLOURS[kind == "topk"],
                     label=f"{kind.replace('top', 'top-')} usage")  # fmt: skip
            ceilings = [row[f"{kind}_ceiling"] for row in rows]
            axes.hlines(ceilings, places + shift - 0.19, places + shift + 0.19, color="#1d2730",
                        label="ceiling of uniform routing" if kind == "top1" else None)  # fmt: skip
        axes.set_xticks(places, names, rotation=0 if len(rows) <= 6 else 60)
        axes.set(ylim=(0, 1.03), ylabel="slots used")
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, fontsize=9)

    described = "; ".join(
        f"{name}: top-1 {100 * row['top1_usage']:.1f} % of at most "
        f"{100 * row['top1_ceiling']:.1f} %, top-k {100 * row['topk_usage']:.1f} %"
        for name, row in zip(names, rows, strict=True)
    )
    return chart(
        title,
        "Share of slots that were a head's first choice (top-1) or received any weight (top-k). "
        "The black lines show what uniform random routing of the same tokens would reach.",
        f"{title}. {described}.",
        plot,
    )


def draws_chart(layer: int, counts: Dict[str, Dict[str, Any]]) -> Chart:
    """Usage of a layer over draws per slot, of one or more checkpoints.

    Args:
        layer: its index.
        counts: the layer's part of the report of each checkpoint, by name.
    """
    drawn = [
        (plain(name), COLOURS[i % len(COLOURS)], counted)
        for i, (name, counted) in enumerate(counts.items())
    ]
    said = "; ".join(
        f"{name}: top-1 {100 * point['top1_usage']:.1f} % at {point['draws_per_slot']:.3g}"
        for name, counted in counts.items()
        for point in counted["curve"]
    )
    return chart(
        f"Layer {layer}: usage over draws per slot",
        "Expected share of slots that a random choice of this many draws (tokens x heads per slot) "
        "hits. On the right: the estimated limit for ever more draws (Chao 1984), with its "
        "standard error. Compare usages at equal draws only.",
        f"Usage of layer {layer} over draws per slot. {said}.",
        lambda axes: draw_curves_of_draws(axes, drawn),
    )


def heat_chart(mass: Tensor, title: str) -> Chart:
    """The weight of the slots on the grid of their two sub-keys.

    Args:
        mass: (n_slots,), slot ``i1 * n_keys + i2``.
        title: of the chart.
    """
    n_keys = math.isqrt(len(mass))
    multiples = times_uniform(mass)
    grid = binned(multiples.view(n_keys, n_keys).cpu().numpy())
    used = grid[grid > 0] if mass.any() else np.ones(1)  # the colour bar of an empty grid
    high = float(used.max()) * 1.001
    low = min(max(float(used.min()), high / 1e5), high / 10)

    def plot(axes: Axes) -> None:
        shown = np.where(grid > 0, np.clip(grid, low, None), np.nan)
        image = axes.imshow(shown, norm=LogNorm(low, high), cmap="viridis", origin="upper",
                            extent=(0, n_keys, n_keys, 0), interpolation="nearest")  # fmt: skip
        axes.grid(visible=False)
        axes.set(xlabel="sub-key of the second half", ylabel="sub-key of the first half")
        axes.figure.colorbar(image, ax=axes, label="weight, multiple of uniform")

    bins = "" if len(grid) == n_keys else f" Averaged over {len(grid)} by {len(grid)} bins."
    return chart(
        title,
        "Each point is a slot: the sub-key of its row and the sub-key of its column. White slots "
        f"received no weight. Stripes are sub-keys that are used often or never.{bins}",
        f"{title}: heat map of {n_keys} by {n_keys} slots. "
        f"{100 * float((mass > 0).double().mean()):.1f} % of the slots received weight, the "
        f"heaviest {float(multiples.max()):.3g} times the uniform weight.",
        plot,
    )


def binned(grid: np.ndarray, most: int = MOST_BINS) -> np.ndarray:
    """Means over bins of nearly equal size, at most ``most`` each way."""
    n = len(grid)
    if n <= most:
        return grid
    starts = np.linspace(0, n, most, endpoint=False).astype(int)
    sizes = np.diff([*starts, n])
    sums = np.add.reduceat(np.add.reduceat(grid, starts, axis=0), starts, axis=1)
    return sums / np.outer(sizes, sizes)


def _sorted_mass(mass: Tensor) -> np.ndarray:
    return times_uniform(mass).sort(descending=True).values.cpu().numpy()


def _thin(n: int) -> np.ndarray:
    """Ranks at which to draw a curve of n points: dense at the start, and including the end."""
    if n <= 2 * POINTS:
        return np.arange(n)
    evenly, closely = np.linspace(0, n - 1, POINTS), np.geomspace(1, n, POINTS) - 1
    return np.unique(np.concatenate([evenly, closely]).astype(int))


def charts_of_checkpoints(
    reports: Sequence[Dict[str, Any]], masses: Sequence[Dict[int, Tensor]]
) -> Dict[int, List[Chart]]:
    """All charts of the counts, by layer, checkpoints side by side.

    Args:
        reports: one per checkpoint.
        masses: for each checkpoint, by layer, (n_slots,).
    """
    charts: Dict[int, List[Chart]] = {}
    for report, mass in zip(reports, masses, strict=True):
        of = f", {report['name']}" if len(reports) > 1 else ""
        for counted in report["layers"]:
            layer = counted["layer"]
            charts.setdefault(layer, []).extend(
                [
                    heads_chart(counted, f"Layer {layer}{of}: usage of each head"),
                    heat_chart(mass[layer], f"Layer {layer}{of}: weight on the grid of sub-keys"),
                ]
            )
    for layer, drawn in charts.items():
        here = zip(reports, masses, strict=True)
        curves = {report["name"]: mass[layer] for report, mass in here if layer in mass}
        drawn.append(mass_chart(layer, curves))
        counts = {report["name"]: counted for report in reports for counted in report["layers"]
                  if counted["layer"] == layer}  # fmt: skip
        drawn.append(draws_chart(layer, counts))
    return dict(sorted(charts.items()))
