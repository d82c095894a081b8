"""The value table: what a memory stores, and the weighted read from it."""

from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .dtypes import compute_dtype, is_half
from .gradient import ValueGradient
from .kernels.pages import advise_huge_pages
from .kernels.torch_backend import row_gradients


class ValueTable(nn.Module):
    """A table of values, one row per slot.

    The parameter carries its :class:`ValueGradient` as the attribute ``value_gradient``, by which
    an optimizer can find it among others and give it its own learning rate and a lazy update.

    Args:
        n_slots: number of rows.
        v_dim: width of a row.
        init: "normal", N(0, v_dim ** -0.5) (Lample et al. 2019, published code), or "zero".
        dtype: what the values are stored in; reads are in at least float32.

    Attributes:
        keeps_dtype: whether the values stay in their dtype when the model they are part of is
            converted to half precision. False, as for any other parameter.

    Raises:
        MemoryError: the table does not fit into memory; the message says how large it is.
    """

    def __init__(
        self,
        n_slots: int,
        v_dim: int,
        init: str = "normal",
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.keeps_dtype = False
        self.init = init
        self.gradient = ValueGradient()
        self.weight = nn.Parameter(allocate(n_slots, v_dim, dtype))
        self._tag()
        self.reset_parameters()

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Tag the parameter of a copy, too; torch does not copy attributes of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tag()

    def _tag(self) -> None:
        self.weight.value_gradient = self.gradient  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueTable":
        """Convert as torch does, but not to half precision, if the dtype is to be kept."""
        convert = partial(_convert_but_to_half, fn) if self.keeps_dtype else fn
        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def reset_parameters(self) -> None:
        """Draw the values anew."""
        if self.init == "zero":
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Sum the values of the given slots, weighted, over heads and neighbours.

        Args:
            slots: (N, H, K), int64.
            weights: (N, H, K), floating.

        Returns:
            (N, v_dim), in at least float32.

        Raises:
            ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
        """
        if slots.dim() < 2 or weights.dim() < 2:
            raise ValueError(
                f"slots have shape {tuple(slots.shape)} and weights {tuple(weights.shape)}, "
                "both must be (tokens, heads, neighbours)"
            )
        slots, weights = slots.flatten(1), weights.flatten(1)  # (N, H * K)
        wants_gradient = weights.requires_grad or self.weight.requires_grad
        if not (torch.is_grad_enabled() and wants_gradient):
            return kernels.read(self.weight, slots, weights)
        if self.gradient.factored:
            weights = weights.to(compute_dtype(self.weight.dtype))
            return _FactoredRead.apply(  # type: ignore[no-untyped-call, no-any-return]
                weights, slots, self.weight, self.gradient
            )
        kernels.check_reads(slots, weights, len(self.weight))
        weights = weights.to(compute_dtype(self.weight.dtype))
        if weights.dtype != self.weight.dtype:
            return _HalfRead.apply(weights, slots, self.weight)  # type: ignore[no-untyped-call, no-any-return]
        return F.embedding_bag(slots, self.weight, per_sample_weights=weights, mode="sum")


def _convert_but_to_half(convert: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    example = convert(table[:0])  # no table of another dtype is made on the way
    return table.to(example.device) if is_half(example.dtype) else convert(table)


class _HalfRead(torch.autograd.Function):
    """The read of a table in half precision, in float32, whose backward makes a dense gradient."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, slots: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weights, slots, values)
        return kernels.read(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> Tuple[Optional[Tensor], None, Optional[Tensor]]:
        weights, slots, values = ctx.saved_tensors
        grad_weights = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_weights = kernels.weight_gradient(values, slots, grad_read)
        if ctx.needs_input_grad[2]:
            factors = ValueGradient()
            factors.keep_factors(values)
            factors.add(slots, weights, grad_read)
            grad_values = torch.zeros_like(values)
            for rows, gradient in row_gradients(factors.entries()):
                grad_values[rows] = gradient.to(values.dtype)
        return grad_weights, None, grad_values


class _FactoredRead(torch.autograd.Function):
    """The read whose backward keeps the factors of the table's gradient and returns none."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, slots: Tensor, values: Tensor, gradient: ValueGradient
    ) -> Tensor:
        ctx.save_for_backward(weights, slots, values)
        ctx.gradient = gradient
        return kernels.read(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> Tuple[Optional[Tensor], None, None, None]:
        weights, slots, values = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.gradient.add(slots, weights, grad_read)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return kernels.weight_gradient(values, slots, grad_read), None, None, None


def allocate(
    n_slots: int,
    v_dim: int,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Memory for a table, (n_slots, v_dim), not initialised.

    Raises:
        MemoryError: it does not fit; the message says how large it is.
    """
    try:
        table = torch.empty(n_slots, v_dim, dtype=dtype, device=device)
    except RuntimeError as error:
        size = n_slots * v_dim * (dtype or torch.get_default_dtype()).itemsize
        raise MemoryError(
            f"a table of {n_slots:,} slots of width {v_dim} takes {size:,} bytes "
            f"({size / 2**30:,.1f} GiB), which could not be had"
        ) from error
    advise_huge_pages(table)
    return table
