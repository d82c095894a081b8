"""``--memory-shards``: value tables split over data-parallel workers."""

from typing import Any, Optional

from fairseq.utils import safe_getattr

from ..memory import ColumnShards
from .check_options import flag_of
from .init_from import take_option

# what would leave a worker out of a read that the others wait in, or a part of a table unsaved
NOT_WITH_SHARDS = {
    "encoder_layerdrop": "workers would drop other layers, and wait for each other's reads",
    "store_ema": "the average of a part of a table cannot be saved as a whole",
    "use_bmuf": "it averages the columns of different workers",
    "no_save_optimizer_state": "fairseq then does not tell all workers that it saves",
}


def take_shards(args: Any, optimizer: Optional[str]) -> Optional[ColumnShards]:
    """The workers that value tables are split over; None for no split.

    The option is of a run, not of a model, and cleared: checkpoints hold whole tables, and load
    with any number of workers.

    Args:
        args: fairseq's model options, whole.
        optimizer: the name of the optimizer.

    Raises:
        ValueError: tables cannot be split so; the message names the option to change.
    """
    n_shards = take_option(args, "memory_shards", 1)
    if n_shards == 1:
        return None
    if not args.memory_layers:
        raise ValueError(f"memory-shards is {n_shards}, must be 1: no layer has a memory")
    if optimizer != "pkm_adam":
        raise ValueError(
            f"memory-shards is {n_shards}, which --optimizer {optimizer} cannot train: fairseq "
            "would average the columns of different workers; use --optimizer pkm_adam"
        )
    freeze = str(safe_getattr(args, "memory_freeze"))
    if freeze in ("values", "all"):
        raise ValueError(
            f"--memory-freeze {freeze} does not work with --memory-shards {n_shards}: the "
            "optimizer, which puts whole tables together to save them, does not get frozen ones"
        )
    for option, reason in NOT_WITH_SHARDS.items():
        if safe_getattr(args, option):
            raise ValueError(
                f"{flag_of(option)} does not work with --memory-shards {n_shards}: {reason}"
            )
    return ColumnShards(n_shards)
