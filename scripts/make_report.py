#!/usr/bin/env python3
"""Evaluate the demo's trained arms if needed, and write report.html and report.json."""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.demo import pipeline
from pkm_fairseq.experiments.demo.presets import PRESETS
from pkm_fairseq.experiments.demo.table import print_report


def main() -> None:
    """Report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="FOLDER",
        help="the demo's folder, with data/ and arms/ (default: %(default)s)",
    )
    parser.add_argument("--preset", choices=PRESETS, default="default")
    args = parser.parse_args()
    print_report(pipeline.report(args.out, PRESETS[args.preset]))
    print(f"{args.out / 'report.html'}")


if __name__ == "__main__":
    run(main)
