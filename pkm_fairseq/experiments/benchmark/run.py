"""One benchmark: everything that was asked for, in order, with results saved as they come."""

from typing import Any, Callable, Dict

import torch

from . import layer, parts, peak
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
        settings: what.
        tell: gets a line for every result.
        save: called with the report, and with what it is as JSON, after each part of the work.

    Raises:
        MismatchError: the two sides of a comparison do not compute the same.
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
    elif what == "memory":
        peak.measure(settings, report)
    else:
        with_fairseq(what).measure(settings, report)


def count(settings: Settings) -> int:
    """How many results there will be, skipped ones included."""
    counts = {"layer": layer.count, "parts": parts.count, "memory": peak.count}
    return sum(
        counts[what](settings) if what in counts else with_fairseq(what).count(settings)
        for what in settings.what
    )


def with_fairseq(what: str) -> Any:
    """A part that needs fairseq, which takes seconds to import."""
    from . import counting, models

    return {"model": models, "usage": counting}[what]
