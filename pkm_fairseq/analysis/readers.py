"""Which tokens read the hottest slots of a memory, and in which contexts."""

from typing import Any, Dict, List, Sequence

from fairseq.data import Dictionary
from torch import Tensor

from ..memory.observe.readers import Place, SlotReaders
from .checkpoints import is_made_of_pieces, joined, shown

TOKENS, CONTEXTS = 8, 4  # shown of each slot
AROUND = 8  # symbols of context on each side


def describe_readers(
    readers: SlotReaders, mass: Tensor, sequences: Sequence[Tensor], dictionary: Dictionary
) -> List[Dict[str, Any]]:
    """Describe which tokens read each watched slot.

    Args:
        readers: the counts.
        mass: weight of each slot of the memory, (n_slots,).
        sequences: the token ids, each (T,).
        dictionary: the dictionary of these ids.

    Returns:
        For each slot ``slot``; ``times_uniform``, its weight as a multiple of uniform;
        ``symbols``, the number of different symbols that read it; ``readers``, the heaviest with
        ``token``, ``reads`` and ``weight_share``; ``contexts``, the strongest read of each of
        the first readers, with ``before``, ``token``, ``after`` and its ``weight``.
    """
    has_pieces = is_made_of_pieces(dictionary)
    multiples = times_uniform(mass)
    found = []
    for rank, slot in enumerate(readers.slots.tolist()):
        weight = readers.weight[rank]
        shares = weight / weight.sum() if weight.any() else weight  # relu reads with weight 0
        order = weight.argsort(descending=True, stable=True)[:TOKENS]
        symbols = [symbol for symbol in order.tolist() if readers.reads[rank, symbol]]
        contexts = [
            _context(readers.best[rank, symbol], sequences, dictionary, has_pieces)
            for symbol in symbols[:CONTEXTS]
        ]
        found.append(
            {
                "slot": slot,
                "times_uniform": float(multiples[slot]),
                "symbols": int((readers.reads[rank] > 0).sum()),
                "readers": [
                    {
                        "token": shown(dictionary[symbol], has_pieces),
                        "reads": int(readers.reads[rank, symbol]),
                        "weight_share": float(shares[symbol]),
                    }
                    for symbol in symbols
                ],
                "contexts": contexts,
            }
        )
    return found


def times_uniform(mass: Tensor) -> Tensor:
    """Weights of slots as multiples of uniform use, (n_slots,); 0 if no slot has any weight."""
    return mass / mass.mean() if mass.any() else mass


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
