"""Capture the inputs of a memory."""

from typing import List

import torch
from torch import Tensor

from ..lookup import Observation


class InputCapture:
    """Keeps a memory's inputs for real tokens, in order.

    Attributes:
        n_tokens: number of tokens kept.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._parts: List[Tensor] = []  # each (n, input_dim)

    def observe(self, seen: Observation) -> None:
        """Keep the inputs of a look-up."""
        tokens = seen.x.reshape(-1, seen.x.shape[-1])
        if seen.padding_mask is None:
            tokens = tokens.clone()
        else:
            tokens = tokens[~seen.padding_mask.flatten().bool()]  # (n, input_dim), a copy
        self._parts.append(tokens)
        self.n_tokens += len(tokens)

    def inputs(self) -> Tensor:
        """All captured inputs, (n_tokens, input_dim).

        Raises:
            ValueError: nothing was looked up.
        """
        if not self._parts:
            raise ValueError("no input was captured: the memory was not read")
        return torch.cat(self._parts)
