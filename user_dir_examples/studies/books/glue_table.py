#!/usr/bin/env python3
"""The table of glue.sh, and its answers claim by claim.

Reads OUT/seed*/*/results.json, or one glue_results.json as in this folder. Prints Markdown. Claims
with unfinished runs stay open.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from arms import ARMS, MEMORY_ARMS
from table import Claim, answer

from pkm_fairseq.experiments.runs.study import median_and_range, write_results

REMEDIES = ("none", "freeze", "key_dropout")
TASKS = ("SST-2", "CoLA", "MRPC", "RTE")
SEEDS = (1, 2, 3)


class Key(NamedTuple):
    """A pretrained arm, and how it was finetuned."""

    arm: str
    remedy: str
    seed: int


Found = Dict[Key, Dict[str, Dict[str, float]]]  # by task: score, and drift of a memory


def read(out: Path) -> Found:
    """The scores of all tasks, and how memories drifted."""
    if out.is_file():
        results = json.loads(out.read_text())
        return {Key(**result["run"]): result["tasks"] for result in results}
    found: Found = {}
    for file in sorted(out.glob("seed*/*/results.json")):
        seed, remedy = int(file.parts[-3].removeprefix("seed")), file.parts[-2]
        results = json.loads(file.read_text())
        metrics = {task: next(iter(about["baseline"])) for task, about in results["tasks"].items()}
        for arm in results["arms"]:
            tasks = {task: measured(of, metrics[task]) for task, of in arm["tasks"].items()}
            if tasks:
                found[Key(arm["name"], remedy, seed)] = tasks
    return found


def measured(of_task: Dict[str, Any], metric: str) -> Dict[str, float]:
    """The official score of a run in per cent, and the drift of its memory."""
    found = {"score": of_task["dev"][metric]["median"]}
    if of_task["memory"]:
        (drift,) = of_task["memory"][0]["drift"]
        found["same"] = round(100 * drift["top1_same"], 2)
        found["overlap"] = round(100 * drift["topk_jaccard"], 2)
        found["moved"] = round(drift["query_moved"], 4)
    return found


def table(found: Found) -> str:
    """A row for each arm and remedy."""
    tasks = [task for task in TASKS if any(task in of for of in found.values())]
    lines = ["| arm | remedy | seeds | " + " | ".join(tasks) + " | mean"]
    lines[0] += " | same first choice, % | queries moved |"
    lines.append("|---|---|" + "--:|" * (len(tasks) + 4))
    for remedy in REMEDIES:
        for arm in ARMS:
            results = [found[key] for key in sorted(found) if key[:2] == (arm, remedy)]
            if not results:
                continue
            cells = [median_and_range([of[task]["score"] for of in results]) for task in tasks]
            cells.append(median_and_range([average(of, "score") for of in results]))
            for what, text in (("same", "{:.1f}"), ("moved", "{:.2f}")):
                drift = [average(of, what) for of in results] if arm in MEMORY_ARMS else []
                cells.append(median_and_range(drift, text) if drift else "")
            lines.append(f"| {arm} | {remedy} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def average(of_tasks: Dict[str, Dict[str, float]], what: str) -> float:
    """The mean over tasks."""
    return mean(of[what] for of in of_tasks.values())


# --- the claims of README.md ---------------------------------------------------------------------


class Claims:
    """The answers, from all seeds and tasks."""

    def __init__(self, found: Found, seeds: Sequence[int], tasks: Sequence[str]) -> None:
        self.found, self.seeds, self.tasks = found, seeds, tasks

    def of(self, what: str, arm: str, seed: int, remedy: str = "none") -> float:
        """The mean over tasks.

        Raises:
            KeyError: a run is missing.
        """
        result = self.found[Key(arm, remedy, seed)]
        return mean(result[task][what] for task in self.tasks)

    def gain(self, what: str, one: str, other: str, seed: int, remedy: str = "none") -> float:
        """By how much an arm is above another one, which has no remedy."""
        return self.of(what, one, seed, remedy) - self.of(what, other, seed)

    def pkm_is_worse(self, seed: int) -> Tuple[bool, bool]:
        """Claim 10."""
        gain = self.gain("score", "pkm", "plain", seed)
        return gain <= -1, gain >= 1

    def both_are_best(self, seed: int) -> Tuple[bool, bool]:
        """Claim 11."""
        others = [arm for arm in ARMS if arm != "resm_init"]
        least = min(self.gain("score", "resm_init", arm, seed) for arm in others)
        return least >= 1, least <= -1

    def pkm_drifts_more(self, seed: int) -> Tuple[bool, bool]:
        """Claim 12."""
        gain = self.gain("same", "resm_init", "pkm", seed)
        return gain >= 5, gain <= -5

    def helps(self, remedy: str, arm: str, seed: int) -> Tuple[bool, bool]:
        """Claims 13 and 14."""
        stays = self.gain("same", arm, arm, seed, remedy)
        score = self.gain("score", arm, arm, seed, remedy)
        return stays >= 5 and score >= -1, stays <= 0 or score <= -1

    def lines(self) -> List[str]:
        """A line for each claim."""
        claims: Dict[str, Claim] = {
            "10, a PKM alone is worse than plain downstream": self.pkm_is_worse,
            "11, both remedies together are best downstream": self.both_are_best,
            "12, finetuning makes a PKM drift more": self.pkm_drifts_more,
        }
        for number, remedy in ((13, "freeze"), (14, "key_dropout")):
            for arm in ("pkm", "resm_init"):
                claims[f"{number}, {remedy} helps {arm}"] = partial(self.helps, remedy, arm)
        return [f"- {name}: {answer(claim, self.seeds)}" for name, claim in claims.items()]


def report(found: Found) -> str:
    """The table, and the answers."""
    return "\n".join([table(found), "", *Claims(found, SEEDS, TASKS).lines()])


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of glue.sh, or glue_results.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args()
    found = read(args.out)
    if not found:
        raise SystemExit(f"{args.out}: no finished run")
    if args.json:
        results = [{"run": key._asdict(), "tasks": found[key]} for key in sorted(found)]
        write_results(args.json, results)
    print(report(found))


if __name__ == "__main__":
    main()
