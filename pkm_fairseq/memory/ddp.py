"""What torch's ``DistributedDataParallel`` leaves alone, which an attribute of the model says."""

from typing import Any, Callable, List, Tuple

from torch import nn

from .observe.staleness import ReadTimes
from .values import ValueTable


def ignore_tables_in_ddp(model: nn.Module) -> nn.Module:
    """Tell torch's DistributedDataParallel to leave value tables to ``MemoryAdam``.

    Call it before DistributedDataParallel wraps the model. Without it, workers exchange a dense
    gradient of each table, which is correct but slow. Frozen tables are not ignored, so that all
    workers get the first one's, unless they are split by columns.

    Args:
        model: the module that will be wrapped.

    Returns:
        The model.
    """
    return _ignore(
        model, ValueTable, ("weight",), lambda x: x.weight.requires_grad or x.shards is not None
    )


def ignore_read_times_in_ddp(model: nn.Module) -> nn.Module:
    """Tell torch's DistributedDataParallel to leave times of reads alone.

    With ``broadcast_buffers`` it would overwrite them in every forward pass by those of the first
    worker. Each worker has its own, until ``merge_read_times`` merges them.

    Args:
        model: the module that will be wrapped.

    Returns:
        The model.
    """
    return _ignore(model, ReadTimes, ("last_read", "last_top1"))


def _ignore(
    model: nn.Module,
    kind: type,
    tensors: Tuple[str, ...],
    is_meant: Callable[[Any], bool] = lambda module: True,
) -> nn.Module:
    """Add these tensors of all modules of a kind that are meant, under each of their names."""
    modules = [
        f"{name}." if name else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, kind) and is_meant(module)
    ]
    before: List[str] = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    names = [*before, *(f"{module}{tensor}" for module in modules for tensor in tensors)]
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys(names))  # type: ignore[assignment]
    return model
