"""The gradient of a value table, kept as what it is the product of."""

from typing import Any, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .dtypes import at_least_float32
from .kernels import Entries


class ValueGradient:
    """The gradient of a value table as factors: which slots were read, how, and to what effect.

    A dense gradient of 512² slots of width 768 takes 805 MB, most of it zeros; the factors of 1,024
    tokens take 6 MB. The table's parameter carries this object as ``value_gradient``, where an
    optimizer finds it.

    Attributes:
        factored: whether backward passes leave factors here instead of a dense ``.grad``. Set by
            an optimizer that can use them.
    """

    def __init__(self) -> None:
        self.factored = False
        self._parts: List[Entries] = []

    def __bool__(self) -> bool:
        """Was anything read?"""
        return bool(self._parts)

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
        self._parts.append(Entries(slots.flatten(), weights, bags, grads))

    def multiply(self, factor: float) -> None:
        """Multiply the gradient."""
        factor = float(factor)
        self._parts = [part._replace(weights=part.weights * factor) for part in self._parts]

    def clear(self) -> None:
        """Forget the gradient."""
        self._parts = []

    def is_finite(self) -> bool:
        """Are all factors finite?"""
        factors = [x for part in self._parts for x in (part.weights, part.grads) if x.numel()]
        return all(bool(torch.stack(x.aminmax()).isfinite().all()) for x in factors)

    def entries(self, dense: Optional[Tensor] = None) -> Entries:
        """The gradient in the form that kernels take; there must be one.

        Args:
            dense: (n_slots, V), a gradient to add.
        """
        parts = self._parts
        if dense is not None:
            whole = ValueGradient()
            rows = (dense != 0).any(dim=1).nonzero()  # (R, 1)
            whole.add(rows, torch.ones_like(rows, dtype=dense.dtype), dense[rows[:, 0]])
            parts = parts + whole._parts
        return _join(parts)

    def gather(self, values: Tensor, group: Any = None) -> None:
        """Make this the mean over data-parallel workers, who exchange factors, not tables.

        Every worker must call it, and each table in the same order.

        Args:
            values: the table, for its width, dtype and device.
            group: the process group of the workers; None means all.
        """
        none = Entries(
            values.new_empty(0, dtype=torch.int64),
            at_least_float32(values.new_empty(0)),
            values.new_empty(0, dtype=torch.int64),
            at_least_float32(values.new_empty(0, values.shape[1])),
        )
        own = _join(self._parts) if self._parts else none
        world = dist.get_world_size(group)
        fields = [_all_gather(x.contiguous(), group) for x in own]
        parts = [Entries(*of_worker) for of_worker in zip(*fields, strict=True)]
        was_read = any(len(part.slots) for part in parts)
        self._parts = [_join(parts)] if self._parts or was_read else []
        self.multiply(1 / world)


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


def _all_gather(x: Tensor, group: Any) -> List[Tensor]:
    """Every worker's x, whose lengths may differ."""
    world = dist.get_world_size(group)
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.empty_like(length) for _ in range(world)]
    dist.all_gather(lengths, length, group=group)
    longest = max(int(n) for n in lengths)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return [part[: int(n)] for part, n in zip(gathered, lengths, strict=True)]
