"""How many slots would fewer or more draws hit? Rarefaction and extrapolation.

Ecology asks the same: how many species would a smaller sample find, and how many exist? Slots are
species, and draws are individuals.
"""

from typing import Dict, List, Sequence

import torch
from torch import Tensor


def rarefied(counts: Tensor, draws: int, smaller: Sequence[int]) -> List[float]:
    """Expected share of slots hit by a random subset of the counted draws.

    The expectation is over all ways to choose m of N draws:
    ``sum_i 1 - C(N - n_i, m) / C(N, m)`` (Hurlbert 1971). It needs only the counts, so it does not
    depend on the order of the draws. It is exact at m = N.

    Args:
        counts: (n_slots,), in how many of the draws each slot was hit.
        draws: N. A draw may hit several slots, each once; choosing a draw then chooses all its
            slots (Colwell et al. 2012, sample-based rarefaction).
        smaller: values of m, each at most N.

    Returns:
        A share of the slots for each m.

    Raises:
        ValueError: an m is not in 0..N.
    """
    for m in smaller:
        if not 0 <= m <= draws:
            raise ValueError(f"{m} draws cannot be chosen of {draws}")
    sizes, slots = torch.unique(counts, return_counts=True)  # few different counts
    missed_by = draws - sizes.double()  # (counts,), draws that do not hit the slot
    total = torch.tensor(float(draws), dtype=torch.float64, device=counts.device)
    shares = []
    for m in smaller:
        log_missed = _log_choose(missed_by, m) - _log_choose(total, m)
        missed = torch.where(missed_by < m, torch.zeros_like(missed_by), log_missed.exp())
        shares.append(float(((1 - missed) * slots).sum()) / len(counts))
    return shares


def _log_choose(n: Tensor, m: int) -> Tensor:
    """``log(C(n, m) * m!)``, float64; unused if n < m."""
    return torch.lgamma(n + 1) - torch.lgamma((n - m).clamp_(min=0) + 1)


def extrapolated(counts: Tensor, draws: int) -> Dict[str, float]:
    """Estimate the share of slots that unlimited further draws would hit.

    Chao1 (Chao 1984): ``hit + (N - 1) / N * f1^2 / (2 f2)``, where f1 slots were hit once and f2
    twice; if f2 is 0, ``f1 (f1 - 1) / 2`` replaces ``f1^2 / (2 f2)``. It is a lower bound in
    expectation. It is close if slots without a hit are about as likely as slots with one hit. For
    draws that hit several slots each, it is Chao2 (Chao 1987), which has the same form.

    Args:
        counts: (n_slots,), in how many of the draws each slot was hit.
        draws: N, at least 1.

    Returns:
        ``usage``: the estimated share, at most 1; ``error``: its standard error (Chao 1987);
        ``coverage``: the estimated probability that the next draw hits a slot that was hit before,
        ``1 - f1 / N`` (Good 1953); for draws of several slots, that one of its slots was hit
        before, ``1 - f1 / sum of counts``.
    """
    n_slots = len(counts)
    hit, f1, f2 = (int((counts > 0).sum()), int((counts == 1).sum()), int((counts == 2).sum()))
    a = (draws - 1) / draws
    if f2:
        ratio = f1 / f2
        unseen = a * f1 * ratio / 2
        variance = f2 * (a / 2 * ratio**2 + a**2 * ratio**3 + a**2 / 4 * ratio**4)
    else:
        unseen = a * f1 * (f1 - 1) / 2
        variance = a * f1 * (f1 - 1) / 2 + a**2 * f1 * (2 * f1 - 1) ** 2 / 4
        variance -= a**2 * f1**4 / (4 * (hit + unseen)) if f1 else 0
    return {
        "usage": min(1.0, (hit + unseen) / n_slots),
        "error": max(0.0, variance) ** 0.5 / n_slots,
        "coverage": 1 - f1 / max(1, int(counts.sum())),
    }


def round_draws(most: float) -> List[float]:
    """1, 3, 10, 30, ... draws per slot, up to ``most``."""
    points, step = [], 1
    while step <= most:
        points += [float(x) for x in (step, 3 * step) if x <= most]
        step *= 10
    return points
