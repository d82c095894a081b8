"""A transformer encoder layer with a product-key memory."""

from contextlib import contextmanager
from typing import Iterator, Optional

import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor, nn

from ..memory import MemoryUsage, ProductKeyMemory, ReadTimes
from ..memory.query import BatchQueryNorm

MEMORY_MODES = ("replace", "residual")


class MemoryEncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer whose second sub-layer reads a memory.

    With h the output of the attention sub-layer, in a post-LN block:

    - "replace" (PKM; Lample et al. 2019): ``LN(h + dropout(memory(h)))``; there is no FFN.
    - "residual" (ResM; Kim & Jung 2020): ``LN(h + dropout(FFN(h)) + dropout(memory(h)))``.

    In a pre-LN block memory and FFN read LN(h), and the sum is not normalised.

    Attributes:
        usage: counters of the look-ups; None, the normal state, counts nothing.
        reads: when each slot was last read in training by fairseq.
        is_idle: whether what is read for is no data, but keeps a worker in step with the others:
            it is in no count and no time, nor in statistics that workers take together.
    """

    def __init__(self, cfg: TransformerConfig, memory: ProductKeyMemory, mode: str) -> None:
        super().__init__(cfg)
        assert mode in MEMORY_MODES, mode
        self.memory = memory
        self.mode = mode
        self.usage: Optional[MemoryUsage] = None
        self.reads = ReadTimes(memory.config.n_slots)
        self.is_idle = False
        if mode == "replace":
            self.fc1 = self.fc2 = None

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Map x (T, B, C), with padding True in encoder_padding_mask (B, T), to (T, B, C)."""
        h = self._attention(x, encoder_padding_mask, attn_mask)
        inner = self.final_layer_norm(h) if self.normalize_before else h
        out = h
        if self.mode == "residual":
            ffn = self.activation_dropout_module(self.activation_fn(self.fc1(inner)))
            out = self.residual_connection(self.dropout_module(self.fc2(ffn)), out)
        read = self._read_memory(inner, encoder_padding_mask)
        out = self.residual_connection(self.dropout_module(read), out)
        return out if self.normalize_before else self.final_layer_norm(out)

    def _attention(
        self, x: Tensor, padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]
    ) -> Tensor:
        if attn_mask is not None:  # 1 where attention is forbidden; large, not infinite
            forbidden = -1e8 if x.element_size() >= 4 else -1e4
            attn_mask = attn_mask.masked_fill(attn_mask.bool(), forbidden)
        inner = self.self_attn_layer_norm(x) if self.normalize_before else x
        attended, _ = self.self_attn(
            query=inner,
            key=inner,
            value=inner,
            key_padding_mask=padding_mask,
            need_weights=False,
            attn_mask=attn_mask,
        )
        h = self.residual_connection(self.dropout_module(attended), x)
        return h if self.normalize_before else self.self_attn_layer_norm(h)

    def _read_memory(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        by_position = None if padding_mask is None else padding_mask.t()  # (T, B), as x
        if isinstance(self.memory.query_norm, BatchQueryNorm):
            self.memory.query_norm.is_idle = self.is_idle
        if self._is_recomputing:  # what there is to note, the first pass has noted
            with _statistics_kept(self.memory.query_norm):
                return self.memory(x, by_position)
        is_update = self.training and self.reads.updates is not None
        if self.is_idle or (self.usage is None and not is_update):
            return self.memory(x, by_position)
        read, lookup = self.memory(x, by_position, return_lookup=True)
        if self.usage is not None:
            self.usage.update(lookup.slots, lookup.weights, by_position)
        if is_update:
            self.reads.record(lookup.slots, by_position)
        return read

    @property
    def _is_recomputing(self) -> bool:
        """Whether --checkpoint-activations runs this layer a second time, in backward.

        fairseq's ``checkpoint_wrapper`` marks the layer, and its first pass has no gradients.
        """
        return hasattr(self, "precheckpoint_forward") and torch.is_grad_enabled()


@contextmanager
def _statistics_kept(norm: nn.Module) -> Iterator[None]:
    """Let a normalisation update copies of its running statistics."""
    kept = dict(norm.named_buffers(recurse=False))
    for name, buffer in kept.items():
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in kept.items():
            setattr(norm, name, buffer)
