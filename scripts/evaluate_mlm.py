#!/usr/bin/env python3
"""Measure masked-LM perplexity and memory usage of checkpoints on held-out text.

The task and seed of the first checkpoint choose the masked tokens. All checkpoints and the unigram
baseline predict these tokens. Any masked-LM checkpoint on this data works.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict

from _script import check_output, run

from pkm_fairseq.experiments.demo.evaluate import (
    ablations,
    evaluate,
    load,
    masked_batches,
    scored,
    unigram_perplexity,
)
from pkm_fairseq.memory.files import write_file


def main() -> None:
    """Evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("demo_out/data/bin"),
        metavar="FOLDER",
        help="folder made by fairseq-preprocess (default: %(default)s)",
    )
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument(
        "--ablate",
        action="store_true",
        help="also measure perplexity with zeroed values, with values permuted among the slots, "
        "and with only the first choice of each head; in all memories at once, and per layer",
    )
    parser.add_argument(
        "--memory-values-file",
        type=Path,
        metavar="FILE",
        help="values of an exported model (default: values.pt beside it)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    check_output("--json", args.json)
    if args.memory_values_file and len(args.checkpoints) > 1:
        raise ValueError(f"--memory-values-file {args.memory_values_file} is of one checkpoint")
    first = load(args.checkpoints[0], args.data, args.memory_values_file)
    batches = masked_batches(first.task, args.split)
    unigram = unigram_perplexity(args.data, batches, first.task)
    n_masked = sum(int(scored(batch["target"], first.task).sum()) for batch in batches)
    print(f"split {args.split}: {n_masked:,} masked tokens")
    print(f"unigram model: perplexity {unigram:.2f}")
    report: Dict[str, Any] = {"split": args.split, "masked_tokens": n_masked}
    report.update(unigram_ppl=unigram, checkpoints=[])
    for at, checkpoint in enumerate(args.checkpoints):
        model = load(checkpoint, args.data).model if at else first.model
        result = evaluate(model, batches, first.task)
        found = {"checkpoint": str(checkpoint), "perplexity": result.ppl, "memory": result.memory}
        print_result(found)
        if args.ablate:
            by_part = ablations(model, batches, first.task)
            print_ablations(by_part)
            found.update(ablations=by_part.pop("all", None), ablations_by_layer=by_part)
        report["checkpoints"].append(found)
    if args.json:
        write_file(args.json, json.dumps(report, indent=2, allow_nan=False) + "\n")


def print_result(found: Dict[str, Any]) -> None:
    """Perplexity of a checkpoint, and the usage of its memories."""
    print(f"{found['checkpoint']}: perplexity {found['perplexity']:.2f}")
    for layer in found["memory"]:
        print(f"  layer {layer['layer']}: {numbers(layer)}")
        for head, counts in enumerate(layer["heads"]):
            print(f"    head {head}: {numbers(counts)}")


def print_ablations(by_part: Dict[str, Dict[str, float]]) -> None:
    """Print the perplexity with ablated memories: a line for all, and one per layer."""
    if not by_part:
        print("  no memory to ablate")
    for part, found in by_part.items():
        name = "all memories" if part == "all" else f"memory of layer {part}"
        said = ", ".join(f"{kind} {ppl:.2f}" for kind, ppl in found.items())
        print(f"  {name} ablated: {said}")


def numbers(counts: Dict[str, Any]) -> str:
    """The numbers of a layer or a head in one line."""
    left_out = ("layer", "heads", "curve", "extrapolation")
    return ", ".join(f"{key} {value:.4g}" for key, value in counts.items() if key not in left_out)


if __name__ == "__main__":
    run(main)
