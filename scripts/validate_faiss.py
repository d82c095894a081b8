#!/usr/bin/env python3
"""Check with FAISS that the memories of a trained model find the exact top-k slots.

Exit status: 0 exact, 1 not exact, 2 any error, 130 interrupted.
"""

import argparse
import json
import logging
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Optional

from _script import INTERRUPTED, check_output, take_interrupts

DTYPES = ("bfloat16", "float16")


def parse(argv: Optional[List[str]]) -> Any:
    """Read the command line."""
    from pkm_fairseq.models import capture

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    capture.add_arguments(parser)
    parser.add_argument("--layers", metavar="N,N", help="memory layers, 0-based (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the score differences to this file"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        default=[],
        help="also report the errors of this precision; can be given twice",
    )
    args = parser.parse_args(argv)
    if args.layers is not None:
        try:
            args.layers = [int(index) for index in args.layers.split(",")]
        except ValueError:
            parser.error(f"--layers is {args.layers}, must be numbers separated by commas")
    return args


def run(args: Any) -> bool:
    """Load, capture, compare, report.

    Returns:
        Whether every search is exact.
    """
    import torch
    from rich.console import Console

    from pkm_fairseq import __version__, validation
    from pkm_fairseq.experiments.benchmark.output import FORMATS
    from pkm_fairseq.memory.files import write_file
    from pkm_fairseq.models.capture import capture
    from pkm_fairseq.validation import report

    take_interrupts()
    check_output("--json", args.json)
    check_output("--plot", args.plot, FORMATS)
    start = time.perf_counter()
    model, captured = capture(args, args.layers)
    memories = {index: layer.memory for index, layer in model.memory_layers().items()}
    dtypes = [getattr(torch, name) for name in dict.fromkeys(args.dtype)]
    results = []
    with progress_bar(2 * len(captured)) as advance:
        for index, text in captured.items():
            for source, tokens in (("text", text), ("random", validation.random_like(text))):
                results.append(
                    validation.validate_memory(
                        memories[index], tokens, index, source, dtypes, progress=advance
                    )
                )
    summary = report.report(
        results,
        memories,
        checkpoint=args.checkpoint,
        text=args.data or args.text,
        split=args.split if args.data else None,
        seconds=round(time.perf_counter() - start, 3),
        threads=torch.get_num_threads(),
        versions={"pkm_fairseq": __version__},
    )
    if args.json:
        write_file(args.json, json.dumps(summary, indent=2) + "\n")
    if args.plot:
        report.plot(results, args.plot)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in report.tables(results):
        console.print(table)
    print(f"{report.verdict(summary)} ({summary['seconds']:.1f} s)")
    return bool(summary["exact"])


@contextmanager
def progress_bar(total: int) -> Iterator[Any]:
    """Show progress on stderr; yield a function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("exact search", total=total)
        yield lambda share: progress.advance(task, share)


def failed(error: BaseException) -> int:
    """Report an error: one line for an interrupt or a known kind of error, else the traceback."""
    if isinstance(error, KeyboardInterrupt):
        print("validate_faiss: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, (ValueError, OSError, ImportError, SystemExit)):
        print(f"validate_faiss: error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 2


def main(argv: Optional[List[str]] = None) -> int:
    """Run; an error never looks like a verdict."""
    try:
        args = parse(argv)
    except SystemExit:  # argparse: 0 after --help, 2 after a wrong option
        raise
    except BaseException as error:
        return failed(error)
    try:
        return 0 if run(args) else 1
    except BaseException as error:  # also SystemExit(0), whoever raises it
        return failed(error)


if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq's and faiss' notes on loading
    sys.exit(main())
