"""The memory's operations in plain torch, on any device.

Rows are gathered in chunks, and no gradient of the table's size is ever created. Products may be
fused into sums: gradients that cancel exactly can leave a rounding error, which changes a row. On
CUDA the order of the sums in the gradient of scores differs from run to run.
"""

from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .float8 import Float8Table, Table
from .tables import FACTORS, NEAREST, Entries, StochasticRounding, at_least_float32, chance_of

DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of tables

CHUNK = 8 << 20  # elements of gathered rows in a chunk
MASK = 0xFFFFFFFF


def topk_pairs(
    half_scores: Tensor, knn: int, rank1: Tensor, rank2: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.topk_pairs``."""
    top, index = half_scores.permute(2, 0, 1, 3).topk(knn, dim=-1)  # (N, H, 2, K), descending
    top1, top2 = top.unbind(dim=2)
    candidate_scores = top1.index_select(-1, rank1) + top2.index_select(-1, rank2)  # (N, H, C)
    scores, best = candidate_scores.topk(knn, dim=-1)  # (N, H, K)
    index1, index2 = index.unbind(dim=2)
    return scores, index1.gather(-1, rank1[best]), index2.gather(-1, rank2[best])


def score_gradients(
    query: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grad_scores: Tensor
) -> Tuple[Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.score_gradients``."""
    index = torch.stack((index1, index2), dim=2)  # (N, H, 2, K)
    no_gradient = query.new_zeros(*query.shape[:3], keys.shape[2])  # (N, H, 2, S)
    grad_half = no_gradient.scatter_add(-1, index, grad_scores.unsqueeze(2).expand_as(index))
    grad_half = grad_half.permute(1, 2, 0, 3)  # (H, 2, N, S)
    grad_query = (grad_half @ keys).permute(2, 0, 1, 3).contiguous()  # (N, H, 2, D)
    return grad_query, grad_half.transpose(-1, -2) @ query.permute(1, 2, 0, 3)


def gather_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_sum``."""
    if values.dtype == weights.dtype:
        return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
    step = _rows(slots.shape[1] * values.shape[1])
    parts = zip(torch.split(slots, step), torch.split(weights, step), strict=True)
    return torch.cat([gather_sum_at_once(values, *part) for part in parts])


def gather_sum_at_once(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Like ``gather_sum``, but differentiable, with the same operations for any number of tokens.

    For a table in half precision, it holds all rows that are read in memory at once.
    """
    if values.dtype == weights.dtype:
        return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
    rows = values[slots].to(weights.dtype)  # (N, T, V)
    return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)


def gather_dot(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_dot``."""
    step = _rows(slots.shape[1] * values.shape[1])
    parts = zip(torch.split(slots, step), torch.split(grad_read, step), strict=True)
    return torch.cat([gather_dot_at_once(values, *part) for part in parts])


def gather_dot_at_once(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """Like ``gather_dot``, but differentiable, with the same operations for any number of tokens.

    It holds all rows that are read in memory at once.
    """
    rows = values[slots].to(grad_read.dtype)  # (N, T, V)
    return torch.bmm(rows, grad_read.unsqueeze(2)).squeeze(2)


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
    """See ``pkm_fairseq.memory.kernels.adam_rows``."""
    beta1, beta2 = betas
    key, first_column = chance_of(rounding)
    for rows, g in row_gradients(entries):
        moves = (g != 0).any(dim=1)
        rows, g = rows[moves], g[moves]  # (R,), (R, V)
        avg = at_least_float32(exp_avg[rows]).mul_(beta1).add_(g, alpha=1 - beta1)
        avg_sq = at_least_float32(exp_avg_sq[rows]).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        moved = at_least_float32(values[rows]) - step_size * avg / (avg_sq.sqrt() + eps)
        tables = (values, moved), (exp_avg, avg), (exp_avg_sq, avg_sq)
        for (table, x), factor in zip(tables, FACTORS, strict=True):
            store(table, x, rows, key, first_column, factor)


def store(
    table: Table, x: Tensor, rows: Tensor, key: int, first_column: int, factor: int = FACTORS[0]
) -> None:
    """Round rows, (R, V), and write them to a table.

    Args:
        table: the table.
        x: the rows, in at least float32.
        rows: (R,), the indices of the rows.
        key: of ``StochasticRounding``, used only for bfloat16 and 8 bits, or ``NEAREST``.
        first_column: the index of x's first column in the whole table.
        factor: the table's own, of ``FACTORS``.
    """
    if isinstance(table, Float8Table):
        table.store(rows, x, _noise(x, rows, key, first_column, factor, bits=20))
        return
    noise = None
    if table.dtype == torch.bfloat16:
        noise = _noise(x, rows, key, first_column, factor, bits=16)
    if noise is not None:
        cut = (x.view(torch.int32) + noise.to(torch.int32) & -0x10000).view(torch.float32)
        x = torch.where(x.isnan(), x, cut)  # the upper half of its bits: a bfloat16
    table[rows] = x.to(table.dtype)


def _noise(
    x: Tensor, rows: Tensor, key: int, first_column: int, factor: int, bits: int
) -> Optional[Tensor]:
    """So many random bits for each element of x, (R, V), int64; None with ``NEAREST``."""
    if key == NEAREST:
        return None
    columns = torch.arange(first_column, first_column + x.shape[1], device=x.device)
    return (_mix(_mix(rows & MASK ^ key)[:, None] + columns) * factor & MASK) >> 32 - bits


def _mix(x: Tensor) -> Tensor:
    """``tables.mix`` of numbers in int64; products that overflow keep the right low bits."""
    x = x & MASK
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def squared_norm(entries: Entries, n_slots: int) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.squared_norm``."""
    total = torch.zeros((), dtype=torch.float64, device=entries.grads.device)
    for _, g in row_gradients(entries):
        total += g.double().square().sum()
    return total


def row_gradients(entries: Entries) -> Iterator[Tuple[Tensor, Tensor]]:
    """The rows that were read and their gradients, (R,) and (R, V), in chunks of rows."""
    slots, order = entries.slots.sort(stable=True)
    rows, counts = torch.unique_consecutive(slots, return_counts=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    bags, weights = entries.bags[order], entries.weights[order]
    step = _rows(entries.grads.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        low, high = int(starts[part][0]), int(ends[part][-1])
        yield (
            rows[part],
            F.embedding_bag(
                bags[low:high],
                entries.grads,
                offsets=starts[part] - low,
                per_sample_weights=weights[low:high],
                mode="sum",
            ),
        )


def _rows(width: int) -> int:
    """The number of rows of this width in a chunk."""
    return max(1, CHUNK // max(1, width))
