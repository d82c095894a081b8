"""Where the blocks of a model are, and the feed-forward of a block."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Where a memory goes in the blocks of an encoder.

    Args:
        blocks: the list of blocks, as a path from the base model (the model without its head).
        ffn: the module of a block that maps the input of the feed-forward to what the block adds to
            its residual stream, dropout included. None is the layout of BERT: the block has
            ``feed_forward_chunk``, which calls ``intermediate`` and ``output``, and ``output`` has
            ``dense``, ``dropout`` and ``LayerNorm``.
        dropout: the entry of the model's configuration that says with which probability what the
            feed-forward adds is dropped out; the memory's read is, too. None: the model does not.
    """

    blocks: str = "encoder.layer"
    ffn: Optional[str] = None
    dropout: Optional[str] = None

    def blocks_of(self, base: nn.Module) -> List[nn.Module]:
        """The blocks of a base model.

        Raises:
            ValueError: there are none under this path.
        """
        try:
            blocks: Any = base.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{type(base).__name__} has no list of blocks {self.blocks!r}")
        return list(blocks)

    def check_block(self, block: nn.Module) -> None:
        """Complain of a block that is laid out otherwise.

        Raises:
            ValueError: with what it lacks.
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
        ValueError: it is not known; the message lists those that are.
    """
    model_type = plain_type(config)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"the model type {model_type!r} is unknown, must be one of "
            f"{', '.join(ARCHITECTURES)}: add another one with register_architecture "
            "(docs/huggingface.md)"
        )
    return ARCHITECTURES[model_type]


PREFIX = "pkm_"  # of the type of a model with memory


def plain_type(config: Any) -> str:
    """The type of the model without memory."""
    return str(config.model_type).removeprefix(PREFIX)
