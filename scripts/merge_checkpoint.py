#!/usr/bin/env python3
"""Merge a checkpoint of --memory-checkpoint parts into one file, which every tool loads.

WHOLE gets the values and moments as whole tables, the same as without parts. They are copied some
rows at a time. WHOLE is complete or absent.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.models.merge import merge


def main() -> None:
    """Merge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path, metavar="PARTS", help="a checkpoint, CHECKPOINT.pt")
    parser.add_argument("whole", type=Path, metavar="WHOLE", help="the new file")
    args = parser.parse_args()
    if args.whole.is_dir():
        raise ValueError(f"WHOLE {args.whole} is a folder, must be a file")
    merged = merge(args.parts, args.whole)
    for n_slots, width in merged.tables:
        print(f"{n_slots:,} values of width {width}")
    print(f"{args.whole}: {merged.bytes:,} bytes")


if __name__ == "__main__":
    run(main, hint="")
