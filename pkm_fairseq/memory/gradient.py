"""The gradient of a value table, stored as factors instead of a dense tensor."""

from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type, Union

import torch
from torch import Tensor

from . import kernels
from .kernels import Entries, at_least_float32, compute_dtype
from .kernels.torch_backend import row_gradients
from .observe.slot_counts import count_slots
from .rows import RowChoice
from .sharding import ColumnShards

Number = Union[float, Tensor]

REFUSAL = (
    "{} does not work on the factored gradient of a value table: update the table with "
    "MemoryAdam, or set values.factored = False for a dense gradient"
)
NOT_BY_HAND = (
    "{} does not work on the factored gradient of a value table: MemoryAdam averages it over "
    "workers, in its step or before in exchange_gradients"
)


class TableState:
    """The information about a value table that an optimizer needs.

    The table's parameter has this object as its attribute ``value_table``. Optimizers recognise
    tables by this attribute.

    Args:
        shards: the workers that split the table by columns; None if the table is whole.
        rows: which rows an update may change; None for all rows that were read.

    Attributes:
        shards: as given.
        rows: as given; ``MemoryAdam`` uses it in each step.
        factored: whether backward passes make a ``FactoredGradient`` instead of a dense one.
            An optimizer that supports it sets this to True; in a copy of a table it is False.
        exchange_as: how workers shall exchange the gradient, a choice of ``exchange.FORMS``. The
            optimizer sets it.
        exchanged_as: how they do, "factors" or "dense"; None before the first exchange.
        assembled: the whole table while it is being saved, if its columns are split.
        reference: what a state holds in place of the table while it is being saved, if the table
            is in a folder (``parts.py``).
        is_in_state: whether the state of the model has got one of the two. The optimizer's state,
            if it is made after that, ends the save.
    """

    def __init__(
        self, shards: Optional[ColumnShards] = None, rows: Optional[RowChoice] = None
    ) -> None:
        self.shards = shards
        self.rows = rows
        self.factored = False
        self.exchange_as = "auto"
        self.exchanged_as: Optional[str] = None
        self.assembled: Optional[Tensor] = None
        self.reference: Optional[Tensor] = None
        self.is_in_state = False

    @property
    def is_being_saved(self) -> bool:
        """Whether the state of the model holds something in place of the parameter."""
        return self.assembled is not None or self.reference is not None

    def end_save(self) -> None:
        """From now on, the state of the model holds the table itself again."""
        self.assembled = self.reference = None
        self.is_in_state = False

    def __reduce__(self) -> Tuple[Type["TableState"], Tuple[Any, ...]]:
        """Copy and pickle without the attributes that an optimizer sets."""
        return TableState, (self.shards, self.rows)


def is_table(param: Tensor) -> bool:
    """Whether a parameter is a value table."""
    return hasattr(param, "value_table")


def table_state(param: Tensor) -> TableState:
    """The ``TableState`` of a value table's parameter."""
    state: TableState = param.value_table  # type: ignore[attr-defined]
    return state


class _Factors:
    """Parts of a gradient, each a sum of outer products, and one scale for all parts.

    Attributes:
        parts: entries that own their memory and are never changed in place.
        scale: a scalar in at least float32. It multiplies all parts.
        exchanged: whether this is the mean over data-parallel workers.
        divided: the number by which the exchange divided the gradient of a split table, whose
            factors are a sum over its workers; else 1.
        counts_reads: whether it is known how often each slot was read.
        reads: these numbers, (n_slots,), int64; None if there is one entry for each read.
    """

    def __init__(
        self,
        parts: List[Entries],
        scale: Tensor,
        exchanged: bool = False,
        counts_reads: bool = True,
        reads: Optional[Tensor] = None,
        divided: int = 1,
    ) -> None:
        self.parts = parts
        self.scale = scale
        self.exchanged = exchanged
        self.divided = divided
        self.counts_reads = counts_reads
        self.reads = reads

    def copy(self) -> "_Factors":
        others = self.exchanged, self.counts_reads, self.reads, self.divided
        return _Factors(list(self.parts), self.scale.clone(), *others)

    def apply_scale(self) -> None:
        """Multiply the parts by the scale, and reset the scale to 1."""
        self.parts = [part._replace(weights=part.weights * self.scale) for part in self.parts]
        self.scale = torch.ones_like(self.scale)

    def assign(
        self,
        parts: List[Entries],
        exchanged: bool = False,
        counts_reads: bool = True,
        divided: int = 1,
    ) -> None:
        """Replace the parts, for all tensors that share them."""
        self.parts, self.exchanged, self.counts_reads = parts, exchanged, counts_reads
        self.reads, self.divided = None, divided
        self.scale = torch.ones_like(self.scale)


