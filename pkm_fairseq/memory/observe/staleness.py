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
WINDOWS = (10, 100, 1000, 10_000)  # numbers of latest updates
ORIGIN = 8  # numbers
ROWS = 8192  # rows to compare at once


class ReadTimes(nn.Module):
    """For each slot, the update of its last read, and of its last read as a first choice.

    As an observer of a memory it records the reads in a training; the state of the run gives the
    number of finished updates. Outside a training it records nothing. Updates count from 1; 0
    means never. The times are buffers, so checkpoints hold them. They are floating because code
    that averages checkpoints or models handles only floating tensors. They are float32 in every
    model, which is exact up to 2 ** 24 updates.

    Args:
        n_slots: slots of the memory.
        origin: identifies the training that created the memory, from ``origin_of``; None if
            unknown.

    Attributes:
        last_read: (n_slots,).
        last_top1: (n_slots,).
        origin: (8,); kept by every run that starts from a checkpoint of the training: a restart,
            another training, finetuning. Zeros if unknown.
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
        """Record a look-up of the current update, if there is one."""
        if seen.training and seen.run.updates is not None:
            self.record(seen.slots, seen.run.updates + 1, seen.padding_mask)

    @torch.no_grad()
    def record(self, slots: Tensor, update: int, padding_mask: Optional[Tensor] = None) -> None:
        """Record that an update reads slots.

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
        """Whether these are means of several models' times (--store-ema), which are no times."""
        return bool((self.last_read != self.last_read.round()).any())

    def summary(self, updates: int) -> Dict[str, Any]:
        """The staleness after this many updates, see ``staleness``."""
        return staleness([self], updates)

    def _apply(self, fn: Any, recurse: bool = True) -> "ReadTimes":
        """Move with the model to another device, but stay in float32."""
        times = self.last_read, self.last_top1, self.origin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.last_read, self.last_top1, self.origin
        self.last_read, self.last_top1, self.origin = (
            now.float() if last.is_meta else last.to(now.device)
            for last, now in zip(times, moved, strict=True)
        )
        return self


def origin_of(keys: Tensor, *names: str) -> Tensor:
    """Identify the training that creates a memory, by its initial sub-keys.

    As a function of the sub-keys it is equal on all workers, and for a training that is repeated
    bit for bit. The numbers are small, so that averages of equal ones stay exact in any dtype.

    Args:
        keys: initial sub-keys, of any shape.
        names: further text that distinguishes trainings with the same seed.

    Returns:
        (8,), float32, each in 1..250.
    """
    content = keys.detach().float().cpu().numpy().tobytes()
    digest = hashlib.sha256("/".join(names).encode() + content).digest()
    return torch.tensor([1.0 + byte % 250 for byte in digest[:ORIGIN]])


def staleness(reads: Sequence[ReadTimes], updates: int) -> Dict[str, Any]:
    """The staleness of slots after this many updates.

    Args:
        reads: the times of all memories that share the values.
        updates: finished updates.

    Returns:
        ``updates``; ``read`` and ``top1``, each as from ``summarise``.
    """
    last_read = torch.stack([x.last_read for x in reads]).amax(0)  # (n_slots,)
    last_top1 = torch.stack([x.last_top1 for x in reads]).amax(0)
    return {
        "updates": updates,
        "read": summarise(last_read, updates),
        "top1": summarise(last_top1, updates),
    }


def merge_over_workers(reads: Sequence[ReadTimes], group: Any) -> None:
    """Merge the times of reads over all workers; every worker must call it.

    Args:
        reads: the times of a model's memories, in the same order on all workers.
        group: the process group of the workers; None for one worker.
    """
    if group is None or not reads:
        return
    times = [last for x in reads for last in (x.last_read, x.last_top1)]
    latest = torch.cat(times)  # all layers in one exchange; their sizes may differ
    dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
    for last, merged in zip(times, latest.split([len(x) for x in times]), strict=True):  # type: ignore[no-untyped-call]
        last.copy_(merged)


def summarise(last: Tensor, updates: int) -> Dict[str, Any]:
    """Staleness of slots: updates since each slot's latest event (a read, or a first choice).

    Args:
        last: (n_slots,), the update of the latest event, from 1; 0 for never.
        updates: finished updates.

    Returns:
        ``never``: share of slots without an event; ``p10`` to ``p99``: quantiles of the updates
        since the event, where a slot without one counts as ``updates``; ``outdated``: share of
        slots with more than 10, 100, 1000 and 10000 updates since; ``used``: share of slots with
        an event in the last 10, 100, 1000 and 10000 updates, if there were that many. For first
        choices, ``used`` is the top-1 usage over all tokens of these updates; for reads, it is the
        usage by at least one read.
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
    """Quantiles of (n,): each the smallest value that this percentage does not exceed."""
    ascending = x.sort().values
    ranks = {q: min(len(x) - 1, max(0, -(-q * len(x) // 100) - 1)) for q in QUANTILES}
    return {f"p{q}": float(ascending[rank]) for q, rank in ranks.items()}


def movement(
    tables: Sequence[Tuple[Tensor, Tensor]], shards: Optional[ColumnShards] = None
) -> Dict[str, float]:
    """How far values have moved; a slot's rows in all tables count as one vector.

    Args:
        tables: for each table its current values, (n_slots, width) or this worker's columns, and
            its initial values, (n_slots, width), on any device.
        shards: the workers with the other columns; all of them must call it. None if values are
            not split.

    Returns:
        ``unmoved``: share of slots whose value did not change; quantiles ``p10`` to ``p99`` and
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
    """L2 distances of a table's rows, or of this worker's columns, from their initial values."""
    if shards is not None:
        initial = shards.own_columns(initial, values.shape[1] * shards.n_shards)
    if values.shape != initial.shape:
        raise ValueError(
            f"values have shape {tuple(values.shape)}, their initial ones {tuple(initial.shape)}"
        )
    parts = zip(torch.split(values.detach(), ROWS), torch.split(initial, ROWS), strict=True)
    return torch.cat([(new.float() - old.to(new).float()).norm(dim=1) for new, old in parts])
