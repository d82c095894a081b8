#!/usr/bin/env python3
"""Masked-LM perplexity and memory usage of checkpoints on held-out text.

All checkpoints see the same masked tokens, those of the first one's task and seed, and so does the
unigram model they are compared with. Works with any masked-LM checkpoint on this data.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

from _script import run

from pkm_fairseq.demo.evaluate import (
    evaluate,
    load,
    masked_batches,
    scored,
    unigram_perplexity,
)


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo_out/data/bin"),
        metavar="FOLDER",
        help="what fairseq-preprocess made (default: %(default)s)",
    )
    parser.add_argument("--split", default="test", help="default: %(default)s")
    args = parser.parse_args()
    first = load(args.checkpoints[0], args.data)
    batches = masked_batches(first.task, args.split)
    unigram = unigram_perplexity(args.data, batches, first.task)
    n_masked = sum(int(scored(batch["target"], first.task).sum()) for batch in batches)
    print(f"split {args.split}: {n_masked:,} masked tokens")
    print(f"unigram model: perplexity {unigram:.2f}")
    for at, checkpoint in enumerate(args.checkpoints):
        model = load(checkpoint, args.data).model if at else first.model
        result = evaluate(model, batches, first.task)
        print(f"{checkpoint}: perplexity {result.ppl:.2f}")
        for layer in result.memory:
            print(f"  layer {layer['layer']}: {numbers(layer)}")
            for head, counts in enumerate(layer["heads"]):
                print(f"    head {head}: {numbers(counts)}")


def numbers(counts: Dict[str, Any]) -> str:
    """The numbers of a layer or a head in one line."""
    left_out = ("layer", "heads", "curve", "extrapolation")
    return ", ".join(f"{key} {value:.4g}" for key, value in counts.items() if key not in left_out)


if __name__ == "__main__":
    run(main)
