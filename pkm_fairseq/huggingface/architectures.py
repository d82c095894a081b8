"""Architectures: the places of a model's blocks, and of a block's feed-forward."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """The place of a memory in the blocks of an encoder.

    Args:
        blocks: the list of blocks, as a path from the base model (the model without its head).
        ffn: the block's feed-forward module. It maps its input to the block's addition to the
            residual stream, including dropout. None means BERT's layout: the block has
            ``feed_forward_chunk``, which calls ``intermediate`` and ``output``, and ``output`` has
            ``dense``, ``dropout`` and ``LayerNorm``.
        dropout: the configuration's entry for the dropout probability of the feed-forward's output;
            the memory's read uses it, too. None: no dropout.
    """

    blocks: str = "encoder.layer"
    ffn: Optional[str] = None
    dropout: Optional[str] = None

    def blocks_of(self, base: nn.Module) -> List[nn.Module]:
        """The blocks of a base model.

        Raises:
            ValueError: the path leads to no blocks.
        """
        try:
            blocks: Any = base.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{type(base).__name__} has no list of blocks {self.blocks!r}")
        return list(blocks)

    def check_block(self, block: nn.Module) -> None:
        """Refuse a block with a different layout.

        Raises:
            ValueError: the block lacks modules; the message names them.
        """
        needed = [self.ffn] if self.ffn else ["feed_forward_chunk", "intermediate", "output"]
        lacking = [name for name in needed if not hasattr(block, name)]
        if self.ffn is None and not lacking:
            parts = ("dense", "dropout", "LayerNorm")
            lacking = [f"output.{part}" for part in parts if not hasattr(block.output, part)]
        if lacking:
            raise ValueError(f"a block {type(block).__name__} has no {', '.join(lacking)}")


_BERT = Architecture("encoder.layer", dropout="hidden_dropout_prob")

# by transformers' ``model_type``
ARCHITECTURES: Dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": Architecture("transformer.layer", ffn="ffn", dropout="dropout"),
    "modernbert": Architecture("layers", ffn="mlp"),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model, by its configuration, with a memory or without.

    Raises:
        ValueError: the architecture is unknown; the message lists the known ones.
    """
    model_type = plain_type(config)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"the model type {model_type!r} is unknown, must be one of "
            f"{', '.join(ARCHITECTURES)}: add another one with register_architecture "
            "(docs/huggingface.md)"
        )
    return ARCHITECTURES[model_type]


PREFIX = "pkm_"  # prefix of the type of a model with memory


def plain_type(config: Any) -> str:
    """The type of the model without memory."""
    return str(config.model_type).removeprefix(PREFIX)
