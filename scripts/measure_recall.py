#!/usr/bin/env python3
"""Measure how many facts about the people of prepare_people.py a checkpoint recalls.

There are two questions: by name alone (all four attributes masked), and with the other three
attributes given. Chance is 1 %, and 6.64 bits per fact. Usage of memories is counted over the
tokens of the second question.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

from _script import check_output, run

from pkm_fairseq.experiments.demo.evaluate import load
from pkm_fairseq.experiments.facts.recall import measure, read_people
from pkm_fairseq.memory.files import write_file


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="bin/ of prepare_people.py"
    )
    parser.add_argument(
        "--split",
        default="train",
        help="train, or test for people who are in no training text (default: %(default)s)",
    )
    parser.add_argument("--people", type=int, metavar="N", help="the first N (default: all)")
    parser.add_argument(
        "--ablate", action="store_true", help="also with all values of the memories read as zero"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    if args.people is not None and args.people < 1:
        raise ValueError(f"--people is {args.people}, must be at least 1")
    check_output("--json", args.json)
    results: List[Dict[str, Any]] = []
    for checkpoint in args.checkpoints:
        loaded = load(checkpoint, args.data)
        people = read_people(args.data, args.split, loaded.task.source_dictionary)[: args.people]
        found = measure(loaded.model, loaded.task.mask_idx, people, args.ablate)
        results.append({"checkpoint": str(checkpoint), "split": args.split, **found})
        print(f"{checkpoint}: {found['people']:,} people, split {args.split}")
        show(found)
        if "zeroed" in found:
            print("  with values of zero")
            show(found["zeroed"], "    ")
    if args.json:
        write_file(args.json, json.dumps(results, indent=2, allow_nan=False) + "\n")


def show(found: Dict[str, Any], indent: str = "  ") -> None:
    """Print recall and bits, one line for each question."""
    for question in ("by_name", "with_others"):
        recall, bits = found[question]["recall"], found[question]["bits"]
        print(f"{indent}{question.replace('_', ' ')}: recall {100 * recall:.1f} %, {bits:.2f} bits")


if __name__ == "__main__":
    run(main)
