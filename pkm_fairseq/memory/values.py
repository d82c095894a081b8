"""The value table of a memory, and the weighted read from it."""

from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import MemoryConfig
from .gradient import FactoredGradient, TableState
from .kernels import allocate, compute_dtype, is_half
from .parts import PARTS, TABLE, block_of, open_reference
from .registry import VALUES
from .sharding import ColumnShards

NO_FACTORS = (
    "a graph of torch.compile cannot hold the factored gradient of MemoryAdam: compile without "
    "fullgraph=True, or train value tables with another optimizer (values.factored = False)"
)


@VALUES.register("table", "a value, one row of a table")
class ValueTable(nn.Module):
    """A table of values, one row per slot.

    The parameter has a ``TableState`` as its attribute ``value_table``. Optimizers recognise
    tables by this attribute.

    Args:
        n_slots: number of rows.
        v_dim: width of a row.
        init: "normal", N(0, v_dim ** -0.5) (Lample et al. 2019, published code), or "zero".
        dtype: the dtype of the stored values; reads are in at least float32.
        shards: workers that split the table by columns; None means no split. Initial values, reads
            and gradients are the same as those of a whole table.
        keeps_dtype: whether the values keep their dtype when the model is converted to half
            precision. If False, they are converted like any other parameter.

    Raises:
        MemoryError: the table does not fit into memory; the message says how large it is.
        ValueError: the columns cannot be divided evenly among the workers.
    """

    def __init__(
        self,
        n_slots: int,
        v_dim: int,
        init: str = "normal",
        dtype: Optional[torch.dtype] = None,
        shards: Optional[ColumnShards] = None,
        keeps_dtype: bool = False,
    ) -> None:
        super().__init__()
        self.keeps_dtype = keeps_dtype
        self.init = init
        self.v_dim = v_dim
        self._state = TableState(shards)
        width = v_dim if shards is None else shards.width(v_dim)
        self.weight = nn.Parameter(allocate(n_slots, width, dtype))
        self.reset_parameters()

    @classmethod
    def from_config(
        cls,
        input_dim: int,
        config: MemoryConfig,
        shards: Optional[ColumnShards] = None,
        keeps_dtype: bool = False,
    ) -> "ValueTable":
        """The table for a memory of this width and these settings."""
        dtype, v_dim = getattr(torch, config.value_dtype), config.value_width(input_dim)
        return cls(config.n_slots, v_dim, config.values_init, dtype, shards, keeps_dtype)

    def tables(self) -> Dict[str, "ValueTable"]:
        """The tables of these values by name; this single table has the empty name."""
        return {"": self}

    @property
    def n_slots(self) -> int:
        """Number of rows."""
        return len(self.weight)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Tag the parameter of a copy, too; torch does not copy attributes of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tag()

    def _apply(self, fn: Any, recurse: bool = True) -> "ValueTable":
        """Convert or move as torch does, but with ``keeps_dtype`` not to half precision."""
        convert = partial(_convert_but_to_half, fn) if self.keeps_dtype else fn
        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        self._tag()  # the parameter may be a new one
        return self

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        """Register as torch does, and tag the parameter, which may replace an old one."""
        super().register_parameter(name, param)
        self._tag()

    def _tag(self) -> None:
        self.weight.value_table = self._state  # type: ignore[attr-defined]

    @property
    def shards(self) -> Optional[ColumnShards]:
        """The workers that split the table by columns; None if the table is whole."""
        return self._state.shards

    @property
    def chooses_rows(self) -> bool:
        """Whether an update changes only rows chosen by their reads."""
        return self._state.rows is not None

    @property
    def factored(self) -> bool:
        """Whether the gradient is a ``FactoredGradient``.

        ``MemoryAdam`` sets it. Set it to False before another optimizer trains the table.
        """
        return self._state.factored

    @factored.setter
    def factored(self, factored: bool) -> None:
        self._state.factored = factored

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values."""
        self._state.end_save()  # what is being saved are not these
        std = self.v_dim**-0.5
        if self.init == "zero":
            nn.init.zeros_(self.weight)
        elif self.shards is None:
            nn.init.normal_(self.weight, std=std)
        else:
            self.shards.draw_normal_(self.weight, std)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the whole table if it was assembled for this, else the parameter as it is.

        If the table was written into a folder, the state gets a reference to it.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._state.is_in_state = self._state.is_being_saved
        if self._state.reference is not None:
            del destination[f"{prefix}weight"]
            destination[f"{prefix}{PARTS}"] = self._state.reference
        if self._state.assembled is not None:
            destination[f"{prefix}weight"] = self._state.assembled

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load this worker's columns of a whole table; the parameter's own data load unchanged.

        Raises:
            ValueError: the state's values are in a file, or in a folder that cannot be read.
        """
        self._state.end_save()  # what is being saved are not these
        reference = state_dict.pop(f"{prefix}{PARTS}", None)
        if reference is not None:
            self.read_parts(reference)
            state_dict[f"{prefix}weight"] = self.weight.detach()
        given = state_dict.get(f"{prefix}weight")
        if given is None and f"{prefix}fingerprint" in state_dict:
            raise ValueError(
                "the checkpoint's values are in a file, which --memory-values-file must name"
            )
        if given is not None:
            state_dict[f"{prefix}weight"] = self.own_columns(given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def own_columns(self, table: Tensor) -> Tensor:
        """This worker's columns of a whole table; the parameter's own data stay as they are."""
        if self.shards is None or table.data_ptr() == self.weight.data_ptr():
            return table
        return self.shards.own_columns(table, self.v_dim)

    def read_parts(self, reference: Tensor) -> None:
        """Read this worker's columns from the folder to which a state refers (``parts.py``).

        Raises:
            ValueError: the folder cannot be read, or its table has another shape.
        """
        folder, name = open_reference(reference)
        folder.read(f"{name}{TABLE}", block_of(self.weight, self.shards))

    def forward(self, slots: Tensor, weights: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        """The weighted sum of the given slots' values, over heads and neighbours.

        Args:
            slots: (N, H, K), int64.
            weights: (N, H, K), floating.
            tokens: (N, input_dim), used only by other kinds of values.

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
        if self.shards is None:
            return self._read(slots, weights)
        kernels.check_reads(slots, weights, len(self.weight))
        weights = weights.to(compute_dtype(self.weight.dtype))
        counts = self.shards.count_tokens(len(slots), slots.device)
        slots = self.shards.gather_slots(slots, counts, len(self.weight))  # (all, H * K)
        columns = self._read(slots, self.shards.gather_weights(weights, counts))
        return self.shards.exchange_columns(columns, counts)

    def dot(self, slots: Tensor, x: Tensor) -> Tensor:
        """The dot products of the values of the given slots with one vector per token.

        It is the adjoint of ``forward``, and differentiable with respect to ``x`` and the table.

        Args:
            slots: (N, H, K), int64.
            x: (N, v_dim), floating.

        Returns:
            (N, H, K), in at least float32.

        Raises:
            ValueError: shapes or dtypes do not fit, or, on the CPU, a slot is out of range.
        """
        shape, values = slots.shape, self.weight
        slots, x = slots.flatten(1), x.to(compute_dtype(values.dtype))  # (N, H * K)
        if _needs_gradient(x, values):
            self._check_choice()
        if self.shards is None:
            return _dot(values, slots, x, self.factored).view(shape)
        tokens = self.shards.count_tokens(len(slots), slots.device)
        slots = self.shards.gather_slots(slots, tokens, len(values))  # (all, H * K)
        columns = self.shards.spread_columns(x, tokens)  # (all, V / W)
        partial = _dot(values, slots, columns, self.factored)
        return self.shards.sum_dots(partial, tokens).view(shape)

    def _check_choice(self) -> None:
        if self.chooses_rows and self.weight.requires_grad and not self.factored:
            raise ValueError(
                "which rows of a value table may move is chosen by MemoryAdam: give it the table "
                "before the first training step; no other optimizer can"
            )

    def _read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Read this worker's columns: (N, T) and (N, T) to (N, columns)."""
        values = self.weight
        is_trained = _needs_gradient(weights, values)
        if is_trained:
            self._check_choice()
        if is_trained and self.factored and kernels.is_compiled():
            return kernels.outside_graphs(self._read, NO_FACTORS)(slots, weights)
        if not (is_trained and kernels.is_plain(values, slots, weights)):
            return kernels.gather_sum(values, slots, weights)  # in traces, torch differentiates
        kernels.check_reads(slots, weights, len(values))
        weights = weights.to(compute_dtype(values.dtype))
        if self.factored or weights.dtype != values.dtype:
            return _Read.apply(  # type: ignore[no-untyped-call, no-any-return]
                weights, slots, values, self.factored and values.is_leaf
            )
        return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")


def read_rows(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of rows that are not trained, differentiable with respect to weights.

    Args:
        values: (n_slots, V), contiguous; int8, or floating.
        slots: (N, T), int64.
        weights: (N, T), in the dtype of computations.

    Returns:
        (N, V).
    """
    if _needs_gradient(weights) and kernels.is_plain(values, slots, weights):
        read: Tensor = _Read.apply(weights, slots, values, False)  # type: ignore[no-untyped-call]
        return read
    return kernels.gather_sum(values, slots, weights)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _convert_but_to_half(convert: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    example = convert(torch.empty(0, dtype=table.dtype, device=table.device))
    becomes_half = is_half(example.dtype) and example.dtype != table.dtype
    return table.to(example.device) if becomes_half else convert(table)


class _Read(torch.autograd.Function):
    """The weighted sum of values; its backward pass returns the table's gradient as factors.

    If no optimizer has asked for factors, a table in half precision gets a dense gradient.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, slots: Tensor, values: Tensor, factored: bool) -> Tensor:
        ctx.save_for_backward(weights, slots, values)
        ctx.factored = factored
        return kernels.gather_sum(values, slots, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_read: Tensor
    ) -> Tuple[Optional[Tensor], None, Optional[Tensor], None]:
        weights, slots, values = ctx.saved_tensors
        grad_weights = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_weights = kernels.gather_dot(values, slots, grad_read)
        if ctx.needs_input_grad[2]:
            factored = FactoredGradient.of_read(values, slots, weights, grad_read)
            grad_values = factored if ctx.factored else factored.dense()
        return grad_weights, None, grad_values, None


def _dot(values: Tensor, slots: Tensor, x: Tensor, factored: bool) -> Tensor:
    """Dot products (N, T) of rows of a table with x (N, V), for slots (N, T)."""
    is_trained = _needs_gradient(x, values)
    if is_trained and factored and kernels.is_compiled():
        return kernels.outside_graphs(_dot, NO_FACTORS)(values, slots, x, factored)
    if not (is_trained and kernels.is_plain(values, slots, x)):
        return kernels.gather_dot(values, slots, x)
    dots: Tensor = _Dot.apply(x, slots, values, factored and values.is_leaf)  # type: ignore[no-untyped-call]
    return dots


class _Dot(torch.autograd.Function):
    """Dot products of values with x; the gradient of x is a read, that of values is factored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, values: Tensor, factored: bool) -> Tensor:
        ctx.save_for_backward(x, slots, values)
        ctx.factored = factored
        return kernels.gather_dot(values, slots, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_dots: Tensor
    ) -> Tuple[Optional[Tensor], None, Optional[Tensor], None]:
        x, slots, values = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.gather_sum(values, slots, grad_dots)
        if ctx.needs_input_grad[2]:
            factored = FactoredGradient.of_read(values, slots, grad_dots, x)
            grad_values = factored if ctx.factored else factored.dense()
        return grad_x, None, grad_values, None
