"""Run a benchmark: all requested parts in order; save results after each part."""

from typing import Any, Callable, Dict

import torch

from . import layer, narrow, parts, peak
from .machine import Memcpy, describe
from .output import Report
from .settings import Settings
from .subjects import sizes


def run(
    settings: Settings,
    tell: Callable[[str], None],
    save: Callable[[Report, Dict[str, Any]], None],
) -> Report:
    """Measure.

    Args:
        settings: what to measure.
        tell: receives a line for every result.
        save: called after each part with the report, and with its JSON form.

    Raises:
        MismatchError: the two sides of a comparison compute different results.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    report = Report(describe(), {**vars(settings), "layer": sizes()}, tell)
    memcpy = Memcpy()
    for what in settings.what:
        memcpy.measure()
        try:
            _measure(what, settings, report, memcpy)
        except KeyboardInterrupt:
            save(report, report.as_dict(memcpy.median_gb_s()))
            raise
        save(report, report.as_dict(memcpy.median_gb_s()))
    return report


def _measure(what: str, settings: Settings, report: Report, memcpy: Memcpy) -> None:
    if what == "layer":
        layer.measure(settings, report)
    elif what == "parts":
        parts.measure(settings, report, memcpy)
    elif what == "narrow":
        narrow.measure(settings, report, memcpy)
    elif what == "memory":
        peak.measure(settings, report)
    else:
        with_fairseq(what).measure(settings, report)


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    counts = {"layer": layer.count, "parts": parts.count, "memory": peak.count}
    counts["narrow"] = narrow.count
    return sum(
        counts[what](settings) if what in counts else with_fairseq(what).count(settings)
        for what in settings.what
    )


def with_fairseq(what: str) -> Any:
    """A part that needs fairseq; importing fairseq takes seconds."""
    from . import counting, models

    return {"model": models, "usage": counting}[what]
