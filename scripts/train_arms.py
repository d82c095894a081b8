#!/usr/bin/env python3
"""Train the demo's three arms with fairseq-train: plain, resm_init and pkm.

Two processes run at a time, with one thread each. Run the script again to continue after an
interruption; it reuses finished arms.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.demo.presets import PRESETS
from pkm_fairseq.experiments.demo.train import train_arms


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo_out/data"),
        metavar="FOLDER",
        help="folder made by prepare_corpus.py (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out/arms"), metavar="FOLDER")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    args = parser.parse_args()
    train_arms(PRESETS[args.preset], args.data, args.out)
    print(f"one folder for each arm in {args.out}")


if __name__ == "__main__":
    run(main)
