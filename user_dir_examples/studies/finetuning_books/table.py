#!/usr/bin/env python3
"""The tables of the study, perplexity on old and new text by arm, and what the criteria say of it.

Reads OUT/{runs,further}.seed<k>.{old,new}.json, writes OUT/results.json, prints Markdown. Given
results.json itself, as results.json of this folder, it only prints. --svg draws the frontier.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

from matplotlib.axes import Axes

from pkm_fairseq.analysis.plots import COLOURS
from pkm_fairseq.analysis.svg import draw
from pkm_fairseq.memory.files import write_file

KINDS = {  # by how an arm's name begins
    "full": "everything",
    "key_dropout": "everything, with key dropout",
    "freeze": "everything but the memory",
    "values": "values",
    "slots": "slots",
}
START = "start"
Arms = Dict[str, Dict[str, Any]]


def read(out: Path, part: str) -> Arms:
    """By arm, the perplexities of the seeds on both texts, and rows per update."""
    found: Arms = {}
    for text in ("old", "new"):
        for file in sorted(out.glob(f"{part}.seed*.{text}.json")):
            for checkpoint in json.loads(file.read_text())["checkpoints"]:
                folder = Path(checkpoint["checkpoint"]).parent
                arm = folder.name if folder.parent.name.startswith("seed") else START
                perplexity = round(checkpoint["perplexity"], 4)
                found.setdefault(arm, {}).setdefault(text, []).append(perplexity)
    for arm, texts in found.items():
        texts["rows"] = rows_of(out / part, arm)
    return found


def rows_of(runs: Path, arm: str) -> Dict[str, float]:
    """Rows that an update read and was allowed to move, the mean over the logs of all seeds."""
    sums: Dict[str, List[float]] = {}
    for log in runs.glob(f"seed*/{arm}/train.log"):
        for line in log.read_text().splitlines():
            if "| train_inner | " in line:
                logged = json.loads(line.split("| train_inner | ")[1])
                for name in ("read", "chosen"):
                    if f"value_rows_{name}" in logged:
                        sums.setdefault(name, []).append(float(logged[f"value_rows_{name}"]))
    return {name: round(sum(values) / len(values), 1) for name, values in sums.items()}


def cell(values: List[float]) -> str:
    """Mean, and half of the range over the seeds."""
    return f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def shown(arm: str) -> str:
    """An arm for people."""
    return arm.replace("_lr", ", lr ").replace("pct", " %").replace("_", " ")


def markdown(arms: Arms) -> str:
    """A row for each arm."""
    start = arms[START]["old"][0]
    lines = ["| arm | rows moved / read per update | old text | change | new text |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for arm, found in arms.items():
        rows, old = found["rows"], found["old"]
        moved = f"{rows['chosen']:,.0f} / {rows['read']:,.0f}" if rows else ""
        change = 100 * (sum(old) / len(old) / start - 1)
        cells = [shown(arm), moved, cell(old), f"{change:+.1f} %", cell(found["new"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the criteria of README.md -----------------------------------------------------------------


def every_seed(one: Dict[str, Any], other: Dict[str, Any], holds: Callable[..., bool]) -> bool:
    """Whether something holds of old and new perplexity of two arms in every seed."""
    pairs = zip(one["old"], one["new"], other["old"], other["new"], strict=True)
    return all(holds(*seed) for seed in pairs)


def forgets_less(old: float, new: float, old2: float, new2: float) -> bool:
    """Criteria 1 and 4."""
    return old < old2 and new <= 1.02 * new2


def dominates(old: float, new: float, old2: float, new2: float) -> bool:
    """Criterion 2."""
    return old <= old2 and new <= new2 and (old < 0.995 * old2 or new < 0.995 * new2)


def verdicts(arms: Arms, further: Arms) -> List[str]:
    """A line for each criterion; what arms show that were added later is a hint, no test."""
    start = arms[START]["new"][0]
    of = {
        kind: [a for a in arms if a.startswith(f"{kind}_")] for kind in ("values", "slots", "full")
    }
    best = min(of["full"], key=lambda a: sum(arms[a]["new"]))

    every = {**arms, **further}

    def pairs(ours: List[str], theirs: List[str], holds: Callable[..., bool]) -> List[str]:
        return [
            f"{shown(a)} over {shown(b)}"
            for a in ours
            for b in theirs
            if every_seed(every[a], every[b], holds)
        ]

    learned = {
        lr: max(start - x for x in arms[f"slots_16_lr{lr}"]["new"])
        / min(start - x for x in arms[f"values_lr{lr}"]["new"])
        for lr in ("1e-3", "1e-2")
    }
    found = {
        "1, values forget less than full": pairs(of["values"], [best], forgets_less),
        "2, slots over values": pairs(of["slots"], of["values"], dominates),
        "3, T = 16 learns next to nothing": [
            f"{100 * x:.1f} % of values, lr {lr}" for lr, x in learned.items() if x < 0.1
        ],
    }
    for number, kind in enumerate(("key_dropout", "freeze")):
        found[f"4{'ab'[number]}, {kind.replace('_', ' ')} forgets less than full"] = [
            pair
            for lr in ("1e-4", "1e-3")
            for pair in pairs([f"{kind}_lr{lr}"], [f"full_lr{lr}"], forgets_less)
        ]
    for kind, other in (("slots", "values"), ("slots", "full"), ("full", "slots")):
        named = [[a for a in every if a.startswith(f"{k}_")] for k in (kind, other)]
        found[f"both perplexities lower, of all arms, {kind} over {other}"] = pairs(
            *named, dominates
        )
    return [f"- {name}: {'; '.join(which) or 'not supported'}" for name, which in found.items()]


def draw_frontier(arms: Arms, axes: Axes) -> None:
    """Perplexity of the old text over that of the new one, each arm's mean over seeds."""
    start = arms[START]
    points = {kind: [arms[a] for a in arms if a.startswith(f"{kind}_")] for kind in KINDS}
    for (kind, found), colour in zip(points.items(), COLOURS, strict=False):
        means = [[sum(arm[text]) / len(arm[text]) for text in ("new", "old")] for arm in found]
        axes.scatter(*zip(*means, strict=True), color=colour, s=28, zorder=3, label=KINDS[kind])
    axes.scatter(start["new"][0], start["old"][0], color=COLOURS[-1], marker="*", s=80,
                 label="before finetuning")  # fmt: skip
    axes.set(xlabel="perplexity of the new text", ylabel="perplexity of the old text")
    axes.set_ylim(start["old"][0] - 0.2, start["old"][0] + 4)
    axes.legend(title="trained", loc="upper right")


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills, or results.json")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the frontier there")
    args = parser.parse_args()
    out = args.out
    if out.is_file():
        report = json.loads(out.read_text())
    else:
        report = {part: read(out, part) for part in ("runs", "further")}
        report = {part: arms for part, arms in report.items() if arms}
        write_file(out / "results.json", json.dumps(report, indent=1) + "\n")
    for part, arms in report.items():
        print(f"{part}\n\n{markdown(arms)}\n")
    print("\n".join(verdicts(report["runs"], report.get("further", {}))))
    if args.svg:
        arms = {**report["runs"], **report.get("further", {})}
        write_file(args.svg, draw(lambda axes: draw_frontier(arms, axes)))


if __name__ == "__main__":
    main()
