"""Read the JSON lines in logs of fairseq-train."""

import json
import re
from pathlib import Path
from typing import Dict, List


def logged_by_update(file: Path, tag: str) -> Dict[int, Dict[str, float]]:
    """The numbers logged under a tag, by the number of finished updates, in order.

    Lines that an interrupted run and its continuation both logged count once. A line that is not
    JSON is skipped: a kill can cut a line off, and the next run then continues it.

    Args:
        file: a log; a missing one counts as empty.
        tag: ``train_inner``, ``train`` or a validation subset; the prefix ``<tag>_`` is removed.
    """
    if not file.is_file():
        return {}
    line = re.compile(rf"\| {re.escape(tag)} \| (\{{.*\}})$", re.MULTILINE)
    found: Dict[int, Dict[str, float]] = {}
    for text in line.findall(file.read_text(encoding="utf-8", errors="replace")):
        try:
            logged = json.loads(text)
        except json.JSONDecodeError:
            continue
        numbers = {
            name.removeprefix(f"{tag}_"): float(number)
            for name, number in logged.items()
            if number is not None  # numbers logged before, but not again
        }
        if "num_updates" in numbers:  # not if all updates of an epoch overflowed
            found[int(numbers["num_updates"])] = numbers
    return dict(sorted(found.items()))


def read_log(file: Path, tag: str) -> List[Dict[str, float]]:
    """The numbers of ``logged_by_update``, one dict per logged update."""
    return list(logged_by_update(file, tag).values())


def last_line(file: Path) -> str:
    """The last line of a process's output."""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
