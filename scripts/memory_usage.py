#!/usr/bin/env python3
"""Analyse the memories of trained models: usage, readers of slots, drift, curves.

The script runs checkpoints on a text and counts their look-ups. With several checkpoints it also
measures the drift from each to the next. It draws logs (memory_usage.jsonl) over updates. You can
combine checkpoints and logs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

from _script import check_output, run

from rich.console import Console
from rich.progress import Progress

from pkm_fairseq.analysis import tables
from pkm_fairseq.analysis.analyse import analyse, check_options
from pkm_fairseq.analysis.page import page, write_charts
from pkm_fairseq.memory.files import write_file
from pkm_fairseq.memory.observe.slot_counts import save_counts

TEXT_OPTIONS = (
    (("--split",), "NAME", "split of --data (default: valid)"),
    (
        ("--sentencepiece-model", "--spm"),
        "FILE",
        "tokenizer of --text; without it, the text must consist of symbols of the dictionary, "
        "separated by blanks",
    ),
    (
        ("--dict",),
        "FILE",
        "dictionary of --text (default: dict.txt in the folder of the training data)",
    ),
)
WIDTH = 200  # of tables, where there is no terminal
NUMBERS = (
    ("--draws", "draws per slot to count, tokens x heads / slots (default: 100)"),
    ("--tokens", "tokens to read, instead of --draws"),
    ("--hot", "hottest slots per layer to show (default: 20)"),
    ("--probe", "tokens on which to compare checkpoints (default: 1000)"),
    ("--counts-batch", "sequences in a batch of --save-counts (default: 16)"),
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]FILE",
        help="trained models with memory (default of NAME: the file's folder)",
    )
    parser.add_argument(
        "--log",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]FILE",
        help="logs of trainings, memory_usage.jsonl",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DATA-BIN", help="folder made by fairseq-preprocess")
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, one passage per line")
    for options, metavar, help_text in TEXT_OPTIONS:
        parser.add_argument(*options, metavar=metavar, help=help_text)
    parser.add_argument(
        "--unmasked",
        action="store_true",
        help="read the text unmasked (default: mask tokens as in the training of a masked language "
        "model, like the counts in its log)",
    )
    parser.add_argument(
        "--force-drift",
        action="store_true",
        help="also measure the drift between checkpoints of different trainings",
    )
    for option, help_text in NUMBERS:
        parser.add_argument(option, type=int, metavar="N", help=help_text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with charts to this file"
    )
    parser.add_argument(
        "--save-counts",
        type=Path,
        metavar="FILE",
        help="write how often the text reads each slot, and in how many batches, to this file; "
        "input for --memory-background and --memory-finetune-counts",
    )
    parser.add_argument(
        "--svg", type=Path, metavar="FOLDER", help="write each chart to this folder"
    )
    return parser.parse_args()


def main() -> None:
    """Analyse, write, print."""
    args = parse()
    check_options(args)
    for option in ("json", "html", "save_counts"):
        check_output(f"--{option.replace('_', '-')}", getattr(args, option))
    errors = Console(stderr=True)

    if args.svg and (args.svg.is_file() or not args.svg.absolute().parent.is_dir()):
        raise ValueError(f"--svg {args.svg} must be a folder, in a folder that exists")
    with Progress(console=errors) as progress:

        def begin(step: str, total: int) -> Callable[[int], Any]:
            task = progress.add_task(f"reading with {step}", total=total)
            return lambda done: progress.advance(task, done)

        def warn(line: str) -> None:
            progress.console.print(
                f"warning: {line}", markup=False, highlight=False, soft_wrap=True
            )

        found = analyse(args, begin, warn)
    if args.json:
        write_file(args.json, json.dumps(found.report, indent=2, allow_nan=False) + "\n")
    if args.html:
        write_file(args.html, page(found))
    if found.counts is not None:
        save_counts(args.save_counts, found.counts)
    if args.svg:
        write_charts(found, args.svg)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in tables.tables(found.report, found.logs):
        console.print(table)


if __name__ == "__main__":
    run(main)
