"""Results as JSON, as Markdown tables and as a plot."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from ...memory.files import whole_file, write_file

PLOTTED = "layer_train_step"
FORMATS = (".png", ".svg", ".pdf")
PEAK = "peak_memory"
TITLES = {
    "layer_train_step": "Layer: training step",
    "layer_forward": "Layer: forward in evaluation",
    "model_train_step": "Model: training step",
    "model_forward": "Model: forward in evaluation",
    "counting_calls": "Counting usage: its calls within a training step, processor time",
    "narrow_train_step": "Narrow tables: training step, against float32",
    "narrow_forward": "Narrow tables: forward in evaluation, against float32",
    PEAK: "Peak memory of a training step of the layer",
}
PARTS = "Parts of a layer's step"
PEAK_COLUMNS = ("table", "between steps", "peak", "step", "extra")

Entry = Dict[str, Any]


class Report:
    """Collects the measurements, in order.

    Args:
        machine: description of the machine.
        settings: the settings of all comparisons.
        tell: receives a line for every entry.
    """

    def __init__(
        self,
        machine: Dict[str, Any],
        settings: Optional[Dict[str, Any]] = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.machine = machine
        self.settings = settings or {}
        self.tell = tell
        self.entries: List[Entry] = []

    def result(
        self, what: str, tokens: int, n_keys: int, subject: str, against: str, **numbers: Any
    ) -> None:
        """Record a comparison; its numbers come from ``timing.compare`` and elsewhere."""
        self._add(_entry(what, tokens, n_keys, subject, against, **numbers))

    def skip(
        self, what: str, tokens: int, n_keys: int, against: str, reason: str, subject: str = "ours"
    ) -> None:
        """Record a skipped measurement, and the reason."""
        self._add(_entry(what, tokens, n_keys, subject, against, reason=reason))

    def peak(self, subject: str, tokens: int, n_keys: int, **n_bytes: Any) -> None:
        """Record peak memory."""
        self._add(_entry(PEAK, tokens, n_keys, subject, None, **n_bytes))

    def as_dict(self, memcpy_gb_s: float) -> Dict[str, Any]:
        """All entries, ready for JSON; peaks and skipped entries are separate from results."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "memcpy_gb_s": memcpy_gb_s,
            "results": [e for e in self.entries if "ratio" in e],
            "memory": [_without(e, "what", "against") for e in self.entries if "peak_bytes" in e],
            "skipped": [e for e in self.entries if "reason" in e],
        }

    def _add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.tell(line(entry))


def line(entry: Entry) -> str:
    """An entry in one line."""
    slots = f"{entry['n_keys']}² slots"
    against = f" against {entry['against']}" if entry["against"] else ""
    where = f"{entry['what']}, {entry['tokens']:,} tokens, {slots}: {entry['subject']}{against}"
    if "reason" in entry:
        return f"{where}: skipped, {entry['reason']}"
    if "peak_bytes" in entry:
        return f"{where}: peak {entry['peak_bytes'] / 1e6:,.0f} MB"
    share = entry.get("share_of_memcpy")
    more = "" if share is None else f", {100 * share:.0f} % of memcpy"
    times = f"{entry['subject_ms']:.2f} and {entry['against_ms']:.2f} ms"
    return f"{where}: {times}, ratio {entry['ratio']:.2f}{more}"


def markdown(report: Dict[str, Any], entries: Sequence[Entry]) -> str:
    """The report as Markdown tables.

    Args:
        report: from ``Report.as_dict``.
        entries: all entries in order.
    """
    blocks = [_machine_line(report)]
    for title, group in groupby(_in_sections(entries), key=lambda e: _title(e["what"])):
        rows = list(group)
        if title == TITLES[PEAK]:
            blocks.append(_section(title, _peak_table(rows)))
        else:
            blocks.append(_section(title, _ratio_table(rows, with_what=title == PARTS)))
    return "\n\n".join(blocks) + "\n"


