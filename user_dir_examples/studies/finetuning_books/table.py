#!/usr/bin/env python3
"""The tables of the study, perplexity on old and new text by arm, and what the criteria say of it.

Reads OUT/runs/*/result.json and writes OUT/results.json; or reads a results.json, such as the one
in this folder. Prints Markdown. Criteria with unfinished runs stay open. --svg draws the frontier.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

from arms import PARTS, SIZES, Run, Size, runs_of
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.experiments.runs.study import collect_results, median_and_range
from pkm_fairseq.memory.files import write_file

KINDS = {  # by kind of arm, its name in the picture
    "full": "everything",
    "key dropout": "everything, with key dropout",
    "freeze": "everything but the memory",
    "values": "values",
    "slots": "slots",
    "low rank": "low-rank additions",
    "plain full": "plain: everything",
    "plain low rank": "plain: low-rank additions",
}
FIRST, HINTS = ("first",), ("first", "further")  # parts of the study
LITTLE = 1.1  # perplexity of the old text, over that of the start: criteria 5 and 6
Found = Dict[Run, Dict[str, Any]]
Arm = Run  # an arm with its rates is its run with the first seed


def read(place: Path) -> Found:
    """What each finished run found, in the form of results.json."""
    return {Run(**result["run"]): result for result in collect_results(place)}


def arms_of(size: Size, parts: Iterable[str] = PARTS) -> List[Arm]:
    """The arms of some parts, each with its rates."""
    first = size.seeds[0]
    return [run for part in parts for run in runs_of(size, part) if run.seed == first]


def seeds_of(arm: Arm, found: Found, size: Size) -> List[Dict[str, Any]]:
    """What an arm found, for each finished seed."""
    runs = [Run(arm.arm, arm.lr, arm.value_lr, seed) for seed in size.seeds]
    return [found[run] for run in runs if run in found]


def shown(arm: Arm) -> str:
    """An arm with its rate, for people."""
    return f"{arm.arm.replace('%', ' %')}, {rate_of(arm)}"


def rate_of(arm: Arm) -> str:
    """The rate of an arm, for people."""
    return f"lr {arm.lr or arm.value_lr:.0e}".replace("e-0", "e-")


def forgotten(result: Dict[str, Any]) -> float:
    """Perplexity of the old text, over that of the start."""
    ratio: float = result["old"] / result["start"]["old"]
    return ratio


def table(found: Found, size: Size, part: str) -> str:
    """A row for each arm of a part, and for the starts."""
    lines = ["| arm | rows moved / read per update | old text | change | new text |"]
    lines += ["|---|--:|--:|--:|--:|"]
    arms = [arm for arm in arms_of(size, [part]) if seeds_of(arm, found, size)]
    for start in dict.fromkeys(arm.start for arm in arms):
        arm = next(arm for arm in arms if arm.start == start)
        before = seeds_of(arm, found, size)[0]["start"]
        name = "start" if start == "resm_init" else f"start, {start}"
        lines.append(f"| {name} |  | {before['old']:.2f} |  | {before['new']:.2f} |")
    for arm in arms:
        results = seeds_of(arm, found, size)
        rows = [[r[f"rows_{name}"] for r in results if f"rows_{name}" in r]
                for name in ("chosen", "read")]  # fmt: skip
        moved = " / ".join(f"{median(numbers):,.0f}" for numbers in rows if numbers)
        old, new = (
            median_and_range([r[text] for r in results], "{:.2f}") for text in ("old", "new")
        )
        change = 100 * (median(forgotten(r) for r in results) - 1)
        cells = [shown(arm), moved, old, f"{change:+.1f} %", new]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the criteria of README.md -----------------------------------------------------------------


def forgets_less(one: Dict[str, Any], other: Dict[str, Any]) -> bool:
    """Criteria 1 and 4, in one seed."""
    return forgotten(one) < forgotten(other) and one["new"] <= 1.02 * other["new"]


def dominates(one: Dict[str, Any], other: Dict[str, Any]) -> bool:
    """Criteria 2, 5 and 6, in one seed."""
    ours, theirs = (forgotten(one), one["new"]), (forgotten(other), other["new"])
    pairs = list(zip(ours, theirs, strict=True))
    return all(a <= b for a, b in pairs) and any(a < 0.995 * b for a, b in pairs)


Holds = Callable[[Dict[str, Any], Dict[str, Any]], bool]


class Verdicts:
    """What the criteria say; without all runs of a part they stay open."""

    def __init__(self, found: Found, size: Size) -> None:
        self.found, self.size = found, size

    def arms(self, kind: str, parts: Iterable[str] = FIRST) -> List[Arm]:
        """The arms of a kind."""
        return [arm for arm in arms_of(self.size, parts) if arm.kind == kind]

    def of(self, arm: Arm) -> List[Dict[str, Any]]:
        """What an arm found, for each seed."""
        return seeds_of(arm, self.found, self.size)

    def holds(self, one: Arm, other: Arm, claim: Holds) -> bool:
        """Whether a claim holds of two arms in every seed."""
        return all(claim(a, b) for a, b in zip(self.of(one), self.of(other), strict=True))

    def pairs(self, of: Iterable[Tuple[Arm, Arm]], claim: Holds) -> str:
        """Those pairs of arms of which a claim holds in every seed."""
        found = [pair for pair in of if self.holds(*pair, claim)]
        return "; ".join(f"{shown(a)} over {shown(b)}" for a, b in found) or "not supported"

    def values_over_full(self) -> str:
        """Criterion 1."""
        best = min(self.arms("full"), key=lambda arm: median(r["new"] for r in self.of(arm)))
        return self.pairs(product(self.arms("values"), [best]), forgets_less)

    def few_slots(self) -> str:
        """Criterion 3."""
        said = []
        for few in (arm for arm in self.arms("slots") if arm.arm == "slots 16"):
            values = Run("values", few.lr, few.value_lr, few.seed)
            most, least = (
                choose(r["start"]["new"] - r["new"] for r in self.of(arm))
                for arm, choose in ((few, max), (values, min))
            )
            if most < 0.1 * least:
                said.append(f"{100 * most / least:.1f} % of values, {rate_of(few)}")
        return "; ".join(said) or "not supported"

    def less_than_full(self, kind: str) -> str:
        """Criterion 4, for arms with equal rates."""
        of = {arm.lr: arm for arm in self.arms(kind)}
        pairs = [(of[full.lr], full) for full in self.arms("full") if full.lr in of]
        return self.pairs(pairs, forgets_less)

    def dominated(self, kinds: Sequence[str]) -> str:
        """Criteria 5 and 6: whether all arms of these kinds that forget little are dominated."""
        ours = [*self.arms("values", HINTS), *self.arms("slots", HINTS)]
        theirs = [
            arm
            for kind in kinds
            for arm in self.arms(kind, PARTS)
            if all(forgotten(result) <= LITTLE for result in self.of(arm))
        ]
        left = [arm for arm in theirs if not any(self.holds(our, arm, dominates) for our in ours)]
        if not theirs:
            return "not supported: no arm forgets so little"
        return f"not supported: not {', nor '.join(map(shown, left))}" if left else "supported"

    def lines(self) -> List[str]:
        """A line for each criterion, and for hints."""
        slots_and_values = product(self.arms("slots"), self.arms("values"))
        claims: List[Tuple[Iterable[str], str, Callable[[], str]]] = [
            (FIRST, "1, values forget less than full", self.values_over_full),
            (FIRST, "2, slots over values", partial(self.pairs, slots_and_values, dominates)),
            (FIRST, "3, T = 16 learns next to nothing", self.few_slots),
        ]
        for letter, kind in (("a", "key dropout"), ("b", "freeze")):
            name = f"4{letter}, {kind} forgets less than full"
            claims.append((FIRST, name, partial(self.less_than_full, kind)))
        for one, other in (("slots", "values"), ("slots", "full"), ("full", "slots")):
            name = f"both perplexities lower, of all arms, {one} over {other}"
            pairs = product(self.arms(one, HINTS), self.arms(other, HINTS))
            claims.append((HINTS, name, partial(self.pairs, pairs, dominates)))
        for name, kinds in (
            ("5, values or slots over a low-rank adapter", ["low rank"]),
            ("6, values or slots over the plain model", ["plain full", "plain low rank"]),
        ):
            claims.append((PARTS, name, partial(self.dominated, kinds)))
        return [
            f"- {name}: {claim() if self.complete(parts) else 'open, runs are missing'}"
            for parts, name, claim in claims
        ]

    def complete(self, parts: Iterable[str]) -> bool:
        """Whether all runs of some parts are finished."""
        return all(run in self.found for part in parts for run in runs_of(self.size, part))


def draw_frontier(found: Found, size: Size, axes: Axes) -> None:
    """What is forgotten of the old text over perplexity of the new one, each arm's median."""
    for (kind, label), colour in zip(KINDS.items(), COLOURS, strict=True):
        of = [seeds_of(arm, found, size) for arm in arms_of(size) if arm.kind == kind]
        of = [results for results in of if results]
        if of:
            new = [median(r["new"] for r in results) for results in of]
            rise = [median(forgotten(r) - 1 for r in results) for results in of]
            marker = "^" if kind.startswith("plain") else "o"
            axes.scatter(new, rise, s=28, color=colour, marker=marker, zorder=3, label=label)
    axes.set(xlabel="perplexity of the new text", ylabel="rise of the perplexity of the old text")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.01, 0.25)
    axes.legend(title="trained", loc="upper right")


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills, or results.json")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the frontier there")
    args = parser.parse_args()
    found, size = read(args.out), SIZES[args.size]
    if not found:
        raise SystemExit(f"{args.out}: no finished run")
    for part in PARTS:
        print(f"{part}\n\n{table(found, size, part)}\n")
    print("\n".join(Verdicts(found, size).lines()))
    if args.svg:
        write_file(args.svg, draw(lambda axes: draw_frontier(found, size, axes)))


if __name__ == "__main__":
    main()
