#!/usr/bin/env python3
"""Measure the memory that each worker needs to save and to load a checkpoint.

The script runs fairseq-train on the CPU with --memory-checkpoint whole and parts. The numbers are
MB of resident memory above that of the training: at the largest, and as it was at the start.
"""

import argparse
import json
from pathlib import Path

from _script import check_output, run

from pkm_fairseq.experiments.benchmark.saving import Setting, measure
from pkm_fairseq.memory.files import write_file


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER",
        help="folder made by fairseq-preprocess",
    )  # fmt: skip
    parser.add_argument("--n-keys", type=int, default=512, metavar="N",
                        help="sub-keys per half (default: %(default)s)")  # fmt: skip
    parser.add_argument("--v-dim", type=int, default=256, metavar="N",
                        help="width of a value (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--shards", type=int, metavar="N", help="default: as many as workers")
    parser.add_argument("--folder", type=Path, default=Path("runs/saving"), metavar="FOLDER",
                        help="a new one, deleted at the end (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    check_output("--json", args.json)
    shards = args.workers if args.shards is None else args.shards
    sizes = {"n-keys": args.n_keys, "v-dim": args.v_dim, "workers": args.workers, "shards": shards}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name} is {size}, must be at least 1")
    if not (args.data / "dict.txt").is_file():
        raise ValueError(f"{args.data / 'dict.txt'}: no such file; prepare the data first")
    if args.folder.exists():
        raise ValueError(f"{args.folder} exists: choose a new folder")
    table = 3 * 4 * args.n_keys**2 * args.v_dim
    print(f"table and moments: {table / 1e6:,.0f} MB, of each worker {table / shards / 1e6:,.0f}\n")
    print("| checkpoint | phase | worker | at the start, MB | more at the peak, MB |")
    print("|---|---|--:|--:|--:|", flush=True)
    found = []
    for stored in ("whole", "parts"):
        setting = Setting(args.data, args.n_keys, args.v_dim, args.workers, shards, stored)
        for row in measure(setting, args.folder):
            found.append({"stored": stored, **row})
            more = (row["peak"] - row["before"]) / 1e6
            print(f"| {stored} | {row['phase']} | {row['worker']} | {row['before'] / 1e6:,.0f} "
                  f"| {more:,.0f} |", flush=True)  # fmt: skip
    if args.json:
        about = {"n_keys": args.n_keys, "v_dim": args.v_dim, "shards": shards}
        write_file(args.json, json.dumps({**about, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    run(main, hint="")
