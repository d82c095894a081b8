"""A value table split over workers computes what a whole one computes."""

from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pkm_fairseq.memory import ColumnShards, MemoryConfig, ProductKeyMemory, ValueTable

N_SLOTS, V_DIM = 36, 12


def _work(rank: int, world: int, folder: Path, task: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.save(task(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_workers(world: int, folder: Path, task: Callable[..., Any], *args: Any) -> List[Any]:
    """What a function of the rank returns on each of several workers."""
    mp.start_processes(_work, (world, folder, task, args), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def whole_table(init: str = "normal") -> ValueTable:
    torch.manual_seed(0)
    return ValueTable(N_SLOTS, V_DIM, init).double()


def lookups(rank: int) -> "tuple[Tensor, Tensor, Tensor]":
    """Slots, weights and gradients of what was read, of other lengths on every worker."""
    generator = torch.Generator().manual_seed(rank)
    n = (3, 0, 5, 1)[rank]
    slots = torch.randint(N_SLOTS, (n, 2, 4), generator=generator)
    weights = torch.rand(n, 2, 4, generator=generator, dtype=torch.float64)
    return slots, weights, torch.randn(n, V_DIM, generator=generator, dtype=torch.float64)


def read(table: ValueTable, rank: int) -> Dict[str, Tensor]:
    slots, weights, grad_read = lookups(rank)
    weights.requires_grad_()
    out = table(slots, weights)
    out.backward(grad_read)
    return {"read": out.detach(), "weights": weights.grad}


def read_split(rank: int, n_shards: int, factored: bool) -> Dict[str, Tensor]:
    table = ValueTable(N_SLOTS, V_DIM, shards=ColumnShards(n_shards)).double()
    if factored:
        table.gradient.keep_factors(table.weight)
    found = {"values": table.weight.detach(), **read(table, rank)}
    if factored:
        assert table.weight.grad is None
        slots, weights, bags, grads = table.gradient.entries()
        found["gradient"] = torch.zeros_like(table.weight).index_add_(
            0, slots, weights[:, None] * grads[bags]
        )
    else:
        found["gradient"] = table.weight.grad
    return found


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("world,n_shards", [(2, 2), (4, 2), (3, 3)])
def test_reads_and_gradients_are_those_of_a_whole_table(
    tmp_path: Path, world: int, n_shards: int, factored: bool
) -> None:
    found = on_workers(world, tmp_path, read_split, n_shards, factored)
    for start in range(0, world, n_shards):
        group, table = found[start : start + n_shards], whole_table()
        for rank, part in enumerate(group, start):
            for key, tensor in read(table, rank).items():
                torch.testing.assert_close(part[key], tensor, rtol=0, atol=1e-12)
        assert torch.equal(torch.cat([part["values"] for part in group], dim=1), table.weight)
        gradient = torch.cat([part["gradient"] for part in group], dim=1)
        torch.testing.assert_close(gradient, table.weight.grad, rtol=0, atol=1e-12)
