#!/usr/bin/env python3
"""Make data for fairseq about synthetic people: a name and four attributes each, drawn at random.

A sentence is one person: first58 last211 city37 job12 food88 pet5. Each attribute is one of 100
values: a fact is 6.64 bits, and nothing can be guessed. Writes FOLDER/bin with the splits train,
valid (the first 1,000 people of train) and test (1,000 people who are in no training text).
"""

import argparse
from functools import partial
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.facts.people import MOST_PEOPLE, prepare_people
from pkm_fairseq.experiments.runs.folders import key_of, key_of_code, make_once


def main() -> None:
    """Prepare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--people", type=int, default=10000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    if not 1 <= args.people <= MOST_PEOPLE:  # before a folder is touched
        raise ValueError(
            f"--people is {args.people}, must be in 1..{MOST_PEOPLE:,}: each has a name of its own"
        )
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, must be at least 0")
    key = key_of(args.people, args.seed, key_of_code("experiments/facts"))
    make_once(args.out, key, partial(prepare_people, args.people, seed=args.seed))
    print(f"data for fairseq-train in {args.out / 'bin'}")


if __name__ == "__main__":
    run(main)
