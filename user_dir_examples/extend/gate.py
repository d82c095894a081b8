"""A kind of output of your own: what was read, times a number for each feature."""

import torch
from torch import Tensor, nn

from pkm_fairseq.memory import OUTPUTS, MemoryConfig


@OUTPUTS.register("my_gate", "the read times a learned number for each feature")
class MyGate(nn.Module):
    """``y * g``, for values as wide as the encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(width))

    @classmethod
    def from_config(cls, input_dim: int, config: MemoryConfig) -> "MyGate":
        """An output for a memory of this width and these settings."""
        if config.value_width(input_dim) != input_dim:
            raise ValueError(f"v_dim is {config.v_dim}, must be {input_dim} for output my_gate")
        return cls(input_dim)

    def forward(self, read: Tensor, tokens: Tensor) -> Tensor:
        """Map reads (N, V) of tokens (N, input_dim) to (N, input_dim)."""
        return read * self.gate
