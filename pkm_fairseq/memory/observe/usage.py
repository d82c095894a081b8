"""Memory usage: counters that can be merged, and statistics of them."""

import math
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor

from ..lookup import Observation
from .richness import extrapolated, rarefied, round_draws

DRAWS = 100  # per slot in one count; our choice
HOLDS = (1, 10, 100)  # per cent of the uniform share of weight
TIE = 1e-10  # a share missed by less counts as reached: rounding

COUNTERS = ("top1_count", "read_count", "weightless_count", "read_mass", "top1_weight", "entropy")


class MemoryUsage:
    """Counts how often each slot is read, with which weight, and how often as a first choice.

    Counters of several workers, or of parts of a data set, merge into counters of the whole. It
    can be an observer of a memory.

    Args:
        n_slots: slots of the memory.
        heads: heads of the memory.
        max_tokens: stop after this many tokens; None counts all.

    Attributes:
        tokens: real tokens counted.
        knn: slots read per head; None before the first update.
        top1_count: (H, n_slots), int64: reads as the highest-scoring slot of a head.
        read_count: (H, n_slots), int64: reads at any rank.
        weightless_count: (H, n_slots), int64: of these, reads with a weight of 0, as relu gives.
        read_mass: (H, n_slots), float64: accumulated weight.
        top1_weight: (H,), float64: accumulated share of the first choices in the weight of their
            look-up; 0 where a look-up has no weight.
        entropy: (H,), float64: accumulated entropy of the shares of a look-up, in nats.
    """

    def __init__(self, n_slots: int, heads: int, max_tokens: Optional[int] = None) -> None:
        self.n_slots = n_slots
        self.heads = heads
        self.max_tokens = max_tokens
        self.tokens = 0
        self.knn: Optional[int] = None
        self.top1_count = torch.zeros(heads, n_slots, dtype=torch.int64)
        self.read_count = torch.zeros(heads, n_slots, dtype=torch.int64)
        self.weightless_count = torch.zeros(heads, n_slots, dtype=torch.int64)
        self.read_mass = torch.zeros(heads, n_slots, dtype=torch.float64)
        self.top1_weight = torch.zeros(heads, dtype=torch.float64)
        self.entropy = torch.zeros(heads, dtype=torch.float64)

    @property
    def draws_per_slot(self) -> float:
        """First choices counted, per slot of the memory: tokens x heads / n_slots."""
        return self.tokens * self.heads / self.n_slots

    @property
    def is_full(self) -> bool:
        """Whether ``max_tokens`` were counted."""
        return self.max_tokens is not None and self.tokens >= self.max_tokens

    def counters(self) -> List[Tensor]:
        """All counters that add up, except the number of tokens."""
        return [getattr(self, name) for name in COUNTERS]

    def observe(self, seen: Observation) -> None:
        """Count a look-up, unless ``max_tokens`` were counted."""
        if not self.is_full:
            self.update(seen.slots, seen.weights, seen.padding_mask)

    @torch.no_grad()
    def update(self, slots: Tensor, weights: Tensor, padding_mask: Optional[Tensor] = None) -> None:
        """Count one look-up.

        Args:
            slots: (..., H, K), the highest score first.
            weights: (..., H, K).
            padding_mask: (...), True at padding, which is not counted.

        Raises:
            ValueError: shapes do not fit, K differs from earlier updates, or the slot of a real
                token is out of range.
        """
        self._check_update(slots, weights, padding_mask)
        if padding_mask is not None:
            slots, weights = slots[~padding_mask.bool()], weights[~padding_mask.bool()]
        slots = slots.reshape(-1, *slots.shape[-2:])  # (N, H, K)
        weights = weights.reshape(slots.shape).double()
        if self.max_tokens is not None:
            room = max(0, self.max_tokens - self.tokens)
            slots, weights = slots[:room], weights[:room]
        if slots.numel():
            self._check_range(slots)
        self.to(slots.device)
        self.tokens += len(slots)
        self.knn = slots.shape[-1]
        first = torch.arange(self.heads, device=slots.device)[:, None] * self.n_slots  # (H, 1)
        flat = slots + first  # (N, H, K), each head with slots of its own
        self.top1_count += self._bincount(flat[..., 0])
        self.read_count += self._bincount(flat)
        self.weightless_count += self._bincount(flat[weights == 0])
        self.read_mass += self._bincount(flat, weights)
        total = weights.sum(dim=-1, keepdim=True)  # (N, H, 1), 1 but for relu
        shares = weights / total.masked_fill(total == 0, 1)  # (N, H, K)
        self.top1_weight += shares[..., 0].sum(dim=0)
        self.entropy -= torch.special.xlogy(shares, shares).sum(dim=(0, 2))

    def _bincount(self, flat: Tensor, weights: Optional[Tensor] = None) -> Tensor:
        weights = None if weights is None else weights.flatten()
        counts = torch.bincount(flat.flatten(), weights, self.heads * self.n_slots)
        return counts.view(self.heads, self.n_slots)

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
        for mine, its in zip(self.counters(), other.counters(), strict=True):
            mine += its
        return self

    def summary(self, per_head: bool = True) -> Dict[str, Any]:
        """Statistics of the counts, for the whole memory and for each head.

        Args:
            per_head: False leaves out ``heads``, ``curve`` and ``extrapolation``.

        Returns:
            ``n_slots``, ``tokens``; ``draws_per_slot``: tokens x heads / n_slots, needed to
            interpret any usage; ``top1_usage`` and ``topk_usage``: share of slots that were
            a first choice, and that received weight (Kim & Jung 2020, by a
            secondary source; Lample et al. 2019);
            ``top1_ceiling`` and ``topk_ceiling``: the expected usage under uniform random routing
            of the same number of tokens; ``dead_slots``: slots that received no weight;
            ``holds_1``, ``holds_10``, ``holds_100``: share of slots that received at least that
            percentage of the weight that uniform routing would give each; ``kl_weighted`` and
            ``kl_unweighted``: divergence of the weight, and of the read
            counts, from uniform, in nats (Lample et al. 2019); ``gini`` of the weight;
            ``slots_50``, ``slots_90``, ``slots_99``: fewest slots that hold that percentage
            of the weight; ``top1_weight``: mean weight of a first choice; ``entropy``: mean
            entropy of the weights of one head's look-up, in nats, at most log knn; both of
            weights divided by their sum, which relu does not make 1;
            ``effective_neighbours``: exp of the entropy, at most knn; near knn, all neighbours
            have similar weights, and the first choice means little;
            ``subkey1_usage`` and ``subkey2_usage``: share of the heads' sub-keys of each half
            that received weight, if n_slots is a square; ``curve`` and ``extrapolation``, see
            these methods; ``heads``: for each head all of this
            except ``n_slots``, ``tokens``, ``curve`` and ``extrapolation``.

        Raises:
            ValueError: no token was counted.
        """
        if not self.tokens or self.knn is None:
            raise ValueError("memory usage of 0 tokens says nothing: count at least one token")
        whole = {"n_slots": self.n_slots, "tokens": self.tokens, **self._describe(slice(None))}
        if not per_head:
            return whole
        heads = [self._describe(slice(h, h + 1)) for h in range(self.heads)]
        more = {"curve": self.curve(), "extrapolation": self.extrapolation()}
        return {**whole, **more, "heads": heads}

    def curve(self) -> List[Dict[str, float]]:
        """The expected usage after fewer draws: 1, 3, 10, ... per slot, and all.

        A draw is a query: one head's look-up for one token. The top-1 usage counts its first
        choice, the top-k usage all its ``knn`` reads that have weight. Both usages have the same
        number of draws.

        Returns:
            Ascending, each ``draws_per_slot``, ``top1_usage`` and ``topk_usage``.
        """
        queries = self.tokens * self.heads
        points = round_draws(self.draws_per_slot)
        if not points or points[-1] != self.draws_per_slot:
            points.append(self.draws_per_slot)
        draws = [min(queries, round(x * self.n_slots)) for x in points]
        shares = (rarefied(counts, queries, draws) for counts in self._hits())
        return [
            {"draws_per_slot": x, "top1_usage": top1, "topk_usage": topk}
            for x, top1, topk in zip(points, *shares, strict=True)
        ]

    def extrapolation(self) -> Dict[str, Dict[str, float]]:
        """The estimated usage after unlimited draws, ``top1`` and ``topk``.

        Each is ``usage``, ``error`` and ``coverage`` of
        ``pkm_fairseq.memory.observe.richness.extrapolated``.
        """
        queries, (top1, topk) = self.tokens * self.heads, self._hits()
        return {"top1": extrapolated(top1, queries), "topk": extrapolated(topk, queries)}

    def _hits(self) -> Tuple[Tensor, Tensor]:
        """The number of queries in which each slot was first choice, and got weight: (n_slots,)."""
        return self.top1_count.sum(0), (self.read_count - self.weightless_count).sum(0)

    def _describe(self, heads: slice) -> Dict[str, Union[int, float]]:
        """Statistics of the joint counts of some heads."""
        assert self.knn is not None
        top1, reads = self.top1_count[heads].sum(0), self.read_count[heads].sum(0)  # (n_slots,)
        mass = self.read_mass[heads].sum(0)
        used = int((mass > 0).sum())
        queries = self.tokens * len(self.entropy[heads])
        ascending = mass.sort().values
        entropy = float(self.entropy[heads].sum()) / queries
        return {
            "draws_per_slot": queries / self.n_slots,
            "top1_usage": int((top1 > 0).sum()) / self.n_slots,
            "topk_usage": used / self.n_slots,
            "top1_ceiling": uniform_ceiling(queries, self.n_slots),
            "topk_ceiling": uniform_ceiling(queries * self.knn, self.n_slots),
            "dead_slots": self.n_slots - used,
            "kl_weighted": kl_from_uniform(mass),
            "kl_unweighted": kl_from_uniform(reads),
            "gini": gini(ascending),
            **slots_that_hold(ascending),
            **slots_that_get(mass),
            "top1_weight": float(self.top1_weight[heads].sum()) / queries,
            "entropy": entropy,
            "effective_neighbours": math.exp(entropy),
            **self._subkey_usage(heads),
        }

    def _subkey_usage(self, heads: slice) -> Dict[str, float]:
        n_keys = math.isqrt(self.n_slots)
        if n_keys**2 != self.n_slots:  # not a product-key memory
            return {}
        used = (self.read_mass[heads] > 0).view(-1, n_keys, n_keys)  # (h, S, S), slot i1 * S + i2
        halves = used.any(dim=2), used.any(dim=1)  # each (h, S)
        return {f"subkey{p}_usage": float(half.double().mean()) for p, half in enumerate(halves, 1)}

    def to(self, device: torch.device) -> "MemoryUsage":
        """Move the counters to a device, and return this object."""
        for name in COUNTERS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _check_range(self, slots: Tensor) -> None:
        low, high = int(slots.min()), int(slots.max())
        if low < 0 or high >= self.n_slots:
            wrong = low if low < 0 else high
            raise ValueError(
                f"slot {wrong} is out of range, must be in [0, {self.n_slots}); "
                "slot -1 marks padding: pass the padding_mask"
            )

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


