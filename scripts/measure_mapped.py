#!/usr/bin/env python3
"""Measure reads of value tables in files: resident memory, and tokens per second, cold and warm."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

from _script import check_output, run

import torch

from pkm_fairseq.experiments.benchmark.machine import describe
from pkm_fairseq.experiments.benchmark.mapped import markdown, measure
from pkm_fairseq.memory.files import write_file


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--n-keys",
        type=int,
        nargs="+",
        default=[512, 1024],
        metavar="N",
        help="sub-keys per half, at least 32 (default: 512 1024)",
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="of each measurement (default: 9)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/mapped"),
        help="for the files, 6 GB at 1,024 sub-keys, deleted at the end (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    for name, least in (("tokens", 1), ("rounds", 1), ("threads", 1)):
        if (given := getattr(args, name)) is not None and given < least:
            raise ValueError(f"--{name} is {given}, must be at least {least}")
    if min(args.n_keys) < 32:
        raise ValueError(f"--n-keys has {min(args.n_keys)}, must be at least 32")
    check_output("--json", args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: List[Dict[str, Any]] = []
    for n_keys in args.n_keys:
        rows += measure(n_keys, args.folder, args.tokens, args.rounds)
    print(markdown(rows), end="")
    if args.json:
        found = {"machine": describe(), "results": rows}
        write_file(args.json, json.dumps(found, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    run(main, hint="; files may be left in --folder")
