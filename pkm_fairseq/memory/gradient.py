"""The gradient of a value table, kept as what it is the product of."""

from typing import Any, List, Optional, Tuple, Type, Union

import torch
from torch import Tensor

from . import kernels
from .collectives import all_gather, all_gather_rows, narrow
from .kernels import Entries, at_least_float32, compute_dtype
from .sharding import ColumnShards


class ValueGradient:
    """The gradient of a value table as factors: which slots were read, how, and to what effect.

    A dense gradient of 512² slots of width 768 takes 805 MB, most of it zeros; the factors of 1,024
    tokens take 6 MB. The table's parameter carries this object as ``value_gradient``, where an
    optimizer finds it.

    Args:
        shards: the workers that the columns of the table are split over; None means that it is
            whole. The factors are then of this worker's columns, and of the tokens of all workers.

    Attributes:
        shards: as given.
        assembled: the whole table, while it is being saved, where it was split.
        scale: its ``.grad`` is what all factors are to be multiplied by. An optimizer lists it
            among its parameters, so that whatever multiplies or resets gradients, as fairseq
            and loss scalers do, reaches the factors. None, the normal state: backward passes
            leave a dense ``.grad`` of the table.
    """

    def __init__(self, shards: Optional[ColumnShards] = None) -> None:
        self.shards = shards
        self.assembled: Optional[Tensor] = None
        self.scale: Optional[Tensor] = None
        self._parts: List[Entries] = []

    @property
    def factored(self) -> bool:
        """Whether backward passes leave factors here instead of a dense ``.grad``."""
        return self.scale is not None

    def __reduce__(self) -> Tuple[Type["ValueGradient"], Tuple[Optional[ColumnShards]]]:
        """A copy, or what is loaded from a file, is dense until an optimizer asks."""
        return ValueGradient, (self.shards,)

    def keep_factors(self, values: Optional[Tensor] = None) -> Tensor:
        """Ask for factors instead of dense gradients.

        From then on every backward pass through a read leaves factors, also one of
        ``torch.autograd.grad`` that does not ask for the gradient of the table.

        Args:
            values: the table, for its dtype and device; None means float32 on the CPU.

        Returns:
            :attr:`scale`, which whoever asks must treat as one of its parameters.
        """
        dtype, device = (None, None) if values is None else (values.dtype, values.device)
        dtype = compute_dtype(dtype or torch.float32)
        self.scale = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        return self.scale

    def __bool__(self) -> bool:
        """Is there any factor?"""
        return bool(self._parts) and self.scale is not None and self.scale.grad is not None

    def add(self, slots: Tensor, weights: Tensor, grad_read: Tensor) -> None:
        """Add what one read contributes: ``gradient[slots[n, t]] += weights[n, t] * grad_read[n]``.

        Args:
            slots: (N, T), int64.
            weights: (N, T).
            grad_read: (N, V).
        """
        n, reads = slots.shape
        bags = torch.arange(n, device=slots.device).repeat_interleave(reads)
        weights = at_least_float32(weights.detach()).flatten()
        grads = at_least_float32(grad_read.detach()).contiguous()
        self._apply_scale()
        self._parts.append(Entries(slots.flatten(), weights, bags, grads))

    def _apply_scale(self) -> None:
        """Multiply the factors by the scale, which is 1 then."""
        assert self.scale is not None, "factors were not asked for"
        scale, self.scale.grad = self.scale.grad, torch.ones_like(self.scale)
        self._parts = [  # none if gradients were reset
            part._replace(weights=part.weights * scale) for part in self._parts if scale is not None
        ]

    def multiply(self, factor: Union[float, Tensor]) -> None:
        """Multiply the gradient, if there is one, in at least float32."""
        if self.scale is not None and self.scale.grad is not None:
            self.scale.grad.mul_(factor)

    def clear(self) -> None:
        """Forget the gradient."""
        self._parts = []
        if self.scale is not None:
            self.scale.grad = None

    def is_finite(self, dense: Optional[Tensor] = None) -> bool:
        """Is the gradient finite, on all workers that hold columns of the table?

        Args:
            dense: (n_slots, V), a gradient to add.
        """
        factors = [] if dense is None else [dense]
        if self:
            assert self.scale is not None and self.scale.grad is not None
            factors += [self.scale.grad, *(x for p in self._parts for x in (p.weights, p.grads))]
        finite = all(bool(torch.stack(x.aminmax()).isfinite().all()) for x in factors if x.numel())
        if self.shards is None:
            return finite
        return self.shards.all_have(finite, None if self.scale is None else self.scale.device)

    def squared_norm(self, values: Tensor) -> float:
        """The squared Euclidean norm of the gradient of all columns.

        Args:
            values: the table, whose ``.grad`` counts, too.
        """
        square = values.new_zeros((), dtype=torch.float64)
        if self or values.grad is not None:
            square = kernels.squared_norm(values, self.entries(values.grad))
        return float(square if self.shards is None else self.shards.sum_(square))

    def entries(self, dense: Optional[Tensor] = None) -> Entries:
        """The gradient in the form that kernels take; there must be one.

        Args:
            dense: (n_slots, V), a gradient to add.
        """
        if self:
            self._apply_scale()
        parts = self._parts if self else []
        if dense is not None:
            rows = (dense != 0).any(dim=1).nonzero().squeeze(1)  # (R,), as if each was read once
            grads = at_least_float32(dense[rows])
            bags = torch.arange(len(rows), device=rows.device)
            parts = [*parts, Entries(rows, grads.new_ones(len(rows)), bags, grads)]
        return _join(parts)

    def average(self, values: Tensor, group: Any = None) -> None:
        """Make this the mean over data-parallel workers, with what is in ``values.grad``.

        Every worker must call it, and each table in the same order.

        Args:
            values: the table.
            group: the process group of all workers; None means all there are.
        """
        if self.shards is not None:  # the factors are a sum over those who share the table
            self.multiply(1 / self.shards.n_shards)
            group = self.shards.replicas
            if group is None:
                return
        self.gather(values, values.grad, group)
        values.grad = None  # what there was is among the factors

    def gather(self, values: Tensor, dense: Optional[Tensor] = None, group: Any = None) -> None:
        """Make this the mean over data-parallel workers, who exchange factors, not tables.

        Every worker must call it, and each table in the same order. Each receives from each other
        one 8 bytes per value read and 4 V + 4 per token, in float32.

        Args:
            values: the table, for its width, dtype and device.
            dense: (n_slots, v_dim), a gradient to add.
            group: the process group of the workers; None means all.
        """
        own = self.entries(dense) if self or dense is not None else _no_entries(values)
        parts = _exchange(own, len(values), group)
        if any(len(part.slots) for part in parts):
            self._apply_scale()
            self._parts = [_join(parts)]
            self.multiply(1 / len(parts))


