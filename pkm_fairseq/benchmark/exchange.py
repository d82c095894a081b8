"""Bytes that data-parallel workers exchange for the gradient of a value table."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ..memory.gradient import ValueGradient

LOOPBACK = Path("/proc/self/net/dev")


class Table(NamedTuple):
    """A value table and how it is read."""

    n_slots: int
    v_dim: int
    reads: int  # of a token: heads * knn


def factor_bytes(table: Table, tokens: float) -> float:
    """Bytes of one worker's factors: slots and weights, gradients and a count for each token."""
    return tokens * (8 * table.reads + 4 * table.v_dim + 4)


def received_bytes(table: Table, tokens: float, workers: int) -> Dict[str, float]:
    """What each worker receives, by formula: factors from all others, or a ring's all-reduce."""
    dense = 4 * table.n_slots * table.v_dim
    return {
        "factors": (workers - 1) * (factor_bytes(table, tokens) + 16),  # 16: how many there are
        "dense": 2 * (workers - 1) / workers * dense,
    }


def even_tokens(table: Table) -> float:
    """Tokens of all workers in one update from which on a dense all-reduce sends fewer bytes."""
    return 2 * 4 * table.n_slots * table.v_dim / factor_bytes(table, 1)


def measure(table: Table, tokens: int, workers: int, dense: bool) -> Dict[str, float]:
    """Let processes exchange a gradient over gloo.

    Returns:
        Bytes per worker: "sent", of all tensors handed to collectives; "received", what the
        loopback device carried, whoever used it meanwhile, headers included.
    """
    with TemporaryDirectory() as folder:
        spawn(_work, args=(folder, table, tokens, workers, dense), nprocs=workers)  # type: ignore[no-untyped-call]
        found: Dict[str, float] = torch.load(Path(folder, "found.pt"), weights_only=True)
        return found


def _work(rank: int, folder: str, table: Table, tokens: int, workers: int, dense: bool) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=workers)
    values = torch.zeros(table.n_slots, table.v_dim)
    gradient = ValueGradient()
    gradient.keep_factors(values)
    slots = torch.randint(table.n_slots, (tokens, table.reads))
    gradient.add(slots, torch.rand(tokens, table.reads), torch.rand(tokens, table.v_dim))
    dist.barrier()
    before, sent = _loopback(), _count_bytes()
    dist.barrier()
    if dense:
        dist.all_reduce(values)
    else:
        gradient.gather(values)
    dist.barrier()
    if rank == 0:
        found = {"sent": sum(sent), "received": (_loopback() - before) / workers}
        torch.save(found, Path(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _count_bytes() -> "list[int]":
    """From now on the sizes of tensors that this worker hands to collectives."""
    sent, all_gather, all_reduce = [], dist.all_gather, dist.all_reduce

    def gather(out: Any, x: Any, group: Any = None) -> None:
        sent.append(x.nbytes)
        all_gather(out, x, group=group)

    def reduce(x: Any, group: Any = None) -> None:
        sent.append(x.nbytes)
        all_reduce(x, group=group)

    dist.all_gather, dist.all_reduce = gather, reduce
    return sent


def _loopback() -> int:
    lines = LOOPBACK.read_text().splitlines() if LOOPBACK.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))
