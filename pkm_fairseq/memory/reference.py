"""Search and read in the plainest code: the oracle of the tests and of the validation."""

from typing import Tuple

import torch
from torch import Tensor


def full_keys(keys: Tensor) -> Tensor:
    """All n_slots keys of each head: the concatenation of every pair of sub-keys.

    Args:
        keys: sub-keys, (H, 2, S, D).

    Returns:
        (H, S * S, 2 * D), slot ``i1 * S + i2`` at row ``i1 * S + i2``.
    """
    heads, _, n_keys, half_dim = keys.shape
    first = keys[:, 0, :, None, :].expand(heads, n_keys, n_keys, half_dim)
    second = keys[:, 1, None, :, :].expand(heads, n_keys, n_keys, half_dim)
    return torch.cat([first, second], dim=-1).reshape(heads, n_keys**2, 2 * half_dim)


def naive_topk(query: Tensor, keys: Tensor, knn: int) -> Tuple[Tensor, Tensor]:
    """Score every slot, keep the best: what ``product_topk`` must equal.

    Args:
        query: (N, H, 2, D).
        keys: (H, 2, S, D).
        knn: slots to keep, K.

    Returns:
        Scores and slots, each (N, H, K), scores descending.
    """
    all_scores = torch.einsum("nhd,hmd->nhm", query.flatten(2), full_keys(keys))  # (N, H, S * S)
    top = all_scores.topk(knn, dim=-1)
    return top.values, top.indices


def naive_read(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values over heads and neighbours: what ``ValueTable`` must equal.

    Args:
        values: (n_slots, V).
        slots: (N, H, K).
        weights: (N, H, K).

    Returns:
        (N, V).
    """
    return (weights[..., None] * values[slots]).sum(dim=(1, 2))
