"""The slots and weights of a look-up, for callers and for observers."""

from functools import cached_property
from typing import NamedTuple, Optional, Protocol

from torch import Tensor

from .run import RunState


class Lookup(NamedTuple):
    """A look-up for callers: usage counts, validation and plots; no gradient.

    The tensors own their memory.

    Attributes:
        slots: (..., H, K), int64, the highest score first; -1 at padding.
        weights: (..., H, K), sum to 1 over K under softmax; 0 at padding.
    """

    slots: Tensor
    weights: Tensor


class Observation:
    """A look-up for observers; no gradient.

    The tensors belong to the memory. Observers must not change them, and must copy what they keep.

    Args:
        x: as below.
        padding_mask: as below.
        slots: (N, H, K), of real tokens, or of all.
        weights: (N, H, K), of the same tokens.
        training: as below.
        run: as below.

    Attributes:
        x: (..., input_dim), the memory's input; arbitrary at padding.
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
        """(..., H, K), sum to 1 over K under softmax; 0 at padding."""
        return self._as_x(self._weights, 0)

    def lookup(self) -> Lookup:
        """A look-up to keep: a copy, independent of the tensors that autograd saved."""
        if self.padding_mask is None:
            return Lookup(self.slots.clone(), self.weights.clone())
        return Lookup(self._as_x(self._slots, -1), self._as_x(self._weights, 0))

    def _as_x(self, rows: Tensor, fill: int) -> Tensor:
        real = None if self.padding_mask is None else ~self.padding_mask.reshape(-1).bool()
        return restore(rows, real, fill).view(*self.x.shape[:-1], *rows.shape[1:])


class Observer(Protocol):
    """Observes a memory: a memory calls each of its ``observers`` with every look-up.

    It skips dummy batches, and the second forward pass of activation checkpointing.
    """

    def observe(self, seen: Observation) -> None:
        """Receive a look-up."""


def restore(rows: Tensor, real: Optional[Tensor], fill: int) -> Tensor:
    """Put the rows of real tokens (N, ...) back among padding (all, ...), which gets ``fill``.

    Returns:
        ``rows`` itself if there is no padding, else a new tensor.
    """
    if real is None:
        return rows
    if len(rows) == len(real):  # nothing was dropped
        padding = ~real.view(-1, *[1] * (rows.dim() - 1))
        return rows.masked_fill(padding, fill)
    restored = rows.new_full((len(real), *rows.shape[1:]), fill)
    return restored.index_put((real,), rows)
