"""One count of look-ups over all workers, and its report."""

from typing import Any, Dict, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..hosts import HasMemories, new_usage, tables_of_layers
from .staleness import movement, staleness
from .usage import DRAWS, MemoryUsage, tokens_for_draws

REPORTED = (
    "tokens",
    "draws_per_slot",
    "top1_usage",
    "topk_usage",
    "top1_ceiling",
    "topk_ceiling",
    "kl_weighted",
    "kl_unweighted",
    "gini",
    "dead_slots",
    "top1_weight",
    "entropy",
    "effective_neighbours",
    "holds_1",
    "holds_10",
    "holds_100",
    "subkey1_usage",
    "subkey2_usage",
)
REPORTED_STALENESS = ("never", "p50", "p90")  # of reads and of first choices


class Count:
    """A count of the look-ups of a number of tokens, over all workers.

    Args:
        model: the model with the memories; its run names the workers.
        split: the data split of the tokens.
        tokens: number of tokens to count; 0 means enough for ``draws``.
        draws: first choices per slot to count.

    Attributes:
        usage: this worker's counters, by layer.
        total: the sum over all workers at the last ``add_up``; with one worker, its counters.
        updates: updates of the training, including the current one; None outside a training.
    """

    def __init__(self, model: HasMemories, split: str, tokens: int = 0, draws: int = DRAWS) -> None:
        self.split = split
        self.group = model.run.group()
        self.layers = model.memory_layers()
        sizes = {(x.memory.config.n_slots, x.memory.config.heads) for x in self.layers.values()}
        self.budget = tokens or max(tokens_for_draws(*size, draws) for size in sizes)
        self.usage: Dict[int, MemoryUsage] = new_usage(model)
        world = 1 if self.group is None else dist.get_world_size(self.group)
        for usage in self.usage.values():
            usage.max_tokens = -(-self.budget // world)
        self.total: Dict[int, MemoryUsage] = {}
        self.is_full = False
        finished = model.run.updates
        self.updates = None if finished is None else finished + 1

    @property
    def is_split(self) -> bool:
        """Whether workers hold different columns of the values."""
        return any(table.shards is not None for table in tables_of_layers(self.layers).values())

    def check(self, device: torch.device) -> None:
        """Check whether all workers have counted enough; every worker must call it."""
        lacking = not all(usage.is_full for usage in self.usage.values())
        if self.group is not None:
            anywhere = torch.tensor(int(lacking), device=device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.group)
            lacking = bool(anywhere)
        self.is_full = not lacking

    def add_up(self, device: torch.device) -> None:
        """Sum the counters of all workers; every worker must call it."""
        for usage in self.usage.values():  # a worker without a token has them on the CPU
            usage.to(device)
        totals = {i: sum_over_workers(usage, self.group) for i, usage in self.usage.items()}
        self.total = {layer: total for layer, total in totals.items() if total.tokens}

    def report(self) -> Dict[str, float]:
        """Numbers to log, as ``memory<layer>_<key>``; empty if no token was counted."""
        report: Dict[str, float] = {}
        for layer, total in sorted(self.total.items()):
            summary = total.summary(per_head=False)
            report.update({f"memory{layer}_{key}": float(summary[key]) for key in REPORTED})
            if self.updates is not None:
                stale = self.layers[layer].reads.summary(self.updates)
                for event in ("read", "top1"):
                    for key in REPORTED_STALENESS:
                        report[f"memory{layer}_{event}_{key}"] = stale[event][key]
        return report

    def record(
        self, initial: Optional[Dict[str, Tensor]], is_alone: bool = False
    ) -> Dict[str, Any]:
        """The line of ``memory_usage.jsonl``; every worker must call it if tables are split.

        Args:
            initial: values at the start of the training, by layer; None if unknown.
            is_alone: whether to skip the exchange with workers that hold other columns.
        """
        moved = {layer: self._moved(layer, initial, is_alone) for layer in self.total}
        layers = [
            {"layer": i, **total.summary(), "staleness": self._staleness([i], moved[i])}
            for i, total in sorted(self.total.items())
        ]
        is_shared = any(layer.memory.config.share_values for layer in self.layers.values())
        shared = self._shared(moved) if is_shared else None
        head = {"update": self.updates, "split": self.split, "budget": self.budget}
        return {**head, "layers": layers, "shared": shared}

    def _shared(self, moved: Dict[int, Any]) -> Dict[str, Any]:
        """Usage of the table that all layers share; a token counts once per layer."""
        totals = list(self.total.values())
        whole = MemoryUsage(totals[0].n_slots, totals[0].heads)
        for total in totals:
            whole.merge(total)
        layers = list(self.total)
        return {**whole.summary(), "staleness": self._staleness(layers, moved[layers[0]])}

    def _staleness(self, layers: Sequence[int], moved: Any) -> Optional[Dict[str, Any]]:
        """Updates since any of these layers last read each slot."""
        if self.updates is None:
            return None
        reads = [self.layers[layer].reads for layer in layers]
        return {**staleness(reads, self.updates), "moved": moved}

    def _moved(self, layer: int, initial: Any, is_alone: bool) -> Optional[Dict[str, float]]:
        tables = tables_of_layers({layer: self.layers[layer]})
        is_known = initial is not None and all(name in initial for name in tables)
        shards = next(iter(tables.values())).shards  # of all alike
        if shards is not None and is_alone:
            return None
        if shards is not None:  # all workers must take part in the sum
            is_known = shards.all_have(is_known, next(iter(tables.values())).weight.device)
        if not is_known:
            return None
        return movement([(t.weight, initial[name]) for name, t in tables.items()], shards)


def sum_over_workers(local: MemoryUsage, group: Any) -> MemoryUsage:
    """The sum of all workers' usage; ``local`` does not change.

    Args:
        local: this worker's usage.
        group: the process group of the workers; None (one worker) returns ``local``.
    """
    if group is None:
        return local
    total = MemoryUsage(local.n_slots, local.heads).merge(local)
    tokens = total.read_count.new_tensor([total.tokens])
    knn = total.read_count.new_tensor([total.knn or 0])
    for counts in (tokens, *total.counters()):
        dist.all_reduce(counts, group=group)
    dist.all_reduce(knn, op=dist.ReduceOp.MAX, group=group)
    total.tokens, total.knn = int(tokens), int(knn) or None
    return total
