"""A naive implementation of every part of a memory: the reference for tests and validation."""

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
    """Score every slot and keep the best; ``product_topk`` must return the same.

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
    """Weighted sum of values over heads and neighbours; ``ValueTable`` must return the same.

    Args:
        values: (n_slots, V).
        slots: (N, H, K).
        weights: (N, H, K).

    Returns:
        (N, V).
    """
    return (weights[..., None] * values[slots]).sum(dim=(1, 2))


def naive_mlp_query(
    x: Tensor, hidden: Tensor, hidden_bias: Tensor, out: Tensor, out_bias: Tensor
) -> Tensor:
    """A query network with one hidden layer; ``MlpQuery`` must return the same.

    Args:
        x: tokens, (N, input_dim).
        hidden: (input_dim, input_dim), one row per hidden unit.
        hidden_bias: (input_dim,).
        out: (H * k_dim, input_dim), one row per feature of the query.
        out_bias: (H * k_dim,).

    Returns:
        (N, H * k_dim).
    """
    inner = (x[:, None, :] * hidden).sum(-1) + hidden_bias  # (N, input_dim)
    active = torch.where(inner > 0, inner, 0 * inner)
    return (active[:, None, :] * out).sum(-1) + out_bias


def naive_weights(scores: Tensor, activation: str = "softmax", scale: float = 1.0) -> Tensor:
    """Weights of the kept scores, (N, H, K), from scores of that shape."""
    scores = scores * scale
    if activation == "relu":
        return torch.where(scores > 0, scores, 0 * scores)
    exps = (scores - scores.amax(-1, keepdim=True)).exp()
    return exps / exps.sum(-1, keepdim=True)


def naive_linear_output(read: Tensor, projection: Tensor) -> Tensor:
    """``y W``, as ``LinearOutput`` must return it; read (N, V), projection (input_dim, V)."""
    return torch.einsum("nv,iv->ni", read, projection)


def naive_swilu_output(read: Tensor, x: Tensor, gate: Tensor, projection: Tensor) -> Tensor:
    """``(y * silu(x W1)) W2``, as ``SwiluOutput`` must return it.

    Args:
        read: y, (N, V).
        x: tokens, (N, input_dim).
        gate: W1, (V, input_dim), one row per feature of a value.
        projection: W2, (input_dim, V), one row per feature of the output.

    Returns:
        (N, input_dim).
    """
    inner = torch.einsum("ni,vi->nv", x, gate)
    return torch.einsum("nv,iv->ni", read * inner / (1 + (-inner).exp()), projection)


def naive_experts(down: Tensor, up: Tensor, slots: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """``sum of weight * gelu(u . x) * v``, as ``Experts`` must return it.

    Args:
        down: the vectors u, (n_slots, input_dim).
        up: the vectors v, (n_slots, V).
        slots: (N, H, K).
        weights: (N, H, K).
        x: tokens, (N, input_dim).

    Returns:
        (N, V).
    """
    return naive_read(up, slots, weights * gelu(naive_dot(down, slots, x)))


def naive_dot(values: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """Dot products of the values of slots (N, H, K) with x (N, V): (N, H, K)."""
    return (values[slots] * x[:, None, None, :]).sum(-1)


def gelu(x: Tensor) -> Tensor:
    """x times the standard normal distribution function of x."""
    return x * 0.5 * torch.erfc(-x / 2**0.5)
