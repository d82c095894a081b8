"""Measure in a process of its own, which does nothing else."""

import json
import sys
from typing import Any, Dict

from ..runs.processes import run_to_end


def measure_in_child(module: str, task: Dict[str, Any], what: str) -> Dict[str, Any]:
    """Run a module with a task as its argument, and read what it prints; both are JSON.

    Args:
        module: its full name.
        task: what to measure.
        what: a name of it, for a message.

    Raises:
        ValueError: it failed; the message is the last line of its errors.
    """
    done = run_to_end([sys.executable, "-m", module, json.dumps(task)])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{what} could not be measured: {last}")
    found: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
