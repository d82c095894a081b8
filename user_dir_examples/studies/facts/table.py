#!/usr/bin/env python3
"""The tables and charts of the study, and the verdicts of its criteria.

Reads OUT/runs/*/result.json, writes OUT/results.json, prints Markdown. Given a results.json, such
as the one in this folder, it only prints. Criteria with unfinished runs stay open. The charts need
the file of step_times.py beside results.json.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

from arms import MEMORIES, SIZES, STEP_TIMES, WIDTHS, Run, Size, chosen, is_complete, is_tuned
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.experiments.facts.people import ATTRIBUTES, BITS
from pkm_fairseq.experiments.facts.training import HEADS, K_DIM, KNN, epoch_of
from pkm_fairseq.experiments.runs.study import (
    in_every,
    median_and_range,
    no_leak,
    read_results,
    write_results,
)
from pkm_fairseq.memory.files import write_file

Found = Dict[Run, Dict[str, Any]]


def read(out: Path) -> Found:
    """The measurements of each finished run, in the form of results.json."""
    if out.is_file():
        return {Run(**entry["run"]): entry for entry in read_results(out)}
    found: Found = {}
    for entry in read_results(out):
        for part in (entry["train"], entry["control"], *entry["way"].values()):
            for question in ("by_name", "with_others"):
                part[question] = {n: round(x, 6) for n, x in part[question].items()}
        for layer in entry["train"].get("memory", []):
            kept = ("layer", "draws_per_slot", "top1_usage", "topk_usage", "top1_ceiling")
            layer_curve = [[at["draws_per_slot"], round(at["top1_usage"], 4)]
                           for at in layer["curve"]]  # fmt: skip
            for name in set(layer) - set(kept):
                del layer[name]
            layer["top1_curve"] = layer_curve
        found[Run(**entry["run"])] = entry
    if found:
        write_results(out / "results.json", list(found.values()))
    return found


def recall(found: Found, run: Run) -> float:
    """Recall by name."""
    return found[run]["train"]["by_name"]["recall"]


def multiply_adds(run: Run) -> int:
    """Multiply-adds of the encoder per token: projections, FFN and memory. Left out are the scores
    of attention, which are alike, and the output layer, which only masked tokens need."""
    width, ffn = WIDTHS.get(run.arm, WIDTHS["plain"])
    layer = 4 * width**2 + 2 * width * ffn
    if not run.n_keys:
        return 2 * layer
    query = width * HEADS * K_DIM
    search = HEADS * run.n_keys * K_DIM  # two halves, each with half of the query's width
    read_rows = HEADS * min(KNN, run.n_keys) * width
    replaced = 2 * width * ffn if run.arm.startswith("pkm") else 0
    return 2 * layer + query + search + read_rows - replaced


def stored_bits(entry: Dict[str, Any]) -> float:
    """Bits of the people's facts that the model knows by name."""
    known = max(0.0, BITS - entry["train"]["by_name"]["bits"])
    return known * entry["train"]["people"] * len(ATTRIBUTES)


def time_of(run: Run, updates: int, multiples: Mapping[str, float]) -> float:
    """The time of the first ``updates`` of a run, those of its start counted, in plain's updates.

    Args:
        run: the run.
        updates: at most those of the run.
        multiples: an arm's time per update, as a multiple of plain's.
    """
    of_start = min(updates, run.updates - run.own_updates)
    return of_start + (updates - of_start) * multiples[run.arm.removesuffix("_init")]


def grouped(found: Found) -> List[List[Run]]:
    """Groups of runs that differ only in their seed, in the order of the tables."""
    groups: Dict[Run, List[Run]] = defaultdict(list)
    order = [*WIDTHS, "pkm", "pkm_init", "resm", "resm_init"]
    for run in sorted(found, key=lambda r: (r.people, r.updates, order.index(r.arm), r.n_keys)):
        groups[replace(run, seed=0)].append(run)
    return list(groups.values())


