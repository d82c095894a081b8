"""From queries and sub-keys to the exact top-k slots (Lample et al. 2019)."""

from functools import lru_cache
from typing import Tuple

import torch
from torch import Tensor


def product_topk(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    """Find the ``knn`` slots with the highest scores, exactly.

    A slot is a pair of sub-keys, its score the sum of the two half scores. Sort each half
    in descending order: the pair of ranks (i, j) is beaten or equalled by the
    (i + 1)(j + 1) - 1 other pairs at ranks (<= i, <= j), so only pairs with
    (i + 1)(j + 1) <= knn can matter: 119 candidates for knn = 32 instead of 1,024.
    Rounding is monotone, so this holds in floating point too.

    Args:
        query: (..., H, 2, D), any floating dtype.
        keys: sub-keys, (H, 2, S, D).
        knn: number of slots per head, K, with 1 <= K <= S.

    Returns:
        Scores and slots, each (..., H, K), scores descending. Scores are in float32, or in
        float64 if query or keys are. Slots are int64, ``i1 * S + i2``. Which of several slots
        with equal scores is kept is not specified.

    Raises:
        ValueError: shapes do not fit, or knn is out of range.
    """
    _check_search(query, keys, knn)
    n_keys = keys.shape[2]
    top, index = half_scores(query, keys).topk(knn, dim=-1)  # (..., H, 2, K), descending
    rank1, rank2 = candidate_ranks(knn, top.device)  # (C,), (C,)
    candidate_scores = top[..., 0, :].index_select(-1, rank1) + top[..., 1, :].index_select(
        -1, rank2
    )  # (..., H, C)
    scores, best = candidate_scores.topk(knn, dim=-1)  # (..., H, K)
    index1 = index[..., 0, :].gather(-1, rank1[best])  # (..., H, K)
    index2 = index[..., 1, :].gather(-1, rank2[best])  # (..., H, K)
    return scores, slot_of(index1, index2, n_keys)


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Score each half of a query against its sub-keys, in at least float32.

    Args:
        query: (..., H, 2, D).
        keys: (H, 2, S, D).

    Returns:
        (..., H, 2, S).
    """
    dtype = torch.promote_types(at_least_float32(query).dtype, at_least_float32(keys).dtype)
    query, keys = query.to(dtype), keys.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        return torch.einsum("...hpd,hpsd->...hps", query, keys)


def slot_of(index1: Tensor, index2: Tensor, n_keys: int) -> Tensor:
    """The slot of a pair of sub-keys; the only place where this is written."""
    return index1 * n_keys + index2


@lru_cache(maxsize=64)
def candidate_ranks(knn: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """The pairs of ranks (i, j) with (i + 1)(j + 1) <= knn, as two index vectors."""
    pairs = [(i, j) for i in range(knn) for j in range(knn // (i + 1))]
    with torch.inference_mode(False):  # cached: must also be usable under autograd
        ranks = torch.tensor(pairs, device=device)
        return ranks[:, 0].contiguous(), ranks[:, 1].contiguous()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


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
