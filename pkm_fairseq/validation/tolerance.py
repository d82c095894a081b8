"""Tolerances of the verdict: how far two correct float32 computations can differ.

A floating-point dot product of length n with unit roundoff u, in any order of summation, has an
error of at most ``gamma(n) * sum |x_i y_i|`` with ``gamma(n) = n u / (1 - n u)`` (Higham 2002,
section 3.1).
"""

import torch
from torch import Tensor

FLOAT64 = torch.finfo(torch.float64)
UNIT = 2.0**-24  # of float32
EXP_ERROR = 8 * UNIT  # exp and the division in a softmax; our choice, several times their error


def gamma(n: int) -> float:
    """Bound of the relative error of n rounded operations in float32."""
    return n * UNIT / (1 - n * UNIT)


def score_tolerance(query: Tensor, keys: Tensor) -> Tensor:
    """How far two correct lists of best scores can differ.

    A score is a dot product of length ``2 * D``. Its error is at most ``e = gamma(2 * D)`` times
    the largest ``sum |q_i k_i|`` of any slot. Two computations differ by up to 2 e, and each may
    prefer a slot that is truly up to 2 e worse: 4 e in total.

    Args:
        query: queries of one head, (N, 2, D).
        keys: sub-keys of one head, (2, S, D).

    Returns:
        (N, 1), float64.
    """
    query, keys = query.double().abs().cpu(), keys.double().abs().cpu()
    first, second = ((query[:, p] @ keys[p].t()).amax(1) for p in (0, 1))  # (N,), (N,)
    k_dim = 2 * keys.shape[2]
    return (4 * gamma(k_dim) * (first + second) + k_dim * torch.finfo(torch.float32).tiny)[:, None]


def weight_tolerance(score_tolerance: Tensor, knn: int) -> Tensor:
    """Relative error of softmax weights, given ``score_tolerance``.

    Errors of e in the scores, and again in subtracting the largest, change a softmax by a factor of
    at most ``exp(4 e)``. The exponentials and their sum over K are also rounded.
    """
    of_scores = torch.expm1(score_tolerance).clamp(max=FLOAT64.max)  # huge scores
    return of_scores + gamma(knn) + EXP_ERROR
