#!/usr/bin/env python3
"""The table and chart of the study, and the verdicts of its criteria.

Reads OUT/runs/*/result.json, writes OUT/results.json, prints Markdown. Given a results.json, such
as the one in this folder, it only prints. Criteria with unfinished runs stay open.
"""

import argparse
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from arms import ARMS, SIZES, Results, Run, Size, best, kept, recall, runs_to_do, tried
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.experiments.runs.study import (
    collect_results,
    in_every,
    median_and_range,
    no_leak,
)
from pkm_fairseq.memory.files import write_file

DRAWN = ("full", "values", "slots_24000", "slots_24000_once", "low_rank", "freeze", "plain_full")


def read(out: Path) -> Results:
    """What each finished run found, in the form of results.json."""
    return {Run(**result["run"]): result for result in collect_results(out)}


def shown(arm: str) -> str:
    """An arm for people."""
    return re.sub(r"\d+", lambda number: f"{int(number[0]):,}", arm.replace("_", " "))


def table(results: Results, size: Size) -> str:
    """A row for each arm and rate; the best rate of an arm has all seeds."""
    names = "arm|lr|value lr|seeds|kept, %|old, %|new, %|old by name, %|new by name, %"
    names += "|rows moved|megabytes"
    lines = ["| " + " | ".join(names.split("|")) + " |", "|---|" + "--:|" * 10]
    lines.append(_start_row(results, size))
    for arm in ARMS:
        for lr, value_lr in ARMS[arm].rates:
            runs = [Run(arm, lr, value_lr, seed) for seed in size.seeds]
            found = [results[run] for run in runs if run in results]
            if found:
                rates = [f"{lr:g}" if lr else "", f"{value_lr:g}" if value_lr else ""]
                lines.append(_row(shown(arm), rates, found))
    return "\n".join(lines)


def _start_row(results: Results, size: Size) -> str:
    """What the starts with a memory know."""
    starts = [
        results[run]["way"][0]
        for run in (Run("values", *ARMS["values"].rates[0], seed=seed) for seed in size.seeds)
        if run in results
    ] or [next(iter(results.values()))["way"][0]]
    cells = ["start", "", "", str(len(starts)), "", *_recalls(starts), "", ""]
    return f"| {' | '.join(cells)} |"


def _recalls(points: List[Dict[str, Any]]) -> List[str]:
    return [
        median_and_range([100 * point[people][question]["recall"] for point in points])
        for question in ("with_others", "by_name")
        for people in ("old", "new")
    ]


def _row(arm: str, rates: List[str], found: List[Dict[str, Any]]) -> str:
    shares = [kept(result) for result in found]
    reached = [100 * share for share in shares if share is not None]
    text = median_and_range(reached) if len(reached) == len(found) else "" if not reached else (
        f"{median_and_range(reached)}; {len(found) - len(reached)} of {len(found)} do not learn"
    )  # fmt: skip
    cells = [arm, *rates, str(len(found)), text, *_recalls([r["way"][-1] for r in found])]
    rows = [result["change"]["rows"] for result in found]
    cells += [median_and_range(rows, "{:,.0f}") if any(rows) else ""]
    cells += [median_and_range([result["change"]["bytes"] / 1e6 for result in found], "{:.2f}")]
    return f"| {' | '.join(cells)} |"


# --- the criteria of README.md -----------------------------------------------------------------


