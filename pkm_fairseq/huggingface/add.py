"""``add_memories``: add memories to an existing encoder of transformers."""

from typing import Any, Optional, Sequence

from ..memory import MemoryConfig
from .models import change_in_place, check_model, settings_of


def add_memories(
    model: Any,
    config: Optional[MemoryConfig] = None,
    layers: Sequence[int] = (3, 7),
    mode: str = "residual",
) -> Any:
    """Add product-key memories to an encoder, bare or with a head.

    On pretrained weights this is INIT (Kim & Jung 2020). With ``values_init="zero"`` and mode
    "residual" the outputs do not change, bit for bit.

    Args:
        model: a BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT or ModernBERT of transformers, or a model
            with a registered architecture. It is changed in place, including its class.
        config: the settings of each memory (default: those of ``MemoryConfig``).
        layers: the blocks that get a memory, counted from 0.
        mode: "residual" puts it beside the feed-forward (ResM; Kim & Jung 2020), "replace" instead
            of it (PKM; Lample et al. 2019).

    Returns:
        The model.

    Raises:
        ValueError: the architecture is unknown, the model already has memories or is a decoder, or
            a layer or the mode does not exist. The model is then unchanged.
    """
    config = MemoryConfig() if config is None else config
    check_model(model, list(layers), mode)
    change_in_place(model, settings_of(config, layers, mode))
    return model
