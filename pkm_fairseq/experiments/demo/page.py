"""The report: report.json, and a report.html that needs nothing but a browser."""

import json
import shlex
from pathlib import Path
from typing import Any, Dict, List

from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from ...analysis.draws import below, draw_curves_of_draws
from ...analysis.svg import draw
from ...memory.files import write_file
from ..runs.logs import read_log
from ..runs.trainings import LOG
from .presets import ARMS, TITLES, Preset, arm_flags
from .train import HALF, INIT_FLAGS

COLOURS = {"plain": "#5b6770", "resm_init": "#0072b2", "pkm": "#d55e00"}  # Okabe and Ito
USAGES = ("_top1_usage", "_topk_usage")  # of slots; usages of sub-keys are only in the log


def write_page(
    out: Path, evaluation: Dict[str, Any], preset: Preset, corpus: str
) -> Dict[str, Any]:
    """Write ``report.json`` and ``report.html``.

    Args:
        out: the demo's folder, with the logs of the arms.
        evaluation: the results of the evaluation.
        preset: the settings.
        corpus: the title of the corpus.

    Returns:
        The content of ``report.json``.
    """
    logs = {arm: out / "arms" / arm / LOG for arm in ARMS}
    offsets = {"plain": 0, "resm_init": preset.half, "pkm": 0}
    arms = [{key: arm[key] for key in arm if key != "slot_mass"} for arm in evaluation["arms"]]
    counts = [
        (f"{TITLES[arm['arm']]}, layer {layer['layer']}", COLOURS[arm["arm"]], layer)
        for arm in arms
        for layer in arm["memory"]
    ]
    report = {**evaluation, "arms": arms, "corpus": corpus, "settings": preset.settings()}
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template("report.html")
    html = page.render(
        **report,
        titles=TITLES,
        usage_draws=_draws_of_log(logs),
        colours=COLOURS,
        charts={
            "learning": draw(lambda axes: learning_curves(axes, logs, offsets)),
            "usage": draw(lambda axes: usage_curves(axes, logs, offsets)),
            "draws": draw(lambda axes: draw_curves_of_draws(axes, counts)),
            "mass": draw(lambda axes: mass_curves(axes, evaluation["arms"])),
        },
        flags={arm: shlex.join(arm_flags(arm, preset)) for arm in ARMS},
        init_flags=shlex.join(["--restore-file", f"plain/{HALF}", *INIT_FLAGS]),
    )
    write_file(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_file(out / "report.html", html)
    return report


def _draws_of_log(logs: Dict[str, Path]) -> str:
    """The draws per slot that the validations of a training counted."""
    said = {
        f"{line[key]:.3g}"
        for arm in ARMS
        for line in read_log(logs[arm], "valid")
        for key in line
        if key.endswith("_draws_per_slot")
    }
    return " or ".join(sorted(said)) or "an unknown number of"


def learning_curves(axes: Axes, logs: Dict[str, Path], offsets: Dict[str, int]) -> None:
    """Perplexity over updates: validation, and training as a faint line."""
    for arm, log in logs.items():
        for tag, strength in (("train_inner", 0.3), ("valid", 1.0)):
            lines = read_log(log, tag)
            axes.plot(
                [line["num_updates"] + offsets[arm] for line in lines],
                [line["ppl"] for line in lines],
                color=COLOURS[arm],
                alpha=strength,
                linewidth=2 if tag == "valid" else 1,
                label=TITLES[arm] if tag == "valid" else None,
            )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in (5, 10, 20, 50, 100, 200, 500, 1000) if low < tick < high])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="updates", ylabel="masked-LM perplexity")
    axes.legend()


def usage_curves(axes: Axes, logs: Dict[str, Path], offsets: Dict[str, int]) -> None:
    """Top-1 and top-k usage over updates, on the validation set."""
    for arm, log in logs.items():
        lines = read_log(log, "valid")
        keys = {key for line in lines[:1] for key in line if key.endswith(USAGES)}
        for name in sorted(keys):
            layer, kind, _ = name.removeprefix("memory").split("_")
            axes.plot(
                [line["num_updates"] + offsets[arm] for line in lines],
                [line[name] for line in lines],
                color=COLOURS[arm],
                linestyle="-" if kind == "top1" else ":",
                label=f"{TITLES[arm]}, layer {layer}, {kind.replace('top', 'top-')}",
            )
    axes.set(xlabel="updates", ylabel="slots used", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    below(axes)


def mass_curves(axes: Axes, arms: List[Dict[str, Any]]) -> None:
    """The share of the softmax weight that each slot received, sorted."""
    for arm in arms:
        for layer, shares in arm["slot_mass"].items():
            used = [share * len(shares) for share in shares if share > 0]
            label = f"{TITLES[arm['arm']]}, layer {layer}"
            axes.plot(range(1, len(used) + 1), used, color=COLOURS[arm["arm"]], label=label)
            axes.set_xlim(0, len(shares))
    axes.axhline(1, color="#9aa4ab", linewidth=1, linestyle="--", label="uniform")
    axes.set_yscale("log")
    axes.set(xlabel="slots, the heaviest first", ylabel="weight, as a multiple of uniform")
    axes.legend()
