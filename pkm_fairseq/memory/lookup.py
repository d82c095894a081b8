"""What a memory looked up, as it is handed out and as observers are shown it."""

from functools import cached_property
from typing import NamedTuple, Optional, Protocol

from torch import Tensor

from .run import RunState


class Lookup(NamedTuple):
    """What a memory looked up, for usage counts, validation and plots; no gradient.

    The tensors are the caller's own.

    Attributes:
        slots: (..., H, K), int64, the highest score first; -1 at padding.
        weights: (..., H, K), sum to 1 over K; 0 at padding.
    """

    slots: Tensor
    weights: Tensor


class Observation:
    """A look-up as observers are shown it; no gradient.

    The tensors are the memory's: an observer changes none of them, and copies what it keeps.

    Args:
        x: as below.
        padding_mask: as below.
        slots: (N, H, K), of real tokens, or of all.
        weights: (N, H, K), of the same tokens.
        training: as below.
        run: as below.

    Attributes:
        x: (..., input_dim), what the memory was given; at padding it may be anything.
        padding_mask: (...), True at padding; None means that all are tokens.
        training: whether the memory is in training mode.
        run: the state of the run.
    """

    def __init__(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor],
        slots: Tensor,
        weights: Tensor,
        training: bool,
        run: RunState,
    ) -> None:
        self.x = x.detach()
        self.padding_mask = padding_mask
        self.training = training
        self.run = run
        self._slots, self._weights = slots, weights.detach()

    @cached_property
    def slots(self) -> Tensor:
        """(..., H, K), int64, the highest score first; -1 at padding."""
        return self._as_x(self._slots, -1)

    @cached_property
    def weights(self) -> Tensor:
        """(..., H, K), sum to 1 over K; 0 at padding."""
        return self._as_x(self._weights, 0)

    def lookup(self) -> Lookup:
        """A look-up to keep: its memory is its own, and no part of what autograd saved."""
        if self.padding_mask is None:
            return Lookup(self.slots.clone(), self.weights.clone())
        return Lookup(self._as_x(self._slots, -1), self._as_x(self._weights, 0))

    def _as_x(self, rows: Tensor, fill: int) -> Tensor:
        real = None if self.padding_mask is None else ~self.padding_mask.reshape(-1).bool()
        return restore(rows, real, fill).view(*self.x.shape[:-1], *rows.shape[1:])


class Observer(Protocol):
    """Looks on at a memory: what stands in its ``observers`` is shown each of its look-ups.

    Dummy batches are not shown, nor is the second pass of a batch that activation checkpointing
    does in backward.
    """

    def observe(self, seen: Observation) -> None:
        """Be shown a look-up."""


def restore(rows: Tensor, real: Optional[Tensor], fill: int) -> Tensor:
    """Put the rows of real tokens (N, ...) back among padding (all, ...), which gets ``fill``.

    Returns:
        The very rows if there is no padding, else new memory.
    """
    if real is None:
        return rows
    if len(rows) == len(real):  # nothing was dropped
        padding = ~real.view(-1, *[1] * (rows.dim() - 1))
        return rows.masked_fill(padding, fill)
    restored = rows.new_full((len(real), *rows.shape[1:]), fill)
    return restored.index_put((real,), rows)
