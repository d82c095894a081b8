#!/usr/bin/env python3
"""The table and chart of the study, and its answers claim by claim.

Reads OUT/runs/*/result.json, and results.json as the one in this folder. Prints Markdown. Claims
with unfinished runs stay open.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from arms import ARMS, HIGH_VALUE_LR, MEMORY_ARMS, SIZES, VALUE_LR, Run, Size, run_of
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.experiments.runs.study import median_and_range, read_results, write_results
from pkm_fairseq.memory.files import write_file

Found = Dict[Run, Dict[str, Any]]
AGREES, CONTRARY, UNCLEAR, OPEN = "agrees", "does not agree", "cannot be said here", "open"


def read(places: List[Path]) -> Found:
    """What finished runs found, in the form of results.json; of two equal runs the last counts."""
    found: Found = {}
    for place in places:
        results = json.loads(place.read_text()) if place.is_file() else read_results(place)
        found.update({Run(**result["run"]): result for result in results})
    return found


def table(found: Found) -> str:
    """A row for each arm and setting."""
    names = "arm|slots|value lr|seeds|perplexity|values zeroed|slots permuted|top-1 usage, %"
    names += "|top-k usage, %|draws per slot|values moved"
    lines = ["| " + " | ".join(names.split("|")) + " |", "|---|" + "--:|" * 10]
    groups: Dict[Any, List[Dict[str, Any]]] = defaultdict(list)
    for run in sorted(found, key=lambda r: (r.n_keys, ARMS.index(r.arm), r.value_lr, r.seed)):
        groups[run.arm, run.n_keys, run.value_lr].append(found[run])
    for (arm, n_keys, value_lr), results in groups.items():
        cells = [arm, f"{n_keys}²" if n_keys else "", f"{value_lr:g}" if n_keys else ""]
        cells += [str(len(results)), median_and_range([r["perplexity"] for r in results], "{:.2f}")]
        if n_keys:
            cells += [median_and_range([r["ablated"][kind] for r in results], "{:.2f}")
                      for kind in ("zero", "permuted")]  # fmt: skip
            cells += [median_and_range([100 * r["usage"][name] for r in results])
                      for name in ("top1_usage", "topk_usage")]  # fmt: skip
            cells += [f"{results[0]['usage']['draws_per_slot']:.0f}"]
            cells += [median_and_range([r["way"][-1]["values_moved"] for r in results], "{:.2f}")]
        else:
            cells += [""] * 6
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the claims of README.md ---------------------------------------------------------------------


class Claims:
    """The answers for one number of slots."""

    def __init__(self, found: Found, size: Size, n_keys: int) -> None:
        self.found, self.size, self.n_keys = found, size, n_keys

    def of(
        self, arm: str, what: Callable[[Dict[str, Any]], float], **changed: float
    ) -> List[float]:
        """A number of an arm for each seed.

        Raises:
            KeyError: a run is missing.
        """
        runs = [run_of(self.size, arm, seed, self.n_keys, **changed) for seed in self.size.seeds]
        return [what(self.found[run]) for run in runs]

    def top1(self, arm: str) -> List[float]:
        """Top-1 usage of an arm, in per cent."""
        return self.of(arm, lambda result: 100 * result["usage"]["top1_usage"])

    def perplexity(self, arm: str, **changed: float) -> List[float]:
        """Perplexity of an arm."""
        return self.of(arm, lambda result: result["perplexity"], **changed)

    def stale(self) -> str:
        """Claim 1."""
        topk = self.of("pkm", lambda result: 100 * result["usage"]["topk_usage"])
        pairs = list(zip(self.top1("pkm"), topk, strict=True))
        return answer([a < 50 and b > 95 for a, b in pairs], [a > 75 for a, _ in pairs])

    def init_raises(self) -> str:
        """Claim 2."""
        gains = [
            [b - a for a, b in zip(self.top1(arm), self.top1(f"{arm}_init"), strict=True)]
            for arm in ("pkm", "resm")
        ]
        both = list(zip(*gains, strict=True))
        return answer([min(pair) >= 5 for pair in both], [max(pair) <= -5 for pair in both])

    def resm_raises(self) -> str:
        """Claim 3."""
        gains = [b - a for a, b in zip(self.top1("pkm"), self.top1("resm"), strict=True)]
        return answer([gain >= 5 for gain in gains], [gain <= -5 for gain in gains])

    def exceeds(self) -> str:
        """Claim 4."""
        usage = self.top1("resm_init")
        return answer([share > 95 for share in usage], [share < 90 for share in usage])

    def better(self, one: List[float], other: List[float]) -> str:
        """Whether perplexities are at least 1 % lower."""
        pairs = list(zip(one, other, strict=True))
        return answer([a <= 0.99 * b for a, b in pairs], [a >= 1.01 * b for a, b in pairs])

    def both_best(self) -> str:
        """Claim 6."""
        others = [self.perplexity(arm) for arm in ARMS if arm != "resm_init"]
        pairs = list(zip(self.perplexity("resm_init"), zip(*others, strict=True), strict=True))
        return answer(
            [ours <= 0.99 * min(theirs) for ours, theirs in pairs],
            [min(theirs) <= 0.99 * ours for ours, theirs in pairs],
        )

    def dip(self) -> str:
        """Claim 7."""
        runs = [run_of(self.size, "pkm", seed, self.n_keys) for seed in self.size.seeds]
        ways = [[100 * at["topk_usage"] for at in self.found[run]["way"]] for run in runs]
        return answer(
            [len(way) > 1 and min(way[1:]) <= way[-1] - 10 and way[-1] > 90 for way in ways],
            [way[-1] == min(way) <= way[0] - 10 for way in ways],
        )

    def needed(self) -> str:
        """Claim 8."""
        rises = self.of("resm_init", lambda r: r["ablated"]["zero"] / r["perplexity"])
        return answer([rise >= 1.05 for rise in rises], [rise < 1.01 for rise in rises])

    def lines(self) -> List[str]:
        """A line for each claim."""
        claims: Dict[str, Callable[[], str]] = {
            "1, from scratch a memory goes stale": self.stale,
            "2, INIT raises usage": self.init_raises,
            "3, ResM raises usage": self.resm_raises,
            "4, INIT with ResM exceeds 95 %": self.exceeds,
            "5, PKM improves perplexity": lambda: self.better(
                self.perplexity("pkm"), self.perplexity("plain")
            ),
            "6, both remedies together are best": self.both_best,
            "7, the early dip passes": self.dip,
            "8, the memory is needed where it is used": self.needed,
        }
        if self.n_keys == self.size.n_keys[0]:
            claims["9, a higher value rate helps"] = lambda: self.better(
                self.perplexity("resm_init", value_lr=HIGH_VALUE_LR),
                self.perplexity("resm_init", value_lr=VALUE_LR),
            )
        return [f"- {self.n_keys}²: {name}: {said(claim)}" for name, claim in claims.items()]


def answer(holds: List[bool], contrary: List[bool]) -> str:
    """The answer to a claim from whether it, or its contrary, holds in each seed."""
    return AGREES if all(holds) else CONTRARY if all(contrary) else UNCLEAR


def said(claim: Callable[[], str]) -> str:
    """The answer, or that runs are missing."""
    try:
        return claim()
    except KeyError:
        return f"{OPEN}, runs are missing"


# --- chart ---------------------------------------------------------------------------------------


def draw_usage(found: Found, size: Size, n_keys: int, axes: Axes) -> None:
    """Top-1 usage in training over updates, a line for each seed."""
    for arm, colour in zip(MEMORY_ARMS, COLOURS, strict=False):
        label: Optional[str] = arm
        for seed in size.seeds:
            result = found.get(run_of(size, arm, seed, n_keys))
            if result is not None:
                axes.plot([at["updates"] for at in result["way"]],
                          [at["top1_usage"] for at in result["way"]], color=colour, marker="o",
                          markersize=3, linewidth=1.5, label=label)  # fmt: skip
                label = None
    axes.set(xlabel="updates, those of the start counted", ylim=(0, 1.03),
             ylabel=f"top-1 usage of {n_keys}² slots")  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower right")


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="+", help="folders of run.sh, or results.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="write the charts there")
    args = parser.parse_args()
    found, size = read(args.out), SIZES[args.size]
    if not found:
        raise SystemExit(f"{', '.join(map(str, args.out))}: no finished run")
    if args.json:
        write_results(args.json, list(found.values()))
    print(table(found))
    print()
    for n_keys in size.n_keys:
        print("\n".join(Claims(found, size, n_keys).lines()))
    if args.svg:
        for n_keys in size.n_keys:
            if any(run.n_keys == n_keys for run in found):
                chart = draw(lambda axes, n=n_keys: draw_usage(found, size, n, axes))
                write_file(args.svg / f"books_usage_{n_keys}.svg", chart)


if __name__ == "__main__":
    main()
