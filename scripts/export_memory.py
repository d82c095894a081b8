#!/usr/bin/env python3
"""Export a checkpoint for inference with its value tables outside of memory.

OUT gets model.pt, a checkpoint without tables and optimizer; values.pt, the tables, which are read
through the page cache; and export.json. With --data the script measures the perplexity of masked
tokens before and after the export.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict

from _script import run

from pkm_fairseq.experiments.demo.evaluate import evaluate, load, masked_batches, scored
from pkm_fairseq.memory.files import write_file
from pkm_fairseq.memory.mapped import STORED
from pkm_fairseq.models.export import export


def main() -> None:
    """Export, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=STORED,
        help="of the stored values; int8 has one scale per row (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder made by fairseq-preprocess: measure perplexity on its text",
    )
    parser.add_argument("--split", default="valid", help="of --data (default: %(default)s)")
    args = parser.parse_args()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"OUT {args.out} must be a folder")
    made = export(args.checkpoint, args.out, args.dtype)
    for layer, shape in made.tables.items():
        print(f"layer {layer}: {shape[0]:,} values of width {shape[1]} in {made.dtype}")
    print(f"{made.values}: {made.bytes:,} bytes")
    report: Dict[str, Any] = {
        **{"checkpoint": str(args.checkpoint), "fingerprint": made.fingerprint},
        **{"dtype": made.dtype, "bytes": made.bytes, "tables": made.tables},
    }
    if args.data:
        report["perplexity"] = measured = measure(args.checkpoint, made.model, args)
        before, after = measured["before"], measured["after"]
        print(
            f"perplexity of {measured['masked_tokens']:,} masked tokens of {args.split}: "
            f"{before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.3f} %)"
        )
    write_file(args.out / "export.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def measure(before: Path, after: Path, args: argparse.Namespace) -> Dict[str, Any]:
    """Perplexity of the checkpoint and of the exported model on the same masked tokens."""
    loaded = load(before, args.data)
    batches = masked_batches(loaded.task, args.split)
    n_masked = sum(int(scored(batch["target"], loaded.task).sum()) for batch in batches)
    found = {"split": args.split, "masked_tokens": n_masked}
    first = evaluate(loaded.model, batches, loaded.task).ppl
    del loaded  # its tables
    again = load(after, args.data)
    return {**found, "before": first, "after": evaluate(again.model, batches, again.task).ppl}


if __name__ == "__main__":
    run(main)
