"""The memory's operations: one signature each, one implementation per backend.

``torch`` runs on any device and needs nothing else; ``numba`` is compiled for the CPU; ``triton``
for CUDA. The fastest one that can run is taken, and logged once per device and dtype. The
environment variable PKM_BACKEND forces one, which then must be able to run.

The shapes: N tokens, H heads, K = knn, S = n_keys, D = k_dim / 2, V = v_dim, T = H * K reads per
token, C candidate pairs, E entries of a gradient. Nothing here is differentiable: the two autograd
functions that use these operations are in ``product_keys`` and ``values``.
"""

from typing import Tuple

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from .backends import backend_for
from .entries import Entries

__all__ = [
    "Entries",
    "backend_for",
    "check_reads",
    "read",
    "score_gradients",
    "squared_norm",
    "topk_pairs",
    "update_rows",
    "weight_gradient",
]


def topk_pairs(
    half_scores: Tensor, knn: int, rank1: Tensor, rank2: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Find the ``knn`` pairs of sub-keys with the highest sums of half scores.

    Args:
        half_scores: (H, 2, N, S), float32 or float64.
        knn: number of pairs, at most S.
        rank1: (C,), int64, ranks in the first half of the pairs that can be among the best.
        rank2: (C,), int64, their ranks in the second half.

    Returns:
        Scores, descending, and the sub-keys of the first and of the second half, int64; each
        (N, H, K). Where a half score is NaN, so is at least one score of that token and head.
    """
    half_scores = half_scores.detach().contiguous()
    return backend_for(half_scores).topk_pairs(half_scores, knn, rank1, rank2)  # type: ignore[no-any-return]


def score_gradients(
    query: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grad_scores: Tensor
) -> Tuple[Tensor, Tensor]:
    """The gradient of the scores of chosen pairs, for queries and sub-keys.

    Args:
        query: (N, H, 2, D), float32 or float64.
        keys: (H, 2, S, D), the same dtype.
        index1: (N, H, K), int64, the sub-keys of the first half.
        index2: (N, H, K), int64, those of the second half.
        grad_scores: (N, H, K), the same dtype as query.

    Returns:
        Gradients shaped as query and as keys.
    """
    given = [x.detach().contiguous() for x in (query, keys, index1, index2, grad_scores)]
    return backend_for(given[0]).score_gradients(*given)  # type: ignore[no-any-return]


def read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """``sum over t of weights[n, t] * values[slots[n, t]]``.

    Args:
        values: (n_slots, V), contiguous.
        slots: (N, T), int64.
        weights: (N, T), any floating dtype.

    Returns:
        (N, V), computed and returned in at least float32. A slot out of range that reaches a GPU
        kernel reads as NaN.

    Raises:
        ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
    """
    _check_table(values)
    check_reads(slots, weights, len(values))
    weights = weights.detach().to(compute_dtype(values.dtype)).contiguous()
    backend = backend_for(values)
    return backend.read(values.detach(), slots.contiguous(), weights)  # type: ignore[no-any-return]


def weight_gradient(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """``values[slots[n, t]] . grad_read[n]``: the gradient of :func:`read` for its weights.

    Args:
        values: (n_slots, V), contiguous.
        slots: (N, T), int64, in range.
        grad_read: (N, V).

    Returns:
        (N, T), in at least float32.
    """
    grad_read = grad_read.detach().to(compute_dtype(values.dtype)).contiguous()
    backend = backend_for(values)
    return backend.weight_gradient(values.detach(), slots.contiguous(), grad_read)  # type: ignore[no-any-return]


def update_rows(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    entries: Entries,
    step_size: float,
    betas: Tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam, in place, on the rows whose gradient has a non-zero element.

    ``exp_avg <- beta1 * exp_avg + (1 - beta1) * g``;
    ``exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g * g``;
    ``values <- values - step_size * exp_avg / (sqrt(exp_avg_sq) + eps)``.

    Args:
        values: (n_slots, V), contiguous; bfloat16 is rounded to nearest, ties to even.
        exp_avg: (n_slots, V), contiguous, in at least float32.
        exp_avg_sq: (n_slots, V), as exp_avg.
        entries: the gradient, on the device of the table.
        step_size: the learning rate times Adam's correction of the bias.
        betas: decay rates of the two moments.
        eps: added to the root.

    Raises:
        ValueError: shapes do not fit.
    """
    for table in (values, exp_avg, exp_avg_sq):
        _check_table(table)
    if not exp_avg.shape == exp_avg_sq.shape == values.shape:
        raise ValueError(
            f"moments have shapes {tuple(exp_avg.shape)} and {tuple(exp_avg_sq.shape)}, "
            f"must be that of the values, {tuple(values.shape)}"
        )
    tables = (values.detach(), exp_avg, exp_avg_sq)
    backend_for(values).update_rows(*tables, entries, step_size, betas, eps)
    torch.autograd.graph.increment_version(values)  # kernels write past torch


def squared_norm(values: Tensor, entries: Entries) -> Tensor:
    """The squared Euclidean norm of the gradient that the entries are.

    Args:
        values: the table, (n_slots, V), of which only shape, dtype and device count.
        entries: the gradient, on the device of the table.

    Returns:
        A float64 scalar.
    """
    return backend_for(values).squared_norm(entries, len(values))  # type: ignore[no-any-return]


def _check_table(table: Tensor) -> None:
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(
            f"a table has shape {tuple(table.shape)} and dtype {table.dtype}, "
            "must be (n_slots, v_dim) and floating"
        )
    if not table.is_contiguous():
        raise ValueError(
            f"a table of shape {tuple(table.shape)} has strides {table.stride()}, must be "
            "contiguous: a copy of it would be as large as the table"
        )


def check_reads(slots: Tensor, weights: Tensor, n_slots: int) -> None:
    if slots.dtype != torch.int64:
        raise ValueError(f"slots have dtype {slots.dtype}, must be torch.int64")
    if not weights.is_floating_point():
        raise ValueError(f"weights have dtype {weights.dtype}, must be floating")
    if slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(
            f"slots have shape {tuple(slots.shape)} and weights {tuple(weights.shape)}, "
            "both must be (tokens, reads per token)"
        )
    if slots.device.type == "cpu" and slots.numel():
        least, most = (int(x) for x in slots.aminmax())
        if least < 0 or most >= n_slots:
            wrong = least if least < 0 else most
            raise ValueError(f"slot {wrong} is out of range, must be in 0..{n_slots - 1}")
