"""Values that are experts: a slot is a network with one hidden unit (PEER)."""

from typing import Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .registry import VALUES
from .sharding import ColumnShards
from .values import ValueTable


@VALUES.register("experts", "a network with down vector u and up vector v, gelu(u x) v; PEER, 2024")
class Experts(nn.Module):
    """Experts of one hidden unit: ``read = sum of weight * gelu(u . x) * v`` (PEER, 2407.04153).

    Two value tables hold the down vectors ``u`` and the up vectors ``v``. With ``init`` "zero" only
    ``v`` starts at zero: the read is then zero, and ``v`` learns from the first step. If ``u`` were
    zero, too, neither would ever get a gradient.

    Args:
        n_slots: number of experts.
        input_dim: width of ``u``.
        v_dim: width of ``v``.
        init: initialisation of ``v``, see ``ValueTable``. ``u`` is drawn from
            N(0, input_dim ** -0.5), so that the hidden units of normalised tokens have unit
            variance (our choice).
        dtype: see ``ValueTable``.
        shards: see ``ValueTable``; both tables are split by columns.
        keeps_dtype: see ``ValueTable``.
    """

    def __init__(
        self,
        n_slots: int,
        input_dim: int,
        v_dim: int,
        init: str = "normal",
        dtype: Optional[torch.dtype] = None,
        shards: Optional[ColumnShards] = None,
        keeps_dtype: bool = False,
    ) -> None:
        super().__init__()
        self.n_slots, self.v_dim = n_slots, v_dim
        self.down = ValueTable(n_slots, input_dim, "normal", dtype, shards, keeps_dtype)
        self.up = ValueTable(n_slots, v_dim, init, dtype, shards, keeps_dtype)

    @classmethod
    def from_config(
        cls,
        input_dim: int,
        config: MemoryConfig,
        shards: Optional[ColumnShards] = None,
        keeps_dtype: bool = False,
    ) -> "Experts":
        """Build the experts for a memory of this width and these settings."""
        dtype, v_dim = getattr(torch, config.value_dtype), config.value_width(input_dim)
        init, sizes = config.values_init, (config.n_slots, input_dim, v_dim)
        return cls(*sizes, init, dtype, shards, keeps_dtype)

    def tables(self) -> Dict[str, ValueTable]:
        """The tables by name."""
        return {"down": self.down, "up": self.up}

    def forward(self, slots: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs over heads and neighbours.

        Args:
            slots: (N, H, K), int64.
            weights: (N, H, K), floating.
            tokens: (N, input_dim).

        Returns:
            (N, v_dim), in at least float32.
        """
        hidden = self.down.dot(slots, tokens)  # (N, H, K)
        return self.up(slots, weights * F.gelu(hidden))  # type: ignore[no-any-return]