def plot(entries: Sequence[Entry], file: Path) -> None:
    """Plot ratios of the layer's training step over tokens, one panel per contestant."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    entries = [e for e in entries if e["what"] == PLOTTED]
    others = list(dict.fromkeys(e["against"] for e in entries))
    figure = Figure(figsize=(3.2 * max(1, len(others)), 3.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(others)), sharey=True, squeeze=False)[0]
    for axes, other in zip(panels, others, strict=False):
        _draw(axes, [e for e in entries if e["against"] == other])
        axes.set(title=other, xlabel="tokens per batch", xscale="log", yscale="log")
        axes.set_xticks(sorted({e["tokens"] for e in entries}))
        axes.xaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_ylabel("times as fast, training step")
    metadata = {"Date": None} if file.suffix == ".svg" else {}
    with whole_file(file) as out:
        figure.savefig(out, format=file.suffix[1:], dpi=120, metadata=metadata)


def save(
    entries: Sequence[Entry],
    report: Dict[str, Any],
    json_file: Optional[Path] = None,
    markdown_file: Optional[Path] = None,
    plot_file: Optional[Path] = None,
) -> None:
    """Write the requested files."""
    if json_file:
        write_file(json_file, json.dumps(report, indent=2) + "\n")
    if markdown_file:
        write_file(markdown_file, markdown(report, entries))
    if plot_file:
        plot(entries, plot_file)


def _draw(axes: Any, entries: List[Entry]) -> None:
    for n_keys in sorted({e["n_keys"] for e in entries}):
        measured = [e for e in entries if e["n_keys"] == n_keys and "ratio" in e]
        measured.sort(key=lambda e: e["tokens"])
        if not measured:
            continue
        tokens, ratios = ([e[key] for e in measured] for key in ("tokens", "ratio"))
        low, high = zip(*(e["spread"] for e in measured), strict=True)
        (drawn,) = axes.plot(tokens, ratios, marker="o", label=f"{n_keys}² slots")
        axes.fill_between(tokens, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(1, color="#9aa4ab", linewidth=1, linestyle="--")
    if not any("ratio" in e for e in entries):
        axes.text(0.5, 0.5, entries[0]["reason"], ha="center", transform=axes.transAxes, wrap=True)
    else:
        axes.legend(frameon=False)


def _entry(
    what: str, tokens: int, n_keys: int, subject: str, against: Optional[str], **more: Any
) -> Entry:
    sizes = {"tokens": tokens, "n_keys": n_keys}
    return {"what": what, **sizes, "subject": subject, "against": against, **more}


def _without(entry: Entry, *keys: str) -> Entry:
    return {key: value for key, value in entry.items() if key not in keys}


def _title(what: str) -> str:
    return TITLES.get(what, PARTS)


def _in_sections(entries: Iterable[Entry]) -> List[Entry]:
    """Group entries by title; titles and entries keep the order of their first occurrence."""
    entries = list(entries)
    titles = list(dict.fromkeys(_title(e["what"]) for e in entries))
    return sorted(entries, key=lambda e: titles.index(_title(e["what"])))


def _machine_line(report: Dict[str, Any]) -> str:
    machine = report["machine"]
    found = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, backend {machine['backend']}, float32, "
        f"memcpy {report['memcpy_gb_s']:.1f} GB/s read and written; {found}"
    )


def _section(title: str, table: List[List[str]]) -> str:
    head, *rows = table
    lines = [head, ["---" if name.isalpha() else "--:" for name in _alignments(head)], *rows]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _alignments(head: List[str]) -> List[str]:
    """Alignments: columns of words left, columns of numbers right."""
    words = {"part", "subject", "against"}
    return ["words" if name in words else "1" for name in head]


def _ratio_table(entries: List[Entry], with_what: bool) -> List[List[str]]:
    head = ["part"] if with_what else []
    head += ["tokens", "slots", "subject", "against", "subject ms", "against ms"]
    head += ["ratio", "quartiles", "pairs", "slots read"]
    head += ["GB/s", "of memcpy"] if with_what else []
    return [head, *([cell for cell in _cells(e, with_what)] for e in entries)]


def _cells(entry: Entry, with_what: bool) -> List[str]:
    start = [entry["what"]] if with_what else []
    start += [f"{entry['tokens']:,}", f"{entry['n_keys']}²", entry["subject"], entry["against"]]
    if "reason" in entry:
        return [*start, entry["reason"], *[""] * (7 if with_what else 5)]
    low, high = entry["spread"]
    numbers = [f"{entry['subject_ms']:.2f}", f"{entry['against_ms']:.2f}"]
    numbers += [f"{entry['ratio']:.2f}", f"{low:.2f} to {high:.2f}", str(entry["pairs"])]
    numbers.append(_slots_read(entry.get("distinct_slots")))
    if with_what:
        moved = "bytes" in entry
        numbers += [f"{entry['gb_s']:.1f}" if moved else ""]
        numbers += [f"{100 * entry['share_of_memcpy']:.0f} %" if moved else ""]
    return [*start, *numbers]


def _slots_read(distinct: Any) -> str:
    by_layer = distinct if isinstance(distinct, list) else [distinct]
    return " + ".join(f"{n:,}" for n in by_layer if n is not None)


def _peak_table(entries: List[Entry]) -> List[List[str]]:
    columns = [f"{name} MB" for name in PEAK_COLUMNS]
    table = [["subject", "tokens", "slots", *columns, "extra of a table"]]
    for entry in entries:
        start = [entry["subject"] if entry["against"] is None else entry["against"]]
        start += [f"{entry['tokens']:,}", f"{entry['n_keys']}²"]
        if "reason" in entry:
            table.append([*start, entry["reason"], *[""] * len(PEAK_COLUMNS)])
            continue
        keys = ("table_bytes", "idle_bytes", "peak_bytes", "step_bytes", "extra_bytes")
        numbers = [f"{entry[key] / 1e6:,.0f}" for key in keys]
        table.append([*start, *numbers, f"{100 * entry['extra_share_of_table']:.1f} %"])
    return table
