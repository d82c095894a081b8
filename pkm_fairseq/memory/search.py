"""From queries and sub-keys to the exact top-k slots (Lample et al. 2019)."""

from functools import lru_cache
from typing import Any, Tuple

import torch
from torch import Tensor

from . import kernels
from .kernels import compute_dtype, is_plain, without_autocast


def product_topk(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    """Find the ``knn`` slots with the highest scores, exactly.

    A slot is a pair of sub-keys; its score is the sum of the two half scores. Sort each half in
    descending order. The (i + 1)(j + 1) - 1 other pairs at ranks (<= i, <= j) beat or equal the
    pair of ranks (i, j). So only pairs with (i + 1)(j + 1) <= knn can be among the best: 119
    candidates for knn = 32 instead of 1,024. Rounding is monotone, so this also holds in floating
    point.

    Args:
        query: (..., H, 2, D), any floating dtype.
        keys: sub-keys, (H, 2, S, D).
        knn: number of slots per head, K, with 1 <= K <= S.

    Returns:
        Scores and slots, each (..., H, K), scores descending. Scores are in float32, or in
        float64 if query or keys are. Slots are int64, ``i1 * S + i2``. The choice among slots
        with equal scores is not specified.

    Raises:
        ValueError: shapes do not fit, knn is out of range, or, on the CPU, the best score of a
            head is not finite, so that the softmax would be NaN. On a GPU (where the check would
            make the host wait) and in traces, such scores are returned.
    """
    _check_search(query, keys, knn)
    dtype = torch.promote_types(compute_dtype(query.dtype), compute_dtype(keys.dtype))
    tokens = query.reshape(-1, *query.shape[-3:]).to(dtype)  # (N, H, 2, D)
    keys = keys.to(dtype)
    if is_plain(tokens, keys):
        scores, slots = _Search.apply(tokens, keys, knn)  # type: ignore[no-untyped-call]
    elif kernels.is_in_graph(tokens, keys):
        scores, slots = kernels.graph_ops.search(tokens, keys, knn)
    else:
        scores, slots, *_ = _search(tokens, keys, knn)  # (N, H, K)
    if scores.device.type == "cpu" and is_plain(scores):
        _check_scores(scores, tokens, keys)
    shape = (*query.shape[:-2], knn)
    return scores.view(shape), slots.view(shape)


class _Search(torch.autograd.Function):
    """The search, differentiable in its scores; the backward pass needs no half scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
        scores, slots, index1, index2 = _search(query, keys, knn)
        ctx.save_for_backward(query, keys, index1, index2)
        ctx.mark_non_differentiable(slots)
        return scores, slots

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_scores: Tensor, _: Tensor) -> Tuple[Tensor, Tensor, None]:
        query, keys, index1, index2 = ctx.saved_tensors
        grads = kernels.score_gradients(query, keys, index1, index2, grad_scores)
        return (*grads, None)


def _search(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, slots, and their sub-keys of the first and of the second half; each (N, H, K)."""
    half = half_scores(query, keys).permute(1, 2, 0, 3)  # (H, 2, N, S)
    ranks = candidate_ranks(knn, query.device)
    scores, index1, index2 = kernels.topk_pairs(half, knn, *ranks)
    return scores, slot_of(index1, index2, keys.shape[2]), index1, index2


def search(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    """Scores and slots, each (N, H, K): the search in graphs of ``torch.compile``."""
    return _search(query, keys, knn)[:2]


def _search_shapes(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    shape = (*query.shape[:2], knn)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def _search_backward(ctx: Any, grad_scores: Tensor, _: Tensor) -> Tuple[Tensor, Tensor, None]:
    query, keys, slots = ctx.saved_tensors
    pair = slots // keys.shape[2], slots % keys.shape[2]
    return (*kernels.graph_ops.score_gradients(query, keys, *pair, grad_scores), None)


kernels.register(search, _search_shapes, _search_backward, lambda given, out: (*given[:2], out[1]))


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Score each half of a query against its sub-keys, in at least float32.

    Args:
        query: (N, H, 2, D).
        keys: (H, 2, S, D).

    Returns:
        (N, H, 2, S); the halves of a head lie together in memory, token by token.
    """
    dtype = torch.promote_types(compute_dtype(query.dtype), compute_dtype(keys.dtype))
    query, keys = query.to(dtype), keys.to(dtype)
    with without_autocast(query.device):
        by_half = query.permute(1, 2, 0, 3) @ keys.transpose(-1, -2)  # (H, 2, N, S)
    return by_half.permute(2, 0, 1, 3)


def slot_of(index1: Tensor, index2: Tensor, n_keys: int) -> Tensor:
    """The slot of a pair of sub-keys; this formula is nowhere else."""
    return index1 * n_keys + index2


def draw_kept_keys(heads: int, n_keys: int, n_kept: int, device: torch.device) -> Tensor:
    """Draw the sub-keys that stay in the search, separately for each head and half.

    Returns:
        (H, 2, n_kept), int64, indices of sub-keys.
    """
    return torch.rand(heads, 2, n_keys, device=device).argsort(dim=-1)[..., :n_kept]


def product_topk_of(query: Tensor, keys: Tensor, kept: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    """Like ``product_topk``, but only among slots whose sub-keys are both kept.

    Args:
        query: (N, H, 2, D).
        keys: sub-keys, (H, 2, S, D).
        kept: (H, 2, S'), indices of sub-keys, as ``draw_kept_keys`` draws them.
        knn: number of slots per head, at most S'.

    Returns:
        Scores and slots, each (N, H, K); slots are those of the whole memory.
    """
    heads, _, n_kept = kept.shape
    scores, found = product_topk(query, keys.take_along_dim(kept[..., None], dim=2), knn)
    head = torch.arange(heads, device=kept.device)[:, None]  # (H, 1)
    index1 = kept[head, 0, found // n_kept]  # (N, H, K)
    index2 = kept[head, 1, found % n_kept]
    return scores, slot_of(index1, index2, keys.shape[2])


def candidate_ranks(knn: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """The pairs of ranks (i, j) with (i + 1)(j + 1) <= knn, as two index vectors."""
    return _kept_ranks(knn, device) if is_plain() else _new_ranks(knn, device)


@lru_cache(maxsize=64)
def _kept_ranks(knn: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Like ``candidate_ranks``, but cached, so that a GPU need not receive them per batch."""
    with torch.inference_mode(False), torch._C.DisableTorchFunction():  # usable in any context
        return _new_ranks(knn, device)


def _new_ranks(knn: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    pairs = [(i, j) for i in range(knn) for j in range(knn // (i + 1))]
    ranks = torch.tensor(pairs, device=device)
    return ranks[:, 0].contiguous(), ranks[:, 1].contiguous()


def _check_scores(scores: Tensor, query: Tensor, keys: Tensor) -> None:
    """Refuse scores (N, H, K), descending, whose softmax is NaN; query (N, H, 2, D)."""
    best = scores[..., 0]  # NaN if any score is NaN
    if best.isfinite().all():
        return
    n_nan, n_infinite = int(best.isnan().sum()), int(best.isinf().sum())
    counts = (n_nan, "NaN"), (n_infinite, "infinite")
    found = " and ".join(f"{n} are {kind}" for n, kind in counts if n)
    n_queries = int((~query.isfinite()).flatten(1).any(dim=1).sum())
    n_keys = int((~keys.isfinite()).any(dim=-1).sum())
    reason = (
        f"{n_queries} of {len(query)} queries and {n_keys} of {keys[..., 0].numel()} sub-keys are "
        "not finite, has the training diverged?"
        if n_queries + n_keys
        else f"queries reach {float(query.abs().max()):.1e} and sub-keys "
        f"{float(keys.abs().max()):.1e}, too large for {str(keys.dtype).removeprefix('torch.')}"
    )
    raise ValueError(f"of {best.numel()} best scores {found}: {reason}")


def _check_search(query: Tensor, keys: Tensor, knn: int) -> None:
    if keys.dim() != 4 or keys.shape[1] != 2:
        raise ValueError(
            f"keys have shape {tuple(keys.shape)}, must be (heads, 2, n_keys, k_dim/2)"
        )
    heads, _, n_keys, half_dim = keys.shape
    if query.dim() < 3 or tuple(query.shape[-3:]) != (heads, 2, half_dim):
        raise ValueError(
            f"query has shape {tuple(query.shape)}, must end in ({heads}, 2, {half_dim}) "
            f"to fit keys of shape {tuple(keys.shape)}"
        )
    if not 1 <= knn <= n_keys:
        raise ValueError(f"knn is {knn}, must be between 1 and n_keys, which is {n_keys}")
