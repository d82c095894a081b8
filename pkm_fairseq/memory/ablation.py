"""Memories that are switched off in part, to see what they are worth to a model."""

from contextlib import ExitStack, contextmanager
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor

from .hosts import HasMemories
from .memory import ProductKeyMemory

Measured = TypeVar("Measured")
Reads = Tuple[Tensor, Tensor]  # slots and weights, each (N, H, K)


def _zero(slots: Tensor, weights: Tensor, order: Tensor) -> Reads:
    return slots, torch.zeros_like(weights)


def _permuted(slots: Tensor, weights: Tensor, order: Tensor) -> Reads:
    return order[slots], weights


def _top1(slots: Tensor, weights: Tensor, order: Tensor) -> Reads:
    first = torch.zeros_like(weights)
    first[..., 0] = weights.sum(dim=-1)
    return slots, first


ABLATIONS: Dict[str, Callable[[Tensor, Tensor, Tensor], Reads]] = {
    "zero": _zero,
    "permuted": _permuted,
    "top1": _top1,
}


@contextmanager
def ablated(
    model: HasMemories, kind: str, layers: Optional[Sequence[int]] = None, seed: int = 1
) -> Iterator[None]:
    """Switch memories off in part while the context is open; nothing of the model is changed.

    Args:
        model: a host's model.
        kind: "zero": all values read as zero. "permuted": each slot reads the value of another one,
            by a random permutation of the slots. "top1": each head reads its first choice alone,
            with the weight of all its reads: under softmax that is 1, as over one score.
        layers: memory layers; None for all. Layers that share values are ablated one by one, too.
        seed: of the permutation, the same for every layer.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ABLATIONS:
        raise ValueError(f"ablation is {kind!r}, must be one of {', '.join(ABLATIONS)}")
    memories = {index: layer.memory for index, layer in model.memory_layers().items()}
    with ExitStack() as stack:
        for index in memories if layers is None else layers:
            stack.enter_context(_ablated(memories[index], kind, seed))
        yield


def measure_ablations(
    model: HasMemories, measure: Callable[[], Measured]
) -> Dict[str, Dict[str, Measured]]:
    """Measure a model with its memories switched off in part: all of them, and each alone.

    Args:
        model: a host's model.
        measure: evaluates it.

    Returns:
        By memory layer, as text, and of all memories together as "all": by kind of
        ``ablated``, what was measured.
    """
    parts: Dict[str, Optional[List[int]]] = {"all": None}
    parts.update({str(layer): [layer] for layer in model.memory_layers()})
    found: Dict[str, Dict[str, Measured]] = {part: {} for part in parts}
    for part, layers in parts.items():
        for kind in ABLATIONS:
            with ablated(model, kind, layers):
                found[part][kind] = measure()
    return found


@contextmanager
def _ablated(memory: ProductKeyMemory, kind: str, seed: int) -> Iterator[None]:
    search, change = memory.search, ABLATIONS[kind]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(memory.config.n_slots, generator=generator)

    def changed(tokens: Tensor) -> Reads:
        slots, weights = search(tokens)
        return change(slots, weights, order.to(slots.device))

    memory.search = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        del memory.search  # the method of the class is in its place again
