"""Exact weights, reads and outputs of a memory in float64, and the tolerance for each.

Each supported kind of values and output has a function here. Add your own kind with
``READS[MyValues] = ...`` or ``RESULTS[MyOutput] = ...``.
"""

from typing import Any, Callable, Dict, NamedTuple

import torch
from torch import Tensor

from ..memory import (
    Experts,
    LinearOutput,
    MappedTable,
    ProductKeyMemory,
    SwiluOutput,
    ValueTable,
)
from ..memory.output import Unchanged
from ..memory.reference import (
    gelu,
    naive_linear_output,
    naive_read,
    naive_swilu_output,
    naive_weights,
)
from .tolerance import FLOAT64, UNIT, gamma, weight_tolerance

STEEPEST_GELU = 1.13  # largest slope of gelu
STEEPEST_SILU = 1.1  # and of silu
SCALED = (
    8 * UNIT
)  # error of a scaled score: a product and a float32 factor; several times their error


class Judged(NamedTuple):
    """An exact result, and the tolerance of each element; same shape, float64."""

    expected: Tensor
    bound: Tensor


class Weighting(NamedTuple):
    """A memory's function from kept scores to weights."""

    activation: str = "softmax"
    scale: float = 1.0

    @classmethod
    def of(cls, memory: ProductKeyMemory) -> "Weighting":
        """The function of a memory."""
        return cls(memory.config.score_activation, float(memory.score_scale))

    def weights(self, scores: Tensor) -> Tensor:
        """Weights of scores (N, K) in float64."""
        return naive_weights(scores, self.activation, self.scale)

    def tolerance(self, score_tolerance: Tensor, scores: Tensor) -> Tensor:
        """The tolerance of weights, (N, 1): relative for softmax, absolute for relu.

        Args:
            score_tolerance: tolerance of the scores, (N, 1).
            scores: (N, K).
        """
        scaled = abs(self.scale) * score_tolerance
        if self.scale != 1:
            scaled = scaled + SCALED * abs(self.scale) * scores.abs().amax(1, keepdim=True)
        return scaled if self.activation == "relu" else weight_tolerance(scaled, scores.shape[1])

    def bound(self, tolerance: Tensor, weights: Tensor) -> Tensor:
        """The absolute tolerance of weights (N, K), given ``tolerance``."""
        if self.activation == "relu":
            return tolerance.expand_as(weights)
        # a weight of 0 may be another one's underflow if the tolerance is huge
        return (tolerance * weights.clamp(min=FLOAT64.tiny)).clamp(max=1)


# --- values -----------------------------------------------------------------------------------


def judge_read(values: Any, slots: Tensor, weights: Judged, x: Tensor) -> Judged:
    """The exact read of a memory's values.

    Args:
        values: the memory's values.
        slots: (n, H, K).
        weights: (n, H, K).
        x: the memory's input, (n, input_dim), float64.

    Returns:
        (n, V).

    Raises:
        ValueError: there is no function for this kind of values.
    """
    return _function(READS, values, "values")(values, slots, weights, x)


def _table_read(values: Any, slots: Tensor, weights: Judged, x: Tensor) -> Judged:
    rows, own = _rows(values, slots)
    expected = naive_read(rows, own, weights.expected)
    # products, sums, and in int8 the product of weight and scale
    rounding = gamma(slots[0].numel() + 2) * weights.expected.abs()
    return Judged(expected, naive_read(rows.abs(), own, weights.bound + rounding))


def _experts_read(values: Experts, slots: Tensor, weights: Judged, x: Tensor) -> Judged:
    rows, own = _rows(values.down, slots)
    products = rows[own] * x[:, None, None, :]  # (n, H, K, input_dim)
    dots = products.sum(-1)
    off = STEEPEST_GELU * gamma(products.shape[-1]) * products.abs().sum(-1)
    off = off + 8 * UNIT * dots.abs()  # error of gelu itself, several times
    hidden, weight = gelu(dots), weights.expected
    bound = weights.bound * (hidden.abs() + off) + weight.abs() * (off + UNIT * hidden.abs())
    return _table_read(values.up, slots, Judged(weight * hidden, bound), x)


def _rows(table: Any, slots: Tensor) -> Any:
    """The table rows that slots need, (R, V), in float64, and the slots' indices in them."""
    needed, own = torch.unique(slots, return_inverse=True)
    if isinstance(table, MappedTable):
        return table.read(needed), own
    return table.weight[needed.to(table.weight.device)].cpu().double(), own


READS: Dict[type, Callable[..., Judged]] = {
    ValueTable: _table_read,
    MappedTable: _table_read,
    Experts: _experts_read,
}


# --- output -----------------------------------------------------------------------------------


def judge_output(output: Any, read: Tensor, x: Tensor) -> Judged:
    """The exact output of a memory for its read.

    Args:
        output: the output network.
        read: its input, (n, V), float64.
        x: the memory's input, (n, input_dim), float64.

    Returns:
        (n, input_dim).

    Raises:
        ValueError: there is no function for this kind of output.
    """
    return _function(RESULTS, output, "output")(output, read, x)


def _unchanged(output: Unchanged, read: Tensor, x: Tensor) -> Judged:
    return Judged(read, torch.zeros_like(read))


def _linear(output: LinearOutput, read: Tensor, x: Tensor) -> Judged:
    projection = output.weight.cpu().double()  # (input_dim, V)
    sizes = naive_linear_output(read.abs(), projection.abs())
    return Judged(naive_linear_output(read, projection), gamma(read.shape[1]) * sizes)


def _swilu(output: SwiluOutput, read: Tensor, x: Tensor) -> Judged:
    gate, projection = (m.weight.cpu().double() for m in (output.gate, output.proj))
    inner = x @ gate.t()  # (n, V)
    off = STEEPEST_SILU * gamma(x.shape[1]) * (x.abs() @ gate.abs().t()) + 8 * UNIT * inner.abs()
    gated = (read * inner * inner.sigmoid()).abs()
    bound = read.abs() * off + gamma(read.shape[1] + 1) * gated
    expected = naive_swilu_output(read, x, gate, projection)
    return Judged(expected, naive_linear_output(bound, projection.abs()))


RESULTS: Dict[type, Callable[..., Judged]] = {
    Unchanged: _unchanged,
    LinearOutput: _linear,
    SwiluOutput: _swilu,
}


def _function(
    known: Dict[type, Callable[..., Judged]], part: Any, name: str
) -> Callable[..., Judged]:
    if type(part) not in known:
        kinds = ", ".join(kind.__name__ for kind in known)
        raise ValueError(
            f"{name} of the kind {type(part).__name__} cannot be judged, must be one of {kinds}"
        )
    return known[type(part)]
