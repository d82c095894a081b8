"""How long ago each slot was last read in training, and how far its value has moved."""

import hashlib
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..lookup import Observation
from ..sharding import ColumnShards

QUANTILES = (10, 50, 90, 99)
OUTDATED_AFTER = (10, 100, 1000, 10_000)  # updates
WINDOWS = (10, 100, 1000, 10_000)  # of the last updates
ORIGIN = 8  # numbers
ROWS = 8192  # of a table, compared at once


class ReadTimes(nn.Module):
    """For each slot the update in which it was last read, and in which it was a first choice.

    Among the observers of a memory it notes what the memory reads in a training, whose finished
    updates the state of the run says; outside a training it notes nothing. Updates are counted
    from 1, and 0 stands for never. The times are buffers and so part of a checkpoint. They are
    floating because what averages checkpoints or models handles floating tensors only, and
    float32 in every model, which is exact up to 2 ** 24 updates.

    Args:
        n_slots: slots of the memory.
        origin: says in which training the memory came into being, as ``origin_of`` makes it;
            None if that is not known.

    Attributes:
        last_read: (n_slots,).
        last_top1: (n_slots,).
        origin: (8,), kept by all that goes on from a checkpoint of the training: a restart, another
            training that starts from it, finetuning. Zeros if it is not known.
    """

    last_read: Tensor
    last_top1: Tensor
    origin: Tensor

    def __init__(self, n_slots: int, origin: Optional[Tensor] = None) -> None:
        super().__init__()
        self.register_buffer("origin", torch.zeros(ORIGIN) if origin is None else origin)
        self.register_buffer("last_read", torch.zeros(n_slots, dtype=torch.float32))
        self.register_buffer("last_top1", torch.zeros(n_slots, dtype=torch.float32))

    def observe(self, seen: Observation) -> None:
        """Note a look-up of the update that is under way, if there is one."""
        if seen.training and seen.run.updates is not None:
            self.record(seen.slots, seen.run.updates + 1, seen.padding_mask)

    @torch.no_grad()
    def record(self, slots: Tensor, update: int, padding_mask: Optional[Tensor] = None) -> None:
        """Note that slots are read in an update.

        Args:
            slots: (..., H, K), the highest score first.
            update: from 1.
            padding_mask: (...), True at padding.
        """
        if padding_mask is not None:
            slots = slots[~padding_mask.bool()]
        self.last_read.index_fill_(0, slots.flatten(), update)
        self.last_top1.index_fill_(0, slots[..., 0].flatten(), update)

    @torch.no_grad()
    def forget_after(self, update: int) -> None:
        """Forget reads of later updates."""
        for last in (self.last_read, self.last_top1):
            last.masked_fill_(last > update, 0)

    @property
    def is_averaged(self) -> bool:
        """Whether these are means of several models' times, as --store-ema makes, and so none."""
        return bool((self.last_read != self.last_read.round()).any())

    def summary(self, updates: int) -> Dict[str, Any]:
        """What the times say after so many updates: "updates", "read" and "top1"."""
        return {
            "updates": updates,
            "read": summarise(self.last_read, updates),
            "top1": summarise(self.last_top1, updates),
        }

    def _apply(self, fn: Any, recurse: bool = True) -> "ReadTimes":
        """Follow the model to another device, but not to half precision."""
        times = self.last_read, self.last_top1, self.origin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.last_read.device
        self.last_read, self.last_top1, self.origin = (last.to(device) for last in times)
        return self


def origin_of(keys: Tensor, *names: str) -> Tensor:
    """Tell the training in which a memory comes into being by the sub-keys it starts with.

    A function of them, so that all workers agree, and a training that is repeated bit for bit is
    the same one. Small numbers, so that averages of equal ones, in any dtype, are these.

    Args:
        keys: initial sub-keys, of any shape.
        names: what else tells trainings of one seed apart.

    Returns:
        (8,), float32, each in 1..250.
    """
    content = keys.detach().float().cpu().numpy().tobytes()
    digest = hashlib.sha256("/".join(names).encode() + content).digest()
    return torch.tensor([1.0 + byte % 250 for byte in digest[:ORIGIN]])


