"""Blocks of transformers' encoders with a memory.

The formulas are in docs/design.md, with h the output of the attention sub-layer. A post-LN block
computes ``LN(h + dropout(FFN(h)) + dropout(memory(h)))``; in a pre-LN block memory and FFN both
read LN(h). In mode "replace" there is no FFN.
"""

from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor, nn

from ..memory import ProductKeyMemory, ReadTimes
from ..memory.observe.staleness import origin_of

MODES = {"residual": "beside the feed-forward; ResM", "replace": "instead of it; PKM"}


class MadeLater:
    """Mixin for classes that are made at run time: where they are missing, pickle makes them."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How to make the object again, from what the class was made of."""
        made_of = vars(type(self)).get("_made_of")  # not of a subclass, which has a place
        if made_of is None:
            return super().__reduce_ex__(protocol)
        return _new, made_of, self.__getstate__()


def _new(make: Callable[..., type], *parts: type) -> Any:
    made: Any = make(*parts)
    return made.__new__(made)


class MemoryBlock(MadeLater, nn.Module):
    """Mixin for a block with a memory, placed before the block's own class.

    Attributes:
        memory: the block's memory.
        reads: the update of each slot's last read in training; observes the memory.
        memory_mode: "residual" or "replace".
        memory_dropout: dropout on the read.
        next_padding: (B, T), True at padding of the current batch; None means that all are tokens.
            The model sets it.
    """

    memory: ProductKeyMemory
    reads: ReadTimes
    memory_mode: str
    memory_dropout: nn.Dropout
    next_padding: Optional[Tensor]
    _padding: Optional[Tensor]

    def put_memory(self, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add a memory to the block, after its class was changed to this one."""
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

        The padding is an argument because of activation checkpointing: its second forward pass then
        gets the same padding as the first.
        """
        self._padding = padding_mask
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._padding = None

    def read(self, h: Tensor) -> Tensor:
        """The memory's contribution for h (B, T, C)."""
        read: Tensor = self.memory_dropout(self.memory(h, self._padding))
        return read


class BertMemoryBlock(MemoryBlock):
    """A post-LN block with the layout of BERT."""

    intermediate: Any  # None if the memory replaces the feed-forward
    output: Any

    def put_memory(self, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add a memory; in mode "replace" remove the feed-forward."""
        super().put_memory(memory, mode, dropout)
        if mode == "replace":
            self.intermediate = self.output.dense = None

    def feed_forward_chunk(self, h: Tensor) -> Tensor:
        """Compute the second sub-layer for h (B, T, C)."""
        out = h
        if self.memory_mode == "residual":
            out = self.output.dropout(self.output.dense(self.intermediate(h))) + out
        normed: Tensor = self.output.LayerNorm(self.read(h) + out)
        return normed


class FeedForwardMemoryBlock(MemoryBlock):
    """A block whose feed-forward is one module; the block adds its output to the residual stream.

    The memory reads the same input as the feed-forward, in pre-LN and post-LN blocks.
    """

    def put_memory_at(self, ffn: str, memory: ProductKeyMemory, mode: str, dropout: float) -> None:
        """Add the memory's read to the feed-forward's output, or replace the feed-forward."""
        super().put_memory(memory, mode, dropout)
        if mode == "replace":
            setattr(self, ffn, NoFeedForward())
        getattr(self, ffn).register_forward_hook(_AddRead(self))


class NoFeedForward(nn.Module):
    """Placeholder for a feed-forward that a memory has replaced."""

    def forward(self, h: Tensor) -> None:
        """Nothing."""


class _AddRead:
    """A hook on a feed-forward that adds the read of its block's memory."""

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
    """A hook before a base model: passes the padding to its blocks with memory.

    Args:
        index: position of ``attention_mask`` among the model's arguments.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, base: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        """Set ``next_padding`` of the blocks, from the base model's arguments."""
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
    """A hook after a base model: clears the padding of its blocks."""
    for block in base.memory_layers().values():
        block.next_padding = None


# --- classes ----------------------------------------------------------------------------------

_CLASSES: Dict[Tuple[type, type], type] = {}


def block_class(plain: type, kind: type) -> type:
    """The class of a block with memory: a ``MemoryBlock`` class before the block's own."""
    if (plain, kind) not in _CLASSES:
        body = {"__module__": __name__, "_made_of": (block_class, plain, kind)}
        _CLASSES[plain, kind] = type(f"Pkm{plain.__name__}", (kind, plain), body)
    return _CLASSES[plain, kind]
