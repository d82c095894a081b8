"""What a model's memories must know of the run that they are part of."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch


class RunState:
    """The state of a run, one for all memories of a model, which only read it.

    The host of the model sets it. Copies of a model share one copy of it.

    Args:
        workers: returns the process group of the workers that take query statistics together, or
            None if there is but one. A function that can be imported by its name, since a model is
            copied and pickled, and a group cannot be.

    Attributes:
        updates: finished updates of the training; None outside a training.
        is_dummy: whether the batch at hand is a dummy batch, no data: a host gives it to an idle
            worker, so that it stays in step with the others.
        workers: as above.
    """

    def __init__(self, workers: Optional[Callable[[], Any]] = None) -> None:
        self.updates: Optional[int] = None
        self.is_dummy = False
        self.workers = workers

    def group(self) -> Any:
        """The process group of the workers that share statistics; None if there is but one."""
        return None if self.workers is None else self.workers()

    @contextmanager
    def dummy_batch(self, is_dummy: bool = True) -> Iterator[None]:
        """While the context is open, batches are dummy batches, or are not."""
        before, self.is_dummy = self.is_dummy, is_dummy
        try:
            yield
        finally:
            self.is_dummy = before


def is_repeated() -> bool:
    """Whether this is the second pass of a batch, which activation checkpointing does in backward.

    The first pass has updated all statistics and counts. torch offers no public way to ask;
    ``torch.utils.checkpoint`` asks in this way itself.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
