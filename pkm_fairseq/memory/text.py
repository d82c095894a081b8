"""Texts for messages of one line."""

from typing import Sequence

MAX_NAMED = 8


def listed(items: Sequence[str], most: int = MAX_NAMED, separator: str = ", ") -> str:
    """The first few of some items, and how many more there are; "nothing" if there are none."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more if items else "nothing"
