#!/usr/bin/env python3
"""The table and charts of the study, and its answers claim by claim.

Reads OUT/runs/*/result.json, and results.json as the one in this folder. Prints Markdown. Claims
with unfinished runs stay open.
"""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from arms import ARMS, HIGH_VALUE_LR, LONGER, MEMORY_ARMS, SIZES, Run, Size, run_of
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.experiments.runs.study import (
    in_every,
    median_and_range,
    read_results,
    write_results,
)
from pkm_fairseq.memory.files import write_file

Found = Dict[Run, Dict[str, Any]]
AGREES, CONTRARY, UNCLEAR, OPEN = "agrees", "does not agree", "cannot be said here", "open"


def read(places: List[Path]) -> Found:
    """What finished runs found, in the form of results.json; of two equal runs the last counts.

    What ``train.py --check half`` trained is no run of the study.
    """
    found: Found = {}
    for place in places:
        found.update({Run(**result["run"]): result for result in read_results(place)})
    return {run: result for run, result in found.items() if not run.stops_at_half}


def table(found: Found) -> str:
    """A row for each arm and setting."""
    names = "arm|slots|value lr|seeds|perplexity|values zeroed|first choice only|slots permuted"
    names += "|top-1 usage, %|top-k usage, %|draws per slot|effective neighbours|values moved"
    lines = ["| " + " | ".join(names.split("|")) + " |", "|---|" + "--:|" * 12]
    groups: Dict[Any, List[Run]] = defaultdict(list)
    order = (*ARMS, LONGER).index

    def settings(run: Run) -> Tuple[Any, ...]:
        return run.n_keys, order(run.arm), run.value_lr, run.value_schedule

    for run in sorted(found, key=lambda run: (settings(run), run.seed)):
        groups[settings(run)].append(run)
    for runs in groups.values():
        run, results = runs[0], [found[run] for run in runs]
        rate = f"{run.value_lr:g}" + (" falling" if run.value_schedule == "follow" else "")
        cells = [run.arm, f"{run.n_keys}²", rate] if run.n_keys else [run.arm, "", ""]
        cells += [str(len(results)), median_and_range([r["perplexity"] for r in results], "{:.2f}")]
        if run.n_keys:
            cells += [median_and_range([r["ablated"][kind] for r in results], "{:.2f}")
                      for kind in ("zero", "top1", "permuted")]  # fmt: skip
            cells += [median_and_range([100 * r["usage"][name] for r in results])
                      for name in ("top1_usage", "topk_usage")]  # fmt: skip
            cells += [f"{results[0]['usage']['draws_per_slot']:.0f}"]
            last = [result["way"][-1] for result in results]
            cells += [median_and_range([at["effective_neighbours"] for at in last])
                      if all("effective_neighbours" in at for at in last) else ""]  # fmt: skip
            cells += [median_and_range([at["values_moved"] for at in last], "{:.2f}")]
        else:
            cells += [""] * 8
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the claims of README.md ---------------------------------------------------------------------


Claim = Callable[[int], Tuple[bool, bool]]  # in a seed: whether it holds, and its contrary does


class Claims:
    """The answers for one number of slots."""

    def __init__(self, found: Found, size: Size, n_keys: int) -> None:
        self.found, self.size, self.n_keys = found, size, n_keys

    def of(self, arm: str, seed: int, **changed: Any) -> Dict[str, Any]:
        """What an arm found with a seed.

        Raises:
            KeyError: the run is missing.
        """
        return self.found[run_of(self.size, arm, seed, self.n_keys, **changed)]

    def top1(self, arm: str, seed: int) -> float:
        """Top-1 usage of an arm, in per cent."""
        share: float = self.of(arm, seed)["usage"]["top1_usage"]
        return 100 * share

    def perplexity(self, arm: str, seed: int, **changed: Any) -> float:
        """Perplexity of an arm."""
        perplexity: float = self.of(arm, seed, **changed)["perplexity"]
        return perplexity

    def stale(self, seed: int) -> Tuple[bool, bool]:
        """Claim 1."""
        top1, topk = self.top1("pkm", seed), 100 * self.of("pkm", seed)["usage"]["topk_usage"]
        return top1 < 50 and topk > 95, top1 > 75

    def init_raises(self, seed: int) -> Tuple[bool, bool]:
        """Claim 2."""
        gains = [self.top1(f"{arm}_init", seed) - self.top1(arm, seed) for arm in ("pkm", "resm")]
        return min(gains) >= 5, max(gains) <= -5

    def resm_raises(self, seed: int) -> Tuple[bool, bool]:
        """Claim 3."""
        gain = self.top1("resm", seed) - self.top1("pkm", seed)
        return gain >= 5, gain <= -5

    def exceeds(self, seed: int) -> Tuple[bool, bool]:
        """Claim 4."""
        usage = self.top1("resm_init", seed)
        return usage > 95, usage < 90

    def pkm_improves(self, seed: int) -> Tuple[bool, bool]:
        """Claim 5."""
        return better(self.perplexity("pkm", seed), self.perplexity("plain", seed))

    def both_best(self, seed: int) -> Tuple[bool, bool]:
        """Claim 6."""
        ours = self.perplexity("resm_init", seed)
        best = min(self.perplexity(arm, seed) for arm in ARMS if arm != "resm_init")
        return ours <= 0.99 * best, best <= 0.99 * ours

    def dip(self, seed: int) -> Tuple[bool, bool]:
        """Claim 7."""
        way = [100 * at["topk_usage"] for at in self.of("pkm", seed)["way"]]
        passes = len(way) > 1 and min(way[1:]) <= way[-1] - 10 and way[-1] > 90
        return passes, way[-1] == min(way) <= way[0] - 10

    def needed(self, seed: int) -> Tuple[bool, bool]:
        """Claim 8."""
        result = self.of("resm_init", seed)
        rise = result["ablated"]["zero"] / result["perplexity"]
        return rise >= 1.05, rise < 1.01

    def high_rate_helps(self, seed: int) -> Tuple[bool, bool]:
        """Claim 9."""
        high = self.perplexity("resm_init", seed, value_lr=HIGH_VALUE_LR)
        return better(high, self.perplexity("resm_init", seed))

    def falling_rate_helps(self, seed: int) -> Tuple[bool, bool]:
        """Claim 17."""
        falling = self.perplexity("resm", seed, value_schedule="follow")
        return better(falling, self.perplexity("resm", seed))

    def worth_its_time(self, arm: str, seed: int) -> Tuple[bool, bool]:
        """Claims 15 and 16."""
        return better(self.perplexity(arm, seed), self.perplexity(LONGER, seed))

    def lines(self) -> List[str]:
        """A line for each claim."""
        claims: Dict[str, Claim] = {
            "1, from scratch a memory goes stale": self.stale,
            "2, INIT raises usage": self.init_raises,
            "3, ResM raises usage": self.resm_raises,
            "4, INIT with ResM exceeds 95 %": self.exceeds,
            "5, PKM improves perplexity": self.pkm_improves,
            "6, both remedies together are best": self.both_best,
            "7, the early dip passes": self.dip,
            "8, the memory is needed where it is used": self.needed,
        }
        if self.n_keys == self.size.n_keys[0]:
            claims["9, a higher value rate helps"] = self.high_rate_helps
            for number, arm in ((15, "resm_init"), (16, "resm")):
                claims[f"{number}, {arm} is worth its time"] = partial(self.worth_its_time, arm)
            claims["17, a falling value rate helps resm"] = self.falling_rate_helps
        return [
            f"- {self.n_keys}²: {name}: {answer(claim, self.size.seeds)}"
            for name, claim in claims.items()
        ]