def tokens_for_draws(n_slots: int, heads: int, draws: int = DRAWS) -> int:
    """Fewest tokens that give this many draws per slot.

    Args:
        n_slots: slots of the memory.
        heads: heads of the memory; each has one first choice per token.
        draws: per slot, at least 1.

    Raises:
        ValueError: the draws are out of range.
    """
    if draws < 1:
        raise ValueError(f"draws are {draws} per slot, must be at least 1")
    return -(-draws * n_slots // heads)


def slots_that_get(mass: Tensor) -> Dict[str, float]:
    """Share of slots that hold at least 1, 10 and 100 % of the uniform share, as ``holds_1`` ...

    Like ``slots_that_hold``, it allows for rounding of the sums.

    Args:
        mass: (n_slots,), weight that each slot received.
    """
    shares = mass / mass.mean() * (1 + TIE)
    return {f"holds_{p}": float((shares >= p / 100).double().mean()) for p in HOLDS}


def slots_that_hold(ascending: Tensor) -> Dict[str, int]:
    """Fewest slots that hold 50, 90 and 99 % of the mass, as ``slots_50`` and so on.

    Masses are sums of floating weights, so rounding can make an exact share look too small. A share
    counts as held if at most 1e-10 of it is missing. The sums use multiples of the largest mass:
    for equal slots these are 1, and their sums are exact.

    Args:
        ascending: (n_slots,), sorted; if all are 0, no slot holds anything.
    """
    if ascending[-1] == 0:
        return {f"slots_{percent}": 0 for percent in (50, 90, 99)}
    held = (ascending.flip(0) / ascending[-1]).cumsum(0)  # (n_slots,), by so many slots
    shares = {percent: held[-1] * percent / 100 * (1 - TIE) for percent in (50, 90, 99)}
    return {f"slots_{p}": int((held < share).sum()) + 1 for p, share in shares.items()}


def kl_from_uniform(counts: Tensor) -> float:
    """KL divergence in nats of normalised counts from uniform, ``log n + sum z log z``.

    Without counts it is the maximum, log n, as if one slot had all counts.
    """
    if not counts.any():
        return math.log(len(counts))
    z = counts.double() / counts.sum()
    return math.log(len(z)) + float(torch.special.xlogy(z, z).sum())


def gini(ascending: Tensor) -> float:
    """Gini coefficient of non-negative masses, sorted ascending: 0 if equal, near 1 if one has all.

    Without any mass it is 1.
    """
    if ascending[-1] == 0:
        return 1.0
    n = len(ascending)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=ascending.device)
    return float(((2 * rank - n - 1) * ascending).sum() / (n * ascending.sum()))
