"""Kinds of queries, values and outputs, by the names that options give them."""

from typing import Any, Callable, Dict, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=type)


class Registry(Dict[str, Any]):
    """Kinds of one part of a memory, by name.

    A kind is a module with a class method ``from_config(input_dim, config)``. How one is written
    is in ``docs/adding_a_kind.md``.

    Args:
        part: what they are kinds of, the name of the option.
    """

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self._means: Dict[str, str] = {}

    def register(self, name: str, means: str) -> Callable[[Kind], Kind]:
        """A decorator that makes a class a kind.

        Args:
            name: what the option is given to choose it.
            means: what it is and where it is from, for help texts and tables.

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
        """The names of now, each with what it means."""
        return {name: self._means[name] for name in self}

    def build(self, name: str, *settings: Any) -> nn.Module:
        """A module of the kind of this name."""
        built: nn.Module = self[name].from_config(*settings)
        return built


QUERIES = Registry("query")
VALUES = Registry("values")
OUTPUTS = Registry("output")