def better(one: float, other: float) -> Tuple[bool, bool]:
    """Whether a perplexity is at least 1 % lower than another one, and at least 1 % higher."""
    return one <= 0.99 * other, one >= 1.01 * other


def answer(claim: Claim, seeds: Sequence[int]) -> str:
    """The answer to a claim. It is open while finished seeds agree, and others are missing."""
    found: List[Optional[Tuple[bool, bool]]] = []
    for seed in seeds:
        try:
            found.append(claim(seed))
        except KeyError:
            found.append(None)
    done = [of for of in found if of is not None]
    for which, name in enumerate((AGREES, CONTRARY)):
        holds = in_every(None if of is None else of[which] for of in found)
        if holds:
            return name
        if holds is None and done:
            return f"{OPEN}, {name} in {len(done)} of {len(seeds)} seeds"
    return UNCLEAR if done else f"{OPEN}, runs are missing"


def report(found: Found, size: Size) -> str:
    """The table, plain at its half, and the answers for each number of slots that has runs."""
    lines = [table(found), ""]
    halves = [result["half"] for result in found.values() if "half" in result]
    if halves:
        shown = f"{median_and_range(halves, '{:.2f}')}; seeds: {len(halves)}"
        lines += [f"Plain after half of its updates, where arms with INIT start: {shown}.", ""]
    for n_keys in size.n_keys:
        if any(run.n_keys == n_keys for run in found):
            lines += Claims(found, size, n_keys).lines()
    return "\n".join(lines)


# --- charts --------------------------------------------------------------------------------------


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


def draw_perplexity(found: Found, size: Size, n_keys: int, axes: Axes) -> None:
    """Perplexity of the arms that have runs, a dot for each seed."""
    arms: List[Tuple[str, str, Dict[str, Any]]] = [(arm, arm, {}) for arm in (*ARMS, LONGER)]
    arms += [(f"resm_init, value lr {HIGH_VALUE_LR:g}", "resm_init", {"value_lr": HIGH_VALUE_LR})]
    arms += [("resm, value lr falling", "resm", {"value_schedule": "follow"})]
    names: List[str] = []
    for name, arm, changed in arms:
        runs = [run_of(size, arm, seed, n_keys, **changed) for seed in size.seeds]
        values = [found[run]["perplexity"] for run in runs if run in found]
        if values:
            axes.plot(values, [len(names)] * len(values), "o", color=COLOURS[0], alpha=0.7)
            names.append(name)
    axes.set(xlabel=f"perplexity, {n_keys}² slots", ylim=(len(names) - 0.5, -0.5),
             yticks=range(len(names)), yticklabels=names)  # fmt: skip


def charts(found: Found, size: Size, n_keys: int) -> Dict[str, str]:
    """The charts for a number of slots, as SVG, by name."""
    return {
        "usage": draw(lambda axes: draw_usage(found, size, n_keys, axes)),
        "perplexity": draw(lambda axes: draw_perplexity(found, size, n_keys, axes)),
    }


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
    print(report(found, size))
    if args.svg:
        for n_keys in size.n_keys:
            if any(run.n_keys == n_keys for run in found):
                for name, chart in charts(found, size, n_keys).items():
                    write_file(args.svg / f"books_{name}_{n_keys}.svg", chart)


if __name__ == "__main__":
    main()