def _join(parts: List[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    offsets = torch.tensor([len(part.grads) for part in parts]).cumsum(0).tolist()
    bags = [part.bags + offset for part, offset in zip(parts, [0, *offsets], strict=False)]
    return Entries(
        torch.cat([part.slots for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat(bags),
        torch.cat([part.grads for part in parts]),
    )


def _no_entries(values: Tensor) -> Entries:
    none = values.new_empty(0, dtype=torch.int64)
    grads = at_least_float32(values.new_empty(0, values.shape[1]))
    return Entries(none, grads.new_empty(0), none, grads)


def _exchange(own: Entries, n_slots: int, group: Any) -> List[Entries]:
    """Every worker's entries, by worker; how many there are may differ.

    Slots travel as int32. Bags, which ascend, travel as the number of entries of each.
    """
    reads = torch.bincount(own.bags, minlength=len(own.grads))
    sizes = torch.tensor([len(own.slots), len(own.grads)], device=own.slots.device)
    gathered = [size.tolist() for size in all_gather(sizes, group)]
    n_entries, n_bags = (list(column) for column in zip(*gathered, strict=True))
    slots = all_gather_rows(narrow(own.slots, n_slots), n_entries, group)
    weights = all_gather_rows(own.weights, n_entries, group)
    counts = all_gather_rows(reads.to(torch.int32), n_bags, group)
    grads = all_gather_rows(own.grads, n_bags, group)
    return [
        Entries(s.long(), w, torch.arange(len(c), device=c.device).repeat_interleave(c), g)
        for s, w, c, g in zip(slots, weights, counts, grads, strict=True)
    ]
