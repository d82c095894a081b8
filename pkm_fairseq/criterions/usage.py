"""Report memory usage and staleness during training, in fairseq's logs and in a file."""

import atexit
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from omegaconf import II

from ..errors import TrainingError
from ..memory.hosts import HasMemories, merge_read_times, observing, with_memories
from ..memory.observe.count import Count
from ..memory.observe.log import UsageLog, load_initial_values, open_log
from ..memory.observe.usage import DRAWS
from ..memory.option import OUR_CHOICE, at_least, check_options, option

logger = logging.getLogger(__name__)

TRAINING = "train"

Loss = Tuple[torch.Tensor, Any, Dict[str, Any]]  # loss, sample size, logging output
PREFIX = "memory"  # prefix of the keys of a count's report
REPORTS = "memory_reports"  # fairseq may sum logging outputs over workers; this counts the summands


@dataclass
class UsageConfig(FairseqDataclass):
    """Options of the criteria that report memory usage."""

    memory_usage_interval: int = option(
        1000,
        "start a count of memory usage in training every this many updates; 0: never",
        OUR_CHOICE,
        test=at_least(0),
    )
    memory_usage_draws: int = option(
        DRAWS,
        "length of one count of memory usage, in draws per slot (tokens x heads / slots); a count "
        "in training ends at the latest when the next one starts",
        OUR_CHOICE,
        test=at_least(1),
    )
    memory_usage_tokens: int = option(
        0,
        "length of one count of memory usage in tokens, instead of --memory-usage-draws; 0: not "
        "given",
        OUR_CHOICE,
        test=at_least(0),
    )
    save_dir: str = II("checkpoint.save_dir")  # no help text, no flag
    no_save: bool = II("checkpoint.no_save")


