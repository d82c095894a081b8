"""Report the rows of values that a finetuning changed: how far, and which tokens read them."""

import re
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..memory.delta import TableRows, moved_by, rows_that_differ
from ..memory.finetune import tables_by_layers
from ..memory.observe.readers import SlotReaders
from ..memory.observe.slot_counts import CountsFile, SlotCounts, needed
from .checkpoints import Opened
from .examine import Advance, count_usage, watch_readers
from .readers import describe_readers

LAYER = re.compile(r"\.layers\.(\d+)\.memory\.values\.")
NEEDED = 0.9  # share of the background's reads that its most read slots receive


def check_rows(opened: Opened, rows: Mapping[str, TableRows]) -> None:
    """Check that a checkpoint holds the changed rows; it may hold rows of other deltas, too.

    Args:
        opened: the finetuned checkpoint.
        rows: the changed rows, by the name of the table.

    Raises:
        ValueError: a table is missing or has another shape, or a row has other bits.
    """
    state = opened.model.state_dict()
    for name, table in rows.items():
        try:
            wrong = rows_that_differ(state, name, table)
        except ValueError as error:
            raise ValueError(f"--checkpoint {opened.file}: {error}") from None
        if len(wrong):
            raise ValueError(
                f"--checkpoint {opened.file}: row {int(wrong[0])} of {name} is not the delta's: "
                "the checkpoint must hold the delta's rows"
            )


def what_moved(
    opened: Opened,
    rows: Mapping[str, TableRows],
    sequences: Sequence[Tensor],
    background: Optional[CountsFile],
    hottest: int,
    advance: Advance,
) -> List[Dict[str, Any]]:
    """Describe the rows that a finetuning changed; the model reads a text twice.

    Args:
        opened: the finetuned checkpoint.
        rows: the changed rows, by the name of the table.
        sequences: token ids of a text, each (T,); the finetuning's text shows why rows changed.
        background: slot counts of old text; None if there are none.
        hottest: for each layer, the number of slots whose readers to show, largest change first.
        advance: called with the number of tokens of each batch.

    Returns:
        For each layer with changed rows ``layer``, ``n_slots``, ``rows_moved``; ``change_norm`` and
        ``change_max``, the L2 norm of all changes and of the largest one; ``overlap``, see
        ``overlap``, None without a background; ``slots``, as
        ``pkm_fairseq.analysis.readers.describe_readers`` returns, and ``change`` of each.

    Raises:
        ValueError: the background counts other memories.
    """
    distances = distances_by_layer(rows)
    shared = groups(opened)
    counts = {
        layer: None if background is None else _counts(opened, background, shared[layer])
        for layer in distances
    }
    usage = count_usage(opened.model, sequences, opened.dictionary.pad(), advance)
    watchers = {
        layer: SlotReaders(_farthest(moved, hottest), usage[layer].n_slots, len(opened.dictionary))
        for layer, moved in distances.items()
    }
    watch_readers(opened.model, sequences, opened.dictionary.pad(), watchers, advance)
    found = []
    for layer, moved in distances.items():
        mass, watcher, old = usage[layer].read_mass.sum(0), watchers[layer], counts[layer]
        slots = describe_readers(watcher, mass, sequences, opened.dictionary)
        norm = torch.tensor(list(moved.values()), dtype=torch.float64).norm()
        found.append(
            {
                "layer": layer,
                "n_slots": usage[layer].n_slots,
                "rows_moved": len(moved),
                "change_norm": float(norm),
                "change_max": max(moved.values()),
                "overlap": None if old is None else overlap(old, list(moved)),
                "slots": [{**slot, "change": moved[slot["slot"]]} for slot in slots],
            }
        )
    return found


def overlap(background: SlotCounts, moved: Sequence[int]) -> Dict[str, Any]:
    """How many of the changed slots old text needs.

    Args:
        background: slot counts of old text.
        moved: the changed slots.

    Returns:
        ``needed``: the fewest slots that receive 90 % of the old text's reads;
        ``moved_and_needed``: how many of these changed; ``expected``: the expected number for
        randomly drawn slots; ``old_reads``: share of the old text's reads that read changed slots.
    """
    most_read = needed(background, NEEDED)
    n_needed = 0 if most_read is None else len(most_read)
    both = 0 if most_read is None else int(torch.isin(most_read, torch.tensor(moved)).sum())
    reads = background.reads
    return {
        "needed": n_needed,
        "moved_and_needed": both,
        "expected": n_needed * len(moved) / background.n_slots,
        "old_reads": float(reads[list(moved)].sum() / reads.sum().clamp(min=1)),
    }


def distances_by_layer(rows: Mapping[str, TableRows]) -> Dict[int, Dict[int, float]]:
    """By layer and slot, the L2 norm of the change of its rows in all tables."""
    squares: Dict[int, Dict[int, float]] = {}
    for name, table in rows.items():
        match = LAYER.search(name)
        if match is None:
            raise ValueError(f"{name} belongs to no memory of a fairseq model")
        of_layer = squares.setdefault(int(match[1]), {})
        for slot, distance in zip(table.slots.tolist(), moved_by(table), strict=True):
            of_layer[slot] = of_layer.get(slot, 0.0) + distance**2
    return {
        layer: {slot: square**0.5 for slot, square in sorted(of_layer.items())}
        for layer, of_layer in sorted(squares.items())
    }


def distances_by_table(rows: Mapping[str, TableRows]) -> Dict[Tuple[int, ...], Dict[int, float]]:
    """As ``distances_by_layer``, with layers that share a table together: these changed equally."""
    tables: Dict[Tuple[int, ...], Dict[int, float]] = {}
    for layer, moved in distances_by_layer(rows).items():
        others = next((layers for layers in tables if tables[layers] == moved), ())
        tables.pop(others, None)
        tables[(*others, layer)] = moved
    return tables


def groups(opened: Opened) -> Dict[int, Tuple[int, ...]]:
    """For each layer, all layers that read its table."""
    memories = {index: layer.memory for index, layer in opened.model.memory_layers().items()}
    return {layer: layers for layers in tables_by_layers(memories) for layer in layers}


def _counts(opened: Opened, background: CountsFile, layers: Tuple[int, ...]) -> SlotCounts:
    n_slots = opened.model.memory_layers()[layers[0]].memory.config.n_slots
    return background.of(layers, n_slots, "--background")


def _farthest(moved: Mapping[int, float], hottest: int) -> Tensor:
    ranked = sorted(moved, key=lambda slot: (-moved[slot], slot))
    return torch.tensor(ranked[:hottest], dtype=torch.int64)
