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
    subset, all subsets of one validation are counted together, and so are the batches by which
    fairseq fills up workers that have run out.
    """

    def __init__(self, cfg: Any, task: Any) -> None:  # fairseq reads these two names
        super().__init__(cfg, task)
        self._usage: Dict[str, Dict[int, MemoryUsage]] = {}  # by subset, by layer
        self._subset = ""

    def train(self, mode: bool = True) -> Any:
        """Forget the last validation when training goes on."""
        if mode:
            self._usage.clear()
            self._subset = ""
        return super().train(mode)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Tuple:
        """Compute the parent's loss; in validation also count memory usage."""
        if model.training or not hasattr(model, "record_memory_usage"):
            return super().forward(model, sample, reduce)
        counted = self._counters(model, sample)
        with model.record_memory_usage(counted):
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        logging_output.update(usage_so_far(self._usage[self._subset]))
        return loss, sample_size, logging_output

    def _counters(self, model: Any, sample: Dict[str, Any]) -> Dict[int, MemoryUsage]:
        subset = sample.get("split", "")
        many = distributed_utils.get_data_parallel_world_size() > 1
        is_filler = many and subset == "train"
        if not is_filler:
            self._subset = subset
        if self._subset not in self._usage:
            self._usage[self._subset] = model.new_memory_usage()
        return model.new_memory_usage() if is_filler else self._usage[self._subset]


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
