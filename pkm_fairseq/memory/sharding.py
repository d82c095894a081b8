"""Split a value table by columns over workers; each worker holds a part of every value."""

from typing import Any, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather, all_gather_rows, narrow
from .kernels import Table, is_traced

ROWS = 8192  # rows to send or draw at once


class ColumnShards:
    """The workers that share a value table, and their communication.

    Workers form groups of W. Each group holds one whole table, V / W columns per worker. To read,
    a group gathers the look-ups of all its workers; each worker reads its columns for everyone and
    sends them back. So every worker of a group must take part in every read, forward and backward.
    All workers must create this object, in the same order.

    torch's ``clip_grad_norm_`` sees the gradient of this worker's columns only, and would clip each
    worker by another norm. ``gradient.squared_norm`` is over all columns.

    Shapes: n tokens of this worker, N of all workers of the group, T reads per token, V v_dim.

    Args:
        n_shards: W, workers per group; a group has consecutive ranks.

    Raises:
        ValueError: W does not divide the number of workers.

    Attributes:
        rank: this worker's index in its group, and the index of its columns in the table.
        n_shards: W.
        group: the process group of this worker's group.
        replicas: the process group of the workers with the same columns, one per group; None if
            there is only one group.
    """

    def __init__(self, n_shards: int) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if n_shards < 1 or world % n_shards:
            raise ValueError(
                f"memory-shards is {n_shards}, must be a divisor of the number of workers, "
                f"which is {world}"
            )
        first = range(0, world, n_shards)
        mine = dist.get_rank()
        self.n_shards = n_shards
        self.rank = mine % n_shards
        groups = [list(range(start, start + n_shards)) for start in first]
        self.group = _own_group(groups)
        same_columns = [list(range(place, world, n_shards)) for place in range(n_shards)]
        self.replicas = _own_group(same_columns) if len(first) > 1 else None

    def width(self, v_dim: int) -> int:
        """Columns per worker.

        Raises:
            ValueError: the columns cannot be divided evenly.
        """
        if v_dim % self.n_shards:
            raise ValueError(
                f"memory-shards is {self.n_shards}, must divide the width of a value, {v_dim}"
            )
        return v_dim // self.n_shards

    def own_columns(self, table: Tensor, v_dim: int) -> Tensor:
        """This worker's columns of a whole table (n_slots, V), as a view; other shapes unchanged.

        Raises:
            ValueError: the table is one worker's part, and it is unknown which worker's.
        """
        width = self.width(v_dim)
        if table.dim() == 2 and table.shape[1] == width < v_dim:
            raise ValueError(
                f"a value table has shape {tuple(table.shape)}, one worker's part; "
                f"must be whole, {(len(table), v_dim)}"
            )
        if table.dim() != 2 or table.shape[1] != v_dim:
            return table  # the loader will raise an error
        return table[:, self.rank * width : (self.rank + 1) * width]

    def __deepcopy__(self, memo: Any) -> "ColumnShards":
        """A copy of a table has the same workers."""
        return self

    def count_tokens(self, tokens: int, device: torch.device) -> List[int]:
        """The number of tokens of each worker in the group; this worker has ``tokens``.

        Raises:
            RuntimeError: torch is tracing; a trace cannot include other workers.
        """
        if is_traced():
            raise RuntimeError(
                "a value table that is split over workers cannot be traced, exported or compiled: "
                "load its checkpoint into a model without shards"
            )
        counts = all_gather(torch.tensor([tokens], device=device), self.group)
        return [int(count) for count in counts]

    def gather_slots(self, slots: Tensor, tokens: List[int], n_slots: int) -> Tensor:
        """The slots that all workers of the group read, (N, T), from this worker's (n, T)."""
        return torch.cat(all_gather_rows(narrow(slots, n_slots), tokens, self.group)).long()

    def gather_weights(self, weights: Tensor, tokens: List[int]) -> Tensor:
        """The weights of all workers of the group, (N, T), from this worker's (n, T).

        It is differentiable: the backward pass sums the contributions of all columns.
        """
        return _GatherWeights.apply(weights, self, tokens)  # type: ignore[no-untyped-call, no-any-return]

    def exchange_columns(self, read: Tensor, tokens: List[int]) -> Tensor:
        """This worker's whole reads, (n, V), from its columns of all workers' reads.

        It is differentiable: the backward pass sends each worker the gradient of its columns.

        Args:
            read: (N, V / W).
            tokens: the number of tokens of each worker.
        """
        return _ExchangeColumns.apply(read, self, tokens)  # type: ignore[no-untyped-call, no-any-return]

    def spread_columns(self, x: Tensor, tokens: List[int]) -> Tensor:
        """This worker's columns of all tokens' vectors, (N, V / W), from this worker's (n, V).

        It is differentiable, and the adjoint of ``exchange_columns``.
        """
        return _SpreadColumns.apply(x, self, tokens)  # type: ignore[no-untyped-call, no-any-return]

    def sum_dots(self, partial: Tensor, tokens: List[int]) -> Tensor:
        """Sums over all columns, (n, T), from this worker's contributions for all, (N, T).

        It is differentiable, and the adjoint of ``gather_weights``.
        """
        return _SumDots.apply(partial, self, tokens)  # type: ignore[no-untyped-call, no-any-return]

    def return_columns(self, read: Tensor, tokens: List[int]) -> Tensor:
        """Send each worker its reads from this worker's columns.

        Args:
            read: (N, V / W).
            tokens: the number of tokens of each worker.

        Returns:
            This worker's reads from all columns, (n, V).
        """
        parts = self._exchange(read, tokens, [tokens[self.rank]] * self.n_shards)
        return parts.view(self.n_shards, *self._own_shape(read, tokens)).transpose(0, 1).flatten(1)

    def send_columns(self, grad_read: Tensor, tokens: List[int]) -> Tensor:
        """Send each worker the gradient of the reads from its columns.

        Args:
            grad_read: (n, V).
            tokens: the number of tokens of each worker.

        Returns:
            The gradient of all workers' reads from this worker's columns, (N, V / W).
        """
        n = len(grad_read)
        width = grad_read.shape[1] // self.n_shards
        by_shard = grad_read.reshape(n, self.n_shards, width).transpose(0, 1).flatten(0, 1)
        return self._exchange(by_shard, [n] * self.n_shards, tokens)

    def sum_for_owners(self, partial: Tensor, tokens: List[int]) -> Tensor:
        """Sum the contributions of all columns, and give each worker the sums of its tokens.

        Args:
            partial: (N, T).
            tokens: the number of tokens of each worker.

        Returns:
            (n, T).
        """
        parts = self._exchange(partial, tokens, [tokens[self.rank]] * self.n_shards)
        return parts.view(self.n_shards, *self._own_shape(partial, tokens)).sum(0)

    def _own_shape(self, of_all: Tensor, tokens: List[int]) -> Tuple[int, int]:
        return tokens[self.rank], of_all.shape[1]

    def _exchange(self, x: Tensor, rows_to: List[int], rows_from: List[int]) -> Tensor:
        """Send and receive the given numbers of rows to and from each worker of the group."""
        received = x.new_empty(sum(rows_from), x.shape[1])
        dist.all_to_all_single(received, x.contiguous(), rows_from, rows_to, group=self.group)
        return received

    def sum_(self, x: Tensor) -> Tensor:
        """Sum x over the workers of the group, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def all_have(self, it: bool, device: Optional[torch.device] = None) -> bool:
        """Whether a condition holds on every worker of the group."""
        lacking = torch.tensor(int(not it), device=device)
        return not int(self.sum_(lacking))

    def assemble(self, columns: Table) -> Optional[Tensor]:
        """Assemble the whole table on the worker of rank 0.

        Every worker must call it. No other tensor of the table's size is created.

        Args:
            columns: (n_slots, V / W), this worker's columns.

        Returns:
            The table, (n_slots, V), on the CPU, on the worker of rank 0; None on all others.
        """
        shape = (len(columns), columns.shape[1] * self.n_shards)
        whole = torch.empty(shape, dtype=columns.dtype) if dist.get_rank() == 0 else None
        start = 0
        for rows in self.whole_rows(columns):
            if whole is not None:
                whole[start : start + len(rows)] = rows
                start += len(rows)
        return whole

    def whole_rows(self, columns: Table) -> Iterator[Tensor]:
        """The rows of the whole table, some at a time, on the worker of rank 0.

        Every worker must iterate to the end; all others get nothing.

        Args:
            columns: (n_slots, V / W), this worker's columns.

        Yields:
            (up to ``ROWS``, V), on the CPU.
        """
        if dist.get_rank() >= self.n_shards:  # another group, with the same table
            return
        for start in range(0, len(columns), ROWS):
            own = columns[start : start + ROWS].detach().contiguous()
            parts = [torch.empty_like(own) for _ in range(self.n_shards)] if not self.rank else None
            dist.gather(own, parts, dst=0, group=self.group)
            if parts is not None:
                yield torch.cat([part.cpu() for part in parts], dim=1)

    def draw_normal_(self, columns: Tensor, std: float) -> None:
        """Draw this worker's columns in place, with the numbers torch would draw for the whole.

        It draws random numbers for all columns, some rows at a time. This holds on the CPU, if the
        last of these blocks of rows has at least 16 numbers, as any table of product keys.
        """
        n_slots, width = columns.shape
        for start in range(0, n_slots, ROWS):
            rows = columns[start : start + ROWS]
            whole = columns.new_empty(len(rows), width * self.n_shards).normal_(std=std)
            rows.copy_(self.own_columns(whole, whole.shape[1]))


class _GatherWeights(torch.autograd.Function):
    """Weights of all workers; backward, the sum over columns for the tokens of this worker."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, shards: ColumnShards, tokens: List[int]) -> Tensor:
        ctx.shards, ctx.tokens = shards, tokens
        return torch.cat(all_gather_rows(weights, tokens, shards.group))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_weights: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.shards.sum_for_owners(grad_weights, ctx.tokens), None, None


