"""How an option is declared, checked and described."""

import argparse
from dataclasses import dataclass, fields

import pytest

from pkm_fairseq.memory.option import (
    OUR_CHOICE,
    Option,
    at_least,
    check_options,
    declared_in,
    integer,
    option,
    share,
    switch,
)
from pkm_fairseq.models.config import ParserWithChoices

KINDS = {"a": "the first"}


@dataclass
class Settings:
    """Two options of ours, and one that is declared elsewhere."""

    my_kind: str = option("a", "what it is", OUR_CHOICE, choices=lambda: KINDS)
    my_size: int = option(3, "how large it is", "a paper, 2020", test=integer(1))
    other: int = 0


def test_a_field_carries_its_declaration_and_a_help_text_made_from_it():
    kind, size = declared_in(Settings).values()
    assert (kind.default, Settings().my_kind) == ("a", "a")
    assert (size.source, Settings().my_size) == ("a paper, 2020", 3)
    helps = {f.name: f.metadata.get("help") for f in fields(Settings)}
    assert helps == {
        "my_kind": "what it is: a (the first) (default: a; our choice)",
        "my_size": "how large it is (default: 3; a paper, 2020)",
        "other": None,
    }


def test_a_choice_that_is_registered_later_is_allowed_described_and_parsed(monkeypatch):
    kind = declared_in(Settings)["my_kind"]
    with pytest.raises(ValueError, match=r"my-kind is 'b', must be one of a$"):
        check_options(Settings, Settings(my_kind="b"))
    monkeypatch.setitem(KINDS, "b", "")
    check_options(Settings, Settings(my_kind="b"))
    assert kind.meaning("`") == "what it is: `a` (the first), `b`"
    (metadata,) = [f.metadata for f in fields(Settings) if f.name == "my_kind"]
    assert metadata["help"] == "what it is: a (the first), b (default: a; our choice)"
    assert dict(metadata) == {"option": kind, "help": metadata["help"]}
    parser = argparse.ArgumentParser()
    ParserWithChoices(parser, Settings).add_argument("--my-kind", type=str)
    ParserWithChoices(parser, Settings).add_argument("--my-size", "-m", type=int)
    assert vars(parser.parse_args(["--my-kind", "b", "-m", "7"])) == {"my_kind": "b", "my_size": 7}
    with pytest.raises(SystemExit):
        parser.parse_args(["--my-kind", "c"])


def test_a_declaration_asks_for_no_choice():
    """The module that registers kinds may import the one that declares the option."""
    asked = []
    option("a", "what it is", OUR_CHOICE, choices=lambda: asked.append(1) or KINDS)
    assert not asked


def test_an_object_that_lacks_an_option_has_its_default():
    check_options(Settings, argparse.Namespace(my_kind="a"))
    with pytest.raises(ValueError, match=r"my-size is 0, must be an integer of at least 1"):
        check_options(Settings, argparse.Namespace(my_size=0))


@pytest.mark.parametrize("default", [None, 3])
def test_none_is_a_value_only_where_it_is_the_default(default):
    declared = Option(default, "", OUR_CHOICE, test=integer(1))
    if default is None:
        declared.check("size", None)
    else:
        with pytest.raises(ValueError, match="size is None"):
            declared.check("size", None)


@pytest.mark.parametrize(
    ("check", "right", "wrong", "words"),
    [
        (integer(2), [2, 10**9], [1, -1, 2.0, True, "2", None], "an integer of at least 2"),
        (at_least(0), [0, 0.0, 5, 1e-9], [-1e-9, -1, float("nan"), "0", True], "at least 0"),
        (share, [0, 0.0, 0.999], [-0.1, 1, 1.0, float("nan"), "0", False], r"in \[0, 1\)"),
        (switch, [True, False], [0, 1, "true", None], "True or False"),
    ],
)
def test_a_check_names_the_value_and_what_is_right(check, right, wrong, words):
    for value in right:
        check("x", value)
    for value in wrong:
        with pytest.raises(ValueError, match=f"^x is {value!r}, must be .*{words}"):
            check("x", value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "none"), ("", "none"), (False, "off"), (True, "on"), ([3, 7], "3,7"), (1e-3, "0.001")],
)
def test_values_are_shown_as_they_are_typed(value, words):
    assert Option(value, "", OUR_CHOICE).default_in_words() == words
    other = Option("other", "", OUR_CHOICE).default_in_words(value)
    assert other == ("other" if value is None else words)


def test_a_default_may_be_put_in_words():
    declared = Option(None, "width", OUR_CHOICE, default_text="that of the input")
    assert declared.help_text() == "width (default: that of the input; our choice)"
    assert declared.help_text("5") == "width (default: 5; our choice)"
    assert declared.default_in_words(7) == "7"
