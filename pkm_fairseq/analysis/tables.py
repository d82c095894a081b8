"""Tables of memory usage for the terminal."""

import math
from typing import Any, Dict, List, Optional, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from ..memory.observe.usage import HOLDS
from .curves import Log, last_counts, shapes_of

DASH = "-"
WORDS = 5  # tokens shown of each slot
HOTTEST = 5  # slots shown of each layer


def usage_table(reports: Sequence[Dict[str, Any]]) -> Table:
    """The usage of each memory and each of its heads; checkpoints side by side."""
    table = _table("memory usage", ("checkpoint", "layer", "head"), USAGE_COLUMNS)
    for row in usage_rows(reports):
        name, layer, head, *cells = row
        table.add_row(escape(name), layer, head, *cells, end_section=head == LAST_HEAD)
    return table


USAGE_COLUMNS = ("draws/slot", "top-1 (uniform)", "top-k", "dead", "KL", "Gini", "50/90/99 % in")
USAGE_COLUMNS += ("≥ 1/10/100 %", "top-1 weight", "neighbours", "sub-keys")
LAST_HEAD = "all"
CURVE_POINTS = (1, 3, 10, 30, 100, 300)  # draws per slot


def usage_rows(reports: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Rows of checkpoint, layer, head and ``USAGE_COLUMNS``; a layer's last row is of all heads."""
    rows = []
    layers = sorted({layer["layer"] for report in reports for layer in report["layers"]})
    for index in layers:
        for report in reports:
            for layer in report["layers"]:
                if layer["layer"] == index:
                    rows += _memory_rows(report["name"], str(index), layer)
    for report in reports:
        if report["shared"]:
            rows += _memory_rows(report["name"], "shared", report["shared"])
    return rows


def _memory_rows(name: str, layer: str, summary: Dict[str, Any]) -> List[List[str]]:
    n_heads = len(summary["heads"])
    counts = [{**head, "draws_per_slot": draws_of(summary) / n_heads} for head in summary["heads"]]
    heads = [[name, layer, str(i), *usage_cells(head)] for i, head in enumerate(counts)]
    return [*heads, [name, layer, LAST_HEAD, *usage_cells(summary)]]


def draws_of(summary: Dict[str, Any]) -> float:
    """Draws per slot of a memory's count; older logs hold only its tokens."""
    return summary["tokens"] * len(summary["heads"]) / summary["n_slots"]


def usage_cells(counts: Dict[str, Any]) -> List[str]:
    """Numbers of a memory or of one head, for ``USAGE_COLUMNS``."""
    held = [counts.get(f"holds_{p}") for p in HOLDS]  # not in logs of older versions
    return [
        f"{counts['draws_per_slot']:.3g}",
        f"{percent(counts['top1_usage'])} ({100 * counts['top1_ceiling']:.1f})",
        percent(counts["topk_usage"]),
        f"{counts['dead_slots']:,}",
        f"{counts['kl_weighted']:.2f}",
        f"{counts['gini']:.2f}",
        " / ".join(f"{counts[f'slots_{share}']:,}" for share in (50, 90, 99)),
        DASH if None in held else " / ".join(f"{100 * share:.0f}" for share in held) + " %",
        f"{counts['top1_weight']:.2f}",
        f"{math.exp(counts['entropy']):.1f}",
        f"{100 * counts['subkey1_usage']:.0f} / {100 * counts['subkey2_usage']:.0f} %",
    ]


CURVE_COLUMNS = ("usage", *(f"{x:,}" for x in CURVE_POINTS), "uniform at the last", "ever more")


def curve_rows(reports: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Rows of checkpoint, layer and ``CURVE_COLUMNS``: usage at fewer draws per slot."""
    return [
        [report["name"], name, *cells]
        for report in reports
        for name, counted in (
            *((str(layer["layer"]), layer) for layer in report["layers"]),
            ("shared", report["shared"]),
        )
        if counted
        for cells in _curve_cells(counted)
    ]


def _curve_cells(counted: Dict[str, Any]) -> List[List[str]]:
    rows = []
    for kind in ("top1", "topk"):
        at = {point["draws_per_slot"]: point[f"{kind}_usage"] for point in counted["curve"]}
        known = [x for x in CURVE_POINTS if x in at]
        uniform = percent(-math.expm1(-known[-1])) if known and kind == "top1" else DASH
        ever = counted["extrapolation"][kind]
        shares = [percent(at[x]) if x in at else DASH for x in CURVE_POINTS]
        more = f"{percent(ever['usage'])} ± {100 * ever['error']:.1f}"
        rows.append([kind.replace("top", "top-"), *shares, uniform, more])
    return rows


STALENESS_COLUMNS = ("updates", "never read", "median", "p90", "p99", "read in last 10", "100")
STALENESS_COLUMNS += ("outdated > 100", "> 1,000", "never top-1", "top-1 median", "top-1 p90")
STALENESS_COLUMNS += ("top-1 in last 10", "100", "1,000")


def staleness_rows(reports: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Rows of checkpoint, layer and ``STALENESS_COLUMNS``, for checkpoints that store them."""
    rows = []
    for report in reports:
        counts = {str(layer["layer"]): layer for layer in report["layers"]}
        for name, counted in {**counts, "shared": report["shared"] or {}}.items():
            if counted.get("staleness"):
                rows.append([report["name"], name, *_staleness_cells(counted["staleness"])])
    return rows


def _staleness_cells(staleness: Dict[str, Any]) -> List[str]:
    read, top1 = staleness["read"], staleness["top1"]
    cells = [f"{staleness['updates']:,}", percent(read["never"])]
    cells += [f"{read[key]:,.0f}" for key in ("p50", "p90", "p99")]
    cells += [_share_used(read, key) for key in ("10", "100")]
    cells += [percent(read["outdated"][key]) for key in ("100", "1000")]
    cells += [percent(top1["never"]), *(f"{top1[key]:,.0f}" for key in ("p50", "p90"))]
    return cells + [_share_used(top1, key) for key in ("10", "100", "1000")]


def _share_used(times: Dict[str, Any], updates: str) -> str:
    share = times["used"].get(updates)  # unknown if there were fewer updates
    return DASH if share is None else percent(share)


DRIFT_COLUMNS = ("tokens", "top-k Jaccard", "top-1 same", "query cosine", "queries moved")
DRIFT_COLUMNS += ("sub-keys moved", "values moved", "slot p50 / p90 / p99", "slots unmoved")


def drift_rows(drifts: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Rows of checkpoints, layer, head and ``DRIFT_COLUMNS``."""
    rows = []
    for pair in drifts:
        name = f"{pair['before']} → {pair['after']}"
        for layer in pair["layers"]:
            for head in (*layer["heads"], layer):
                is_whole = head is layer
                who = LAST_HEAD if is_whole else str(head["head"])
                keys = ("topk_jaccard", "top1_same", "query_cosine", "query_moved", "keys_moved")
                cells = [f"{layer['tokens']:,}", *(number(head[key]) for key in keys)]
                cells += _value_cells(layer) if is_whole else ["", "", ""]
                rows.append([name, str(layer["layer"]), who, *cells])
    return rows


def _value_cells(layer: Dict[str, Any]) -> List[str]:
    quantiles = (number(layer[f"values_moved_{q}"]) for q in ("p50", "p90", "p99"))
    moved = number(layer["values_moved"])
    return [moved, " / ".join(quantiles), percent(layer["values_unmoved"])]


LOG_COLUMNS = ("split", "update", "draws/slot", "top-1 (uniform)", "top-k", "dead", "KL")
LOG_COLUMNS += ("Gini", "top-1 weight", "staleness p50 / p90", "values moved p50")


def log_rows(logs: Sequence[Log]) -> List[List[str]]:
    """Rows of arm, shapes, layer and ``LOG_COLUMNS``: the last count of each split."""
    rows = []
    for log in logs:
        for record in last_counts(log):
            for layer in record["layers"]:
                start = [log.name, shapes_of(log), str(layer["layer"])]
                where = [record["split"], f"{record['update']:,}"]
                rows.append([*start, *where, *_log_cells(layer)])
    return rows


def _log_cells(layer: Dict[str, Any]) -> List[str]:
    *counted, _, _, weight, _, _ = usage_cells({**layer, "draws_per_slot": draws_of(layer)})
    staleness: Dict[str, Any] = layer.get("staleness") or {}
    read: Optional[Dict[str, Any]] = staleness.get("read")
    moved: Optional[Dict[str, Any]] = staleness.get("moved")
    since = f"{read['p50']:,.0f} / {read['p90']:,.0f}" if read else DASH
    return [*counted, weight, since, number(moved["p50"]) if moved else DASH]


def slot_table(reports: Sequence[Dict[str, Any]]) -> Table:
    """The hottest slots of each layer and the tokens that read them most."""
    columns = ("slot", "times uniform", "symbols")
    table = _table(
        f"hottest slots, up to {HOTTEST} of a layer",
        ("checkpoint", "layer"),
        columns,
        "read most by",
    )
    for report in reports:
        for layer in report["layers"]:
            for slot in layer["hot_slots"][:HOTTEST]:
                words = ", ".join(
                    f"{reader['token']} {100 * reader['weight_share']:.0f} %"
                    for reader in slot["readers"][:WORDS]
                )
                cells = [escape(report["name"]), str(layer["layer"]), f"{slot['slot']:,}"]
                cells += [f"{slot['times_uniform']:.1f}", f"{slot['symbols']:,}", escape(words)]
                table.add_row(*cells)
    return table


def tables(report: Dict[str, Any], logs: Sequence[Log]) -> List[Table]:
    """All tables of a report that have rows."""
    found = []
    checkpoints = report["checkpoints"]
    if checkpoints:
        found += [usage_table(checkpoints), slot_table(checkpoints)]
        split = f", split {report['split']}" if report["split"] else ""
        read = ", ".join(f"{about['tokens']:,} by {about['name']}" for about in checkpoints)
        found[0].caption = escape(f"tokens of {report['text']}{split}: {read}")
    for title, first, columns, rows in (
        ("usage at so many draws per slot", ("checkpoint", "layer"), CURVE_COLUMNS,
         curve_rows(checkpoints)),
        ("staleness of slots, in updates", ("checkpoint", "layer"), STALENESS_COLUMNS,
         staleness_rows(checkpoints)),
        ("drift between checkpoints", ("checkpoints", "layer", "head"), DRIFT_COLUMNS,
         drift_rows(report["drift"])),
        ("last counts in the logs", ("log", "memories", "layer"), LOG_COLUMNS, log_rows(logs)),
    ):  # fmt: skip
        if rows:
            found.append(_table(title, first, columns))
            for row in rows:
                found[-1].add_row(*map(escape, row))
    return found


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


def number(value: Optional[float]) -> str:
    """A number with four significant digits; a dash if there is none."""
    return DASH if value is None else f"{value:.4g}"


def _table(title: str, left: Sequence[str], right: Sequence[str], last: str = "") -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in left:
        is_number = column in ("layer", "head")
        table.add_column(
            column, overflow="fold", no_wrap=is_number, min_width=0 if is_number else 12
        )
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    if last:
        table.add_column(last)
    return table
