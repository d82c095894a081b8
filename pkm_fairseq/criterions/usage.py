"""Memory usage over a validation set, through fairseq's logging."""

from typing import Any, Dict, List, Tuple

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics

from ..memory import MemoryUsage

PREFIX = "memory"
LOGGED = (
    "tokens",
    "top1_usage",
    "topk_usage",
    "top1_ceiling",
    "topk_ceiling",
    "kl_weighted",
    "kl_unweighted",
    "gini",
    "dead_slots",
)


class ValidationUsage:
    """Mixin for a criterion: adds ``memory<layer>_<key>`` to the metrics of validation.

    The counters stay with the criterion; a batch's logging output carries what they say so far
    over all workers, as plain numbers. Training steps count nothing. With the tasks of this
    plugin each subset is counted on its own; with stock tasks, whose batches do not name their
    subset, all subsets of one validation are counted together, and with several workers and
    subsets the batches that keep idle workers busy are not recognised after the first subset.
    """

    def __init__(self, cfg: Any, task: Any) -> None:  # fairseq reads these two names
        super().__init__(cfg, task)
        self._usage: Dict[str, Dict[int, MemoryUsage]] = {}  # by subset, by layer
        self._first_ids: Dict[str, List[int]] = {}  # by subset

    def train(self, mode: bool = True) -> Any:
        """Forget the last validation when training goes on."""
        if mode:
            self._usage.clear()
            self._first_ids.clear()
        return super().train(mode)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple:
        """Compute the parent's loss; in validation also count memory usage."""
        if model.training or not hasattr(model, "record_memory_usage"):
            return super().forward(model, sample, reduce)
        subset = sample.get("split", "")
        if subset not in self._usage:
            self._usage[subset] = model.new_memory_usage()
        usage = self._usage[subset]
        counted = model.new_memory_usage() if self._is_filler(subset, sample) else usage
        with model.record_memory_usage(counted):
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        for counts in usage.values():  # a worker that has counted nothing yet has them on the CPU
            counts.to(loss.device)
        logging_output.update(usage_so_far(usage))
        return loss, sample_size, logging_output

    def _is_filler(self, subset: str, sample: Dict[str, Any]) -> bool:
        """Whether this batch only keeps a worker busy that has run out of batches.

        For that fairseq takes the first batch of the subset, which worker 0 reads first of all.
        """
        if distributed_utils.get_data_parallel_world_size() == 1:
            return False
        ids, group = sample["id"].tolist(), distributed_utils.get_data_parallel_group()
        at_start = subset not in self._first_ids
        if at_start:
            self._first_ids[subset] = distributed_utils.broadcast_object(ids, 0, group)
        is_first_read = at_start and distributed_utils.get_data_parallel_rank() == 0
        return ids == self._first_ids[subset] and not is_first_read


def usage_so_far(usage: Dict[int, MemoryUsage]) -> Dict[str, float]:
    """Sum the counters over all workers, and name what they say; every worker must call it."""
    report: Dict[str, float] = {}
    for layer, local in sorted(usage.items()):
        total = sum_over_workers(local)
        if total.tokens:
            summary = total.summary()
            report.update({f"{PREFIX}{layer}_{key}": float(summary[key]) for key in LOGGED})
    # fairseq may sum logging outputs over workers: this says by how much
    return {**report, f"{PREFIX}_reports": 1.0} if report else {}


def sum_over_workers(local: MemoryUsage) -> MemoryUsage:
    """The usage of all data-parallel workers together; ``local`` is left as it is."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return local
    group = distributed_utils.get_data_parallel_group()
    total = MemoryUsage(local.n_slots, local.heads).merge(local)
    sizes = total.read_count.new_tensor([total.tokens])
    knn = total.read_count.new_tensor([total.knn or 0])
    for counts in (sizes, total.top1_count, total.read_count, total.read_mass):
        distributed_utils.all_reduce(counts, group=group, op="sum")
    distributed_utils.all_reduce(knn, group=group, op="max")
    total.tokens, total.knn = int(sizes), int(knn) or None
    return total


def log_usage(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the latest usage among logging outputs of one step, or of a whole validation."""
    reports = [log for log in logging_outputs if log.get(f"{PREFIX}_reports", 0)]
    if not reports:
        return
    latest = reports[-1]
    for key, value in latest.items():
        if key.startswith(PREFIX) and key != f"{PREFIX}_reports":
            mean = float(torch.as_tensor(value / latest[f"{PREFIX}_reports"]))
            metrics.log_scalar(key, mean, weight=0, round=4)  # weight 0: the latest value, no mean
