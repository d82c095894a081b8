#!/usr/bin/env python3
"""Finetune pretrained checkpoints on GLUE with fairseq-train, and tabulate their dev results.

Run the script again to continue after an interruption; it skips finished runs. The table has all
finished runs in --out, also those of earlier calls. Flags after -- go to fairseq-train unchanged.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Tuple

from _script import run

from pkm_fairseq.experiments.glue.data import load_dictionary, prepared_tasks
from pkm_fairseq.experiments.glue.finetune import Choices, finetune, plan
from pkm_fairseq.experiments.glue.presets import load_preset, parse_overrides
from pkm_fairseq.experiments.glue.results import print_results, read_results, write_results
from pkm_fairseq.experiments.glue.start import read_arms


def seeds(text: str) -> Tuple[int, ...]:
    """``5`` is seeds 1 to 5; ``2,7`` are these two."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    chosen = numbers if "," in text else list(range(1, numbers[0] + 1))
    if not chosen or min(chosen) < 1 or len(set(chosen)) < len(chosen):
        raise ValueError(f"--seeds is {text}, must be a number above 0, or different ones: 1,2,3")
    return tuple(chosen)


def parse(words: List[str]) -> argparse.Namespace:
    """Parse the command line; ``further`` holds the flags after ``--``."""
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", "--checkpoints", nargs="+", required=True, metavar="[ARM=]FILE",
        help="pretrained RoBERTas, with or without memory (default of ARM: the file's folder)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="folder made by prepare_glue.py"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all tasks in --data")
    parser.add_argument(
        "--seeds",
        default="5",
        metavar="N",
        help="number of seeds, or a list such as 1,2,3 (default: 5)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("glue_out"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument(
        "--preset", default="roberta", metavar="NAME", help="roberta (default), small, or a file"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", action="extend",
        help="settings that override the preset, such as lr=1e-5 max_epoch=3",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="parallel runs (default: 1)"
    )
    parser.add_argument(
        "--keep-last", action="store_true", help="keep checkpoint_last.pt of finished runs"
    )
    parser.add_argument(
        "--memory-tokens", type=int, default=20_000, metavar="N",
        help="dev tokens on which to compare memory usage before and after finetuning (default: "
        "%(default)s; 0: no comparison)",
    )  # fmt: skip
    args = parser.parse_args(words[:at])
    args.further = tuple(words[at + 1 :])
    return args


def main() -> None:
    """Finetune, and print the table."""
    args = parse(sys.argv[1:])
    if args.workers < 1:
        raise ValueError(f"--workers is {args.workers}, must be at least 1")
    if args.memory_tokens < 0:
        raise ValueError(f"--memory-tokens is {args.memory_tokens}, must be at least 0")
    choices = Choices(
        out=args.out,
        seeds=seeds(args.seeds),
        preset=load_preset(args.preset),
        overrides=parse_overrides(args.overrides),
        further=args.further,
        workers=args.workers,
        keep_last=args.keep_last,
        memory_tokens=args.memory_tokens,
    )
    tasks = prepared_tasks(args.data, args.tasks)
    arms = read_arms(args.checkpoint, load_dictionary(tasks))
    runs = plan(arms, tasks, choices)
    args.out.mkdir(parents=True, exist_ok=True)
    names = [arm.name for arm in arms]
    finetune(runs, choices, lambda: write_results(args.out, read_results(args.out, names)))
    results = read_results(args.out, names)
    write_results(args.out, results)
    print_results(results)
    print(f"written: {args.out / 'results.md'}, {args.out / 'results.json'}")


if __name__ == "__main__":
    run(main)