def table(found: Found) -> str:
    """A row for each arm and setting."""
    names = "people|updates|exposures|arm|slots|lr|value lr|seeds|recall by name, %|with others, %"
    names += "|values zeroed, %|bits stored per parameter|multiply-adds per token"
    names += "|top-1 usage, %|draws per slot"
    lines = ["| " + " | ".join(names.split("|")) + " |", "|--:|--:|--:|---|" + "--:|" * 11]
    for runs in grouped(found):
        run, entries = runs[0], [found[run] for run in runs]
        parts = [entry["train"] for entry in entries]

        def share(of: Callable[[Dict[str, Any]], float], parts: List[Any] = parts) -> str:
            return median_and_range([100 * of(part) for part in parts])

        n_keys, falls = run.n_keys, " falling" if run.value_schedule == "follow" else ""
        cells = [f"{run.people:,}", f"{run.updates:,}", f"{run.updates / epoch_of(run.people):.0f}"]
        cells += [run.arm, f"{n_keys}²" if n_keys else ""]
        cells += [f"{run.lr:g}", f"{run.value_lr:g}{falls}" if n_keys else "", str(len(runs))]
        cells += [share(lambda part: part["by_name"]["recall"])]
        cells += [share(lambda part: part["with_others"]["recall"])]
        cells += [share(lambda part: part["zeroed"]["by_name"]["recall"]) if n_keys else ""]
        cells += [
            median_and_range(
                [stored_bits(entry) / entry["parameters"] for entry in entries], "{:.3f}"
            )
        ]
        cells += [f"{multiply_adds(run):,}"]
        cells += [share(lambda part: part["memory"][0]["top1_usage"]) if n_keys else ""]
        cells += [f"{parts[0]['memory'][0]['draws_per_slot']:.1f}" if n_keys else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the criteria of README.md -----------------------------------------------------------------


class Criteria:
    """The verdicts of the criteria on finished runs; None if runs are missing."""

    def __init__(self, found: Found, size: Size) -> None:
        self.found, self.size = found, size
        self.recalls = {run: recall(found, run) for run in found}

    def of(self, arm: str, **changed: Any) -> List[Optional[float]]:
        """Recall by name of an arm with its best rate, for each seed; None if its run is missing.

        All are None while a rate is missing, with which recall might be better.
        """
        if not is_tuned(self.recalls, self.size, arm):
            return [None for _ in self.size.seeds]
        runs = [chosen(self.size, self.recalls, arm, **changed, seed=s) for s in self.size.seeds]
        return [self.recalls.get(run) for run in runs]

    def above(
        self, one: List[Optional[float]], other: List[Optional[float]], by: float = 0.1
    ) -> Optional[bool]:
        """Whether recall is higher, and by at least ``by``, for every seed."""
        return in_every(
            None if a is None or b is None else round(a - b, 9) >= by and a > b
            for a, b in zip(one, other, strict=True)
        )

    def capacity_or_updates(self) -> Optional[str]:
        """Criterion 3."""
        ours, long = self.of("resm_init"), self.of("plain", updates=4 * self.size.updates)
        comes_near = [
            None if a is None or b is None else b >= a - 0.1
            for a, b in zip(ours, long, strict=True)
        ]
        if None in comes_near:
            return None
        if all(comes_near):
            return "the memory saved updates"
        gains = []
        for seed in self.size.seeds:
            run = chosen(self.size, self.recalls, "plain", updates=4 * self.size.updates, seed=seed)
            way = {int(at): asked for at, asked in self.found[run]["way"].items()}
            before = way[3 * self.size.updates]["by_name"]["recall"]
            gains.append(way[4 * self.size.updates]["by_name"]["recall"] - before)
        if not any(comes_near) and max(gains) < 0.02:
            return "capacity"
        return "it cannot be said"

    def facts_are_in_values(self) -> Optional[bool]:
        """Criterion 4."""
        recalls = zip(self.size.seeds, self.of("resm_init"), strict=True)
        return in_every(None if x is None else self._lost(seed) >= 0.8 for seed, x in recalls)

    def _lost(self, seed: int) -> float:
        """The share of what resm_init learned after its start that is lost without values."""
        run = chosen(self.size, self.recalls, "resm_init", seed=seed)
        assert run.start
        half = self.found[run.start]["way"]
        start = {int(at): asked for at, asked in half.items()}[run.updates // 2]
        gained = self.recalls[run] - start["by_name"]["recall"]
        without: float = self.found[run]["train"]["zeroed"]["by_name"]["recall"]
        return (self.recalls[run] - without) / gained if gained > 0 else 0.0

    def more_slots(self) -> Optional[bool]:
        """Criterion 5."""
        sizes = [self.of("resm_init", n_keys=n) for n in (*self.size.smaller, self.size.n_keys)]
        return in_every(self.above(b, a, 0.0) for a, b in pairwise(sizes))

    def memory_wins(self, **changed: int) -> Optional[bool]:
        """Criterion 1; ``changed`` can set another number of people."""
        ours = self.of("resm_init", **changed)
        dense = [self.of(arm, **changed) for arm in ("plain", "wide")]
        return in_every(self.above(ours, other) for other in dense)

    def lines(self) -> List[str]:
        """A line for each criterion."""
        ours = self.of("resm_init")
        highest = max(e["control"]["by_name"]["recall"] for e in self.found.values())
        answers: Dict[str, Any] = {
            "1, more at equal updates and multiply-adds": self.memory_wins(),
            "2, more at equal time": self.above(
                ours, self.of("plain", updates=4 * self.size.updates)
            ),
            "3, capacity or optimisation": self.capacity_or_updates(),
            "4, the facts are in the values": self.facts_are_in_values(),
            "5, more slots, more facts": self.more_slots(),
            "6, INIT helps": self.above(ours, self.of("resm")),
            "7, ResM over PKM": self.above(ours, self.of("pkm_init"), 0.0),
            f"8, {self.size.fewer:,} people": self.memory_wins(people=self.size.fewer),
            f"8, {self.size.more:,} people": self.memory_wins(people=self.size.more),
            f"9, no leak (control at most {100 * highest:.1f} %)": no_leak(
                highest, is_complete(self.size, self.recalls)
            ),
            "10, a falling value rate helps": self.above(
                self.of("resm_init", value_schedule="follow"), ours, 0.02
            ),
        }
        words = {None: "open, runs are missing", True: "supported", False: "not supported"}
        return [f"- {name}: {words.get(answer, answer)}" for name, answer in answers.items()]


# --- charts ------------------------------------------------------------------------------------


def draw_charts(found: Found, size: Size, multiples: Mapping[str, float], folder: Path) -> None:
    """Recall by name over updates, time and multiply-adds per token; usage over draws."""
    recalls = {run: recall(found, run) for run in found}
    arms = [arm for arm in (*WIDTHS, *MEMORIES) if any(run.arm == arm for run in found)]
    colours = dict(zip((*WIDTHS, *MEMORIES), COLOURS, strict=True))

    def runs_of(arm: str, **changed: int) -> List[Run]:
        runs = [chosen(size, recalls, arm, seed=seed, **changed) for seed in size.seeds]
        return [run for run in runs if run in found]

    def recalls_on_the_way(run: Run) -> Dict[int, float]:
        way = {int(at): part["by_name"]["recall"] for at, part in found[run]["way"].items()}
        if run.start in found:
            half = run.updates // 2
            way[half] = recalls_on_the_way(run.start)[half]
        return dict(sorted(way.items()))

    def line(axes: Axes, run: Run, label: str, points: Mapping[float, float], style: str) -> None:
        shown = label if run.seed == size.seeds[0] else None  # once in the legend
        axes.plot(list(points), list(points.values()), style, color=colours[run.arm], marker="o",
                  markersize=3, linewidth=1.5, label=shown)  # fmt: skip

    def over_updates(axes: Axes) -> None:
        for arm in arms:
            for run in runs_of(arm):
                line(axes, run, arm, recalls_on_the_way(run), "-")
        axes.set(xlabel="updates, those of the start counted", ylabel="recall by name")

    def over_time(axes: Axes) -> None:
        for factor, style in ((1, "-"), (4, "--")):
            for arm in arms:
                for run in runs_of(arm, updates=factor * size.updates):
                    way = recalls_on_the_way(run).items()
                    points = {time_of(run, at, multiples): recall for at, recall in way}
                    label = arm if factor == 1 else f"{arm}, {run.updates:,} updates"
                    line(axes, run, label, points, style)
        axes.set(xlabel="time, in updates of plain", ylabel="recall by name")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    def usage(axes: Axes) -> None:
        for arm in (arm for arm in arms if arm in MEMORIES):
            for run in runs_of(arm):
                (memory,) = found[run]["train"]["memory"]
                line(axes, run, arm, dict(memory["top1_curve"]), "-")
        axes.set(xlabel="draws per slot", ylabel="top-1 usage", xscale="log", ylim=(0, 1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    def over_compute(axes: Axes) -> None:
        for arm in arms:
            runs = [run for run in found if run in set(runs_of(arm))]
            axes.scatter([multiply_adds(run) for run in runs], [recalls[run] for run in runs],
                         color=colours[arm], label=arm, s=28)  # fmt: skip
        axes.set(xlabel="multiply-adds per token", ylabel="recall by name", xlim=0, ylim=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    def with_per_cent(plot: Callable[[Axes], None], axes: Axes) -> None:
        plot(axes)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: no curve crosses it
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    for plot in (over_updates, over_time, over_compute, usage):
        write_file(folder / f"facts_{plot.__name__}.svg", draw(partial(with_per_cent, plot)))


def read_multiples(file: Path) -> Dict[str, float]:
    """An arm's time per update, as a multiple of plain's."""
    if not file.is_file():
        raise SystemExit(f"{file}: no such file, make it with step_times.py {file.parent}")
    return {arm: times["multiple"] for arm, times in json.loads(file.read_text()).items()}


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills, or results.json")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="write the charts there")
    args = parser.parse_args()
    found = read(args.out)
    if not found:
        raise SystemExit(f"{args.out} holds no finished run")
    print(table(found))
    print()
    print("\n".join(Criteria(found, SIZES[args.size]).lines()))
    if args.svg:
        folder = args.out.parent if args.out.is_file() else args.out
        draw_charts(found, SIZES[args.size], read_multiples(folder / STEP_TIMES), args.svg)


if __name__ == "__main__":
    main()
