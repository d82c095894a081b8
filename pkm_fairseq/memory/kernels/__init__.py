"""The memory's operations: one signature per operation, one implementation per backend.

``torch`` runs on any device and needs no other package; ``numba`` compiles for the CPU, ``triton``
for CUDA. The fastest backend that can run is used, and logged once per device and dtype. The
environment variable PKM_BACKEND forces a backend; if that backend cannot run, it is an error.

Shapes: N tokens, H heads, K = knn, S = n_keys, D = k_dim / 2, V = v_dim, T = H * K reads per token,
C candidate pairs, E entries of a gradient.

On plain data no operation is differentiable; the autograd functions that use these operations are
in ``search`` and ``values``. If tensors are not plain data (see ``is_plain``: traced, exported,
compiled, fake or wrapped), no code looks at the numbers, and scores and reads are differentiable:
graphs of ``torch.compile`` hold the registered operations (``registered``), all other cases use
torch's own operations.
"""

from contextlib import nullcontext
from functools import wraps
from typing import Any, Callable, ContextManager, Optional, Tuple, TypeVar, cast

import torch
from torch import Tensor

from . import torch_backend
from .backends import (
    backend_for,
    is_compiled,
    is_in_graph,
    is_plain,
    is_traced,
    is_wrapped,
    needs_torch,
    outside_graphs,
    run,
)
from .float8 import Float8Table, Table
from .registered import graph_ops, register, register_all
from .tables import (
    Entries,
    StochasticRounding,
    allocate,
    at_least_float32,
    compute_dtype,
    is_half,
)

FLOAT8 = "float8 (signed and unsigned)"
Operation = TypeVar("Operation", bound=Callable[..., Any])

__all__ = [
    "Entries",
    "Float8Table",
    "StochasticRounding",
    "Table",
    "adam_rows",
    "allocate",
    "at_least_float32",
    "backend_for",
    "check_reads",
    "compute_dtype",
    "gather_dot",
    "gather_sum",
    "graph_ops",
    "is_compiled",
    "is_half",
    "is_in_graph",
    "is_plain",
    "is_traced",
    "is_wrapped",
    "outside_graphs",
    "register",
    "score_gradients",
    "squared_norm",
    "topk_pairs",
    "without_autocast",
]


def without_autocast(device: torch.device) -> ContextManager[Any]:
    """A context without autocast, because operations choose their precision themselves."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _without_autocast(operation: Operation) -> Operation:
    @wraps(operation)
    def run_operation(x: Tensor, *args: Any) -> Any:
        with without_autocast(x.device):
            return operation(x, *args)

    return cast(Operation, run_operation)


@_without_autocast
def topk_pairs(
    half_scores: Tensor, knn: int, rank1: Tensor, rank2: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Find the ``knn`` pairs of sub-keys with the highest sums of half scores.

    Args:
        half_scores: (H, 2, N, S), float32 or float64.
        knn: number of pairs, at most S.
        rank1: (C,), int64: for each pair that can be among the best, its rank in the first half.
        rank2: (C,), int64: its rank in the second half.

    Returns:
        Scores, descending, and the sub-keys of the first and of the second half, int64; each
        (N, H, K). If a half score is NaN, the first score of its token and head is NaN.
    """
    if needs_torch(half_scores, rank1, rank2):
        return torch_backend.topk_pairs(half_scores, knn, rank1, rank2)
    half_scores = half_scores.detach().contiguous()
    return run(half_scores, "topk_pairs", half_scores, knn, rank1, rank2)  # type: ignore[no-any-return]


@_without_autocast
def score_gradients(
    query: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grad_scores: Tensor
) -> Tuple[Tensor, Tensor]:
    """The gradients of queries and sub-keys, from the gradient of the chosen pairs' scores.

    Args:
        query: (N, H, 2, D), float32 or float64.
        keys: (H, 2, S, D), the same dtype.
        index1: (N, H, K), int64, the sub-keys of the first half.
        index2: (N, H, K), int64, the sub-keys of the second half.
        grad_scores: (N, H, K), the same dtype as query.

    Returns:
        Gradients with the shapes of query and keys.
    """
    given = query, keys, index1, index2, grad_scores
    if needs_torch(*given):
        return torch_backend.score_gradients(*given)
    return run(query, "score_gradients", *(x.detach().contiguous() for x in given))  # type: ignore[no-any-return]