class Criteria:
    """The verdicts of the criteria on finished runs; None if runs are missing."""

    def __init__(self, results: Results, size: Size) -> None:
        self.results, self.size = results, size

    def of(self, arm: str) -> List[Optional[Dict[str, Any]]]:
        """What an arm found with its best rate, for each seed; None if its run is missing.

        All are None while a rate is missing, which might be better.
        """
        if any(run not in self.results for run in tried(self.size, arm)):
            return [None for _ in self.size.seeds]
        run = best(self.results, self.size, arm)
        runs = [Run(arm, run.lr, run.value_lr, seed) for seed in self.size.seeds]
        return [self.results.get(run) for run in runs]

    def holds(self, arm: str, claim: Callable[[Dict[str, Any]], bool]) -> Optional[bool]:
        """Whether a claim holds for an arm in every seed."""
        return in_every(None if found is None else claim(found) for found in self.of(arm))

    def keeps_more(self, arm: str, other: str, by: float) -> Optional[bool]:
        """Whether an arm keeps more than another one by this share, in every seed."""

        def more(ours: Dict[str, Any], theirs: Dict[str, Any]) -> bool:
            share = kept(ours)
            return share is not None and round(share - (kept(theirs) or 0.0), 9) >= by

        return in_every(
            None if ours is None or theirs is None else more(ours, theirs)
            for ours, theirs in zip(self.of(arm), self.of(other), strict=True)
        )

    def some_slots(self) -> Optional[bool]:
        """Criterion 3."""
        answers = [
            self.keeps_more(arm, "values", 0.01) for arm in ARMS if ARMS[arm].slots is not None
        ]
        return True if any(answers) else None if None in answers else False

    def few_slots(self) -> Optional[bool]:
        """Criterion 4."""
        few = [a for a, arm in ARMS.items() if arm.slots and arm.slots <= 1024 and not arm.once]

        def stays_low(found: Dict[str, Any]) -> bool:
            return all(recall(point, "new") < 0.1 for point in found["way"])

        return in_every(self.holds(a, stays_low) for a in few)

    def dense_has_no_room(self) -> Optional[bool]:
        """Criterion 6."""
        return in_every(
            self.holds(arm, lambda r: (kept(r) or 0.0) < recall(r["way"][0], "old") / 2)
            for arm in ("plain_full", "plain_low_rank")
        )

    def lines(self) -> List[str]:
        """A line for each criterion."""
        points = [point for result in self.results.values() for point in result["way"]]
        highest = max(recall(point, "control") for point in points)
        answers = {
            "1, values forget less than full finetuning": self.keeps_more("values", "full", 0.1),
            "2, values forget less than a low-rank adapter": self.keeps_more(
                "values", "low_rank", 0.1
            ),
            "3, slots by TF-IDF forget less than values": self.some_slots(),
            "4, few slots learn nothing": self.few_slots(),
            "5, key dropout helps": self.keeps_more("key_dropout", "full", 0.02),
            "5, freeze helps": self.keeps_more("freeze", "full", 0.02),
            "6, a dense model of this size has no room": self.dense_has_no_room(),
            f"7, no leak (control at most {100 * highest:.1f} %)": no_leak(
                highest, not runs_to_do(self.size, self.results)
            ),
        }
        words = {None: "open, runs are missing", True: "supported", False: "not supported"}
        return [f"- {name}: {words[answer]}" for name, answer in answers.items()]


# --- chart -------------------------------------------------------------------------------------


def draw_frontier(results: Results, size: Size, axes: Axes) -> None:
    """Recall of old people over recall of new ones, during the finetuning with the best rate."""
    for arm, colour in zip(DRAWN, COLOURS, strict=False):
        if not any(run in results for run in tried(size, arm)):
            continue
        chosen = best(results, size, arm)
        for seed in size.seeds:
            run = Run(arm, chosen.lr, chosen.value_lr, seed)
            if run in results:
                way = results[run]["way"]
                axes.plot([recall(point, "new") for point in way],
                          [recall(point, "old") for point in way], color=colour, marker="o",
                          markersize=3, linewidth=1.5,
                          label=shown(arm) if seed == size.seeds[0] else None)  # fmt: skip
    axes.set(xlabel="recall of new people", ylabel="recall of old people", ylim=(0, 1.03))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="center")


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills, or results.json")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the frontier there")
    args = parser.parse_args()
    results, size = read(args.out), SIZES[args.size]
    if not results:
        raise SystemExit(f"{args.out} holds no finished run")
    print(table(results, size))
    print()
    print("\n".join(Criteria(results, size).lines()))
    if args.svg:
        write_file(args.svg, draw(lambda axes: draw_frontier(results, size, axes)))


if __name__ == "__main__":
    main()
