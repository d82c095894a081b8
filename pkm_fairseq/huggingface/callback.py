"""Report memory usage and staleness while transformers' Trainer trains."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..memory.hosts import HasMemories, merge_read_times, set_finished_updates
from ..memory.lookup import Observation
from ..memory.observe.count import Count
from ..memory.observe.log import UsageLog, load_initial_values, open_log
from ..memory.observe.usage import DRAWS, MemoryUsage
from .limits import check_training

TRAINING = "train"
RUNTIME = "_runtime"  # end of a key in every evaluation's log, and in the last one of a training
END_OF_TRAINING = "total_flos"  # only in the latter


class MemoryUsageCallback(TrainerCallback):
    """Counts memory usage at intervals in training and in each evaluation, and logs it.

    It adds the last count to the Trainer's log as ``memory<layer>_<key>``, and as
    ``eval_memory<layer>_<key>`` for an evaluation. A finished count becomes a line of
    ``memory_usage.jsonl`` in the output folder, beside ``memory_initial_values.pt``. Keys and lines
    are the same as those of the fairseq criteria. It also sets the number of updates of the
    memories, which they need to record times of reads. Pass it as
    ``callbacks=[MemoryUsageCallback()]``. Reporters such as TensorBoard see its numbers only if it
    comes before them; ``add_to`` puts it there.

    Args:
        interval: start a count in training every this many updates; 0: never.
        draws: draws per slot (tokens x heads / slots) in one count.
        tokens: tokens in one count, instead of draws; 0: not given.

    Raises:
        ValueError: a number is negative, or ``draws`` is 0.
    """

    def __init__(self, interval: int = 1000, draws: int = DRAWS, tokens: int = 0) -> None:
        given = (("interval", interval, 0), ("draws", draws, 1), ("tokens", tokens, 0))
        for name, value, least in given:
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        self.interval, self.draws, self.tokens = interval, draws, tokens
        self._host: Optional[HasMemories] = None
        self._switches: Dict[int, _Switch] = {}  # by layer
        self._folder: Optional[Path] = None  # of a training
        self._log: Optional[UsageLog] = None  # the first worker's
        self._window: Optional[Count] = None  # of training batches
        self._next_window = 0  # updates
        self._evaluation: Optional[Count] = None
        self._report: Dict[str, float] = {}  # of the last window
        self._updates: Optional[int] = None  # of the model; None if it was not trained here

    def add_to(self, trainer: Any) -> "MemoryUsageCallback":
        """Put this callback before all others of a Trainer, including reporters.

        Raises:
            ValueError: the model has no memories, or the training cannot work with them.
        """
        check_training(trainer.model, trainer.args)
        trainer.callback_handler.callbacks.insert(0, self)
        self._begin(trainer.model)
        return self

    # --- what the Trainer calls ---------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Start to count evaluations, when the Trainer is created.

        Raises:
            ValueError: the model has no memories, or the training cannot work with them.
        """
        check_training(model, args)
        self._begin(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Prepare for a training, which may resume from a checkpoint.

        Raises:
            ValueError: the model has no memories, the training cannot work with them, or the log
                in the output folder is of other memories.
        """
        check_training(model, args)  # again, for a callback that was added later
        host = self._begin(model)
        set_finished_updates(host, state.global_step)
        self._folder, self._updates = Path(args.output_dir), state.global_step
        self._next_window, self._window, self._report = state.global_step, None, {}
        writes = state.is_world_process_zero
        self._log, problem = open_log(host, self._folder, state.global_step, writes)
        if host.run.group() is not None:  # all workers stop, or none
            told: List[Optional[str]] = [problem]
            dist.broadcast_object_list(told, 0, host.run.group())
            problem = told[0]
        if problem:
            raise ValueError(f"memory usage: {problem}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before an update: start a count if one is due."""
        host = self._host
        assert host is not None
        set_finished_updates(host, state.global_step)
        if self._evaluation is not None and self._is_begun(
            self._evaluation
        ):  # batches of another evaluation
            self._new_evaluation(host)
        if self.interval and state.global_step >= self._next_window:
            self._close_window(host, state.global_step, args.device)
            self._window = Count(host, TRAINING, self.tokens, self.draws)
            self._next_window = (state.global_step // self.interval + 1) * self.interval
            self._switch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an update, before anything is saved: merge times of reads, finish a full count."""
        assert self._host is not None
        self._updates = state.global_step
        merge_read_times(self._host)
        if self._window is None:
            return
        self._window.check(args.device)
        if self._window.is_full:
            self._close_window(self._host, state.global_step, args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take note of the best model's updates, if the Trainer has loaded it."""
        if args.load_best_model_at_end and state.best_global_step:
            self._updates = state.best_global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Optional[Dict[str, Any]] = None, **_: Any
    ) -> None:
        """Add the last count to a log of training; finish the count of an evaluation.

        The last log of a training finishes its count, before the Trainer loads the best model.
        """
        if logs is None or self._host is None:
            return
        if END_OF_TRAINING in logs:
            self._close_window(self._host, state.global_step, args.device)
        prefix = _evaluation_of(logs)
        report = self._report if prefix is None else self._finish_evaluation(prefix, args)
        logs.update(report)
        if state.log_history:  # a copy that the Trainer made before
            state.log_history[-1].update(report)

    def on_predict(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the look-ups of ``Trainer.predict``: they are not of the next evaluation."""
        if self._host is not None:  # None if it was added later, and nothing was trained yet
            self._new_evaluation(self._host)

    # --- counts -------------------------------------------------------------------------------

    def _begin(self, model: Any) -> HasMemories:
        host: HasMemories = model
        if host is not self._host:
            self._host = host
            self._switches = {index: _Switch() for index in host.memory_layers()}
            for index, layer in host.memory_layers().items():
                layer.memory.observers.append(self._switches[index])
            self._new_evaluation(host)
        return host

    def _new_evaluation(self, host: HasMemories) -> None:
        self._evaluation = Count(host, "", self.tokens, self.draws)
        self._switch()

    def _switch(self) -> None:
        for index, switch in self._switches.items():
            switch.training = None if self._window is None else self._window.usage[index]
            switch.evaluation = None if self._evaluation is None else self._evaluation.usage[index]

    @staticmethod
    def _is_begun(count: Count) -> bool:
        return any(usage.tokens for usage in count.usage.values())

    def _close_window(self, host: HasMemories, updates: int, device: torch.device) -> None:
        """Report the count of training batches up to and including this update."""
        count, self._window = self._window, None
        self._switch()
        if count is None:
            return
        count.updates = updates
        count.add_up(device)
        if count.total:
            self._write(host, count)
            self._report = count.report()

    def _finish_evaluation(self, prefix: str, args: Any) -> Dict[str, float]:
        host, count = self._host, self._evaluation
        assert host is not None and count is not None
        count.split = f"{prefix}_evaluation" if prefix == TRAINING else prefix
        count.updates = self._updates
        count.add_up(args.device)
        if count.total:
            self._write(host, count)
        report = {f"{prefix}_{key}": value for key, value in count.report().items()}
        self._new_evaluation(host)
        return report

    def _write(self, host: Any, count: Count) -> None:
        initial = None if self._folder is None else load_initial_values(self._folder)
        record = count.record(initial)
        host.memory_usage = record  # for the model card
        if self._log is not None:
            self._log.append(record)


class _Switch:
    """An observer that counts look-ups in training and in evaluation separately."""

    def __init__(self) -> None:
        self.training: Optional[MemoryUsage] = None
        self.evaluation: Optional[MemoryUsage] = None

    def observe(self, seen: Observation) -> None:
        usage = self.training if seen.training else self.evaluation
        if usage is not None:
            usage.observe(seen)


def _evaluation_of(logs: Dict[str, Any]) -> Optional[str]:
    """The prefix of the keys in an evaluation's log; None for other logs."""
    found = [key.removesuffix(RUNTIME) for key in logs if key.endswith(RUNTIME)]
    # a metric's name may have the same end, as eval_model_runtime
    return min(found, key=len) if found and END_OF_TRAINING not in logs else None
