"""Output networks: from the read to the width of the input."""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .registry import OUTPUTS


class Unchanged(nn.Module):
    """The read, unchanged."""

    def forward(self, read: Tensor, tokens: Tensor) -> Tensor:
        """Return ``read``."""
        return read


@OUTPUTS.register("linear", "a projection; none if values are as wide as the encoder")
class LinearOutput(nn.Linear):
    """A projection ``y W`` without bias, so that zero values read as exactly zero."""

    @classmethod
    def from_config(cls, input_dim: int, config: MemoryConfig) -> nn.Module:
        """A projection from values to inputs; ``Unchanged`` if both have the same width."""
        v_dim = config.value_width(input_dim)
        return Unchanged() if v_dim == input_dim else cls(v_dim, input_dim, bias=False)

    def forward(self, read: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Map reads (N, V) to (N, input_dim)."""
        return super().forward(read)


@OUTPUTS.register("swilu", "(y * silu(x W1)) W2 for the read y; Memory Layers at Scale, 2024")
class SwiluOutput(nn.Module):
    """A gate on the read: ``(y * silu(x W1)) W2`` (Memory Layers at Scale, 2412.09764).

    There is no bias, so zero values read as exactly zero. They still get a gradient.
    """

    def __init__(self, input_dim: int, v_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(input_dim, v_dim, bias=False)  # W1
        self.proj = nn.Linear(v_dim, input_dim, bias=False)  # W2

    @classmethod
    def from_config(cls, input_dim: int, config: MemoryConfig) -> "SwiluOutput":
        """A gate and a projection for a memory of this width and these settings."""
        return cls(input_dim, config.value_width(input_dim))

    def forward(self, read: Tensor, tokens: Tensor) -> Tensor:
        """Map reads (N, V) of tokens (N, input_dim) to (N, input_dim)."""
        gated: Tensor = self.proj(read * F.silu(self.gate(tokens)))
        return gated
