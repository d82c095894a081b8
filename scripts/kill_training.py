#!/usr/bin/env python3
"""Kill a tiny training with SIGKILL at random moments, and resume it each time.

The script checks all files after each kill, and compares the final checkpoint with that of an
undisturbed training. Exit status: 0 if no kill lost more than the updates since the last checkpoint
and both final checkpoints are equal, else 1. Flags after -- go to fairseq-train, such as
-- --memory-n-keys 256 for larger checkpoints.
"""

import argparse
import sys
from pathlib import Path

from _script import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of tests
from tests.faults import Choices, kill_training


def main() -> None:
    """Kill and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER",
        help="folder made by fairseq-preprocess",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), metavar="FOLDER",
                        help="a new folder (default: %(default)s)")  # fmt: skip
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the moments")
    parser.add_argument("--interval", type=int, default=5, metavar="N",
                        help="updates between checkpoints (default: %(default)s)")  # fmt: skip
    parser.add_argument("--updates", type=int, metavar="N",
                        help="updates of the whole training (default: ten per kill)")  # fmt: skip
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, further = parser.parse_args(words[:at]), tuple(words[at + 1 :])
    updates = args.updates or max(10 * args.kills, 10 * args.interval)
    choices = Choices(args.data, args.out, args.kills, args.seed, updates, args.interval, further)
    result = kill_training(choices, lambda line: print(line, flush=True))
    print(
        f"{result['kills']} kills, {result['hit_a_save']} in the middle of a save: every "
        f"checkpoint whole, at most {result['most_lost']} updates lost (saved every "
        f"{result['interval']}), all {result['equal']['tensors']} tensors equal at the end"
    )
    print(f"details in {args.out / 'result.json'}")


if __name__ == "__main__":
    run(main, hint="")
