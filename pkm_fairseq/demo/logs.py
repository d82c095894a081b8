"""What fairseq-train logged as JSON lines."""

import json
import re
from pathlib import Path
from typing import Dict, List

LINE = re.compile(r"\| (train_inner|valid) \| (\{.*\})$")


def read_log(file: Path, tag: str) -> List[Dict[str, float]]:
    """The numbers logged under a tag, in the order of updates.

    Args:
        file: a log; a missing one counts as empty.
        tag: ``train_inner`` or ``valid``.

    Returns:
        One dict for each logged update. What an interrupted run logged and its continuation
        logged again counts once; the prefix ``valid_`` is taken off.
    """
    by_update: Dict[int, Dict[str, float]] = {}
    if not file.is_file():
        return []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = LINE.search(line)
        if match and match[1] == tag:
            logged = json.loads(match[2])
            numbers = {  # null: what was logged before, but not since
                name.removeprefix("valid_"): float(text)
                for name, text in logged.items()
                if text is not None
            }
            by_update[int(numbers["num_updates"])] = numbers
    return [by_update[update] for update in sorted(by_update)]
