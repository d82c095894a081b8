"""The page of a report: one file that needs nothing but a browser. Its charts, as files, too."""

import re
from pathlib import Path
from typing import List

from jinja2 import Environment, FileSystemLoader

from ..memory.files import write_file
from . import tables
from .analyse import Analysis
from .curves import draw_curves, logs_of_checkpoints
from .plots import COLOURS, Chart, charts_of_checkpoints


def write_charts(analysis: Analysis, folder: Path) -> None:
    """Write each chart of the page as an SVG file, called as its title."""
    folder.mkdir(exist_ok=True)
    by_layer = charts_of_checkpoints(analysis.report["checkpoints"], analysis.masses)
    charts = [chart for drawn in by_layer.values() for chart in drawn]
    charts += _curves(analysis)
    for chart in charts:
        name = re.sub(r"\W+", "_", chart.title.lower()).strip("_")
        svg = str(chart.svg).replace("<svg", '<svg style="background: #fff"', 1)
        write_file(folder / f"{name}.svg", f"{svg}\n")


def page(analysis: Analysis) -> str:
    """The page as HTML, with all charts in it."""
    report = analysis.report
    checkpoints = report["checkpoints"]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template("page.html")
    return template.render(
        **report,
        colours=COLOURS,
        charts=charts_of_checkpoints(checkpoints, analysis.masses),
        curves=_curves(analysis),
        usage=(("checkpoint", "layer", "head", *tables.USAGE_COLUMNS),
               tables.usage_rows(checkpoints)),
        curve=(("checkpoint", "layer", *tables.CURVE_COLUMNS), tables.curve_rows(checkpoints)),
        staleness=(("checkpoint", "layer", *tables.STALENESS_COLUMNS),
                   tables.staleness_rows(checkpoints)),
        drifts=(("checkpoints", "layer", "head", *tables.DRIFT_COLUMNS),
                tables.drift_rows(report["drift"])),
        last=(("log", "memories", "layer", *tables.LOG_COLUMNS), tables.log_rows(analysis.logs)),
        last_head=tables.LAST_HEAD,
    )  # fmt: skip


def _curves(analysis: Analysis) -> List[Chart]:
    """What logs, and several checkpoints of one training, say over updates."""
    report = analysis.report
    of_checkpoints = logs_of_checkpoints(report["checkpoints"], report["split"] or "text")
    return draw_curves([*analysis.logs, *of_checkpoints])