class FactoredGradient(Tensor):
    """The gradient of a value table: a tensor of the table's shape, stored as factors.

    A dense gradient of 512² slots of width 768 takes 805 MB, mostly zeros. The factors of 1,024
    tokens take 6 MB: slots, weights and the gradient of the reads. Autograd accumulates it in
    ``.grad`` like any other gradient. torch's functions that reset, scale, measure or clip
    gradients work on it: ``zero_grad``, loss scalers, ``clip_grad_norm_`` and
    ``clip_grad_value_``. Other operations use a dense copy; those that would write to the gradient
    are refused.

    Args:
        factors: the parts.
        like: the table, for its shape, dtype and device.
        dtype: a dtype other than the table's; the parts are always in at least float32.
    """

    _factors: _Factors

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, factors: _Factors, like: Tensor, dtype: Optional[torch.dtype] = None
    ) -> "FactoredGradient":
        """Make a tensor without memory."""
        made: FactoredGradient = Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=dtype or like.dtype, device=like.device, requires_grad=False
        )
        made._factors = factors
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """A short description instead of a printed table."""
        reads = sum(len(part.slots) for part in self._factors.parts)
        return f"FactoredGradient(shape={tuple(self.shape)}, reads={reads}, dtype={self.dtype})"

    @classmethod
    def of_read(
        cls, values: Tensor, slots: Tensor, weights: Tensor, grad_read: Tensor
    ) -> "FactoredGradient":
        """The gradient of one read: ``gradient[slots[n, t]] += weights[n, t] * grad_read[n]``.

        The arguments are copied, so the caller may change them later.

        Args:
            values: the table, (n_slots, V).
            slots: (N, T), int64.
            weights: (N, T).
            grad_read: (N, V).
        """
        if kernels.is_compiled():
            return kernels.outside_graphs(cls.of_read)(values, slots, weights, grad_read)
        if kernels.is_wrapped(grad_read):
            raise RuntimeError(REFUSAL.format("a vectorised or traced backward pass"))
        n, reads = slots.shape
        bags = torch.arange(n, device=slots.device).repeat_interleave(reads)
        part = Entries(
            slots.detach().flatten().clone(),
            _own(weights.detach().flatten()),
            bags,
            _own(grad_read.detach()),
        )
        return cls(_Factors([part], _one(values)), values)

    @classmethod
    def of_workers(
        cls,
        values: Tensor,
        total: Entries,
        n_workers: int,
        counts_reads: bool = True,
        reads: Optional[Tensor] = None,
    ) -> "FactoredGradient":
        """The mean over data-parallel workers, from the sum.

        Args:
            values: the table, (n_slots, V).
            total: the entries of all workers; the gradient keeps them.
            n_workers: the number of workers.
            counts_reads: whether it is known how often each slot was read.
            reads: these numbers, (n_slots,), int64; None if there is one entry for each read.
        """
        scale = _one(values) * (1 / n_workers)
        return cls(_Factors([total], scale, True, counts_reads, reads), values)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a torch operation that has a factored gradient among its arguments."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "c10d":  # their schemas do not say that they write
            raise RuntimeError(NOT_BY_HAND.format(name.rstrip("_")))
        if name.startswith("_foreach_"):
            return _one_by_one(func, name, args, kwargs)
        result = _operate(name, args, kwargs)
        if result is NotImplemented:
            if _writes_or_shares(func) and type(kwargs.get("out")) is not Tensor:
                raise RuntimeError(REFUSAL.format(name))
            result = func(*_dense(args), **kwargs)
        return result

    @property
    def data(self) -> "FactoredGradient":
        """The same gradient, as an alias."""
        return _alias(self)

    @data.setter
    def data(self, other: Tensor) -> None:
        """Take over another factored gradient of this shape.

        Raises:
            RuntimeError: ``other`` is an ordinary tensor.
        """
        if not isinstance(other, FactoredGradient):
            raise RuntimeError(REFUSAL.format("an assignment to .data"))
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self._factors = other._factors

    def share_memory_(self) -> Any:
        """Refuse what needs a tensor with memory of its own.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(REFUSAL.format("share_memory_"))

    def entries(self) -> Entries:
        """The gradient in the form that kernels take. Callers must not change it."""
        parts = self.parts()
        return join_entries(parts) if parts else no_entries(self)

    def dense(self) -> Tensor:
        """The gradient as an ordinary tensor, (n_slots, V)."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for rows, of_rows in () if self.is_meta else self.rows():
            dense[rows] = of_rows.to(self.dtype)
        return dense

    def rows(self) -> Iterator[Tuple[Tensor, Tensor]]:
        """Rows that were read, each once, and their gradients: (R,) and (R, V), in chunks."""
        return row_gradients(self.entries())

    def rescale(self, factor: Number) -> None:
        """Multiply the gradient by a number, in at least float32."""
        self._factors.scale.mul_(factor.view(()) if isinstance(factor, Tensor) else factor)

    def is_finite(self) -> bool:
        """Whether all factors of this worker are finite."""
        parts = [x for part in self._factors.parts for x in (part.weights, part.grads)]
        return all(_is_finite(x) for x in [self._factors.scale, *parts])

    def p_norm(self, order: float = 2.0) -> Tensor:
        """The p-norm of all elements for p above 0, a float64 scalar."""
        if order == 2:
            return kernels.squared_norm(self, self.entries()).sqrt()
        norms = [torch.linalg.vector_norm(g.double(), order) for _, g in self.rows()]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
        return whole

    def map_elements(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to each element, in place. The function must map 0 to 0."""
        mapped = [entries_of_rows(rows, function(of_rows)) for rows, of_rows in self.rows()]
        factors = self._factors
        factors.assign(mapped, factors.exchanged, counts_reads=False, divided=factors.divided)

    def parts(self) -> List[Entries]:
        """The parts, with the scale applied. Callers must not change them."""
        self._factors.apply_scale()
        return self._factors.parts


def _one(values: Tensor) -> Tensor:
    return torch.ones((), dtype=compute_dtype(values.dtype), device=values.device)


def _own(x: Tensor) -> Tensor:
    """A contiguous copy in at least float32."""
    return x.to(compute_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)


def _is_finite(x: Tensor) -> bool:
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


# --- torch's operations on gradients ----------------------------------------------------------


def _operate(name: str, args: Any, kwargs: Dict[str, Any]) -> Any:
    """Run an operation; NotImplemented if it is not supported."""
    known = OPERATIONS.get(name)
    if known is None or ("out" in kwargs and name != "mul") or "rounding_mode" in kwargs:
        return NotImplemented
    return known(*args, **kwargs)


def _dense(x: Any) -> Any:
    """Arguments of an operation, also in lists, with dense copies of factored gradients."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_dense, x))
    return x.dense() if isinstance(x, FactoredGradient) else x


def _writes_or_shares(func: Any) -> bool:
    """Whether an operation changes an argument, or returns a view of one."""
    schema = func._schema
    return schema.is_mutable or any(x.alias_info is not None for x in schema.returns)


def _one_by_one(func: Any, name: str, args: Any, kwargs: Dict[str, Any]) -> Any:
    """Run an operation on lists: at once for ordinary tensors, else one by one."""
    lists = [x for x in args if isinstance(x, (list, tuple))]
    ours = [
        i for i in range(len(args[0])) if any(isinstance(x[i], FactoredGradient) for x in lists)
    ]
    others = [i for i in range(len(args[0])) if i not in ours]
    results: Dict[int, Any] = {}
    if others:
        plain = [[x[i] for i in others] if isinstance(x, (list, tuple)) else x for x in args]
        results.update(zip(others, func(*plain, **kwargs) or [None] * len(others), strict=True))
    for i in ours:
        of_one = [x[i] if isinstance(x, (list, tuple)) else x for x in args]
        results[i] = _operate(name.removeprefix("_foreach_"), of_one, kwargs)
        if results[i] is NotImplemented:
            if func._schema.is_mutable:
                raise RuntimeError(REFUSAL.format(name))
            dense = [[_dense(x[i])] if isinstance(x, (list, tuple)) else x for x in args]
            (results[i],) = func(*dense, **kwargs)
    return [results[i] for i in range(len(args[0]))] if func._schema.returns else None


def _alias(x: FactoredGradient) -> FactoredGradient:
    return FactoredGradient(x._factors, x)


def _clone(x: FactoredGradient, **_: Any) -> FactoredGradient:
    return FactoredGradient(x._factors.copy(), x)


def _to_copy(x: FactoredGradient, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    if device not in (None, x.device):
        return NotImplemented
    return FactoredGradient(x._factors.copy(), x, dtype)


def _add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1 or not _have_one_shape(x, y):
        return NotImplemented
    like = x if isinstance(x, FactoredGradient) else y
    parts, counted = [*_parts_of(x), *_parts_of(y)], _has_reads(x) and _has_reads(y)
    return FactoredGradient(_Factors(parts, _one(like), counts_reads=counted), like)


def _add_in_place(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if alpha != 1 or not _have_one_shape(x, y):
        return NotImplemented
    if isinstance(x, FactoredGradient):
        parts, counted = [*_parts_of(x), *_parts_of(y)], _has_reads(x) and _has_reads(y)
        x._factors.assign(parts, counts_reads=counted)
        return x
    for rows, of_rows in y.rows():
        x[rows] += of_rows.to(x.dtype)
    return x


def _have_one_shape(x: Any, y: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape


def _parts_of(x: Tensor) -> List[Entries]:
    """The parts of a summand. The next exchange divides the sum, so a division is undone."""
    if not isinstance(x, FactoredGradient):
        return [entries_of_dense(x)]
    parts, divided = x.parts(), x._factors.divided
    if divided == 1:
        return parts
    return [part._replace(weights=part.weights * divided) for part in parts]


def _has_reads(x: Tensor) -> bool:
    """Whether a gradient has one entry for each read."""
    return counts_reads(x) and x._factors.reads is None  # type: ignore[attr-defined]


def _multiply(x: Any, y: Any, *, out: Optional[Tensor] = None) -> Any:
    x, factor = (x, y) if isinstance(x, FactoredGradient) else (y, x)
    if not _is_number(factor):
        return NotImplemented
    product = _clone(x)
    product.rescale(factor)
    return product if out is None else out.copy_(product)


def _multiply_in_place(x: Any, factor: Any) -> Any:
    if not isinstance(x, FactoredGradient) or not _is_number(factor):
        return NotImplemented
    x.rescale(factor)
    return x


def _divide(x: Any, factor: Any) -> Any:
    return _multiply(x, 1 / factor) if _is_number(factor) else NotImplemented


def _divide_in_place(x: Any, factor: Any) -> Any:
    return _multiply_in_place(x, 1 / factor) if _is_number(factor) else NotImplemented


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (type(x) is Tensor and x.numel() == 1 and x.dim() <= 2)


def _copy(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    """Copy. A dense gradient counts as not exchanged: nobody knows whether it is a mean.

    If it is one, as what torch's DistributedDataParallel copies from its buckets, its mean over
    workers is the same.
    """
    if isinstance(x, FactoredGradient):
        if isinstance(y, FactoredGradient):
            of_y = y._factors
            x._factors.assign(y.parts(), of_y.exchanged, _has_reads(y), of_y.divided)
        else:
            divided = x._factors.divided
            x._factors.assign([entries_of_dense(y)], counts_reads=False, divided=divided)
        return x
    assert isinstance(y, FactoredGradient)
    return x.copy_(y.dense())


def _zero(x: FactoredGradient) -> FactoredGradient:
    x._factors.assign([])
    return x


def _norm(
    x: FactoredGradient,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    order = 2.0 if order is None else float(order)
    if dim not in (None, []) or keepdim or order <= 0:  # which zeros matter for
        return NotImplemented
    return x.p_norm(order).to(dtype or x.dtype)


def _clamp(x: FactoredGradient, low: Any = None, high: Any = None) -> Any:
    is_odd = not all(limit is None or _is_number(limit) for limit in (low, high))
    if is_odd or (low or 0) > 0 or (high or 0) < 0:  # zeros would change
        return NotImplemented
    x.map_elements(lambda rows: rows.clamp(low, high))
    return x


def _unscale(gradients: List[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Unscale gradients, as torch's GradScaler does before a step."""
    plain = [x for x in gradients if not isinstance(x, FactoredGradient)]
    if plain:
        torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inv_scale)
    for x in gradients:
        if isinstance(x, FactoredGradient):
            if not x.is_finite():
                found_inf.fill_(1.0)
            x.rescale(inv_scale)


# by torch's names; they return NotImplemented for arguments that they do not support
OPERATIONS: Dict[str, Callable[..., Any]] = {
    "alias": _alias,
    "detach": _alias,
    "clone": _clone,
    "_to_copy": _to_copy,
    "add": _add,
    "add_": _add_in_place,
    "mul": _multiply,
    "mul_": _multiply_in_place,
    "div": _divide,
    "div_": _divide_in_place,
    "copy_": _copy,
    "zero_": _zero,
    "norm": _norm,
    "linalg_vector_norm": _norm,
    "clamp_": _clamp,
    "clamp_min_": lambda x, low: _clamp(x, low=low),
    "clamp_max_": lambda x, high: _clamp(x, high=high),
    "_amp_foreach_non_finite_check_and_unscale_": _unscale,
}


# --- entries ----------------------------------------------------------------------------------


def entries_of_rows(rows: Tensor, gradients: Tensor) -> Entries:
    """Entries of rows, each read once: (R,) and (R, V)."""
    bags = torch.arange(len(rows), device=rows.device)
    return Entries(rows, gradients.new_ones(len(rows)), bags, gradients)


def entries_of_dense(dense: Tensor) -> Entries:
    """Entries of the rows of a dense gradient (n_slots, V) that have a non-zero element."""
    rows = (dense != 0).any(dim=1).nonzero().squeeze(1)  # (R,)
    return entries_of_rows(rows, at_least_float32(dense[rows]))


def entries_of(values: Tensor) -> Optional[Entries]:
    """The gradient of a table, factored or dense; None if there is none."""
    if values.grad is None:
        return None
    if isinstance(values.grad, FactoredGradient):
        return values.grad.entries()
    return entries_of_dense(values.grad)


def entries_that_may_move(values: Tensor) -> Optional[Entries]:
    """The gradient of the rows that the table's choice of rows allows to change; None if none.

    Raises:
        ValueError: rows are chosen by their reads, but the gradient does not count reads.
    """
    entries, rows = entries_of(values), table_state(values).rows
    if entries is None or rows is None:
        return entries
    assert values.grad is not None
    reads = _reads_of(values.grad, entries)
    if reads is None:
        raise ValueError(
            "rows of a value table are chosen by their reads, but its gradient is dense, or was "
            "clipped element by element, and has lost count of them: use ignore_tables_in_ddp, "
            "and clip norms"
        )
    return rows.keep(entries, reads)


def counts_reads(gradient: Tensor) -> bool:
    """Whether it is known how often each slot was read for a gradient."""
    return isinstance(gradient, FactoredGradient) and gradient._factors.counts_reads


def _reads_of(gradient: Tensor, entries: Entries) -> Optional[Tensor]:
    """How often each slot was read, (n_slots,), int64; None if it is unknown."""
    if not isinstance(gradient, FactoredGradient) or not gradient._factors.counts_reads:
        return None
    reads = gradient._factors.reads
    return count_slots(entries.slots, len(gradient)) if reads is None else reads


def gradient_is_finite(values: Tensor) -> bool:
    """Whether the gradient of a table is finite, on all workers that hold columns of it."""
    grad, shards = values.grad, table_state(values).shards
    if isinstance(grad, FactoredGradient):
        finite = grad.is_finite()
    else:
        finite = grad is None or _is_finite(grad)
    return finite if shards is None else shards.all_have(finite, values.device)


def squared_norm(values: Tensor) -> float:
    """The squared Euclidean norm of the gradient of a table, over all its columns."""
    entries, shards = entries_of(values), table_state(values).shards
    square = values.new_zeros((), dtype=torch.float64)
    if entries is not None:
        square = kernels.squared_norm(values, entries)
    return float(square if shards is None else shards.sum_(square))


def is_exchanged(values: Tensor) -> bool:
    """Whether the gradient of a table is already the mean over data-parallel workers."""
    return isinstance(values.grad, FactoredGradient) and values.grad._factors.exchanged


def divide_once(values: Tensor, workers: int) -> None:
    """Divide the gradient of a split table, unless that was done, and note it.

    A dense gradient becomes factored, since it cannot note that.
    """
    if values.grad is None:
        return
    if not isinstance(values.grad, FactoredGradient):
        whole = _Factors([entries_of_dense(values.grad)], _one(values), counts_reads=False)
        values.grad = FactoredGradient(whole, values)
    values.grad.rescale(values.grad._factors.divided / workers)
    values.grad._factors.divided = workers


def mark_exchanged(values: Tensor, divided: int) -> None:
    """Note that a factored gradient is the mean over workers, and was divided by this number."""
    assert isinstance(values.grad, FactoredGradient)
    values.grad._factors.exchanged, values.grad._factors.divided = True, divided


def join_entries(parts: List[Entries]) -> Entries:
    """The entries of all parts, of which there is at least one."""
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


def no_entries(values: Tensor) -> Entries:
    """The gradient of a table that nobody has read."""
    none = torch.empty(0, dtype=torch.int64, device=values.device)
    dtype = compute_dtype(values.dtype)
    grads = torch.empty(0, values.shape[1], dtype=dtype, device=values.device)
    return Entries(none, grads.new_empty(0), none, grads)
