"""Gather tensors from workers that have different numbers of rows."""

from typing import Any, List

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: Any = None) -> List[Tensor]:
    """Every worker's x, of the same shape on all workers."""
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return gathered


def all_gather_rows(x: Tensor, lengths: List[int], group: Any = None) -> List[Tensor]:
    """Every worker's x, of different lengths; shorter ones are padded for the transfer.

    Args:
        x: (n, ...), this worker's part.
        lengths: n of each worker.
        group: the process group of the workers; None means all workers.
    """
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    gathered = all_gather(padded, group)
    return [part[:length] for part, length in zip(gathered, lengths, strict=True)]


def narrow(slots: Tensor, n_slots: int) -> Tensor:
    """Slots in the smallest dtype that holds them all, for sending."""
    return slots.to(torch.int32) if n_slots <= 2**31 else slots
