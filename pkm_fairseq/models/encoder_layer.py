"""A transformer encoder layer with a product-key memory."""

from typing import Any, Optional

from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import Tensor

from ..memory import ProductKeyMemory, ReadTimes
from ..memory.observe.staleness import origin_of

MEMORY_MODES = {
    "replace": "instead of the FFN; PKM, Lample et al. 2019",
    "residual": "added to the FFN; ResM, Kim & Jung 2020",
}


class MemoryEncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer whose second sub-layer reads a memory.

    With h the output of the attention sub-layer, in a post-LN block:

    - "replace" (PKM; Lample et al. 2019): ``LN(h + dropout(memory(h)))``; there is no FFN.
    - "residual" (ResM; Kim & Jung 2020): ``LN(h + dropout(FFN(h)) + dropout(memory(h)))``.

    In a pre-LN block memory and FFN read LN(h), and the sum is not normalised.

    Attributes:
        reads: the update of each slot's last read in fairseq's training; observes the memory.
    """

    fc1: Any  # None if the memory replaces the FFN
    fc2: Any

    def __init__(self, cfg: TransformerConfig, memory: ProductKeyMemory, mode: str) -> None:
        super().__init__(cfg)
        assert mode in MEMORY_MODES, mode
        self.memory = memory
        self.mode = mode
        self.reads = ReadTimes(memory.config.n_slots, origin_of(memory.keys, mode))
        memory.observers.append(self.reads)
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
        by_position = None if encoder_padding_mask is None else encoder_padding_mask.t()  # (T, B)
        read = self.memory(inner, by_position)
        out = self.residual_connection(self.dropout_module(read), out)
        return out if self.normalize_before else self.final_layer_norm(out)

    def _attention(
        self, x: Tensor, padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]
    ) -> Tensor:
        if attn_mask is not None:  # 1 marks forbidden attention; large, not infinite
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
