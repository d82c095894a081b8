#!/usr/bin/env python3
"""Masked-LM perplexity and memory usage of checkpoints on held-out text.

All checkpoints see the same masked tokens, those of the first one's task and seed, and so does the
unigram model they are compared with. Works with any masked-LM checkpoint on this data.
"""

import argparse
from pathlib import Path

from _script import run

from pkm_fairseq.demo.evaluate import evaluate, load, masked_batches, unigram_perplexity


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
    task = load(args.checkpoints[0], args.data).task
    batches = masked_batches(task, args.split)
    print(f"unigram model: perplexity {unigram_perplexity(args.data, batches, task):.2f}")
    for checkpoint in args.checkpoints:
        result = evaluate(load(checkpoint, args.data).model, batches, task)
        print(f"{checkpoint}: perplexity {result.ppl:.2f}")
        for layer in result.memory:
            numbers = (f"{key} {value:.4g}" for key, value in layer.items() if key != "layer")
            print(f"  layer {layer['layer']}: {', '.join(numbers)}")


if __name__ == "__main__":
    run(main)
