"""Moving averages of the parameters, ``--store-ema``."""

import logging
from functools import wraps
from types import SimpleNamespace
from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor

from .loading import showing

logger = logging.getLogger(__name__)


def average_tied_parameters_once(stock: Callable[..., None]) -> Callable[..., None]:
    """Replace ``EMA._step_internal``, which averages by name.

    A parameter with several names (tied embeddings, a shared value table) is one tensor in the
    average, too. fairseq updates it once per name; the replacement updates it once.
    """

    @wraps(stock)
    def step(self: Any, new_model: Any, updates: Any = None) -> None:
        averages = self.fp32_params if self.config.ema_fp32 else self.model.state_dict()
        once, seen = {}, set()
        for name, value in new_model.state_dict().items():
            place = _place(averages.get(name))
            if place is None or place not in seen:
                once[name] = value
                seen.add(place)
        stock(self, SimpleNamespace(state_dict=lambda: once), updates)

    return step


@showing
def start_from_the_checkpoint(trainer: Any, checkpoint: Dict[str, Any], file: str) -> None:
    """For a checkpoint without an average: name its parameters as the average, too.

    fairseq wants to start the average from the parameters, but has deleted them by then.
    """
    if trainer.cfg.ema.store_ema and "ema" not in checkpoint["extra_state"]:
        logger.info("the checkpoint has no average: --store-ema starts from its parameters")
        checkpoint["extra_state"]["ema"] = checkpoint["model"]


def _place(value: Any) -> Optional[Tuple[Any, ...]]:
    """A key that is equal for tensors that are the same; None for anything else, or if empty."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return None
    return value.device, value.dtype, value.data_ptr(), value.shape, value.stride()
