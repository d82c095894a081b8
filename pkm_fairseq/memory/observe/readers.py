"""Which symbols read some slots of a memory, and where."""

from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..lookup import Observation


class Place(NamedTuple):
    """The place where a symbol read a slot with the largest weight."""

    weight: float
    sequence: int
    position: int


class SlotReaders:
    """An observer that counts which symbols read some slots of its memory.

    Call ``begin`` with the symbols of each batch before the memory reads the batch.

    Args:
        slots: the slots to watch, (R,).
        n_slots: slots of the memory.
        n_symbols: size of the dictionary.

    Attributes:
        reads: (R, n_symbols), int64: reads by any head.
        weight: (R, n_symbols), float64: accumulated softmax weight.
        best: by rank of the slot and symbol, the place of the read with the largest weight.
    """

    def __init__(self, slots: Tensor, n_slots: int, n_symbols: int) -> None:
        self.slots = slots.to("cpu", copy=True)
        self.rank = torch.full((n_slots,), -1)
        self.rank[self.slots] = torch.arange(len(slots))
        self.n_symbols = n_symbols
        self.reads = torch.zeros(len(slots), n_symbols, dtype=torch.int64)
        self.weight = torch.zeros(len(slots), n_symbols, dtype=torch.float64)
        self.best: Dict[Tuple[int, int], Place] = {}
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (T, B)
        self._n_sequences = self._first = 0

    def begin(self, batch: Tensor) -> None:
        """Set the token ids, (B, T), of the next look-up."""
        self._tokens = batch.t().to("cpu", copy=True)
        self._first = self._n_sequences
        self._n_sequences += len(batch)

    def observe(self, seen: Observation) -> None:
        """Count a look-up of the current batch."""
        self.update(seen.slots, seen.weights, seen.padding_mask)

    def update(self, slots: Tensor, weights: Tensor, padding_mask: Optional[Tensor] = None) -> None:
        """Count one look-up of the current batch.

        Args:
            slots: (T, B, H, K).
            weights: (T, B, H, K).
            padding_mask: (T, B), True at padding.
        """
        rank = self.rank[slots.cpu().clamp(min=0)]  # (T, B, H, K)
        if padding_mask is not None:
            rank[padding_mask.cpu().bool()] = -1
        at = (rank >= 0).nonzero()  # (n, 4)
        time, row = at[:, 0], at[:, 1]
        weight = weights.cpu()[tuple(at.t())].double()  # (n,)
        key = rank[tuple(at.t())] * self.n_symbols + self._tokens[time, row]
        self.reads.view(-1).index_add_(0, key, torch.ones_like(key))
        self.weight.view(-1).index_add_(0, key, weight)
        heaviest = weight.argsort(descending=True)
        keys, first = np.unique(key[heaviest].numpy(), return_index=True)
        for where, i in zip(keys.tolist(), heaviest[first].tolist(), strict=True):
            place = Place(float(weight[i]), self._first + int(row[i]), int(time[i]))
            known = self.best.get(divmod(where, self.n_symbols))
            if known is None or place.weight > known.weight:
                self.best[divmod(where, self.n_symbols)] = place
