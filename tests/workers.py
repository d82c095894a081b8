"""Several workers, for what they compute together."""

import multiprocessing
from pathlib import Path
from typing import Any, Callable, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# a server that has imported the package once, and has no threads, starts workers in no time
multiprocessing.set_forkserver_preload(["pkm_fairseq"])


def _work(rank: int, world: int, folder: Path, task: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.save(task(rank, *args), folder / f"{rank}.pt")
    dist.barrier()  # another worker may still be connecting to this one
    dist.destroy_process_group()


def on_workers(world: int, folder: Path, task: Callable[..., Any], *args: Any) -> List[Any]:
    """What a function, called with the rank and args, returns on each of several workers.

    Args:
        world: number of workers, which reach each other by gloo.
        folder: an empty one.
        task: of a module, so that workers can import it.
        args: further arguments.
    """
    mp.start_processes(_work, (world, folder, task, args), world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
