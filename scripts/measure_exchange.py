#!/usr/bin/env python3
"""Measure what data-parallel workers exchange for the gradient of a value table, as a table."""

import argparse

from _script import run

from pkm_fairseq.benchmark.exchange import Table, even_tokens, factor_bytes, measure, received_bytes


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-keys", type=int, default=128, help="sub-keys per half (default 128)")
    parser.add_argument("--v-dim", type=int, default=768, help="width of a value (default 768)")
    parser.add_argument("--reads", type=int, default=128, help="heads * knn (default 128)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="of each worker in one update", default=[256, 1024]
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    for name in ("n_keys", "v_dim", "reads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least 1")
    for name, least in (("tokens", 0), ("workers", 2)):
        if min(getattr(args, name)) < least:
            parser.error(f"--{name} has {min(getattr(args, name))}, must be at least {least}")
    table = Table(args.n_keys**2, args.v_dim, args.reads)
    print(f"{table.n_slots:,} slots of width {table.v_dim}, {table.reads} reads per token")
    print(f"{factor_bytes(table, 1):,} bytes per token; as many as a dense all-reduce sends from")
    print(f"{even_tokens(table):,.0f} tokens of all workers in one update\n")
    print("| workers | tokens each | | received by each, MB, by formula | measured | handed over |")
    print("|--:|--:|---|--:|--:|--:|")
    for workers in args.workers:
        for tokens in (*args.tokens, None):
            what = "dense" if tokens is None else "factors"
            found = measure(table, tokens or 0, workers, dense=tokens is None)
            formula = received_bytes(table, tokens or 0, workers)[what]
            numbers = (formula, found["received"], found["sent"])
            cells = " | ".join(f"{number / 1e6:,.2f}" for number in numbers)
            shown = "any" if tokens is None else f"{tokens:,}"
            print(f"| {workers} | {shown} | {what} | {cells} |", flush=True)


if __name__ == "__main__":
    run(main)
