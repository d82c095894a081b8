"""Results of a validation as JSON, as a table and as a plot."""

import platform
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterable, List

import faiss
import numpy as np
import torch
from rich import box
from rich.table import Table

from ..memory.files import whole_file
from .results import LayerResult

TOLERANCE = (
    "A correct float32 dot product of length k_dim is off by at most e = gamma(k_dim) * "
    "sum |q_i k_i|, gamma(n) = n u / (1 - n u), u = 2^-24, for any order of summation. Scores may "
    "differ by 4 e, with the largest such sum of any slot, query by query: 2 e between two "
    "computations, and each may prefer a slot that is truly 2 e worse. Weights, reads and "
    "outputs: the error that these inputs cause, and their own rounding."
)


def versions() -> Dict[str, str]:
    """Versions of the software that computed the results."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "faiss": faiss.__version__,
    }


# said only if more than half are
MANY_TIES = "; CAUTION: up to {:.0%} of a head's queries are tied: their slots are not judged"


def is_exact(results: List[LayerResult]) -> bool:
    """The verdict over all results.

    Raises:
        ValueError: there is nothing to judge.
    """
    if not results:
        raise ValueError("no layer was compared: nothing to judge")
    return all(result.exact for result in results)


def report(results: List[LayerResult], layers: Iterable[int], **more: Any) -> Dict[str, Any]:
    """The report, ready for JSON.

    Args:
        results: one per layer and source.
        layers: all memory layers of the model; the report names those without a result.
        more: further entries, such as the checkpoint or the seconds.
    """
    heads = [head for result in results for head in result.heads]
    judged = {result.layer for result in results}
    return {
        "exact": is_exact(results),
        "layers_judged": sorted(judged),
        "layers_left_out": sorted(set(layers) - judged),
        "tied": max(h.ties_at_k / r.queries for r in results for h in r.heads),
        "recall_at_k": min(head.recall_at_k for head in heads),
        "score_difference": max(head.score_difference for head in heads),
        "queries": sum(result.queries * len(result.heads) for result in results),
        "dtype": "float32",
        "tolerance": TOLERANCE,
        **more,
        "versions": {**versions(), **more.get("versions", {})},
        "gpus": faiss.get_num_gpus(),
        "layers": [_as_dict(result) for result in results],
    }


def verdict(summary: Dict[str, Any]) -> str:
    """The verdict of a report in one line, with the memory layers that were not judged."""
    judged, left_out = (
        ", ".join(map(str, summary[key])) for key in ("layers_judged", "layers_left_out")
    )
    return (
        f"{'EXACT' if summary['exact'] else 'NOT EXACT'}: {summary['queries']:,} float32 queries, "
        f"recall@k {summary['recall_at_k']:.6g}, "
        f"largest score difference {summary['score_difference']:.1e}; memory layers judged: "
        + (f"{judged}; NOT judged: {left_out}" if left_out else f"{judged} (all)")
        + (MANY_TIES.format(summary["tied"]) if summary["tied"] > 0.5 else "")
    )


def tables(results: List[LayerResult]) -> List[Table]:
    """Readable tables: verdict per head, and the errors of reduced precision if measured."""
    shared = ["layer", "queries", "head", "recall@1", "recall@k"]
    verdict = _table(
        *shared,
        "ties@k",
        "score diff",
        "relative",
        "tolerance",
        "weight diff",
        "read diff",
        "output diff",
        "exact",
    )
    shared[2] = "dtype"
    reduced = _table(*shared, "score diff", "weight diff", "read diff")
    for result in results:
        where = [str(result.layer), f"{result.queries} {result.source}"]
        for head in result.heads:
            numbers = [head.score_difference, head.score_difference_relative]
            numbers += [head.score_tolerance, head.weight_difference]
            numbers += [result.read_difference, result.output_difference]
            cells = [*where, str(head.head), f"{head.recall_at_1:.6g}", f"{head.recall_at_k:.6g}"]
            cells += [str(head.ties_at_k), *(f"{number:.1e}" for number in numbers)]
            verdict.add_row(*cells, "yes" if head.exact and result.exact else "NO")
        for cost in result.reduced:
            numbers = [cost.score_difference, cost.weight_difference, cost.read_difference]
            cells = [*where, cost.dtype, f"{cost.recall_at_1:.4f}", f"{cost.recall_at_k:.4f}"]
            reduced.add_row(*cells, *(f"{number:.1e}" for number in numbers))
    return [verdict, reduced] if reduced.rows else [verdict]


def plot(results: List[LayerResult], file: Path) -> None:
    """Histograms of the score differences, with the smallest tolerance as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), sharex=True, squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        least = np.finfo(np.float32).eps / 8
        differences = result.differences.abs().flatten().numpy().clip(min=least)
        tolerance = min(head.score_tolerance for head in result.heads)
        bins = np.geomspace(least, 2 * max(tolerance, float(differences.max())), 80)
        axis.hist(differences, bins=bins, log=True)
        axis.axvline(tolerance, color="tab:red", label=f"least tolerance {tolerance:.1e}")
        axis.set(xscale="log", ylabel="scores", title=f"layer {result.layer}, {result.source}")
        axis.legend(loc="upper right")
    axes[-1].set_xlabel("absolute difference from FAISS (equal scores at the left edge)")
    with whole_file(file) as out:
        figure.savefig(out, format=file.suffix[1:], dpi=120)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _as_dict(result: LayerResult) -> Dict[str, Any]:
    plain = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "differences"}
    plain["heads"] = [vars(head) for head in result.heads]
    plain["reduced"] = [vars(cost) for cost in result.reduced]
    return plain
