"""Average the gradients of value tables over data-parallel workers, as factors or dense."""

import logging
from typing import Any, List, NamedTuple, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather, all_gather_rows, narrow
from .gradient import (
    FactoredGradient,
    counts_reads,
    divide_once,
    entries_of,
    join_entries,
    mark_exchanged,
    no_entries,
    table_state,
)
from .kernels import Entries, compute_dtype
from .kernels.torch_backend import row_gradients
from .observe.slot_counts import count_slots
from .sharding import ROWS

logger = logging.getLogger(__name__)

FORMS = {
    "auto": "which of the two moves fewer bytes in the first update",
    "factors": "slots, weights and output gradients of all reads",
    "dense": "one gradient of the table's size, summed over workers",
}


class Choice(NamedTuple):
    """How workers exchange the gradient of a table.

    Attributes:
        form: "factors" or "dense".
        asked: the choice of ``FORMS`` that led to it.
        workers: the number of workers.
        factors: bytes that each worker receives with "factors", in the update of the choice.
        dense: bytes that each worker receives with "dense", in a ring's all-reduce.
    """

    form: str
    asked: str
    workers: int
    factors: float
    dense: float


class _Sizes(NamedTuple):
    """The sizes of all workers' factors, by worker."""

    entries: List[int]
    bags: List[int]


def average_all(tables: Sequence[Tensor], group: Any = None) -> None:
    """Average the gradients of tables, one after the other, and log how if it is their first time.

    Args:
        tables: as for ``average``; the same ones, in the same order, on every worker.
        group: as for ``average``.

    Raises:
        ValueError: the workers differ in how they exchange the gradient of a table.
    """
    choices = [average(values, group) for values in tables]
    new = [choice for choice in choices if choice is not None]
    if dist.get_rank() == 0:
        for form in sorted({choice.form for choice in new}):
            _log([choice for choice in new if choice.form == form])


@torch.no_grad()
def average(values: Tensor, group: Any = None) -> Optional[Choice]:
    """Average the gradient of a table over data-parallel workers.

    Every worker must call it, for the tables in the same order. The result is the same in both
    forms, up to the order of sums; the bytes are not (``received_bytes``). Dense needs memory for
    one gradient of the table's size.

    Args:
        values: the table. Its state says how (``exchange_as``). "auto" is settled by the first
            gradient that is exchanged, and stays (``exchanged_as``).
        group: the process group of the workers; None means all workers.

    Returns:
        The choice, if it was made in this call; else None.

    Raises:
        ValueError: the workers differ in how they exchange the gradient.
    """
    state = table_state(values)
    if state.shards is not None:  # the factors are a sum over the workers that share the table
        divide_once(values, state.shards.n_shards)
        group = state.shards.replicas
        if group is None:
            if values.grad is not None:
                mark_exchanged(values, state.shards.n_shards)
            return None
    found = entries_of(values)
    own = no_entries(values) if found is None else found
    counted = values.grad is None or counts_reads(values.grad)
    sizes = _gather_sizes(own, state.exchanged_as or state.exchange_as, group)
    if not any(sizes.entries):
        values.grad = None
        return None
    choice = None
    if state.exchanged_as is None:
        choice = _choose(values, sizes, state.exchange_as)
        state.exchanged_as = choice.form
    is_dense = state.exchanged_as == "dense"
    exchange = _exchange_dense if is_dense else _exchange_factors
    values.grad = exchange(values, own, sizes, counted, group)
    if state.shards is not None:
        mark_exchanged(values, state.shards.n_shards)
    return choice


def received_bytes(values: Tensor, entries: Sequence[int], bags: Sequence[int], form: str) -> float:
    """Bytes that each worker receives for the gradient of a table.

    Args:
        values: the table or this worker's columns, (n_slots, V).
        entries: number of reads of each worker.
        bags: number of tokens of each worker.
        form: "factors" or "dense".
    """
    others, size = len(entries) - 1, compute_dtype(values.dtype).itemsize
    if form == "dense":  # a ring's all-reduce
        return 2 * others / len(entries) * values.numel() * size
    slot = narrow(torch.empty(0, dtype=torch.int64), len(values)).element_size()
    per_bag = values.shape[1] * size + 4  # the gradient of the read; how many reads it has
    return float(others * (max(entries) * (slot + size) + max(bags) * per_bag))


