"""How much of a memory is used: counters that merge, and what they say."""

import math
from typing import Dict, Optional, Union

import torch
from torch import Tensor


class MemoryUsage:
    """Counts which slots were read, how often, how strongly, and as somebody's first choice.

    Counters of parts of a data set, or of several workers, merge into those of the whole.

    Args:
        n_slots: slots of the memory.
        heads: heads of the memory.

    Attributes:
        tokens: real tokens counted.
        knn: slots read per head; None before the first update.
        top1_count: (n_slots,), int64: reads as the highest-scoring slot of a head.
        read_count: (n_slots,), int64: reads at any rank.
        read_mass: (n_slots,), float64: accumulated softmax weight.
    """

    def __init__(self, n_slots: int, heads: int) -> None:
        self.n_slots = n_slots
        self.heads = heads
        self.tokens = 0
        self.knn: Optional[int] = None
        self.top1_count = torch.zeros(n_slots, dtype=torch.int64)
        self.read_count = torch.zeros(n_slots, dtype=torch.int64)
        self.read_mass = torch.zeros(n_slots, dtype=torch.float64)

    @torch.no_grad()
    def update(self, slots: Tensor, weights: Tensor, padding_mask: Optional[Tensor] = None) -> None:
        """Count one look-up.

        Args:
            slots: (..., H, K), the highest score first.
            weights: (..., H, K).
            padding_mask: (...), True at padding, which is not counted.

        Raises:
            ValueError: shapes do not fit, K differs from earlier updates, or a slot that is
                no padding is out of range.
        """
        self._check_update(slots, weights, padding_mask)
        if padding_mask is not None:
            slots, weights = slots[~padding_mask.bool()], weights[~padding_mask.bool()]
        slots = slots.reshape(-1, *slots.shape[-2:])  # (N, H, K)
        if slots.numel():
            low, high = int(slots.min()), int(slots.max())
            if low < 0 or high >= self.n_slots:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"slot {wrong} is out of range, must be in [0, {self.n_slots}); "
                    "slot -1 stands at padding: pass the padding_mask"
                )
        self.to(slots.device)
        self.tokens += len(slots)
        self.knn = slots.shape[-1]
        flat = slots.flatten()
        self.top1_count += torch.bincount(slots[..., 0].flatten(), minlength=self.n_slots)
        self.read_count += torch.bincount(flat, minlength=self.n_slots)
        self.read_mass += torch.bincount(flat, weights.flatten().double(), self.n_slots)

    def merge(self, other: "MemoryUsage") -> "MemoryUsage":
        """Add the counts of ``other`` to this one, and return this one.

        Raises:
            ValueError: the other counts a memory of another shape.
        """
        ours, theirs = (self.n_slots, self.heads), (other.n_slots, other.heads)
        if ours != theirs or (None not in (self.knn, other.knn) and self.knn != other.knn):
            raise ValueError(
                f"cannot merge usage of (n_slots, heads, knn) = {(*theirs, other.knn)} "
                f"into {(*ours, self.knn)}"
            )
        self.to(other.read_count.device)
        self.tokens += other.tokens
        self.knn = other.knn if self.knn is None else self.knn
        self.top1_count += other.top1_count
        self.read_count += other.read_count
        self.read_mass += other.read_mass
        return self

    def summary(self) -> Dict[str, Union[int, float]]:
        """What the counts say.

        Returns:
            ``n_slots``, ``tokens``; ``top1_usage`` and ``topk_usage``: share of slots that were
            a first choice, and that received weight (Kim & Jung 2020, by a
            secondary source; Lample et al. 2019);
            ``top1_ceiling`` and ``topk_ceiling``: the usage that uniform random routing of as
            many tokens is expected to reach; ``dead_slots``: slots that received no weight;
            ``kl_weighted`` and ``kl_unweighted``: divergence of the weight, and of the read
            counts, from uniform, in nats (Lample et al. 2019); ``gini`` of the weight;
            ``slots_50``, ``slots_90``, ``slots_99``: fewest slots that hold that percentage
            of the weight.

        Raises:
            ValueError: no token was counted.
        """
        if not self.tokens or self.knn is None:
            raise ValueError("memory usage of 0 tokens says nothing: count at least one token")
        used = int((self.read_mass > 0).sum())
        queries = self.tokens * self.heads
        ascending = self.read_mass.sort().values
        held = ascending.flip(0).cumsum(0) / ascending.sum()
        return {
            "n_slots": self.n_slots,
            "tokens": self.tokens,
            "top1_usage": int((self.top1_count > 0).sum()) / self.n_slots,
            "topk_usage": used / self.n_slots,
            "top1_ceiling": uniform_ceiling(queries, self.n_slots),
            "topk_ceiling": uniform_ceiling(queries * self.knn, self.n_slots),
            "dead_slots": self.n_slots - used,
            "kl_weighted": kl_from_uniform(self.read_mass),
            "kl_unweighted": kl_from_uniform(self.read_count),
            "gini": gini(ascending),
            **{
                f"slots_{percent}": min(int((held < percent / 100).sum()) + 1, self.n_slots)
                for percent in (50, 90, 99)
            },
        }

    def to(self, device: torch.device) -> "MemoryUsage":
        """Move the counters to a device, and return this object."""
        self.top1_count = self.top1_count.to(device)
        self.read_count = self.read_count.to(device)
        self.read_mass = self.read_mass.to(device)
        return self

    def _check_update(self, slots: Tensor, weights: Tensor, padding_mask: Optional[Tensor]) -> None:
        if slots.dim() < 2 or slots.shape[-2] != self.heads:
            raise ValueError(
                f"slots have shape {tuple(slots.shape)}, must end in (heads, knn) "
                f"with heads = {self.heads}"
            )
        if weights.shape != slots.shape:
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}, must be that of the slots, "
                f"{tuple(slots.shape)}"
            )
        if padding_mask is not None and padding_mask.shape != slots.shape[:-2]:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)}, "
                f"must be {tuple(slots.shape[:-2])} to fit the slots"
            )
        if self.knn not in (None, slots.shape[-1]):
            raise ValueError(f"slots have knn = {slots.shape[-1]}, earlier ones had {self.knn}")


def uniform_ceiling(queries: int, n_slots: int) -> float:
    """Expected share of slots hit by Q uniform random draws, ``1 - exp(-Q / n_slots)``."""
    return -math.expm1(-queries / n_slots)


def kl_from_uniform(counts: Tensor) -> float:
    """KL divergence in nats of normalised counts from uniform, ``log n + sum z log z``."""
    z = counts.double() / counts.sum()
    return math.log(len(z)) + float(torch.special.xlogy(z, z).sum())


def gini(ascending: Tensor) -> float:
    """Gini coefficient of non-negative masses, sorted ascending: 0 equal, near 1 one holds all."""
    n = len(ascending)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=ascending.device)
    return float(((2 * rank - n - 1) * ascending).sum() / (n * ascending.sum()))
