#!/usr/bin/env python3
"""Benchmark the memory: layer, parts, whole models, peak memory, cost of counting, narrow tables.

Both sides of a comparison run alternately. A ratio above 1 means that this plugin's memory is
faster. Exit status: 0 measured, 1 the two sides compute different results, 2 any other error.
"""

import argparse
import logging
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Tuple

from _script import INTERRUPTED, Parser, check_output, take_interrupts


def parse(argv: Optional[List[str]]) -> Any:
    """Read the command line."""
    parser = Parser(
        prog="benchmark_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--what",
        type=words,
        metavar="NAME,NAME",
        help="what to measure: layer, parts, model, memory, usage, narrow (default: all)",
    )
    parser.add_argument(
        "--tokens", type=numbers, metavar="N,N", help="tokens per batch (default: 256,1024,4096)"
    )
    parser.add_argument(
        "--n-keys",
        type=numbers,
        metavar="N,N",
        help="sub-keys per half (default: 128,256,512,1024)",
    )
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="pairs of runs per comparison (default: 11)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few pairs, under two minutes"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights and inputs (default: 1)"
    )
    for name in ("json", "markdown", "plot"):
        parser.add_argument(
            f"--{name}", type=Path, metavar="FILE", help="write results to this file"
        )
    return parser.parse_args(argv)


def words(text: str) -> Tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(text.split(",")))


def numbers(text: str) -> Tuple[int, ...]:
    """Integers separated by commas, each once."""
    try:
        return tuple(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        message = f"{text!r} is not a list of numbers, such as 256,1024"
        raise argparse.ArgumentTypeError(message) from None


def run(args: Any) -> None:
    """Check the options, measure, write."""
    from pkm_fairseq.experiments.benchmark import output
    from pkm_fairseq.experiments.benchmark.run import count
    from pkm_fairseq.experiments.benchmark.run import run as measure
    from pkm_fairseq.experiments.benchmark.settings import WHAT, Settings

    take_interrupts()
    settings = Settings(
        args.what or WHAT, args.tokens, args.n_keys, args.pairs, args.threads, args.seed, args.quick
    )
    check_files(args, settings.what, output.FORMATS)

    def save(found: Any, as_dict: Any) -> None:
        output.save(found.entries, as_dict, args.json, args.markdown, args.plot)

    with progress_bar(count(settings)) as tell:
        measure(settings, tell, save)


def check_files(args: Any, what: Tuple[str, ...], formats: Tuple[str, ...]) -> None:
    """Check output files before measuring for hours."""
    check_output("--json", args.json)
    check_output("--markdown", args.markdown)
    check_output("--plot", args.plot, formats)
    if args.plot and "layer" not in what:
        raise ValueError("--plot shows the layer's training step: --what must name layer")


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Show progress on stderr; yield a function that takes each result's line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def tell(line: str) -> None:
            progress.advance(task)
            console.print(line, markup=False)

        yield tell


def main(argv: Optional[List[str]] = None) -> int:
    """Run; report a user's mistake in one line, with status 2."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"benchmark_memory: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark_memory: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        from pkm_fairseq.experiments.benchmark.textbook import MismatchError

        if not isinstance(error, MismatchError):  # a fault never looks like a result
            traceback.print_exception(error)
            return 2
        print(f"benchmark_memory: NOT THE SAME: {error}; nothing was compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    logging.disable(logging.INFO)  # fairseq's notes when it is imported
    warnings.simplefilter("ignore")  # hydra's and torch's, of what fairseq calls
    sys.exit(main())
