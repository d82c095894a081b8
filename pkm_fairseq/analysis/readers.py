"""Which tokens read the hottest slots of a memory, and in which contexts."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor

from .checkpoints import is_made_of_pieces, joined, shown

TOKENS, CONTEXTS = 8, 4  # shown of each slot
AROUND = 8  # symbols of context on each side


class Place(NamedTuple):
    """Where a slot was read most strongly by a symbol."""

    weight: float
    sequence: int
    position: int


class SlotReaders:
    """Counts which symbols read some slots; takes look-ups as ``MemoryUsage`` does.

    Args:
        slots: the slots to watch, (R,).
        n_slots: slots of the memory.
        n_symbols: size of the dictionary.

    Attributes:
        reads: (R, n_symbols), int64: reads by any head.
        weight: (R, n_symbols), float64: accumulated softmax weight.
        best: by rank of the slot and symbol, where it was read with the largest weight.
    """

    def __init__(self, slots: Tensor, n_slots: int, n_symbols: int) -> None:
        self.slots = slots.cpu()
        self.rank = torch.full((n_slots,), -1)
        self.rank[self.slots] = torch.arange(len(slots))
        self.n_symbols = n_symbols
        self.reads = torch.zeros(len(slots), n_symbols, dtype=torch.int64)
        self.weight = torch.zeros(len(slots), n_symbols, dtype=torch.float64)
        self.best: Dict[Tuple[int, int], Place] = {}
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (T, B)
        self._n_sequences = self._first = 0

    def begin(self, batch: Tensor) -> None:
        """Be told the token ids, (B, T), of the look-up that comes next."""
        self._tokens = batch.t().cpu()
        self._first = self._n_sequences
        self._n_sequences += len(batch)

    def update(self, slots: Tensor, weights: Tensor, padding_mask: Optional[Tensor] = None) -> None:
        """Count one look-up of the batch that was begun.

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


def describe_readers(
    readers: SlotReaders, mass: Tensor, sequences: Sequence[Tensor], dictionary: Dictionary
) -> List[Dict[str, Any]]:
    """What is read from each watched slot.

    Args:
        readers: what was counted.
        mass: weight that each slot of the memory received, (n_slots,).
        sequences: the token ids that were read, each (T,).
        dictionary: of these ids.

    Returns:
        For each slot ``slot``; ``times_uniform``, its weight as a multiple of uniform;
        ``symbols``, how many different ones read it; ``readers``, the heaviest ones with
        ``token``, ``reads`` and ``weight_share``; ``contexts``, the strongest read of each of
        the first readers, with ``before``, ``token``, ``after`` and its ``weight``.
    """
    has_pieces = is_made_of_pieces(dictionary)
    found = []
    for rank, slot in enumerate(readers.slots.tolist()):
        weight = readers.weight[rank]
        order = weight.argsort(descending=True, stable=True)[:TOKENS]
        symbols = [symbol for symbol in order.tolist() if readers.reads[rank, symbol]]
        contexts = [
            _context(readers.best[rank, symbol], sequences, dictionary, has_pieces)
            for symbol in symbols[:CONTEXTS]
        ]
        found.append(
            {
                "slot": slot,
                "times_uniform": float(mass[slot] / mass.mean()),
                "symbols": int((readers.reads[rank] > 0).sum()),
                "readers": [
                    {
                        "token": shown(dictionary[symbol], has_pieces),
                        "reads": int(readers.reads[rank, symbol]),
                        "weight_share": float(weight[symbol] / weight.sum()),
                    }
                    for symbol in symbols
                ],
                "contexts": contexts,
            }
        )
    return found


def _context(
    place: Place, sequences: Sequence[Tensor], dictionary: Dictionary, has_pieces: bool
) -> Dict[str, Any]:
    symbols = [dictionary[index] for index in sequences[place.sequence].tolist()]
    at = place.position
    before, after = symbols[max(0, at - AROUND) : at], symbols[at + 1 : at + 1 + AROUND]
    starts_word = [not has_pieces or s[:1] in "\u2581<" for s in (symbols[at], *after[:1])]
    return {
        "before": joined(before, has_pieces) + " " * starts_word[0],
        "token": joined([symbols[at]], has_pieces),
        "after": " " * any(starts_word[1:]) + joined(after, has_pieces),
        "weight": place.weight,
    }
