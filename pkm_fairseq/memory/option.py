"""How options are declared: once, with their default, meaning, source, choices and check.

A field made by ``option`` carries its declaration. Help texts, fairseq's flags, the tables of
``docs/settings.md`` and the checks are all made from it.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Union

OUR_CHOICE = "our choice"
LAMPLE = "Lample et al. 2019"
LAMPLE_CODE = "published code of Lample et al. 2019"
KIM = "Kim & Jung 2020"
CSORDAS = "Csordás et al. 2023"
BERGES = "Memory Layers at Scale, 2024"

Check = Callable[[str, Any], None]
Choices = Mapping[str, str]  # text -> what it means; "" where the text says it all


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Args:
        default: its value where nobody says another one.
        help: what it does, a phrase without a full stop.
        source: where the default is from, or "our choice".
        choices: the texts it may be, each with its meaning; a function is called whenever they are
            needed, and not before, so that kinds which are registered later are among them.
        test: given the option's name and a value, raises a ValueError that names both and says
            what is right.
        default_text: the default in words, where the value says too little.
    """

    default: Any
    help: str
    source: str
    choices: Union[Choices, Callable[[], Choices], None] = None
    test: Optional[Check] = None
    default_text: Optional[str] = None

    def allowed(self) -> Choices:
        """The choices of now; empty if any text goes."""
        return (self.choices() if callable(self.choices) else self.choices) or {}

    def check(self, name: str, value: Any) -> None:
        """Check a value; None stands for "not given" where it is the default.

        Raises:
            ValueError: the value is impossible; the message names it and what is right.
        """
        if value is None and self.default is None:
            return
        allowed = self.allowed()
        if allowed and value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
        if self.test is not None:
            self.test(name, value)

    def meaning(self, quote: str = "") -> str:
        """What the option does, and what its choices mean, with ``quote`` around each."""
        choices = [
            f"{quote}{choice}{quote}" + (f" ({means})" if means else "")
            for choice, means in self.allowed().items()
        ]
        return f"{self.help}: {', '.join(choices)}" if choices else self.help

    def help_text(self, default: Optional[str] = None) -> str:
        """The help text of a flag: meaning, default, source.

        Args:
            default: the default in words; None takes the declared one.
        """
        return f"{self.meaning()} (default: {default or self.default_in_words()}; {self.source})"

    def default_in_words(self, value: Any = None) -> str:
        """The default, or another value in its place, as help texts and tables show it."""
        if value is None:
            if self.default_text is not None:
                return self.default_text
            value = self.default
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, (list, tuple)):
            return ",".join(map(str, value))
        if isinstance(value, float):
            return f"{value:g}"
        return "none" if value in (None, "") else str(value)


def option(
    default: Any,
    help: str,
    source: str,
    choices: Union[Choices, Callable[[], Choices], None] = None,
    test: Optional[Check] = None,
    default_text: Optional[str] = None,
) -> Any:
    """A dataclass field that declares an option; see ``Option``."""
    return field_of(Option(default, help, source, choices, test, default_text), default)


def field_of(declared: Option, default: Any, default_in_words: Optional[str] = None) -> Any:
    """A dataclass field for an option that is declared elsewhere, with a default of its own.

    Args:
        declared: the option.
        default: of the field.
        default_in_words: what the help text calls the default; None takes the declared one.
    """
    return field(default=default, metadata=_Metadata(declared, default_in_words))


class _Metadata(Mapping[str, Any]):
    """What a field carries: the declaration and a help text, which is made when it is asked for.

    Then all modules are imported, and all kinds of a choice registered.
    """

    def __init__(self, declared: Option, default_in_words: Optional[str]) -> None:
        self._declared = declared
        self._default = default_in_words

    def __getitem__(self, key: str) -> Any:
        if key == "help":
            return self._declared.help_text(self._default)
        return {"option": self._declared}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("option", "help"))

    def __len__(self) -> int:
        return 2


def declared_in(config: Any) -> Dict[str, Option]:
    """The options that a dataclass, or an instance of one, declares, by field."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


def flag_of(name: str) -> str:
    """The flag of an option on the command line, by the name of its field."""
    return "--" + name.replace("_", "-")


def check_options(config: type, values: Any) -> None:
    """Check values against the options that a dataclass declares, named as flags are.

    Args:
        config: the dataclass.
        values: an object with an attribute for each option; one that lacks it has the default.

    Raises:
        ValueError: a value is impossible.
    """
    for name, declared in declared_in(config).items():
        value = getattr(values, name, declared.default)
        declared.check(flag_of(name).removeprefix("--"), value)


def integer(least: int) -> Check:
    """A check for integers of at least ``least``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, must be an integer of at least {least}")

    return check


def at_least(least: float) -> Check:
    """A check for numbers of at least ``least``."""

    def check(name: str, value: Any) -> None:
        if not _is_number(value) or not value >= least:
            raise ValueError(f"{name} is {value!r}, must be at least {least:g}")

    return check


def positive(name: str, value: Any) -> None:
    """Check that a value is a finite number above 0."""
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}, must be above 0")


def share(name: str, value: Any) -> None:
    """Check that a value is a number in [0, 1)."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value!r}, must be a number in [0, 1)")


def switch(name: str, value: Any) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, must be True or False")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