class _ExchangeColumns(torch.autograd.Function):
    """All columns of this worker's reads; backward, the gradient of its columns for all tokens."""

    @staticmethod
    def forward(ctx: Any, read: Tensor, shards: ColumnShards, tokens: List[int]) -> Tensor:
        ctx.shards, ctx.tokens = shards, tokens
        return shards.return_columns(read, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_read: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.shards.send_columns(grad_read, ctx.tokens), None, None


class _SpreadColumns(torch.autograd.Function):
    """Columns of all tokens' vectors; backward, the whole gradient of this worker's vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ColumnShards, tokens: List[int]) -> Tensor:
        ctx.shards, ctx.tokens = shards, tokens
        return shards.send_columns(x, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_columns: Tensor) -> Tuple[Tensor, None, None]:
        return ctx.shards.return_columns(grad_columns, ctx.tokens), None, None


class _SumDots(torch.autograd.Function):
    """Dot products over all columns; backward, their gradient for every worker's part."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, shards: ColumnShards, tokens: List[int]) -> Tensor:
        ctx.shards, ctx.tokens = shards, tokens
        return shards.sum_for_owners(partial, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_dots: Tensor) -> Tuple[Tensor, None, None]:
        shards = ctx.shards
        return torch.cat(all_gather_rows(grad_dots, ctx.tokens, shards.group)), None, None


def _own_group(groups: List[List[int]]) -> Any:
    """Create all groups, as every worker must, and return this worker's."""
    rank = dist.get_rank()
    made = [dist.new_group(ranks) for ranks in groups]
    return next(g for g, ranks in zip(made, groups, strict=True) if rank in ranks)
