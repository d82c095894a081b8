"""The interface of a host's model: its memory layers, and the state of its run."""

from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, Mapping, Optional, Protocol

from .lookup import Observer
from .memory import ProductKeyMemory
from .observe.staleness import ReadTimes, merge_over_workers
from .observe.usage import MemoryUsage, tokens_for_draws
from .run import RunState
from .values import ValueTable


class MemoryLayer(Protocol):
    """A layer of a host's model with a memory."""

    @property
    def memory(self) -> ProductKeyMemory:
        """The memory that the layer reads."""

    @property
    def reads(self) -> ReadTimes:
        """The update of each slot's last read in training; an observer of the memory."""


class HasMemories(Protocol):
    """A host's model with memories in some of its layers."""

    @property
    def run(self) -> RunState:
        """The state of the run, which all its memories read."""

    def memory_layers(self) -> Mapping[int, MemoryLayer]:
        """The layers with a memory, by their index."""


def with_memories(model: Any) -> Optional[HasMemories]:
    """The model if it has memories, else None.

    ``isinstance`` with a protocol fails on wrappers, such as those of data-parallel training: they
    forward attributes only on access.
    """
    if not hasattr(model, "memory_layers") or not model.memory_layers():
        return None
    has_memories: HasMemories = model
    return has_memories


def set_finished_updates(model: HasMemories, updates: int) -> None:
    """Tell a model how many updates its training has finished.

    Later times of reads come from the training whose parameters this one started from. They are
    cleared.
    """
    run = model.run
    if run.updates is None or updates < run.updates:
        for layer in model.memory_layers().values():
            layer.reads.forget_after(updates)
    run.updates = updates


def merge_read_times(model: HasMemories) -> None:
    """Merge the times of reads over all workers; every worker must call it."""
    layers = sorted(model.memory_layers().items())
    merge_over_workers([layer.reads for _, layer in layers], model.run.group())


def new_usage(model: HasMemories, draws: Optional[int] = None) -> Dict[int, MemoryUsage]:
    """Counters at zero, one for each memory layer, by layer index.

    Args:
        model: whose memories are to be counted.
        draws: stop after this many draws per slot; None counts all.
    """
    usage = {}
    for index, layer in model.memory_layers().items():
        shape = layer.memory.config.n_slots, layer.memory.config.heads
        tokens = None if draws is None else tokens_for_draws(*shape, draws)
        usage[index] = MemoryUsage(*shape, max_tokens=tokens)
    return usage


def tables_of_layers(layers: Mapping[int, MemoryLayer]) -> Dict[str, ValueTable]:
    """The value tables of each layer, by ``<layer>``, or ``<layer>.<name>`` if it has several."""
    return {
        f"{layer}.{name}" if name else str(layer): table
        for layer, has_memory in sorted(layers.items())
        for name, table in has_memory.memory.values.tables().items()
    }


@contextmanager
def observing(model: HasMemories, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Add observers, by layer index, to the memories while the context is open."""
    layers = model.memory_layers()
    with ExitStack() as stack:
        for index, observer in observers.items():
            stack.enter_context(layers[index].memory.observed_by(observer))
        yield
