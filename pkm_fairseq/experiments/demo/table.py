"""The final table of the demo, on the terminal."""

import sys
from typing import Any, Dict, List

from rich.console import Console
from rich.table import Table

from .facts import summary
from .presets import TITLES


def print_report(report: Dict[str, Any]) -> None:
    """Print the table of the report, and one fill-mask example."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(report))
    for found in report["validation"]:
        verdict = "exact" if found["exact"] else "NOT EXACT"
        console.print(f"{TITLES[found['arm']]}: search {verdict} by FAISS", highlight=False)
    if report["facts"]:
        console.print(summary(report["facts"]), highlight=False)
    for example in report["fill_mask"][:1]:
        console.print(f"{example['sentence']}  (text: {example['answer']})", markup=False)
        for arm, answers in example["top"].items():
            tops = ", ".join(f"{piece.strip()} {100 * share:.0f} %" for piece, share in answers)
            console.print(f"  {TITLES[arm]}: {tops}", markup=False, highlight=False)


def _table(report: Dict[str, Any]) -> Table:
    table = Table("arm", title=f"held-out text, {report['masked_tokens']:,} masked tokens")
    columns = ("parameters", "updates", "perplexity", "draws/slot", "top-1 usage (uniform)")
    for column in (*columns, "top-k usage (uniform)", "KL, nats", "words/s"):
        table.add_column(column, justify="right")
    for arm in report["arms"]:
        table.add_row(
            TITLES[arm["arm"]],
            f"{arm['parameters']:,}",
            f"{arm['updates']:,}",
            f"{arm['ppl']:.2f}",
            ", ".join(f"{layer['draws_per_slot']:.3g}" for layer in arm["memory"]) or "-",
            _usage(arm["memory"], "top1"),
            _usage(arm["memory"], "topk"),
            ", ".join(f"{layer['kl_weighted']:.2f}" for layer in arm["memory"]) or "-",
            f"{arm['words_per_second']:,.0f}",
        )
    table.add_row("unigram model", "", "", f"{report['unigram_ppl']:.2f}")
    return table


def _usage(memory: List[Dict[str, float]], kind: str) -> str:
    """Usage and ceiling in per cent, for each layer."""
    shares = (
        f"{100 * layer[f'{kind}_usage']:.1f} % ({100 * layer[f'{kind}_ceiling']:.1f})"
        for layer in memory
    )
    return ", ".join(shares) or "-"
