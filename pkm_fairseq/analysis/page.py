"""The page of a report, one self-contained HTML file; also writes its charts as files."""

import re
from itertools import chain, count
from pathlib import Path
from typing import List, Set, Tuple

from jinja2 import Environment, FileSystemLoader

from ..memory.files import write_file
from . import tables
from .analyse import Analysis
from .curves import draw_curves, logs_of_checkpoints
from .plots import COLOURS, Chart, charts_of_checkpoints


def write_charts(analysis: Analysis, folder: Path) -> None:
    """Write each chart of the page as an SVG file, named after its title.

    Titles that differ only in case or signs get numbers.
    """
    folder.mkdir(exist_ok=True)
    by_layer = charts_of_checkpoints(analysis.report["checkpoints"], analysis.masses)
    charts = [chart for drawn in by_layer.values() for chart in drawn]
    charts += _curves(analysis)
    written: Set[str] = set()
    for chart in charts:
        name = _unused(re.sub(r"\W+", "_", chart.title.lower()).strip("_"), written)
        written.add(name)
        svg = str(chart.svg).replace("<svg", '<svg style="background: #fff"', 1)
        write_file(folder / f"{name}.svg", f"{svg}\n")


def _unused(name: str, used: Set[str]) -> str:
    """The name, with a number if it is used."""
    numbered = (f"{name}_{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in used)


def page(analysis: Analysis) -> str:
    """The page as HTML, with all charts in it."""
    report = analysis.report
    checkpoints = report["checkpoints"]
    by_head = ("checkpoint", "layer", "head")
    usage, weights = _split(
        by_head, tables.USAGE_COLUMNS, "50/90/99 % in", tables.usage_rows(checkpoints)
    )
    staleness, first_choices = _split(
        by_head[:2], tables.STALENESS_COLUMNS, "never top-1", tables.staleness_rows(checkpoints)
    )
    drifts, values = _split(
        ("checkpoints", "layer", "head"), tables.DRIFT_COLUMNS, "values moved",
        tables.drift_rows(report["drift"]),
    )  # fmt: skip
    last, last_weights = _split(
        ("log", "memories", "layer", *tables.LOG_COLUMNS[:2]), tables.LOG_COLUMNS[2:], "KL",
        tables.log_rows(analysis.logs),
    )  # fmt: skip
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template("page.html")
    return template.render(
        **report,
        colours=COLOURS,
        charts=charts_of_checkpoints(checkpoints, analysis.masses),
        curves=_curves(analysis),
        usage=usage,
        weights=weights,
        curve=(("checkpoint", "layer", *tables.CURVE_COLUMNS), tables.curve_rows(checkpoints)),
        staleness=staleness,
        first_choices=first_choices,
        drifts=drifts,
        values=(values[0], [row for row in values[1] if row[2] == tables.LAST_HEAD]),
        last=last,
        last_weights=last_weights,
        last_head=tables.LAST_HEAD,
    )  # fmt: skip


Content = Tuple[Tuple[str, ...], List[List[str]]]  # of a table: its columns and its rows


def _split(
    keys: Tuple[str, ...], columns: Tuple[str, ...], second: str, rows: List[List[str]]
) -> Tuple[Content, Content]:
    """Two tables that fit into a narrow window; the second begins with this column."""
    n, at = len(keys), columns.index(second)
    return (
        ((*keys, *columns[:at]), [row[: n + at] for row in rows]),
        ((*keys, *columns[at:]), [row[:n] + row[n + at :] for row in rows]),
    )


def _curves(analysis: Analysis) -> List[Chart]:
    """Charts over updates, from logs and from several checkpoints of one training."""
    report = analysis.report
    of_checkpoints = logs_of_checkpoints(report["checkpoints"], report["split"] or "text")
    return draw_curves([*analysis.logs, *of_checkpoints])