class UsageReports(FairseqCriterion):
    """Mixin for a criterion: counts memory usage in validation, and at intervals in training.

    A count covers a fixed number of draws per slot, or of tokens. A validation subset, or the
    updates between two counts in training, may hold fewer; each count reports its number. The
    logging outputs hold the current count as ``memory<layer>_<key>``, plain numbers over all
    workers. A finished count becomes a line of ``memory_usage.jsonl`` beside the checkpoints.
    fairseq-validate writes no such line.

    With this plugin's tasks each validation subset is counted separately. Batches of stock tasks
    do not name their subset, so all subsets of one validation are counted together. With several
    workers and stock tasks, the criterion does not recognise dummy batches of idle workers in
    training, or in validation after the first subset. Workers then exchange times of reads when a
    count is finished, not after each update.
    """

    def __init__(self, cfg: Any, task: Any) -> None:  # fairseq reads these two names
        super().__init__(cfg, task)
        # configurations in older checkpoints lack these options
        self._interval = getattr(cfg, "memory_usage_interval", 0)
        self._tokens = getattr(cfg, "memory_usage_tokens", 0)
        self._draws = getattr(cfg, "memory_usage_draws", DRAWS)
        check_options(UsageConfig, cfg)
        self._folder = None if getattr(cfg, "no_save", True) else Path(cfg.save_dir)
        self._log: Optional[UsageLog] = None
        self._is_training = False  # whether this process trains
        self._is_alone = False  # whether to skip exchanges with other workers
        self._validation: Dict[str, Count] = {}  # by subset
        self._said: Dict[str, Dict[str, float]] = {}  # reports of these counts, for fairseq's log
        self._first_ids: Dict[str, List[int]] = {}  # by subset
        self._window: Optional[Count] = None  # of training batches
        self._next_window = 0  # updates
        self._report: Dict[str, float] = {}  # of the last window
        self._shown: Dict[str, float] = {}  # the report in the outputs of this update
        self._shown_at: Optional[int] = None  # updates

    def train(self, mode: bool = True) -> Any:
        """When training continues, finish the counts of the last validation and drop them."""
        if mode:
            self.finish_validation()
            self._first_ids.clear()
        return super().train(mode)

    def forward(self, model: Any, sample: Dict[str, Any], reduce: bool = True) -> Loss:
        """Compute the parent's loss, and count memory usage."""
        host = with_memories(model)
        if host is None:
            return super().forward(model, sample, reduce)
        if not model.training:
            return self._validation_step(model, host, sample, reduce)
        if host.run.updates is None:  # not trained by fairseq
            return super().forward(model, sample, reduce)
        return self._training_step(model, host, sample, reduce)

    # --- training -----------------------------------------------------------------------------

    def _training_step(
        self, model: Any, host: HasMemories, sample: Dict[str, Any], reduce: bool
    ) -> Loss:
        updates = host.run.updates
        assert updates is not None
        if not self._is_training:
            self._begin_training(host, updates)
        if self._interval and updates >= self._next_window:
            if self._window is not None:  # it has fewer draws than wanted, and reports their number
                self._close_window(host, updates, sample["target"].device)
            self._window = Count(host, TRAINING, self._tokens, self._draws)
            self._next_window = (updates // self._interval + 1) * self._interval
        if self._window is None:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        else:
            with observing(host, self._window.usage):
                loss, sample_size, logging_output = super().forward(model, sample, reduce)
            self._window.check(loss.device)
            if self._window.is_full:
                self._close_window(host, updates + 1, loss.device)
        if updates != self._shown_at:  # one report in all batches of an update: fairseq adds them
            self._shown_at, self._shown = updates, self._report
        logging_output.update(self._shown)  # in every output, or fairseq would log None
        return loss, sample_size, logging_output

    def _begin_training(self, model: HasMemories, updates: int) -> None:
        self._is_training = True
        problem = None
        if self._folder is not None:
            self._log, problem = open_log(model, self._folder, updates, _is_first_worker())
        if distributed_utils.get_data_parallel_world_size() > 1:
            group = distributed_utils.get_data_parallel_group()
            problem = distributed_utils.broadcast_object(problem, 0, group)
        if problem:
            raise TrainingError(f"memory usage: {problem}")
        atexit.register(self._finish_at_exit)  # no training follows the last validation

    def _close_window(self, model: HasMemories, updates: int, device: torch.device) -> None:
        """Report the count of training batches up to and including this update."""
        assert self._window is not None
        merge_read_times(model)
        self._window.updates = updates
        self._window.add_up(device)
        if self._window.total:
            self._write(self._window)
            self._report = _to_log(self._window)
        self._window = None

    # --- validation ---------------------------------------------------------------------------

    def _validation_step(
        self, model: Any, host: HasMemories, sample: Dict[str, Any], reduce: bool
    ) -> Loss:
        subset = sample.get("split", "")
        if subset not in self._validation:
            merge_read_times(host)
            self._validation[subset] = Count(host, subset, self._tokens, self._draws)
            if not self._is_training:  # the model is told of the last update, too
                self._validation[subset].updates = host.run.updates
        count = self._validation[subset]
        if count.is_full:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        else:
            is_dummy = self._is_dummy(subset, sample)
            with host.run.dummy_batch(is_dummy), observing(host, count.usage):
                loss, sample_size, logging_output = super().forward(model, sample, reduce)
            count.check(loss.device)
            count.add_up(loss.device)
            self._said[subset] = _to_log(count)
            if count.is_full:
                self._write(count)
        logging_output.update(self._said[subset])
        return loss, sample_size, logging_output

    def finish_validation(self, tells: bool = True) -> None:
        """Write the counts of subsets that had too few tokens.

        Args:
            tells: whether to warn about each.
        """
        for subset, count in self._validation.items():
            if count.total and not count.is_full:
                self._write(count)
                if not tells:
                    continue
                said = next(iter(count.total.values()))
                wanted = count.budget * said.heads / said.n_slots
                logger.warning(
                    f"memory usage: {subset or 'the validation set'} has {said.tokens} tokens, "
                    f"fewer than the {count.budget} to count: {said.draws_per_slot:.3g} draws per "
                    f"slot instead of {wanted:.3g}; compare its usage at equal draws only"
                )
        self._validation.clear()
        self._said.clear()

    def _finish_at_exit(self) -> None:
        self._is_alone = True  # after an error, other workers may not answer
        self.finish_validation(tells=False)  # the error must be the last line

    def _is_dummy(self, subset: str, sample: Dict[str, Any]) -> bool:
        """Whether this is a dummy batch, which fairseq gives to a worker without batches.

        fairseq uses the subset's first batch as dummy batch. Worker 0 reads that batch first.
        """
        if distributed_utils.get_data_parallel_world_size() == 1:
            return False
        ids, group = sample["id"].tolist(), distributed_utils.get_data_parallel_group()
        at_start = subset not in self._first_ids
        if at_start:
            self._first_ids[subset] = distributed_utils.broadcast_object(ids, 0, group)
        is_first_read = at_start and distributed_utils.get_data_parallel_rank() == 0
        return ids == self._first_ids[subset] and not is_first_read

    # --- both ---------------------------------------------------------------------------------

    def _write(self, count: Count) -> None:
        helps = self._is_training and count.is_split  # the first worker, with its columns
        if self._folder is None or not (self._log or helps):
            return
        record = count.record(load_initial_values(self._folder), self._is_alone)
        if self._log is None:
            return
        try:
            self._log.append(record)
        except OSError as error:
            raise TrainingError(f"memory usage: {self._log.file}: {error.strerror}") from None


def _to_log(count: Count) -> Dict[str, float]:
    """A count's report in the form of logging outputs; empty if no token was counted."""
    report = count.report()
    return {**report, REPORTS: 1.0} if report else {}


def _is_first_worker() -> bool:
    if distributed_utils.get_data_parallel_world_size() == 1:
        return True
    return distributed_utils.get_data_parallel_rank() == 0


def log_usage(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log the latest usage in the logging outputs of one step, or of a whole validation."""
    reports = [log for log in logging_outputs if log.get(REPORTS, 0)]
    if not reports:
        return
    latest = reports[-1]
    for key, value in latest.items():
        if key.startswith(PREFIX) and key != REPORTS:
            mean = float(torch.as_tensor(value / latest[REPORTS]))
            metrics.log_scalar(
                key, mean, weight=0, round=4
            )  # weight 0 logs the latest value, not a mean