def _choose(values: Tensor, sizes: _Sizes, asked: str) -> Choice:
    factors, dense = (received_bytes(values, *sizes, form) for form in ("factors", "dense"))
    form = asked
    if asked == "auto":
        form = "dense" if factors > dense else "factors"
    return Choice(form, asked, len(sizes.bags), factors, dense)


def _log(choices: List[Choice]) -> None:
    """Log one line for tables that are exchanged in the same form."""
    form, asked, workers, *_ = choices[0]
    factors, dense = (sum(getattr(c, name) for c in choices) / 1e6 for name in ("factors", "dense"))
    logger.info(
        f"{workers} workers exchange the gradients of {len(choices)} value table(s) "
        f"{'dense' if form == 'dense' else 'as factors'} "
        f"({'by their bytes' if asked == 'auto' else 'as told'}): each worker receives "
        f"{factors:,.2f} MB as factors or {dense:,.2f} MB dense in this update"
    )


def _gather_sizes(own: Entries, form: str, group: Any) -> _Sizes:
    """The sizes of all workers' factors.

    Raises:
        ValueError: the workers differ in how they exchange the gradient.
    """
    names = list(FORMS)
    sizes = torch.tensor(
        [len(own.slots), len(own.grads), names.index(form)], device=own.slots.device
    )
    gathered = [size.tolist() for size in all_gather(sizes, group)]
    entries, bags, forms = (list(column) for column in zip(*gathered, strict=True))
    if len(set(forms)) > 1:
        said = ", ".join(names[form] for form in forms)
        raise ValueError(
            f"exchange_as (--memory-exchange) is {said} on workers 0, 1, ..., must be the same on "
            "all of them"
        )
    return _Sizes(entries, bags)


def _exchange_factors(
    values: Tensor, own: Entries, sizes: _Sizes, counted: bool, group: Any
) -> Tensor:
    """The mean of all workers' gradients, with the entries of all of them.

    Slots are sent as int32. Bags ascend, so only the number of entries per bag is sent.
    """
    reads = torch.bincount(own.bags, minlength=len(own.grads))
    slots = all_gather_rows(narrow(own.slots, len(values)), sizes.entries, group)
    weights = all_gather_rows(own.weights, sizes.entries, group)
    counts = all_gather_rows(reads.to(torch.int32), sizes.bags, group)
    grads = all_gather_rows(own.grads, sizes.bags, group)
    parts = [
        Entries(s.long(), w, torch.arange(len(c), device=c.device).repeat_interleave(c), g)
        for s, w, c, g in zip(slots, weights, counts, grads, strict=True)
    ]
    return FactoredGradient.of_workers(values, join_entries(parts), len(parts), counted)


def _exchange_dense(
    values: Tensor, own: Entries, sizes: _Sizes, counted: bool, group: Any
) -> Tensor:
    """The mean of all workers' gradients, with one entry for each row that is not zero.

    If rows are chosen by their reads, these are summed, too.
    """
    total = torch.zeros(values.shape, dtype=compute_dtype(values.dtype), device=values.device)
    for rows, of_rows in row_gradients(own):
        total[rows] = of_rows
    dist.all_reduce(total, group=group)
    is_moved = torch.cat([(part != 0).any(dim=1) for part in torch.split(total, ROWS)])
    rows = is_moved.nonzero().squeeze(1)  # (R,), ascending
    entries = Entries(rows, total.new_ones(len(rows)), rows, total)
    reads = None
    if table_state(values).rows is not None:
        reads = count_slots(own.slots, len(values))
        dist.all_reduce(reads, group=group)
    counted = counted and reads is not None
    return FactoredGradient.of_workers(values, entries, len(sizes.bags), counted, reads)
