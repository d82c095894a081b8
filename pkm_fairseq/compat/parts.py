"""Checkpoints whose value tables are in a folder beside them (``--memory-checkpoint parts``)."""

from functools import wraps
from pathlib import Path
from typing import Any, Callable

from ..memory.parts import place_parts, remove_unused_parts


def find_parts_beside(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_checkpoint_to_cpu``, which every loading function of fairseq calls."""

    @wraps(stock)
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        state = stock(path, *args, **kwargs)
        place_parts(state, Path(path))
        return state

    return load_checkpoint_to_cpu


def remove_parts_with_checkpoints(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``save_checkpoint``, which also removes checkpoints that are no longer kept."""

    @wraps(stock)
    def save_checkpoint(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        saved = stock(cfg, trainer, *args, **kwargs)
        if not cfg.no_save and trainer.is_data_parallel_master:
            remove_unused_parts(Path(cfg.save_dir))
        return saved

    return save_checkpoint
