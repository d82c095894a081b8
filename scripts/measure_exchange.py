#!/usr/bin/env python3
"""Measure or calculate the traffic between data-parallel workers for a value table."""

import argparse

from _script import run

from pkm_fairseq.experiments.benchmark.exchange import (
    Table,
    columns_of,
    even_tokens,
    factor_bytes,
    measure,
    plan_bytes,
    possible_groups,
    received_bytes,
)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-keys", type=int, default=128, help="sub-keys per half (default 128)")
    parser.add_argument("--v-dim", type=int, default=768, help="width of a value (default 768)")
    parser.add_argument(
        "--reads", type=int, default=128, help="reads per token, heads * knn (default 128)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="tokens per worker and update (256 1024)",
        default=[256, 1024],
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4], help="number of workers (2 4)"
    )
    parser.add_argument("--plan", action="store_true", help="calculate only")
    shards = "with --plan: workers to a group that shares a table (1 8)"
    parser.add_argument("--shards", type=int, nargs="+", help=shards, default=[1, 8])
    args = parser.parse_args()
    for name in ("n_keys", "v_dim", "reads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least 1")
    for name, least in (("tokens", 1), ("workers", 2), ("shards", 1)):
        if min(getattr(args, name)) < least:
            parser.error(f"--{name} has {min(getattr(args, name))}, must be at least {least}")
    table = Table(args.n_keys**2, args.v_dim, args.reads)
    for n in possible_groups(args.shards, args.workers) if args.plan else args.workers:
        columns_of(table, n)  # before anything is printed
    print(f"{table.n_slots:,} slots of width {table.v_dim}, {table.reads} reads per token")
    print(f"{factor_bytes(table, 1):,} bytes per token; as many as a dense all-reduce sends from")
    print(f"{even_tokens(table):,.0f} tokens of all workers in one update\n")
    print_plan(table, args) if args.plan else print_measured(table, args)


def print_measured(table: Table, args: argparse.Namespace) -> None:
    """Print the measured traffic beside the formula."""
    print("| workers | tokens each | | received by each, MB, by formula | measured | handed over |")
    print("|--:|--:|---|--:|--:|--:|")
    for workers in args.workers:
        ways = [(way, tokens) for tokens in args.tokens for way in ("factors", "shards")]
        for way, tokens in (*ways, ("dense", args.tokens[0])):
            found = measure(table, tokens, workers, way)
            formula = received_bytes(table, tokens, workers)[way]
            numbers = (formula, found["received"], found["sent"])
            cells = " | ".join(f"{number / 1e6:,.2f}" for number in numbers)
            print(
                f"| {workers} | {'any' if way == 'dense' else f'{tokens:,}'} | {way} | {cells} |",
                flush=True,
            )


def print_plan(table: Table, args: argparse.Namespace) -> None:
    """Print the formula only, for any number of workers, in groups that share a table."""
    print("| workers | shards | tokens each | held, MB | in a group | factors | dense |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for workers in args.workers:
        for shards in (n for n in args.shards if workers % n == 0):
            for tokens in args.tokens:
                plan = plan_bytes(table, tokens, workers, shards)
                cells = " | ".join(f"{number / 1e6:,.0f}" for number in plan.values())
                print(f"| {workers:,} | {shards} | {tokens:,} | {cells} |")


if __name__ == "__main__":
    run(main)
