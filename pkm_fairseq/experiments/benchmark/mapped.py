"""Measure reads of a table in a file: resident memory, and tokens per second, cold and warm.

``python -m pkm_fairseq.experiments.benchmark.mapped JSON`` measures the resident memory of one
subject and prints JSON.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Optional

import torch

from ...memory import ProductKeyMemory, ValuesFile, save_values
from . import subjects
from .child import measure_in_child
from .machine import release_free_memory
from .timing import interleave, time_once

DTYPES = ("float32", "bfloat16", "int8")
IN_MEMORY = "in memory"
LAYER, MARK = "0", "00" * 32
BATCHES = 16  # of the resident memory
STATUS = Path("/proc/self/status")


def measure(
    n_keys: int,
    folder: Path,
    tokens: int = 1024,
    rounds: int = 9,
    say: Callable[[str], None] = print,
) -> List[Dict[str, Any]]:
    """Measure a memory of width 768 whose table is in memory, or in a file of each dtype.

    Args:
        n_keys: sub-keys per half.
        folder: for the files, which are deleted at the end; together 1.75 tables in float32.
        tokens: per batch.
        rounds: of each measurement.
        say: gets a line of progress now and then.

    Returns:
        Of each subject: ``bytes`` of its table, ``anonymous`` (resident memory that only this
        process has), ``file`` (resident pages of files, which the system takes back when it needs
        them), both in bytes above a process without a table; ``warm`` and ``cold``, the seconds of
        each batch; ``ratio``, of the speed of each
        warm batch to that of the same batch with the table in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {dtype: folder / f"values{n_keys}.{dtype}.pt" for dtype in DTYPES}
    try:
        say(f"{n_keys}² slots: writing tables")
        memories = {IN_MEMORY: _memory(n_keys)}
        for dtype, file in files.items():
            values = memories[IN_MEMORY].values.weight.detach()
            save_values(file, {LAYER: values}, dtype, MARK, {})
            memories[dtype] = _memory(n_keys, file)
        say(f"{n_keys}² slots: resident memory")
        found = [_resident(n_keys, tokens, name, file) for name, file in files.items()]
        found.insert(0, _resident(n_keys, tokens, IN_MEMORY))
        say(f"{n_keys}² slots: tokens per second")
        warm = _warm(memories, tokens, rounds)
        for row in found:
            row["warm"], row["cold"] = warm[row["table"]], []
            pairs = zip(warm[IN_MEMORY], row["warm"], strict=True)
            row["ratio"] = [here / there for here, there in pairs]
        for turn in range(rounds):  # taking turns, too
            for row in [*found[1 + turn % 3 :], *found[1 : 1 + turn % 3]]:
                row["cold"].append(_cold(memories[row["table"]], tokens))
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    return found


def markdown(rows: List[Dict[str, Any]]) -> str:
    """The table of ``docs/performance.md``: medians."""
    head = ["slots", "table", "file, MB", "own memory, MB", "pages of the file, MB"]
    head += ["tokens/s, warm", "against memory", "first batch from cold, s"]
    lines = [head, ["--:", "---", *["--:"] * 6]]
    for row in rows:
        cold = f"{median(row['cold']):.2f}" if row["cold"] else ""
        lines.append(
            [
                f"{row['n_keys']:,}²",
                row["table"],
                "" if row["table"] == IN_MEMORY else f"{row['bytes'] / 1e6:,.0f}",
                f"{row['anonymous'] / 1e6:,.0f}",
                f"{row['file'] / 1e6:,.0f}",
                f"{row['tokens'] / median(row['warm']):,.0f}",
                f"{median(row['ratio']):.2f}",
                cold,
            ]
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _memory(n_keys: int, file: Optional[Path] = None) -> ProductKeyMemory:
    """A fresh memory in eval mode, with its table in memory or in a file."""
    torch.manual_seed(1)
    values = None if file is None else ValuesFile(file).table(LAYER)
    return ProductKeyMemory(subjects.WIDTH, subjects.memory_config(n_keys), values).eval()


@torch.no_grad()
def _warm(
    memories: Dict[str, ProductKeyMemory], tokens: int, rounds: int
) -> Dict[str, List[float]]:
    """Seconds of reads whose pages are in memory, taking turns."""
    x = torch.randn(BATCHES, tokens, subjects.WIDTH)
    for memory in memories.values():
        for batch in x:
            memory(batch)
    return interleave(
        {
            name: lambda i, memory=memory: lambda: memory(x[i % BATCHES])  # type: ignore[misc]
            for name, memory in memories.items()
        },
        rounds,
    )


@torch.no_grad()
def _cold(memory: ProductKeyMemory, tokens: int) -> float:
    """Seconds of the first batch, with no page of the file in memory."""
    source = memory.values.source
    source.forget_pages()
    x = torch.randn(tokens, subjects.WIDTH)
    return time_once(lambda: memory(x))


def _resident(n_keys: int, tokens: int, name: str, file: Optional[Path] = None) -> Dict[str, Any]:
    task = {"n_keys": n_keys, "tokens": tokens, "file": None if file is None else str(file)}
    found = measure_in_child(__name__, task, f"the memory of {name}")
    size = {} if file is None else {"bytes": file.stat().st_size}
    return {"n_keys": n_keys, "tokens": tokens, "table": name, **size, **found}


@torch.no_grad()
def resident(n_keys: int, tokens: int, file: Optional[str]) -> Dict[str, int]:
    """What this process, which should do nothing else, holds after some batches.

    Returns:
        Bytes above what it held before: ``anonymous`` and ``file``, see ``measure``.
    """
    x = torch.randn(BATCHES, tokens, subjects.WIDTH)
    _memory(32)(x[0])  # compiles and loads the same code
    before = _held()
    memory = _memory(n_keys, None if file is None else Path(file))
    for batch in x:
        memory(batch)
    release_free_memory()
    return {key: held - before[key] for key, held in _held().items()}


def _held() -> Dict[str, int]:
    found = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    parts = {"anonymous": "RssAnon", "file": "RssFile"}
    return {name: 1024 * int(found[key].split()[0]) for name, key in parts.items()}


if __name__ == "__main__":
    print(json.dumps(resident(**json.loads(sys.argv[1]))))
