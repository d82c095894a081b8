#!/usr/bin/env python3
"""The table of the study: perplexity on old and new text, mean and range over seeds.

Reads OUT/seed<k>.{old,new}.json, writes OUT/results.json, prints Markdown.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

from pkm_fairseq.memory.files import write_file

BASE = "start"


def read(out: Path) -> Dict[str, Dict[str, List[float]]]:
    """By arm and text, the perplexities of the seeds."""
    found: Dict[str, Dict[str, List[float]]] = {}
    for text in ("old", "new"):
        for file in sorted(out.glob(f"seed*.{text}.json")):
            for checkpoint in json.loads(file.read_text())["checkpoints"]:
                folder = Path(checkpoint["checkpoint"]).parent
                arm = BASE if folder.name == "resm_init" else folder.name
                found.setdefault(arm, {}).setdefault(text, []).append(checkpoint["perplexity"])
    return found


def rows_of(out: Path, arm: str) -> Dict[str, float]:
    """Rows that an update read and was allowed to move, the mean over a log."""
    sums: Dict[str, List[float]] = {}
    for log in (out / "runs").glob(f"seed*/{arm}/train.log"):
        for line in log.read_text().splitlines():
            if "| train_inner | " in line:
                logged = json.loads(line.split("| train_inner | ")[1])
                for name in ("read", "chosen"):
                    if f"value_rows_{name}" in logged:
                        sums.setdefault(name, []).append(float(logged[f"value_rows_{name}"]))
    return {name: sum(values) / len(values) for name, values in sums.items()}


def cell(values: List[float]) -> str:
    """Mean, and half of the range over the seeds."""
    return f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def markdown(report: Dict[str, Dict[str, Any]]) -> str:
    """A row for each arm."""
    start = report[BASE]["old"][0]
    lines = ["| arm | rows moved / read per update | old text | old, change | new text |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for arm, found in report.items():
        rows, old = found["rows"], found["old"]
        moved = f"{rows['chosen']:,.0f} / {rows['read']:,.0f}" if rows else ""
        change = 100 * (sum(old) / len(old) / start - 1)
        lines.append(
            f"| {arm.replace('_lr', ', lr ').replace('_', ' ').replace('pct', ' %')} | {moved} | "
            f"{cell(old)} | {change:+.1f} % | {cell(found['new'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh fills")
    args = parser.parse_args()
    report: Dict[str, Dict[str, Any]] = {
        arm: {**texts, "rows": rows_of(args.out, arm)} for arm, texts in read(args.out).items()
    }
    write_file(args.out / "results.json", json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
