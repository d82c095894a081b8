"""The value table: what a memory stores, and the weighted read from it."""

from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .gradient import ValueGradient
from .kernels import allocate, compute_dtype, is_half
from .kernels.torch_backend import row_gradients
from .sharding import ColumnShards


class ValueTable(nn.Module):
    """A table of values, one row per slot.

    The parameter carries its :class:`ValueGradient` as the attribute ``value_gradient``, by which
    an optimizer can find it among others and give it its own learning rate and a lazy update.

    Args:
        n_slots: number of rows.
        v_dim: width of a row.
        init: "normal", N(0, v_dim ** -0.5) (Lample et al. 2019, published code), or "zero".
        dtype: what the values are stored in; reads are in at least float32.
        shards: workers to split the columns over; None means that this table is whole. Its
            initial values, reads and gradients are those of a whole table.

    Attributes:
        keeps_dtype: whether the values stay in their dtype when the model they are part of is
            converted to half precision. False, as for any other parameter.

    Raises:
        MemoryError: the table does not fit into memory; the message says how large it is.
        ValueError: the workers cannot have equally many columns.
    """

    def __init__(
        self,
        n_slots: int,
        v_dim: int,
        init: str = "normal",
        dtype: Optional[torch.dtype] = None,
        shards: Optional[ColumnShards] = None,
    ) -> None:
        super().__init__()
        self.keeps_dtype = False
        self.init = init
        self.v_dim = v_dim
        self.gradient = ValueGradient(shards)
        width = v_dim if shards is None else shards.width(v_dim)
        self.weight = nn.Parameter(allocate(n_slots, width, dtype))
        self._tag()
        self.reset_parameters()

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Tag the parameter of a copy, too; torch does not copy attributes of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tag()

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueTable":
        """Convert or move as torch does, but not to half precision, if the dtype is to be kept."""
        convert = partial(_convert_but_to_half, fn) if self.keeps_dtype else fn
        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        self._tag()  # the parameter may be a new one
        return self

    def _tag(self) -> None:
        self.weight.value_gradient = self.gradient  # type: ignore[attr-defined]

    @property
    def shards(self) -> Optional[ColumnShards]:
        """The workers that the columns are split over; None if this table is whole."""
        return self.gradient.shards

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the values anew."""
        std = self.v_dim**-0.5
        if self.init == "zero":
            nn.init.zeros_(self.weight)
        elif self.shards is None:
            nn.init.normal_(self.weight, std=std)
        else:
            self.shards.draw_normal_(self.weight, std)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the whole table, if it was assembled for this, and else what is here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.gradient.assembled is not None:
            destination[f"{prefix}weight"] = self.gradient.assembled

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load this worker's columns of a whole table, or what is here already."""
        given = state_dict.get(f"{prefix}weight")
        is_own = given is None or given.data_ptr() == self.weight.data_ptr()
        if self.shards is not None and not is_own:
            state_dict[f"{prefix}weight"] = self.shards.own_columns(given, self.v_dim)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._tag()  # load_state_dict(assign=True) puts another parameter in place of the old one

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
        if self.shards is not None:
            kernels.check_reads(slots, weights, len(self.weight))
            weights = weights.to(compute_dtype(self.weight.dtype))
            return _ShardedRead.apply(  # type: ignore[no-untyped-call, no-any-return]
                weights, slots, self.weight, self.gradient
            )
        if not (torch.is_grad_enabled() and wants_gradient):
            return kernels.gather_sum(self.weight, slots, weights)
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
        return kernels.gather_sum(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> Tuple[Optional[Tensor], None, Optional[Tensor]]:
        weights, slots, values = ctx.saved_tensors
        grad_weights = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_weights = kernels.gather_dot(values, slots, grad_read)
        if ctx.needs_input_grad[2]:
            grad_values = _dense_gradient(values, slots, weights, grad_read)
        return grad_weights, None, grad_values


def _dense_gradient(values: Tensor, slots: Tensor, weights: Tensor, grad_read: Tensor) -> Tensor:
    factors = ValueGradient()
    factors.keep_factors(values)
    factors.add(slots, weights, grad_read)
    gradient = torch.zeros_like(values)
    for rows, of_rows in row_gradients(factors.entries()):
        gradient[rows] = of_rows.to(values.dtype)
    return gradient


class _ShardedRead(torch.autograd.Function):
    """The read of a table of which this worker holds some columns, for it and all others.

    Its backward leaves the gradient of these columns, from the tokens of all workers.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, slots: Tensor, values: Tensor, gradient: ValueGradient
    ) -> Tensor:
        assert gradient.shards is not None
        lookups = gradient.shards.gather_lookups(slots, weights, len(values))
        slots, weights, ctx.tokens = lookups  # (all, T) twice
        ctx.save_for_backward(weights, slots, values)
        ctx.gradient = gradient
        return gradient.shards.return_columns(
            kernels.gather_sum(values, slots, weights), ctx.tokens
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_read: Tensor
    ) -> Tuple[Optional[Tensor], None, Optional[Tensor], None]:
        weights, slots, values = ctx.saved_tensors
        shards = ctx.gradient.shards
        grad_columns = shards.send_columns(grad_read, ctx.tokens)  # (all, V / W)
        grad_weights = grad_values = None
        if ctx.needs_input_grad[2] and ctx.gradient.factored:
            ctx.gradient.add(slots, weights, grad_columns)
        elif ctx.needs_input_grad[2]:
            grad_values = _dense_gradient(values, slots, weights, grad_columns)
        if ctx.needs_input_grad[0]:
            partial = kernels.gather_dot(values, slots, grad_columns)
            grad_weights = shards.sum_for_owners(partial, ctx.tokens)
        return grad_weights, None, grad_values, None


class _FactoredRead(torch.autograd.Function):
    """The read whose backward keeps the factors of the table's gradient and returns none."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, slots: Tensor, values: Tensor, gradient: ValueGradient
    ) -> Tensor:
        ctx.save_for_backward(weights, slots, values)
        ctx.gradient = gradient
        return kernels.gather_sum(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> Tuple[Optional[Tensor], None, None, None]:
        weights, slots, values = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.gradient.add(slots, weights, grad_read)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return kernels.gather_dot(values, slots, grad_read), None, None, None
