#!/usr/bin/env python3
"""Compare product-key search with FAISS' exact and approximate indexes on a trained memory."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any, List, Optional


def parse(argv: Optional[List[str]]) -> Any:
    """Read the command line."""
    from pkm_fairseq.models import capture

    parser = argparse.ArgumentParser(description=__doc__)
    capture.add_arguments(parser)
    parser.add_argument("--layer", type=int, help="memory layer, 0-based (default: the first)")
    parser.add_argument("--head", type=int, default=0, help="head, 0-based (default: 0)")
    parser.add_argument("--knn", type=int, help="slots to find (default: as the model)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


def run(args: Any) -> None:
    """Capture queries, compare, print."""
    import torch

    from pkm_fairseq.models import capture
    from pkm_fairseq.validation.report import versions
    from pkm_fairseq.validation.study import compare_indexes

    model, captured = capture.capture(args, None if args.layer is None else [args.layer])
    layer = min(captured)
    memory = model.memory_layers()[layer].memory
    config = memory.config
    if not 0 <= args.head < config.heads:
        raise ValueError(f"--head is {args.head}, must be in 0..{config.heads - 1}")
    with torch.no_grad():
        query = memory.query(captured[layer])[:, args.head]  # (N, 2, D)
        keys = memory.keys[args.head].detach()  # (2, S, D)
    knn = config.knn if args.knn is None else args.knn
    rows = compare_indexes(query, keys, knn, args.rounds, lambda line: print(line, file=sys.stderr))
    if args.json:
        sizes = {"n_slots": config.n_slots, "k_dim": config.k_dim, "knn": knn}
        about = {**sizes, "queries": len(query), "threads": torch.get_num_threads()}
        report = {
            **about,
            "rounds": args.rounds,
            "versions": versions(),
            "rows": list(map(vars, rows)),
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    show(rows)


def show(rows: List[Any]) -> None:
    """Print the rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    table.add_column("method")
    table.add_column("setting")
    for column in ("recall@k", "queries/s", "times exact flat", "MB", "build s"):
        table.add_column(column, justify="right")
    flat = rows[1].queries_per_second
    for row in rows:
        speed = row.queries_per_second
        table.add_row(
            *(row.method, row.setting, f"{row.recall_at_k:.4f}", f"{speed:,.0f}"),
            *(f"{speed / flat:.1f}", f"{row.megabytes:,.1f}", f"{row.build_seconds:.1f}"),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(argv: Optional[List[str]] = None) -> int:
    """Run; a user's mistake is one line and status 2."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError, SystemExit) as error:
        print(f"compare_indexes: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq's and faiss' notes on loading
    sys.exit(main())
