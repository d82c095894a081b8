"""The value table: what a memory stores, and the weighted read from it."""

from typing import Any, Dict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ValueTable(nn.Module):
    """A table of values, one row per slot.

    The parameter carries the attribute ``is_value_table``, by which an optimizer can find it
    among others and give it its own learning rate and a lazy update.

    Args:
        n_slots: number of rows.
        v_dim: width of a row.
        init: "normal", N(0, v_dim ** -0.5) (Lample et al. 2019, published code), or "zero".
    """

    def __init__(self, n_slots: int, v_dim: int, init: str = "normal") -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(n_slots, v_dim))
        self._tag()
        self.reset_parameters()

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """Tag the parameter of a copy, too; torch does not copy attributes of parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tag()

    def _tag(self) -> None:
        self.weight.is_value_table = True  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Draw the values anew."""
        if self.init == "zero":
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Sum the values of the given slots, weighted, over heads and neighbours.

        Args:
            slots: (N, H, K), int64.
            weights: (N, H, K).

        Returns:
            (N, v_dim), in the dtype of the table.
        """
        return F.embedding_bag(
            slots.flatten(1),  # (N, H * K)
            self.weight,
            per_sample_weights=weights.flatten(1).to(self.weight.dtype),
            mode="sum",
        )
