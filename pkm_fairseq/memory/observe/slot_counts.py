"""How often a text reads each slot, and in how many of its batches: counts kept in a file."""

import contextlib
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..files import whole_file
from ..lookup import Observation

KIND, VERSION = "pkm_fairseq slot counts", 1
MOST = 2**31 - 1  # what int32 holds

Layers = Tuple[int, ...]  # the layers that read one table


class SlotCounts:
    """Counts the reads of each slot of a table, and the batches in which it was read.

    Among the observers of all memories that read the table, it counts what they look up, padding
    left out. Whoever reads the text says with ``end_batch`` where a batch ends.

    Args:
        n_slots: rows of the table.

    Attributes:
        reads: (n_slots,), int64: reads at any rank by any head.
        batches: (n_slots,), int64: finished batches in which the slot was read.
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
        """Count a look-up of the batch at hand."""
        slots = seen.slots
        self.update(slots if seen.padding_mask is None else slots[~seen.padding_mask.bool()])

    def update(self, slots: Tensor) -> None:
        """Count slots, (...), int64, that the batch at hand reads."""
        self.reads += count_slots(slots.flatten(), self.n_slots).cpu()

    def end_batch(self) -> None:
        """Say that the next look-up is of another batch."""
        self.batches += self.reads > self._before
        self.n_batches += 1
        self._before = self.reads.clone()


class CountsFile(NamedTuple):
    """What a file of counts holds.

    Attributes:
        tables: counts by the layers that read the table.
        about: of which checkpoint and text they are, plain data.
    """

    tables: Dict[Layers, SlotCounts]
    about: Dict[str, Any]

    def of(self, layers: Layers, n_slots: int, name: str) -> SlotCounts:
        """The counts of a table.

        Args:
            layers: those that read it.
            n_slots: its rows.
            name: what messages call the file.

        Raises:
            ValueError: the file counts other memories.
        """
        counts = self.tables.get(layers)
        if counts is None or counts.n_slots != n_slots:
            theirs = "; ".join(_described(*table) for table in self.tables.items())
            ours = _described(layers, n_slots)
            raise ValueError(f"{name} counts {theirs}: must count {ours}, as the model has it")
        return counts


def count_slots(slots: Tensor, n_slots: int) -> Tensor:
    """How often each slot occurs, (n_slots,), among slots (E,)."""
    return torch.bincount(slots, minlength=n_slots)


def save_counts(file: Path, counts: CountsFile) -> None:
    """Write counts; the file is whole or absent."""
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
    """Read counts; no code from the file is run.

    Args:
        file: as ``save_counts`` wrote it.
        name: what messages call it.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{name}: no such file")
    content: Any = None
    with contextlib.suppress(Exception):  # what is no file of torch's can raise nearly anything
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{name}: no counts of slots, as memory_usage.py --save-counts writes")
    if content["version"] != VERSION:
        raise ValueError(f"{name}: its version is {content['version']}, must be {VERSION}")
    tables = {tuple(table["layers"]): _table(table) for table in content["tables"]}
    return CountsFile(tables, content["about"])


def _table(saved: Mapping[str, Any]) -> SlotCounts:
    counts = SlotCounts(len(saved["reads"]))
    counts.reads, counts.batches = saved["reads"].long(), saved["batches"].long()
    counts.n_batches = int(saved["n_batches"])
    return counts


def _narrow(counts: Tensor) -> Tensor:
    return counts.to(torch.int32) if int(counts.max()) <= MOST else counts


def _described(layers: Layers, slots: Any) -> str:
    n_slots = slots.n_slots if isinstance(slots, SlotCounts) else slots
    return f"{n_slots:,} slots of layer {', '.join(map(str, layers))}"


def needed(counts: SlotCounts, share: float = 0.9) -> Optional[Tensor]:
    """The fewest slots that take a share of the reads, most read first; None of no reads."""
    if not int(counts.reads.sum()):
        return None
    reads, slots = counts.reads.sort(descending=True, stable=True)
    reached = reads.cumsum(0).double() >= share * float(reads.sum())
    return slots[: int(reached.double().argmax()) + 1]
