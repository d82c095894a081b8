"""Warn about examples that fairseq leaves out of a validation."""

import contextlib
import logging
from functools import wraps
from typing import Any, Callable, Iterator, Optional

from fairseq.distributed import utils as distributed_utils

logger = logging.getLogger(__name__)

TRAIN = "train"  # fairseq leaves out the same here, but reports no number on it


def tell_what_is_left_out(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Make a task warn about examples that are left out of its validation sets.

    fairseq leaves out the last batch of a data set if its number of examples is not a multiple of
    ``--required-batch-size-multiple``, by default 8.
    """

    @wraps(stock)
    def get_batch_iterator(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        with _told(dataset, _split_of(self, dataset)):
            return stock(self, dataset, *args, **kwargs)

    return get_batch_iterator


def _split_of(task: Any, dataset: Any) -> Optional[str]:
    """The name under which a task has loaded a data set."""
    return next((name for name, loaded in task.datasets.items() if loaded is dataset), None)


@contextlib.contextmanager
def _told(dataset: Any, split: Optional[str]) -> Iterator[None]:
    """Find the examples of a validation set that are in no batch, while batches are made."""
    if split in (None, TRAIN):
        yield
        return
    make = dataset.batch_by_size

    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
        batches = make(indices, *args, **kwargs)
        _tell(dataset, split, indices, batches, kwargs.get("required_batch_size_multiple"))
        return batches

    dataset.batch_by_size = batch_by_size
    try:
        yield
    finally:
        del dataset.batch_by_size


def _tell(dataset: Any, split: str, indices: Any, batches: Any, multiple: Any) -> None:
    """Warn about examples that are in no batch.

    Raises:
        ValueError: no example is in a batch.
    """
    batched = {index for batch in batches for index in batch}
    left_out = [index for index in indices if index not in batched]
    if not left_out:
        return
    tokens = [sum(int(dataset.num_tokens(i)) for i in those) for those in (left_out, indices)]
    line = (
        f"split {split}: {len(left_out):,} of {len(indices):,} examples ({tokens[0]:,} of "
        f"{tokens[1]:,} tokens) are left out, because fairseq's last batch of them is not a "
        f"multiple of {multiple}: --required-batch-size-multiple 1 keeps all"
    )
    if len(left_out) == len(indices):
        raise ValueError(line)
    if distributed_utils.get_global_rank() == 0:
        logger.warning(line)
