"""Blocks of transformers' encoders with a memory.

With h the output of the attention sub-layer, the formulas are those of docs/design.md. A post-LN
block computes ``LN(h + dropout(FFN(h)) + dropout(memory(h)))``; in a pre-LN block memory and FFN
both read LN(h). Without the FFN the memory stands in its place.
"""

from typing import Any, Dict, Optional, Tuple

from torch import Tensor, nn

from ..memory import ProductKeyMemory, ReadTimes
from ..memory.observe.staleness import origin_of

MODES = {"residual": "beside the feed-forward; ResM", "replace": "instead of it; PKM"}


class MemoryBlock(nn.Module):
    """What a block with a memory has; it stands in front of the block's own class.

    Attributes:
        memory: what the block reads.
        reads: when each slot was last read in training; observes the memory.
        memory_mode: "residual" or "replace".
        memory_dropout: on what was read.
        next_padding: (B, T), True at padding of the batch at hand; None means that all are tokens.
            The model sets it.
    """

    memory: ProductKeyMemory
    reads: ReadTimes
    memory_mode: str
    memory_dropout: nn.Dropout
    next_padding: Optional[Tensor]
    _padding: Optional[Tensor]

    def put_memory(self, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add a memory to the block, whose class was just changed to this one."""
        self.memory = memory
        self.memory_mode = mode
        self.memory_dropout = nn.Dropout(dropout)
        origin = None if memory.keys.is_meta else origin_of(memory.keys, mode)
        self.reads = ReadTimes(memory.config.n_slots, origin)
        memory.observers.append(self.reads)
        self.next_padding = self._padding = None
        self.register_forward_pre_hook(_hand_over_padding, with_kwargs=True)

    def forward(self, *args: Any, padding_mask: Optional[Tensor] = None, **kwargs: Any) -> Any:
        """Compute the block; ``padding_mask`` (B, T) is True at padding.

        It is an argument so that activation checkpointing, which runs this method a second time in
        the backward pass, has the padding of the first.
        """
        self._padding = padding_mask
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._padding = None

    def read(self, h: Tensor) -> Tensor:
        """What the memory adds for h (B, T, C)."""
        read: Tensor = self.memory_dropout(self.memory(h, self._padding))
        return read


class BertMemoryBlock(MemoryBlock):
    """A post-LN block with the layout of BERT."""

    intermediate: Any  # None where the memory stands in place of the feed-forward
    output: Any

    def put_memory(self, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add a memory; in mode "replace" the feed-forward goes."""
        super().put_memory(memory, mode, dropout)
        if mode == "replace":
            self.intermediate = self.output.dense = None

    def feed_forward_chunk(self, h: Tensor) -> Tensor:
        """The second sub-layer, of h (B, T, C)."""
        out = h
        if self.memory_mode == "residual":
            out = self.output.dropout(self.output.dense(self.intermediate(h))) + out
        normed: Tensor = self.output.LayerNorm(self.read(h) + out)
        return normed


class FeedForwardMemoryBlock(MemoryBlock):
    """A block whose feed-forward is one module; the block adds its output to the residual stream.

    Whether the block normalises before or after, the memory reads what the feed-forward reads.
    """

    def put_memory_at(self, ffn: str, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add a memory to the output of the feed-forward, or in its place."""
        super().put_memory(memory, mode, dropout)
        if mode == "replace":
            setattr(self, ffn, NoFeedForward())
        getattr(self, ffn).register_forward_hook(_AddRead(self))


class NoFeedForward(nn.Module):
    """Stands where a memory has replaced the feed-forward."""

    def forward(self, h: Tensor) -> None:
        """Nothing."""


class _AddRead:
    """A hook on a feed-forward that adds what the memory of its block reads."""

    def __init__(self, block: MemoryBlock) -> None:
        self.block = block

    def __call__(self, ffn: nn.Module, args: Tuple[Any, ...], output: Optional[Tensor]) -> Tensor:
        read = self.block.read(args[0])
        return read if output is None else output + read


def _hand_over_padding(
    block: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
    return args, {"padding_mask": block.next_padding, **kwargs}


class TellPadding:
    """A hook before a base model: tells its blocks with memory what is padding.

    Args:
        index: place of ``attention_mask`` among the arguments of the model.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, base: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        """Set ``next_padding`` of the blocks; the arguments are those of the base model."""
        mask = args[self.index] if len(args) > self.index else kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape}, must be (batch, tokens) for a model with memories: it "
                "marks the padding"
            )
        for block in base.memory_layers().values():
            block.next_padding = None if mask is None else mask == 0


def forget_padding(base: Any, args: Any, output: Any) -> None:
    """A hook after a base model: its blocks keep no mask of a batch that is done."""
    for block in base.memory_layers().values():
        block.next_padding = None


# --- classes ----------------------------------------------------------------------------------

_CLASSES: Dict[Tuple[type, type], type] = {}


def block_class(plain: type, kind: type) -> type:
    """The class of a block with memory: a kind of ``MemoryBlock`` in front of its own."""
    if (plain, kind) not in _CLASSES:
        made = type(f"Pkm{plain.__name__}", (kind, plain), {"__module__": __name__})
        globals().setdefault(made.__name__, made)  # where pickle looks for it
        _CLASSES[plain, kind] = made
    return _CLASSES[plain, kind]
