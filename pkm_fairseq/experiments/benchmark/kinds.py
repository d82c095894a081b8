"""The cost of kinds of queries, weights, values and outputs, relative to the plain memory."""

from statistics import median
from typing import Any, Dict, Iterator, NamedTuple

import torch
from torch import Tensor

from ...memory import MemoryAdam, MemoryConfig, ProductKeyMemory, memory_param_groups
from .timing import Prepare, interleave

PLAIN = "plain"
KINDS: Dict[str, Dict[str, Any]] = {
    PLAIN: {},
    "query mlp": {"query": "mlp"},
    "relu weights": {"score_activation": "relu"},
    "learned scale": {"learn_score_scale": True},
    "output swilu": {"output": "swilu"},
    "values experts": {"values": "experts"},
}


class Cost(NamedTuple):
    """The cost of a kind.

    Attributes:
        parameters: number of parameters.
        held: bytes of parameters and moments.
        forward: its time in evaluation, as a multiple of the plain memory's in the same round.
        step: the same for forward, backward and update in training.
        forward_ms: median milliseconds.
        step_ms: median milliseconds.
    """

    parameters: int
    held: int
    forward: float
    step: float
    forward_ms: float
    step_ms: float


def costs(config: MemoryConfig, width: int, tokens: int, rounds: int) -> Iterator[Any]:
    """Measure every kind alternately with the plain memory.

    Args:
        config: sizes of all memories.
        width: width of input and output.
        tokens: tokens per batch.
        rounds: number of timed rounds.

    Yields:
        The name of a kind and its ``Cost``.
    """
    x = torch.randn(tokens, width)
    plain = _memory(config, width, PLAIN)
    for name in KINDS:
        memory = _memory(config, width, name)
        pair = {"subject": memory, PLAIN: plain}
        seconds = [
            interleave({key: time(it, x) for key, it in pair.items()}, rounds)
            for time in (_forward, _step)
        ]
        ratios = [
            median(a / b for a, b in zip(s["subject"], s[PLAIN], strict=True)) for s in seconds
        ]
        milliseconds = [1000 * median(s["subject"]) for s in seconds]
        count = sum(p.numel() for p in memory.parameters())
        yield name, Cost(count, 3 * 4 * count, *ratios, *milliseconds)
        del memory, pair


def _memory(config: MemoryConfig, width: int, name: str) -> ProductKeyMemory:
    torch.manual_seed(0)
    return ProductKeyMemory(width, MemoryConfig(**{**vars(config), **KINDS[name]}))


def _forward(memory: ProductKeyMemory, x: Tensor) -> Prepare:
    def forward() -> None:
        with torch.no_grad():
            memory(x)

    memory.eval()
    return lambda _: forward


def _step(memory: ProductKeyMemory, x: Tensor) -> Prepare:
    memory.train()
    optimizer = MemoryAdam(memory_param_groups(memory))
    weigh = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad()
        memory(x).backward(weigh)
        optimizer.step()

    return lambda _: step
