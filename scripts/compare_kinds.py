#!/usr/bin/env python3
"""Compare kinds of memories: their cost, or what they learn from the same number of tokens."""

import argparse
from pathlib import Path
from typing import Dict, Tuple

from _script import run

from pkm_fairseq.experiments.benchmark.kinds import costs
from pkm_fairseq.experiments.demo.kinds import KINDS, learned, spread
from pkm_fairseq.memory import MemoryConfig


def main() -> None:
    """Parse, then measure or train, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    cost = parts.add_parser("cost", help="parameters and times relative to the plain memory")
    cost.add_argument("--n-keys", type=int, default=512, help="sub-keys per half (default 512)")
    cost.add_argument("--heads", type=int, default=4, help="(default 4)")
    cost.add_argument("--knn", type=int, default=32, help="(default 32)")
    cost.add_argument(
        "--width", type=int, default=768, help="width of input and values (default 768)"
    )
    cost.add_argument("--tokens", type=int, default=512, help="tokens per batch (default 512)")
    cost.add_argument("--rounds", type=int, default=11, help="timed rounds (default 11)")
    learn = parts.add_parser("train", help="perplexity and usage after short trainings")
    learn.add_argument("--data", type=Path, required=True, help="folder made by fairseq-preprocess")
    learn.add_argument("--out", type=Path, required=True, help="folder for logs")
    learn.add_argument("--arm", choices=("pkm", "resm"), default="pkm", help="(default pkm)")
    learn.add_argument("--preset", choices=("default", "quick"), default="default", help="sizes")
    learn.add_argument("--updates", type=int, default=1000, help="updates per run (default 1000)")
    learn.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default 1 2 3)")
    learn.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(all)")
    args = parser.parse_args()
    for name in ("width", "tokens", "rounds") if args.part == "cost" else ("updates",):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, must be at least 1")
    print_costs(args) if args.part == "cost" else print_learned(args)


def print_costs(args: argparse.Namespace) -> None:
    """Measure and print."""
    config = MemoryConfig(n_keys=args.n_keys, heads=args.heads, knn=args.knn)
    print("| kind | parameters, M | with moments, MB | forward | step | forward, ms | step, ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, c in costs(config, args.width, args.tokens, args.rounds):
        sizes = f"{c.parameters / 1e6:.2f} | {c.held / 1e6:,.0f}"
        times = f"{c.forward:.2f} | {c.step:.2f} | {c.forward_ms:.1f} | {c.step_ms:.1f}"
        print(f"| {name} | {sizes} | {times} |", flush=True)


def print_learned(args: argparse.Namespace) -> None:
    """Train and print each run, then the median and range of each kind."""
    print("| kind | seed | perplexity | top-1 usage | top-k usage | KL, weighted |")
    print("|---|--:|--:|--:|--:|--:|")
    settings = (args.data, args.out, args.arm, args.preset, args.updates)
    rows: Dict[str, Dict[int, Tuple[float, ...]]] = {name: {} for name in args.kinds}
    for name, seed, found in learned(*settings, args.seeds, args.kinds):
        cells = " | ".join(f"{number:.4g}" for number in found)
        print(f"| {name} | {seed} | {cells} |", flush=True)
        rows[name][seed] = found
    print("\n| kind | perplexity | top-1 usage | top-k usage | KL, weighted | against plain |")
    print("|---|--:|--:|--:|--:|---|")
    for name, by_seed in rows.items():
        cells = " | ".join(map(spread, zip(*by_seed.values(), strict=True)))
        seeds = by_seed if "plain" in rows and name != "plain" else ()
        against = ", ".join(f"{by_seed[k][0] - rows['plain'][k][0]:+.1f}" for k in seeds)
        print(f"| {name} | {cells} | {against} |")


if __name__ == "__main__":
    run(main)
