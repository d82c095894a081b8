"""``add_memories``: memories in an encoder of transformers that is there already."""

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
    "residual" the outputs are those of the model before, bit for bit.

    Args:
        model: a BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT or ModernBERT of transformers, or one
            whose architecture was registered. It is changed in place, its class included.
        config: the settings of each memory (default: those of ``MemoryConfig``).
        layers: the blocks that get one, 0-based.
        mode: "residual" puts it beside the feed-forward (ResM; Kim & Jung 2020), "replace" in its
            place (PKM; Lample et al. 2019).

    Returns:
        The model.

    Raises:
        ValueError: the architecture is not known, the model has memories or is a decoder, or a
            layer or the mode does not exist; the model is then as it was.
    """
    config = MemoryConfig() if config is None else config
    check_model(model, list(layers), mode)
    change_in_place(model, settings_of(config, layers, mode))
    return model
