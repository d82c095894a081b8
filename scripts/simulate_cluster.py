#!/usr/bin/env python3
"""Simulate the time of an update on many workers, for each way to exchange gradients of values.

Nothing is measured unless --measure is given: speeds of devices and links are parameters. The
defaults are assumptions about a GPU with 2,000 GB/s of memory, eight to a node.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

from _script import Parser, check_output, run

from pkm_fairseq.experiments.benchmark.cluster import (
    Cluster,
    Device,
    Training,
    held_bytes,
    measure,
    simulate,
)
from pkm_fairseq.experiments.benchmark.exchange import Table, possible_groups
from pkm_fairseq.memory.files import write_file

# flag, default, meaning; all must be above 0
NUMBERS = [
    ("n-keys", 512, "sub-keys per half"),
    ("v-dim", 768, "width of a value"),
    ("reads", 128, "reads per token, heads * knn"),
    ("layers", 2, "memories, each with its own table"),
    ("passes", 1, "batches per update, which share the tokens"),
    ("per-node", 8, "workers in a node"),
]
SPEEDS = [
    ("intra", 300.0, "GB/s that a worker receives from its node"),
    ("inter", 25.0, "GB/s that a worker receives from other nodes"),
    ("latency", 20.0, "microseconds of each step of a collective"),
    ("memory", 2000.0, "GB/s of a device's memory"),
    ("read-share", 0.6, "share of --memory that gathering rows reaches"),
    ("update-share", 0.7, "share of --memory that Adam on rows reaches"),
    ("stream-share", 0.9, "share of --memory that passes over whole tables reach"),
    ("base", 27.0, "ms of an update of the model without memories, at the largest --tokens"),
    ("rest", 440.0, "MB of all gradients except those of values"),
    ("query", 0.5, "ms of a query network and its search, both passes, at the largest --tokens"),
]
WAYS = ("plain", "factors", "dense", "owned")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="simulate_cluster.py", description=__doc__)
    for kind, flags in ((int, NUMBERS), (float, SPEEDS)):
        for name, default, meaning in flags:
            parser.add_argument(
                f"--{name}", type=kind, default=default, help=f"{meaning} ({default})"
            )
    for name, default, meaning in (
        ("workers", [8, 64, 1024], "numbers of workers"),
        ("tokens", [512, 4096], "tokens per worker and update"),
        ("shards", [1, 8], "workers that split a table by columns; 1: no split"),
    ):
        words = " ".join(map(str, default))
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=default, help=f"{meaning} ({words})"
        )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the three speeds of this machine's CPU instead of --memory and its shares",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all parts to this file")
    args = parser.parse_args()
    for name in (name.replace("-", "_") for name, *_ in (*NUMBERS, *SPEEDS)):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be above 0")
    for name in ("workers", "tokens", "shards"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} has {min(getattr(args, name))}, must be at least 1")
    return args


def main() -> None:
    """Parse, simulate, print."""
    args = parse()
    check_output("--json", args.json)
    possible_groups(args.shards, args.workers)
    table = Table(args.n_keys**2, args.v_dim, args.reads)
    device = measure(table, max(args.tokens)) if args.measure else assumed(args)
    found = [
        row
        for workers in args.workers
        for tokens in args.tokens
        for row in rows(args, table, device, workers, tokens)
    ]
    speeds = {name: speed / 1e9 for name, speed in device._asdict().items()}
    print("GB/s: " + ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()))
    print_table(args, found)
    if args.json is not None:
        given = {k: v for k, v in vars(args).items() if k != "json"}
        report = {"options": given, "speeds": speeds, "updates": found}
        write_file(args.json, json.dumps(report, indent=1) + "\n")


def assumed(args: argparse.Namespace) -> Device:
    """The speeds that the options say."""
    return Device(
        *(1e9 * args.memory * share for share in (args.read_share, args.update_share)),
        1e9 * args.memory * args.stream_share,
    )


def rows(
    args: argparse.Namespace, table: Table, device: Device, workers: int, tokens: int
) -> List[Dict[str, Any]]:
    """Every way to train with these workers and tokens: its times in ms, and MB held per table."""
    links = 1e9 * args.intra, 1e9 * args.inter, 1e-6 * args.latency
    cluster = Cluster(workers, args.per_node, *links)
    part = 1e-3 * tokens / max(args.tokens)
    rest = part * args.base, 1e6 * args.rest, part * args.query
    training = Training(table, args.layers, tokens, args.passes, *rest)
    found = []
    for shards in (n for n in args.shards if workers % n == 0):
        for form in WAYS:
            if form == "plain" and shards > 1:
                continue
            parts = simulate(cluster, device, training, form, shards)
            held = 0.0 if form == "plain" else held_bytes(cluster, table, form, shards) / 1e6
            times = {name: 1e3 * seconds for name, seconds in parts.items()}
            way = {"workers": workers, "tokens": tokens, "shards": shards, "form": form}
            found.append({**way, "held": held, **times})
    return found


def print_table(args: argparse.Namespace, found: List[Dict[str, Any]]) -> None:
    """Print the total time of each way, in ms."""
    ways = list(dict.fromkeys((row["shards"], row["form"]) for row in found))
    heads = [form if shards == 1 else f"{shards} shards, {form}" for shards, form in ways]
    print(f"| workers | tokens each | {' | '.join(heads)} |")
    print("|--:" * (2 + len(ways)) + "|")
    for workers in args.workers:
        for tokens in args.tokens:
            totals = {
                (row["shards"], row["form"]): f"{row['total']:,.1f}"
                for row in found
                if (row["workers"], row["tokens"]) == (workers, tokens)
            }
            cells = " | ".join(totals.get(way, "-") for way in ways)
            print(f"| {workers:,} | {tokens:,} | {cells} |")


if __name__ == "__main__":
    run(main)
