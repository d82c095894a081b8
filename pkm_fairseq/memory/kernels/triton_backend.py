"""The memory's operations on CUDA, compiled by triton; the programs are in ``triton_kernels``.

The host never waits for the device here. With TRITON_INTERPRET=1 triton interprets the same
programs on the CPU, slowly: for tests on machines without a GPU.
"""

import os
from typing import Any, Optional, Tuple

import torch
import triton
from torch import Tensor

from . import torch_backend
from . import triton_kernels as programs
from .float8 import Float8Table, Table
from .tables import Entries, StochasticRounding, chance_of

DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of tables

ROWS = 8  # rows that a program holds at once
BLOCK = 256  # columns that a program holds at once
TILE = 4096  # elements that a program of whole rows holds at once, unless one row is longer
SORTED = 1024  # most elements that a program sorts; 4,096 took over 8 minutes to compile


def topk_pairs(
    half_scores: Tensor, knn: int, rank1: Tensor, rank2: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.topk_pairs``.

    float64 uses torch, because the program sorts a score and its index as one integer of 64 bits.
    More than 1,024 sub-keys per half, or more than 1,024 candidates, use torch, too.
    """
    heads, _, n, n_keys = half_scores.shape
    if half_scores.dtype != torch.float32 or max(n_keys, len(rank1)) > SORTED:
        return torch_backend.topk_pairs(half_scores, knn, rank1, rank2)
    scores = half_scores.new_empty(n, heads, knn)
    index1, index2 = rank1.new_empty(2, n, heads, knn)
    given = half_scores, rank1, rank2, scores, index1, index2, knn, n_keys, len(rank1)
    blocks = _blocks(n_keys), _blocks(knn), _blocks(len(rank1))
    _run(programs.topk_pairs, (n, heads), *given, *blocks)
    return scores, index1, index2


def score_gradients(
    query: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grad_scores: Tensor
) -> Tuple[Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.score_gradients``.

    The gradient of the sub-keys is a matrix product with the dense gradient of all half scores: a
    GPU multiplies faster than it sorts.
    """
    n, heads, _, width = query.shape
    n_keys, knn = keys.shape[2], index1.shape[2]
    grad_query = torch.empty_like(query)
    grad_half = query.new_empty(heads, 2, n, n_keys)
    tile, keys_at_once = _tile(width), min(_blocks(n_keys), SORTED)
    for half, index in enumerate((index1, index2)):
        grid = n, heads, triton.cdiv(width, tile[1])
        sizes = half, knn, n_keys
        _run(programs.grad_query, grid, keys, index, grad_scores, grad_query, *sizes, width, *tile)
        grid = n, heads, triton.cdiv(n_keys, keys_at_once)
        _run(programs.grad_half_scores, grid, index, grad_scores, grad_half, *sizes, keys_at_once)
    with torch.autocast(query.device.type, enabled=False):
        return grad_query, grad_half.transpose(-1, -2) @ query.permute(1, 2, 0, 3)


def gather_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_sum``."""
    (n, reads), (n_slots, width) = slots.shape, values.shape
    out = weights.new_empty(n, width)
    tile = _tile(width)
    grid = n, triton.cdiv(width, tile[1])
    _run(programs.gather_sum, grid, values, slots, weights, out, n_slots, reads, width, *tile)
    return out


def gather_dot(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_dot``."""
    (n, reads), (n_slots, width) = slots.shape, values.shape
    out = grad_read.new_empty(n, reads)
    given = values, slots, grad_read, out, n_slots, reads, width
    _run(programs.gather_dot, (n, triton.cdiv(reads, ROWS)), *given, *_tile(width))
    return out


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
    """See ``pkm_fairseq.memory.kernels.adam_rows``. Moments in 8 bits use torch."""
    if isinstance(exp_avg, Float8Table):
        given = entries, step_size, betas, eps, rounding
        return torch_backend.adam_rows(values, exp_avg, exp_avg_sq, *given)
    (beta1, beta2), (n_slots, width) = betas, values.shape
    tables, by_slot = (values, exp_avg, exp_avg_sq), _sorted(entries)
    sizes = n_slots, len(entries.slots), width
    settings = map(float, (step_size, beta1, 1 - beta1, beta2, 1 - beta2, eps))
    args = *tables, *by_slot, *sizes, *settings, *chance_of(rounding)
    _run(programs.adam_rows, (len(entries.slots),), *args, *_whole_rows(width))


def squared_norm(entries: Entries, n_slots: int) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.squared_norm``."""
    n, width = len(entries.slots), entries.grads.shape[1]
    squares = torch.zeros(n, dtype=torch.float64, device=entries.grads.device)
    given = *_sorted(entries), squares, n, width
    _run(programs.row_squares, (n,), *given, *_whole_rows(width))
    return squares.sum()


def _sorted(entries: Entries) -> Entries:
    """Sort entries by slot; entries of one slot keep their order, and grads do not change."""
    slots, order = entries.slots.sort(stable=True)
    return Entries(slots, entries.weights[order], entries.bags[order], entries.grads)


def _blocks(size: int) -> int:
    """The next power of two, for the size of a program's block; sorting needs at least 2."""
    return max(2, int(triton.next_power_of_2(size)))


def _tile(width: int) -> Tuple[int, int]:
    """Rows and columns that a program holds at once."""
    return ROWS, min(_blocks(width), BLOCK)


def _whole_rows(width: int) -> Tuple[int, int]:
    """Rows and columns of a program that must hold whole rows."""
    block = _blocks(width)
    return max(1, min(ROWS, TILE // block)), block


def _run(program: Any, grid: Tuple[int, ...], *args: Any) -> None:
    """Launch a program on the device of its first argument, without fusing products into sums.

    With fusion ``w * g - w * g`` could differ from zero, and change a row that must stay.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
        program[grid](*args, enable_fp_fusion=False)
