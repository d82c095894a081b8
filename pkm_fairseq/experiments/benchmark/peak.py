"""Measure the peak memory of a training step; each subject runs in its own process.

``python -m pkm_fairseq.experiments.benchmark.peak JSON`` measures one subject and prints JSON.
"""

import gc
import json
import sys
from itertools import product
from typing import Any, Dict, Sequence

import torch

from . import subjects
from .child import measure_in_child
from .layer import memory_problem
from .machine import peak_bytes, release_free_memory, resident_bytes
from .output import Report
from .settings import Settings

WHAT = "peak_memory"
SMALL = subjects.memory_config(32)  # compiles and loads the same code as a large one
STEPS = 3


def measure(settings: Settings, report: Report) -> None:
    """Measure every subject at every size; skip sizes that do not fit into memory."""
    for where in product(settings.memory_tokens, settings.memory_n_keys):
        for name in measured(settings):
            problem = subjects.problem(name) or memory_problem(name, *where)
            if problem:
                report.skip(WHAT, *where, name, problem)
            else:
                report.peak(name, *where, **in_child(name, *where, settings.seed))


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    sizes = len(settings.memory_tokens) * len(settings.memory_n_keys)
    return sizes * len(measured(settings))


def measured(settings: Settings) -> Sequence[str]:
    """The subjects to measure; each needs a process, which takes some seconds."""
    everyone = (subjects.OURS, *subjects.OTHERS)
    return everyone[:2] if settings.quick else everyone


def in_child(name: str, tokens: int, n_keys: int, seed: int) -> Dict[str, Any]:
    """Measure in a new process.

    Raises:
        ValueError: it failed; the message is the last line of its errors.
    """
    task = {"name": name, "tokens": tokens, "n_keys": n_keys, "seed": seed}
    task["threads"] = torch.get_num_threads()
    return measure_in_child(__name__, task, f"peak memory of {name}")


def here(name: str, tokens: int, n_keys: int) -> Dict[str, Any]:
    """Measure in this process, which should do nothing else.

    Returns:
        In bytes: of one table; in use between two steps, and at the peak of a step, both above
        what was in use before the layer was built; and ``extra``, the peak without the table and
        its two moments, with its share of a table.
    """
    x, grad = subjects.batches(tokens, number=1)
    _warm(name, SMALL.n_keys, x[0], grad[0])
    release_free_memory()
    before = resident_bytes()
    subject = _warm(name, n_keys, x[0], grad[0])
    for optimizer in subject.optimizers:
        optimizer.zero_grad()
    gc.collect()
    release_free_memory()
    idle = resident_bytes()
    peak = peak_bytes(lambda: subject.train_step(x[0], grad[0]))
    table = subjects.table_bytes(n_keys)
    extra = peak - before - 3 * table
    return {
        "table_bytes": table,
        "idle_bytes": idle - before,
        "peak_bytes": peak - before,
        "step_bytes": peak - idle,
        "extra_bytes": extra,
        "extra_share_of_table": extra / table,
    }


def _warm(name: str, n_keys: int, x: torch.Tensor, grad: torch.Tensor) -> subjects.Subject:
    memory = subjects.new_memory(n_keys)
    is_ours = name == subjects.OURS
    subject = subjects.ours(memory, subjects.ADAM) if is_ours else subjects.other(name, memory)
    del memory
    for _ in range(STEPS):
        subject.train_step(x, grad)
    return subject


def main() -> None:
    """Measure the subject of the command line."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task.pop("threads"))
    torch.manual_seed(task.pop("seed"))
    print(json.dumps(here(**task)))


if __name__ == "__main__":
    main()
