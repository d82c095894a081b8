"""The state of a run that a model's memories need."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch


class RunState:
    """The state of a run, one for all memories of a model; the memories only read it.

    The model's host sets it. Copies of a model share one copy of it.

    Args:
        workers: returns the process group of the workers that share query statistics, or None for
            one worker. It must be importable by name: models are copied and pickled, and process
            groups cannot be.

    Attributes:
        updates: finished updates of the training; None outside a training.
        is_dummy: whether the current batch is a dummy batch. A host gives dummy batches to idle
            workers, so that they stay in step with the others.
        workers: as above.
    """

    def __init__(self, workers: Optional[Callable[[], Any]] = None) -> None:
        self.updates: Optional[int] = None
        self.is_dummy = False
        self.workers = workers

    def group(self) -> Any:
        """The process group of the workers that share statistics; None for one worker."""
        return None if self.workers is None else self.workers()

    @contextmanager
    def dummy_batch(self, is_dummy: bool = True) -> Iterator[None]:
        """Set ``is_dummy`` while the context is open."""
        before, self.is_dummy = self.is_dummy, is_dummy
        try:
            yield
        finally:
            self.is_dummy = before


def is_repeated() -> bool:
    """Whether this is activation checkpointing's second forward pass, during backward.

    The first pass has updated all statistics and counts. torch has no public function for this;
    ``torch.utils.checkpoint`` itself checks it this way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
