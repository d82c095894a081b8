"""Bytes that data-parallel workers exchange for a value table."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ...memory import ColumnShards, ValueTable
from ...memory.exchange import average
from ...memory.gradient import table_state

LOOPBACK = Path("/proc/self/net/dev")
SIZES = 24  # bytes: how many reads and tokens there are, and which form is meant


class Table(NamedTuple):
    """A value table and its reads per token."""

    n_slots: int
    v_dim: int
    reads: int  # of a token: heads * knn


def columns_of(table: Table, shards: int) -> Table:
    """The part of a table that each of the workers has who split it by columns.

    Raises:
        ValueError: the columns cannot be divided evenly.
    """
    if table.v_dim % shards:
        raise ValueError(f"shards is {shards}, must divide the width of a value, {table.v_dim}")
    return table._replace(v_dim=table.v_dim // shards)


def possible_groups(shards: Sequence[int], workers: Sequence[int]) -> List[int]:
    """The sizes of groups into which some number of workers can be divided.

    Args:
        shards: sizes of groups.
        workers: numbers of workers.

    Raises:
        ValueError: there is none.
    """
    possible = [n for n in shards if any(number % n == 0 for number in workers)]
    if not possible:
        sizes, numbers = (", ".join(map(str, given)) for given in (shards, workers))
        raise ValueError(f"--shards is {sizes}, must divide a number of --workers, {numbers}")
    return possible


def factor_bytes(table: Table, tokens: float) -> float:
    """Bytes of one worker's factors: slots and weights, gradients and a count for each token."""
    return tokens * (8 * table.reads + 4 * table.v_dim + 4)


def received_bytes(table: Table, tokens: int, workers: int) -> Dict[str, float]:
    """The bytes that each worker receives, by formula.

    Args:
        table: the table.
        tokens: tokens per worker.
        workers: W.

    Returns:
        "factors": from all others, once per update; "dense": a ring's all-reduce, once per update;
        "shards": for a table split over all workers, look-ups and columns in the forward pass, and
        columns and the gradients of weights in the backward pass.
    """
    others, dense = workers - 1, 4 * table.n_slots * table.v_dim
    look_up = (4 + 4 + 4) * table.reads  # slots, weights, gradients of weights
    columns = 2 * 4 * table.v_dim / workers  # of the read, and of its gradient
    return {
        "factors": others * (factor_bytes(table, tokens) + SIZES),
        "dense": 2 * others / workers * dense + others * SIZES,
        "shards": others * (tokens * (look_up + columns) + 8),  # 8: how many tokens there are
    }


def plan_bytes(table: Table, tokens: int, workers: int, shards: int) -> Dict[str, float]:
    """Bytes for workers in groups that split a table over their members, by formula.

    Args:
        table: the table.
        tokens: tokens per worker and update.
        workers: W.
        shards: workers per group, a divisor of W; 1 for no split.

    Returns:
        Per worker, "held": its part of the table and of two moments; "group": received for reads;
        "factors" and "dense": received from the other groups with each method.

    Raises:
        ValueError: the columns cannot be divided evenly.
    """
    columns, groups = columns_of(table, shards), workers // shards
    between = received_bytes(columns, tokens * shards, groups)
    return {
        "held": 3 * 4 * table.n_slots * columns.v_dim,
        "group": received_bytes(table, tokens, shards)["shards"],
        "factors": between["factors"],
        "dense": between["dense"],
    }


def even_tokens(table: Table) -> float:
    """Number of tokens per update, of all workers, above which a dense all-reduce sends less."""
    return 2 * 4 * table.n_slots * table.v_dim / factor_bytes(table, 1)


def measure(table: Table, tokens: int, workers: int, way: str) -> Dict[str, float]:
    """Measure the exchange for one read of a table, between processes over gloo.

    Args:
        table: the table.
        tokens: tokens per worker.
        workers: number of workers.
        way: "factors", "dense" or "shards", as in ``received_bytes``.

    Returns:
        Bytes per worker: "sent", of all tensors passed to collectives; "received", all traffic of
        the loopback device, including headers and other programs' traffic.

    Raises:
        ValueError: the columns cannot be divided evenly.
    """
    if way == "shards":
        columns_of(table, workers)
    with TemporaryDirectory() as folder:
        spawn(  # daemons always end with this process
            _work, args=(folder, table, tokens, workers, way), nprocs=workers, daemon=True
        )
        found: Dict[str, float] = torch.load(Path(folder, "found.pt"), weights_only=True)
        return found


def _work(rank: int, folder: str, table: Table, tokens: int, workers: int, way: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=workers)
    shards = ColumnShards(workers) if way == "shards" else None
    values = ValueTable(table.n_slots, table.v_dim, shards=shards)
    values.factored = True
    slots = torch.randint(table.n_slots, (tokens, 1, table.reads))
    weights = torch.rand(tokens, 1, table.reads, requires_grad=True)
    dist.barrier()
    before, sent = _loopback(), _count_bytes()
    dist.barrier()
    values(slots, weights).sum().backward()
    table_state(values.weight).exchange_as = "dense" if way == "dense" else "factors"
    average(values.weight)
    dist.barrier()
    if rank == 0:
        found = {"sent": sum(sent), "received": (_loopback() - before) / workers}
        torch.save(found, Path(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _count_bytes() -> "list[int]":
    """Record the sizes of tensors that this worker passes to collectives from now on."""
    sent, to_all = [], (dist.all_gather, dist.all_reduce, dist.all_to_all_single)
    all_gather, all_reduce, all_to_all = to_all

    def gather(out: Any, x: Any, group: Any = None) -> None:
        sent.append(x.nbytes)
        all_gather(out, x, group=group)

    def reduce(x: Any, group: Any = None) -> None:
        sent.append(x.nbytes)
        all_reduce(x, group=group)

    def exchange(out: Any, x: Any, *sizes: Any, group: Any = None) -> None:
        sent.append(x.nbytes)
        all_to_all(out, x, *sizes, group=group)

    dist.all_gather, dist.all_reduce, dist.all_to_all_single = gather, reduce, exchange
    return sent


def _loopback() -> int:
    lines = LOOPBACK.read_text().splitlines() if LOOPBACK.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))
