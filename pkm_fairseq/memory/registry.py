"""Registries: kinds of queries, values and outputs, by their names in options."""

from typing import Any, Callable, Dict, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=type)


class Registry(Dict[str, Any]):
    """Kinds of one part of a memory, by name.

    A kind is a module with a class method ``from_config(input_dim, config)``.
    ``docs/adding_a_kind.md`` shows how to write one.

    Args:
        part: the part of the memory, which is the name of the option.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self._means: Dict[str, str] = {}

    def register(self, name: str, means: str) -> Callable[[Kind], Kind]:
        """A decorator that registers a class as a kind.

        Args:
            name: the option's value that chooses this kind.
            means: its meaning and source, for help texts and tables.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"{self.part} {name!r} is registered already, by {self[name]}")

        def decorate(kind: Kind) -> Kind:
            self[name], self._means[name] = kind, means
            return kind

        return decorate

    def meanings(self) -> Dict[str, str]:
        """The current names with their meanings."""
        return {name: self._means[name] for name in self}

    def build(self, name: str, *settings: Any) -> nn.Module:
        """Build a module of the kind with this name."""
        built: nn.Module = self[name].from_config(*settings)
        return built


QUERIES = Registry("query")
VALUES = Registry("values")
OUTPUTS = Registry("output")