def merge_over_workers(reads: Sequence[ReadTimes], group: Any) -> None:
    """Let every worker know when any of them has read a slot; every worker must call it.

    Args:
        reads: of the memories of a model, in the same order on all workers.
        group: the process group of the workers; None if there is but one.
    """
    if group is None or not reads:
        return
    times = [last for x in reads for last in (x.last_read, x.last_top1)]
    latest = torch.cat(times)  # of all layers, which may have other sizes; exchanged at once
    dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
    for last, merged in zip(times, latest.split([len(x) for x in times]), strict=True):  # type: ignore[no-untyped-call]
        last.copy_(merged)


def summarise(last: Tensor, updates: int) -> Dict[str, Any]:
    """Staleness of slots: updates since an event that happens to each of them.

    Args:
        last: (n_slots,), the update of the latest event, from 1; 0 for never.
        updates: finished updates.

    Returns:
        ``never``: share of slots without any; ``p10`` to ``p99``: quantiles of the number of
        updates since, where a slot without any counts as ``updates``; ``outdated``: share of
        slots for which it is more than 10, 100, 1000 and 10000; ``used``: share of slots with an
        event in the last 10, 100, 1000 and 10000 updates, as far as there were so many. Of first
        choices it is the top-1 usage of all tokens of these updates, as a count of them would
        find it, and of reads the usage by at least one read.
    """
    since = (updates - last.double()).clamp_(min=0)  # (n_slots,)
    return {
        "never": float((last == 0).double().mean()),
        **quantiles(since),
        "used": {
            str(x): float((last > updates - x).double().mean()) for x in WINDOWS if x <= updates
        },
        "outdated": {str(x): float((since > x).double().mean()) for x in OUTDATED_AFTER},
    }


def quantiles(x: Tensor) -> Dict[str, float]:
    """Quantiles of (n,): each the smallest value that so many per cent do not exceed."""
    ascending = x.sort().values
    ranks = {q: min(len(x) - 1, max(0, -(-q * len(x) // 100) - 1)) for q in QUANTILES}
    return {f"p{q}": float(ascending[rank]) for q, rank in ranks.items()}


def movement(
    tables: Sequence[Tuple[Tensor, Tensor]], shards: Optional[ColumnShards] = None
) -> Dict[str, float]:
    """How far values have moved from what they were; a slot's rows in all tables are one vector.

    Args:
        tables: of each table its values, (n_slots, width) or this worker's columns, and what they
            were, (n_slots, width), on any device.
        shards: the workers with the other columns, all of which must call it; None if values are
            whole.

    Returns:
        ``unmoved``: share of slots whose value is what it was; quantiles ``p10`` to ``p99`` and
        ``max`` of the L2 distance.

    Raises:
        ValueError: the shapes differ.
    """
    distances = [_distances(values, initial, shards) for values, initial in tables]  # (n_slots,)
    moved = distances[0] if len(distances) == 1 else torch.stack(distances).norm(dim=0)
    if shards is not None:
        moved = shards.sum_(moved.square_()).sqrt_()
    return {
        "unmoved": float((moved == 0).double().mean()),
        **quantiles(moved),
        "max": float(moved.max()),
    }


def _distances(values: Tensor, initial: Tensor, shards: Optional[ColumnShards]) -> Tensor:
    """L2 distances of the rows of a table, or of this worker's columns, from what they were."""
    if shards is not None:
        initial = shards.own_columns(initial, values.shape[1] * shards.n_shards)
    if values.shape != initial.shape:
        raise ValueError(
            f"values have shape {tuple(values.shape)}, their initial ones {tuple(initial.shape)}"
        )
    parts = zip(torch.split(values.detach(), ROWS), torch.split(initial, ROWS), strict=True)
    return torch.cat([(new.float() - old.to(new).float()).norm(dim=1) for new, old in parts])
