"""Declare each option once: default, meaning, source, choices and check.

``option`` makes a dataclass field that carries the declaration. Help texts, fairseq's flags, the
tables of ``docs/settings.md`` and the checks follow from it.
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
Choices = Mapping[str, str]  # choice -> its meaning; "" if the choice explains itself


@dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Args:
        default: its default value.
        help: what it does, a phrase without a full stop.
        source: where the default comes from, or "our choice".
        choices: the allowed texts, each with its meaning. A function is called each time the
            choices are needed, so kinds that are registered later are included.
        test: takes the option's name and a value; raises a ValueError that names both and says
            what is allowed.
        default_text: the default in words, if the value alone is unclear.
    """

    default: Any
    help: str
    source: str
    choices: Union[Choices, Callable[[], Choices], None] = None
    test: Optional[Check] = None
    default_text: Optional[str] = None

    def allowed(self) -> Choices:
        """The current choices; empty if any text is allowed."""
        return (self.choices() if callable(self.choices) else self.choices) or {}

    def check(self, name: str, value: Any) -> None:
        """Check a value. None means "not given" if the default is None.

        Raises:
            ValueError: the value is impossible; the message names it and what is allowed.
        """
        if value is None and self.default is None:
            return
        allowed = self.allowed()
        if allowed and value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
        if self.test is not None:
            self.test(name, value)

    def meaning(self, quote: str = "") -> str:
        """What the option and its choices mean, with ``quote`` around each choice."""
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
        """The default, or the given value, as help texts and tables show it."""
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
    """A dataclass field with its own default, for an option that is declared elsewhere.

    Args:
        declared: the option.
        default: the field's default.
        default_in_words: the default in the help text; None takes the declared one.
    """
    return field(default=default, metadata=_Metadata(declared, default_in_words))


class _Metadata(Mapping[str, Any]):
    """A field's declaration and help text.

    The text is made on access: by then all modules are imported and all kinds registered.
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
    """The options that a dataclass (or its instance) declares, by field name."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


def flag_of(name: str) -> str:
    """The command-line flag of an option, from its field's name."""
    return "--" + name.replace("_", "-")


def check_options(config: type, values: Any) -> None:
    """Check values against the options that a dataclass declares; errors name the flags.

    Args:
        config: the dataclass.
        values: an object with one attribute per option; a missing one takes the default.

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
