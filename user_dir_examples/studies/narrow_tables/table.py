#!/usr/bin/env python3
"""The table of the study, and the verdicts of its criteria.

Reads OUT/runs/*/result.json, writes OUT/results.json, prints Markdown. Given a results.json, such
as the one in this folder, it only prints. Verdicts with unfinished runs stay open.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Dict, List, Sequence

from arms import ARMS, BYTES, SEEDS, TASKS, Run

from pkm_fairseq.experiments.runs.study import collect_results, median_and_range

MEASURES = {"text": "perplexity", "facts": "recall"}
Found = Dict[Run, float]


def read(out: Path) -> Found:
    """Perplexity or recall of each finished run."""
    found = {}
    for result in collect_results(out):
        run = Run(**result["run"])
        found[run] = result[MEASURES[run.task]]
    return found


def of(found: Found, task: str, arm: str) -> List[float]:
    """The results of an arm, by seed."""
    return [
        found[run]
        for run in sorted(found, key=lambda r: r.seed)
        if (run.task, run.arm) == (task, arm)
    ]


def table(found: Found) -> str:
    """A row for each arm."""
    lines = ["| arm | bytes a number | perplexity of text | recall of facts, % | seeds |"]
    lines.append("|---|--:|--:|--:|--:|")
    for arm in ("plain", *ARMS):
        text, facts = (of(found, task, arm) for task in TASKS)
        if text or facts:
            size = f"{BYTES[arm]:.3g}" if arm in BYTES else ""
            cells = [arm, size, median_and_range(text, "{:.3f}") if text else ""]
            cells.append(median_and_range([100 * x for x in facts]) if facts else "")
            lines.append(f"| {' | '.join(cells)} | {max(len(text), len(facts))} |")
    return "\n".join(lines)


def verdict(found: Found, task: str, arm: str, seeds: Sequence[int]) -> str:
    """A verdict of README.md."""
    theirs, ours = of(found, task, "float32"), of(found, task, arm)
    if not len(theirs) == len(ours) == len(seeds):
        return "open, runs are missing"
    noise = max(theirs) - min(theirs)
    losses = [b - a for a, b in zip(theirs, ours, strict=True)]
    if task == "facts":
        losses, noise = [100 * (0 - loss) for loss in losses], 100 * noise
    kind = "as good" if median(losses) <= noise else "worse"
    by_seed = ", ".join(f"{loss:+.3f}" for loss in losses)
    return f"{kind} (losses by seed {by_seed}; noise {noise:.3f})"


def report(found: Found, seeds: Sequence[int]) -> str:
    """The table and all verdicts."""
    verdicts = [
        f"- {task}, {arm}: {verdict(found, task, arm, seeds)}"
        for task in TASKS
        for arm in list(ARMS)[1:]
    ]
    return "\n".join([table(found), "", *verdicts])


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of run.sh, or results.json")
    parser.add_argument("--size", choices=SEEDS, default="full")
    args = parser.parse_args()
    found = read(args.out)
    if not found:
        raise SystemExit("no finished run")
    print(report(found, SEEDS[args.size]))


if __name__ == "__main__":
    main()
