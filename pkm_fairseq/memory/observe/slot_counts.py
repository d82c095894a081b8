"""Slot counts: how often a text reads each slot, and in how many batches. Stored in a file."""

import contextlib
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..files import whole_file
from ..lookup import Observation

KIND, VERSION = "pkm_fairseq slot counts", 1
MOST = 2**31 - 1  # largest int32

Layers = Tuple[int, ...]  # the layers that read one table


class SlotCounts:
    """Counts the reads of each slot of a table, and the batches that read it.

    Add it to the observers of all memories that read the table. It skips padding. Call
    ``end_batch`` after each batch.

    Args:
        n_slots: rows of the table.

    Attributes:
        reads: (n_slots,), int64: reads at any rank by any head.
        batches: (n_slots,), int64: finished batches that read the slot.
        n_batches: finished batches.
    """

    def __init__(self, n_slots: int) -> None:
        self.reads = torch.zeros(n_slots, dtype=torch.int64)
        self.batches = torch.zeros(n_slots, dtype=torch.int64)
        self.n_batches = 0
        self._before = self.reads.clone()  # the reads of finished batches

    @property
    def n_slots(self) -> int:
        """Rows of the table."""
        return len(self.reads)

    def observe(self, seen: Observation) -> None:
        """Count a look-up of the current batch."""
        slots = seen.slots
        self.update(slots if seen.padding_mask is None else slots[~seen.padding_mask.bool()])

    def update(self, slots: Tensor) -> None:
        """Count slots, (...), int64, that the current batch reads."""
        self.reads += count_slots(slots.flatten(), self.n_slots).cpu()

    def end_batch(self) -> None:
        """End the current batch."""
        self.batches += self.reads > self._before
        self.n_batches += 1
        self._before = self.reads.clone()


class CountsFile(NamedTuple):
    """The content of a file of slot counts.

    Attributes:
        tables: counts by the layers that read the table.
        about: plain data on the checkpoint and the text.
    """

    tables: Dict[Layers, SlotCounts]
    about: Dict[str, Any]

    def of(self, layers: Layers, n_slots: int, name: str) -> SlotCounts:
        """The counts of a table.

        Args:
            layers: the layers that read it.
            n_slots: its number of rows.
            name: the file's name in messages.

        Raises:
            ValueError: the file counts other memories.
        """
        counts = self.tables.get(layers)
        if counts is None or counts.n_slots != n_slots:
            theirs = "; ".join(_described(*table) for table in self.tables.items())
            ours = _described(layers, n_slots)
            raise ValueError(f"{name} counts {theirs}: must count {ours}, as in the model")
        return counts


def count_slots(slots: Tensor, n_slots: int) -> Tensor:
    """How often each slot occurs, (n_slots,), among slots (E,)."""
    return torch.bincount(slots, minlength=n_slots)


def save_counts(file: Path, counts: CountsFile) -> None:
    """Write counts; the file is complete or absent."""
    tables = [
        {
            "layers": list(layers),
            "reads": _narrow(table.reads),
            "batches": _narrow(table.batches),
            "n_batches": table.n_batches,
        }
        for layers, table in counts.tables.items()
    ]
    content = {"kind": KIND, "version": VERSION, "about": counts.about, "tables": tables}
    with whole_file(file) as out:
        torch.save(content, out)


def load_counts(file: Path, name: str) -> CountsFile:
    """Read counts, without running code from the file.

    Args:
        file: a file of ``save_counts``.
        name: the file's name in messages.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{name}: no such file")
    content: Any = None
    with contextlib.suppress(Exception):  # torch.load can raise nearly anything
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{name}: not a file of slot counts from memory_usage.py --save-counts")
    if content.get("version") != VERSION:
        raise ValueError(f"{name}: its version is {content.get('version')}, must be {VERSION}")
    tables = {tuple(table["layers"]): _table(table) for table in content["tables"]}
    return CountsFile(tables, content["about"])


def _table(saved: Mapping[str, Any]) -> SlotCounts:
    counts = SlotCounts(len(saved["reads"]))
    counts.reads, counts.batches = saved["reads"].long(), saved["batches"].long()
    counts.n_batches = int(saved["n_batches"])
    counts._before = counts.reads.clone()
    return counts


def _narrow(counts: Tensor) -> Tensor:
    return counts.to(torch.int32) if int(counts.max()) <= MOST else counts


def _described(layers: Layers, slots: Any) -> str:
    n_slots = slots.n_slots if isinstance(slots, SlotCounts) else slots
    return f"{n_slots:,} slots of layer {', '.join(map(str, layers))}"


def needed(counts: SlotCounts, share: float = 0.9) -> Optional[Tensor]:
    """The fewest slots that receive a share of the reads, most read first; None without reads."""
    if not int(counts.reads.sum()):
        return None
    reads, slots = counts.reads.sort(descending=True, stable=True)
    reached = reads.cumsum(0).double() >= share * float(reads.sum())
    return slots[: int(reached.double().argmax()) + 1]
