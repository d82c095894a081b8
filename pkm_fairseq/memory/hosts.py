"""What the core knows of a host's model: its memory layers, and the state of its run."""

from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, Mapping, Optional, Protocol

from .lookup import Observer
from .memory import ProductKeyMemory
from .observe.staleness import ReadTimes, merge_over_workers
from .observe.usage import MemoryUsage, tokens_for_draws
from .run import RunState
from .values import ValueTable


class MemoryLayer(Protocol):
    """A layer of a host's model that reads a memory."""

    @property
    def memory(self) -> ProductKeyMemory:
        """What the layer reads."""

    @property
    def reads(self) -> ReadTimes:
        """When it read which slot in training; one of the memory's observers."""


class HasMemories(Protocol):
    """A host's model with memories in some of its layers."""

    @property
    def run(self) -> RunState:
        """The state of the run, which all its memories read."""

    def memory_layers(self) -> Mapping[int, MemoryLayer]:
        """The layers with a memory, by their index."""


def with_memories(model: Any) -> Optional[HasMemories]:
    """The model if it has memories, else None.

    Wrappers, as of data-parallel training, hand over attributes when asked for them, which an
    ``isinstance`` with a protocol does not see.
    """
    if not hasattr(model, "memory_layers") or not model.memory_layers():
        return None
    has_memories: HasMemories = model
    return has_memories


def set_finished_updates(model: HasMemories, updates: int) -> None:
    """Tell a model that its training has finished so many updates.

    Times of reads after that are of another training, whose parameters this one started from:
    they are forgotten.
    """
    run = model.run
    if run.updates is None or updates < run.updates:
        for layer in model.memory_layers().values():
            layer.reads.forget_after(updates)
    run.updates = updates


def merge_read_times(model: HasMemories) -> None:
    """Let every worker know when any of them has read a slot; every worker must call it."""
    layers = sorted(model.memory_layers().items())
    merge_over_workers([layer.reads for _, layer in layers], model.run.group())


def new_usage(model: HasMemories, draws: Optional[int] = None) -> Dict[int, MemoryUsage]:
    """Counters at zero, one for each memory layer, by layer index.

    Args:
        model: whose memories are to be counted.
        draws: count so many draws per slot and then no more; None counts all.
    """
    usage = {}
    for index, layer in model.memory_layers().items():
        shape = layer.memory.config.n_slots, layer.memory.config.heads
        tokens = None if draws is None else tokens_for_draws(*shape, draws)
        usage[index] = MemoryUsage(*shape, max_tokens=tokens)
    return usage


def tables_of_layers(layers: Mapping[int, MemoryLayer]) -> Dict[str, ValueTable]:
    """The tables of values of each layer, by ``<layer>``, or ``<layer>.<name>`` of several."""
    return {
        f"{layer}.{name}" if name else str(layer): table
        for layer, has_memory in sorted(layers.items())
        for name, table in has_memory.memory.values.tables().items()
    }


@contextmanager
def observing(model: HasMemories, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Show observers, by layer index, what the memories look up while the context is open."""
    layers = model.memory_layers()
    with ExitStack() as stack:
        for index, observer in observers.items():
            stack.enter_context(layers[index].memory.observed_by(observer))
        yield
