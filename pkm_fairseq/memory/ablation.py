"""Ablate memories, to measure how much they contribute to a model."""

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
    """Ablate memories while the context is open; the model itself does not change.

    Ablations can be nested; that of the inner context changes what the outer one reads.

    Args:
        model: a host's model.
        kind: "zero": all values read as zero. "permuted": a random permutation gives each slot the
            value of another slot. "top1": each head reads only its first choice, with the sum of
            its weights; under softmax this is 1.
        layers: memory layers; None for all. Layers that share values can be ablated one by one.
        seed: of the permutation, which is the same for every layer.

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
    """Measure a model with ablated memories: all at once, and each alone.

    Args:
        model: a host's model.
        measure: evaluates the model.

    Returns:
        Results by memory layer (as text, or "all" for all memories), then by kind of ``ablated``.
    """
    parts: Dict[str, Optional[List[int]]] = {"all": None}
    layers = list(model.memory_layers())
    if len(layers) > 1:
        parts.update({str(layer): [layer] for layer in layers})
    found: Dict[str, Dict[str, Measured]] = {part: {} for part in parts}
    for part, of_part in parts.items():
        for kind in ABLATIONS:
            with ablated(model, kind, of_part):
                found[part][kind] = measure()
    if len(layers) == 1:  # the only memory is all of them
        found[str(layers[0])] = dict(found["all"])
    return found


@contextmanager
def _ablated(memory: ProductKeyMemory, kind: str, seed: int) -> Iterator[None]:
    outer = vars(memory).get("search")  # of an ablation around this one
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
        del memory.search  # restores the method of the class
        if outer is not None:
            memory.search = outer  # type: ignore[method-assign]
