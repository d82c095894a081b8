"""Run a model on a text, and report the usage of its memories."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..memory import MemoryUsage
from ..memory.finetune import tables_by_layers
from ..memory.hosts import observing
from ..memory.observe.readers import SlotReaders
from ..memory.observe.slot_counts import CountsFile, SlotCounts
from ..memory.observe.staleness import staleness
from ..memory.observe.usage import tokens_for_draws
from ..models.capture import batches
from ..models.roberta import PkmRobertaModel
from .checkpoints import Opened, count_tokens
from .readers import describe_readers

Advance = Callable[[int], None]


class Examined(NamedTuple):
    """The usage of a checkpoint's memories.

    Attributes:
        report: ready for JSON.
        mass: by layer, the softmax weight of each slot, (n_slots,).
    """

    report: Dict[str, Any]
    mass: Dict[int, Tensor]


def tokens_for(opened: Opened, draws: int) -> int:
    """Tokens that give this many draws per slot in every memory."""
    configs = [layer.memory.config for layer in opened.model.memory_layers().values()]
    return max(tokens_for_draws(config.n_slots, config.heads, draws) for config in configs)


def examine(
    opened: Opened, sequences: Sequence[Tensor], hottest: int, advance: Advance
) -> Examined:
    """Read the text twice: count the usage, then record which tokens read the hottest slots.

    Args:
        opened: the checkpoint.
        sequences: token ids, each (T,).
        hottest: slots per layer to watch.
        advance: called with the number of tokens of each batch.

    Returns:
        The report: ``name``, ``checkpoint``, ``updates``, ``tokens``; ``origins``, by layer, the
        training that created its memory, or None if unknown; ``layers``, for each
        ``MemoryUsage.summary`` and ``layer``, ``knn``, ``staleness`` (None if unknown) and
        ``hot_slots``; ``shared``, summary and ``staleness`` of a table that all layers share, or
        None.
    """
    model, pad = opened.model, opened.dictionary.pad()
    usage = count_usage(model, sequences, pad, advance)
    mass = {layer: counts.read_mass.sum(0) for layer, counts in usage.items()}
    watchers = {
        layer: SlotReaders(
            heat.topk(min(hottest, len(heat))).indices, len(heat), len(opened.dictionary)
        )
        for layer, heat in mass.items()
    }
    watch_readers(model, sequences, pad, watchers, advance)
    layers = [
        {
            "layer": layer,
            "knn": counts.knn,
            **counts.summary(),
            "staleness": staleness_in(opened, [layer]),
            "hot_slots": describe_readers(
                watchers[layer], mass[layer], sequences, opened.dictionary
            ),
        }
        for layer, counts in sorted(usage.items())
    ]
    report = {
        "name": opened.name,
        "checkpoint": str(opened.file),
        "updates": opened.updates,
        "origins": _origins(opened),
        "tokens": count_tokens(sequences),
        "layers": layers,
        "shared": _shared(opened, usage),
    }
    return Examined(report, mass)


@torch.no_grad()
def count_usage(
    model: PkmRobertaModel, sequences: Sequence[Tensor], pad: int, advance: Advance
) -> Dict[int, MemoryUsage]:
    """Count the memory usage, by layer, while the model reads all sequences."""
    with model.record_memory_usage() as usage:
        for batch in batches(sequences, pad):
            model(batch, features_only=True)
            advance(int(batch.ne(pad).sum()))
    return usage


@torch.no_grad()
def count_slots(
    opened: Opened, sequences: Sequence[Tensor], per_batch: int, advance: Advance
) -> CountsFile:
    """Count how often the text reads each slot, and in how many batches.

    Args:
        opened: the checkpoint.
        sequences: token ids, each (T,).
        per_batch: sequences per batch.
        advance: called with the number of tokens of each batch.
    """
    model, pad = opened.model, opened.dictionary.pad()
    memories = {index: layer.memory for index, layer in model.memory_layers().items()}
    counts = {
        layers: SlotCounts(tables[0].n_slots)
        for layers, tables in tables_by_layers(memories).items()
    }
    with observing(model, {i: table for layers, table in counts.items() for i in layers}):
        for batch in batches(sequences, pad, per_batch):
            model(batch, features_only=True)
            for table in counts.values():
                table.end_batch()
            advance(int(batch.ne(pad).sum()))
    return CountsFile(counts, {"sequences_per_batch": per_batch, "tokens": count_tokens(sequences)})


@torch.no_grad()
def watch_readers(
    model: PkmRobertaModel,
    sequences: Sequence[Tensor],
    pad: int,
    watchers: Dict[int, SlotReaders],
    advance: Advance,
) -> None:
    """Read all sequences and count, by layer, which tokens read the watched slots."""
    with observing(model, watchers):
        for batch in batches(sequences, pad):
            for watcher in watchers.values():
                watcher.begin(batch)
            model(batch, features_only=True)
            advance(int(batch.ne(pad).sum()))


def staleness_in(opened: Opened, layers: Sequence[int]) -> Optional[Dict[str, Any]]:
    """The staleness of the slots of these layers, which share values.

    None if the checkpoint has no times of reads. Averages of checkpoints, or of a model
    (--store-ema), have none.
    """
    reads = [opened.model.memory_layers()[layer].reads for layer in layers]
    if not opened.has_read_times or not opened.updates:
        return None
    if not any(x.last_read.any() for x in reads) or any(x.is_averaged for x in reads):
        return None
    return staleness(reads, opened.updates)


def _origins(opened: Opened) -> Optional[Dict[str, List[int]]]:
    """The origins of the memories, ready for JSON."""
    if opened.origins is None:
        return None
    return {str(layer): list(origin) for layer, origin in opened.origins.items()}


def _shared(opened: Opened, usage: Dict[int, MemoryUsage]) -> Optional[Dict[str, Any]]:
    """The usage of the table that all layers share; None if each layer has its own."""
    first, *others = usage.values()
    configs = [layer.memory.config for layer in opened.model.memory_layers().values()]
    if not others or not all(config.share_values for config in configs):
        return None
    whole = MemoryUsage(first.n_slots, first.heads)
    for counts in (first, *others):
        whole.merge(counts)
    return {**whole.summary(), "staleness": staleness_in(opened, list(usage))}