@_without_autocast
def gather_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """``sum over t of weights[n, t] * values[slots[n, t]]``.

    Args:
        values: (n_slots, V), contiguous; floating, or int8, which is read as whole numbers.
        slots: (N, T), int64.
        weights: (N, T), any floating dtype.

    Returns:
        (N, V), computed and returned in at least float32. A slot out of range that reaches a GPU
        kernel reads as NaN.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
    """
    _check_table(values, or_int8=True)
    check_reads(slots, weights, len(values))
    weights = weights.to(compute_dtype(values.dtype))
    if needs_torch(values, slots, weights):
        if is_in_graph(values, slots, weights):
            return graph_ops.gather_sum(values, slots, weights)  # type: ignore[no-any-return]
        return torch_backend.gather_sum_at_once(values, slots, weights)
    weights = weights.detach().contiguous()
    return run(values, "gather_sum", values.detach(), slots.contiguous(), weights)  # type: ignore[no-any-return]


@_without_autocast
def gather_dot(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """``values[slots[n, t]] . grad_read[n]``: the gradient of ``gather_sum`` for its weights.

    Args:
        values: (n_slots, V), contiguous; floating, or int8, which is read as whole numbers.
        slots: (N, T), int64, in range.
        grad_read: (N, V).

    Returns:
        (N, T), in at least float32.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
    """
    _check_table(values, or_int8=True)
    _check_slots(slots, len(values))
    if tuple(grad_read.shape) != (slots.shape[0], values.shape[1]):
        raise ValueError(
            f"the gradient of what was read has shape {tuple(grad_read.shape)}, must be "
            f"{(len(slots), values.shape[1])}"
        )
    grad_read = grad_read.to(compute_dtype(values.dtype))
    if needs_torch(values, slots, grad_read):
        if is_in_graph(values, slots, grad_read):
            return graph_ops.gather_dot(values, slots, grad_read)  # type: ignore[no-any-return]
        return torch_backend.gather_dot_at_once(values, slots, grad_read)
    grad_read = grad_read.detach().contiguous()
    return run(values, "gather_dot", values.detach(), slots.contiguous(), grad_read)  # type: ignore[no-any-return]


@_without_autocast
def adam_rows(
    values: Tensor,
    exp_avg: Table,
    exp_avg_sq: Table,
    entries: Entries,
    step_size: float,
    betas: Tuple[float, float],
    eps: float,
    rounding: Optional[StochasticRounding] = None,
) -> None:
    """One step of Adam, in place, on the rows whose gradient has a non-zero element.

    ``exp_avg <- beta1 * exp_avg + (1 - beta1) * g``;
    ``exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g``;
    ``values <- values - step_size * exp_avg / (sqrt(exp_avg_sq) + eps)``.

    Args:
        values: (n_slots, V), contiguous.
        exp_avg: (n_slots, V), contiguous, in at least float32; or in bfloat16 or a signed
            ``Float8Table``, with ``rounding``.
        exp_avg_sq: (n_slots, V), like exp_avg, but an unsigned ``Float8Table``.
        entries: the gradient, on the device of the table.
        step_size: the learning rate times Adam's bias correction.
        betas: decay rates of the two moments.
        eps: added to the root.
        rounding: of tables in bfloat16 and 8 bits; None rounds values to nearest, ties to even.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, an entry is out of range.
        RuntimeError: tensors are not plain data.
    """
    if is_compiled():
        given = values, exp_avg, exp_avg_sq, entries, step_size, betas, eps, rounding
        return outside_graphs(adam_rows)(*given)
    tables = values, *_parts(exp_avg), *_parts(exp_avg_sq)
    for table in (values, exp_avg, exp_avg_sq):
        if not isinstance(table, Float8Table):
            _check_table(table)
    if not exp_avg.shape == exp_avg_sq.shape == values.shape:
        raise ValueError(
            f"moments have shapes {tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)}, "
            f"must be that of the values, {tuple(values.shape)}"
        )
    _check_moments(values.dtype, exp_avg, exp_avg_sq, rounding)
    _check_entries(values, entries)
    _check_numbers(*tables, *entries)
    settings = step_size, betas, eps, rounding
    run(values, "adam_rows", values.detach(), exp_avg, exp_avg_sq, entries, *settings)
    torch.autograd.graph.increment_version(values)  # torch does not see writes of kernels


@_without_autocast
def squared_norm(values: Tensor, entries: Entries) -> Tensor:
    """The squared Euclidean norm of the gradient that the entries form.

    Args:
        values: the table, (n_slots, V); only its shape, dtype and device are used.
        entries: the gradient, on the device of the table.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, an entry is out of range.
        RuntimeError: tensors are not plain data.
    """
    if is_compiled():
        return outside_graphs(squared_norm)(values, entries)
    _check_entries(values, entries)
    _check_numbers(*entries)
    return run(entries.grads, "squared_norm", entries, len(values))  # type: ignore[no-any-return]


def _parts(table: Table) -> Tuple[Tensor, ...]:
    """The tensors that make up a table."""
    return (table.codes, table.exponents) if isinstance(table, Float8Table) else (table,)


def _check_table(table: Tensor, or_int8: bool = False) -> None:
    is_allowed = table.is_floating_point() or (or_int8 and table.dtype == torch.int8)
    if table.dim() != 2 or not is_allowed:
        raise ValueError(
            f"a table has shape {tuple(table.shape)} and dtype {table.dtype}, "
            f"must be (n_slots, v_dim) and floating{' or int8' * or_int8}"
        )
    if not table.is_contiguous():
        raise ValueError(
            f"a table of shape {tuple(table.shape)} has strides {table.stride()}, must be "
            "contiguous: a copy of it would be as large as the table"
        )


def _check_moments(
    values: torch.dtype, exp_avg: Table, exp_avg_sq: Table, rounding: Optional[StochasticRounding]
) -> None:
    allowed = [str(compute_dtype(values))]
    if rounding is not None and allowed == [str(torch.float32)]:
        allowed += [str(torch.bfloat16), FLOAT8]  # to nearest, a second moment would stop falling
    kinds = [_kind_of(exp_avg, signed=True), _kind_of(exp_avg_sq, signed=False)]
    if kinds[0] not in allowed or kinds[0] != kinds[1]:
        raise ValueError(
            f"moments have dtypes {kinds[0]} and {kinds[1]}, must both be "
            f"{' or '.join(allowed)} for values in {values}"
        )


def _kind_of(moment: Table, signed: bool) -> str:
    if isinstance(moment, Float8Table):
        right = moment.codes.dtype.is_signed == signed
        return FLOAT8 if right else f"float8 with codes in {moment.codes.dtype}"
    return str(moment.dtype)


def check_reads(slots: Tensor, weights: Tensor, n_slots: int) -> None:
    """Refuse slots and weights that ``gather_sum`` does not accept.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
    """
    if not weights.is_floating_point():
        raise ValueError(f"weights have dtype {weights.dtype}, must be floating")
    if slots.shape != weights.shape:
        raise ValueError(
            f"slots have shape {tuple(slots.shape)} and weights {tuple(weights.shape)}, "
            "both must be (tokens, reads per token)"
        )
    _check_slots(slots, n_slots)


def _check_slots(slots: Tensor, n_slots: int) -> None:
    if slots.dim() != 2:
        raise ValueError(
            f"slots have shape {tuple(slots.shape)}, must be (tokens, reads per token)"
        )
    _check_index("slots", "slot", slots, n_slots)


def _check_entries(values: Tensor, entries: Entries) -> None:
    slots, weights, bags, grads = entries
    if not (slots.dim() == 1 and slots.shape == weights.shape == bags.shape):
        raise ValueError(
            f"slots, weights and bags of entries have shapes {tuple(slots.shape)}, "
            f"{tuple(weights.shape)} and {tuple(bags.shape)}, must be alike, (entries,)"
        )
    dtype = compute_dtype(values.dtype)
    if grads.dim() != 2 or grads.shape[1] != values.shape[1] or not grads.is_contiguous():
        raise ValueError(
            f"gradients of entries have shape {tuple(grads.shape)}, must be contiguous and "
            f"(reads, {values.shape[1]})"
        )
    if not weights.dtype == grads.dtype == dtype:
        raise ValueError(
            f"weights and gradients of entries have dtypes {weights.dtype} and {grads.dtype}, "
            f"must be {dtype} for values in {values.dtype}"
        )
    _check_index("slots", "slot", slots, len(values))
    _check_index("bags", "bag", bags, len(grads))


def _check_numbers(*tensors: Tensor) -> None:
    """Refuse tensors without readable numbers, because the gradient of a table needs numbers."""
    if is_traced() or any(is_wrapped(x) or x.is_meta for x in tensors):
        kinds = ", ".join(sorted({type(x).__name__ for x in tensors}))
        raise RuntimeError(
            f"the gradient of a value table needs tensors with numbers; given are {kinds} on "
            f"{tensors[0].device}, traced, wrapped or without data"
        )


def _check_index(names: str, name: str, index: Tensor, size: int) -> None:
    """Refuse a wrong dtype and, on the CPU, where the check is cheap, a number out of range."""
    if index.dtype != torch.int64:
        raise ValueError(f"{names} have dtype {index.dtype}, must be torch.int64")
    if index.device.type == "cpu" and is_plain(index) and index.numel():
        least, most = (int(x) for x in index.aminmax())
        if least < 0 or most >= size:
            wrong = least if least < 0 else most
            raise ValueError(f"{name} {wrong} is out of range, must be in 0..{size - 1}")


register_all(gather_sum, gather_dot, score_gradients)
