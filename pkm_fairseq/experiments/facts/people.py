"""Synthetic people: a name and four attributes, drawn at random, so that nothing can be guessed.

A sentence is one person: ``first58 last211 city37 job12 food88 pet5``. Each attribute is drawn
uniformly from 100 values: one fact is log2(100) = 6.64 bits, and one person 26.6 bits.
"""

import math
from pathlib import Path
from typing import List

import numpy as np

from ..data.prepare import binarise, write_lines

N_NAMES = 300  # first names, and as many last names
N_VALUES = 100
NAMES = ("first", "last")
ATTRIBUTES = ("city", "job", "food", "pet")
BITS = math.log2(N_VALUES)  # of a fact
N_CONTROL = 1000
N_VALID = 1000
MOST_PEOPLE = N_NAMES**2 - N_CONTROL  # to learn


def draw_people(n: int, seed: int) -> List[str]:
    """Draw people with unique names, one sentence each.

    A smaller ``n`` gives the first people of a larger ``n``.

    Args:
        n: number of people.
        seed: of the draw.

    Raises:
        ValueError: there are not enough names for ``n`` people, or ``n`` is below 1.
    """
    if not 1 <= n <= N_NAMES**2:
        raise ValueError(f"{n} people, must be in 1..{N_NAMES**2:,}: each has a name of its own")
    names, values = (np.random.default_rng([seed, stream]) for stream in range(2))
    pairs = names.permutation(N_NAMES**2)[:n]
    drawn = values.integers(N_VALUES, size=(n, len(ATTRIBUTES)))
    columns = (*NAMES, *ATTRIBUTES)
    return [
        " ".join(f"{column}{number}" for column, number in zip(columns, numbers, strict=True))
        for numbers in np.column_stack([pairs // N_NAMES, pairs % N_NAMES, drawn]).tolist()
    ]


def prepare_people(n: int, folder: Path, seed: int = 1, skip: int = 0) -> None:
    """Write data for fairseq about people, ``folder/bin``.

    The splits: ``train``; ``valid`` (up to 1,000 people of train, so that its log shows recall);
    and ``test`` (1,000 people who are in no training text, to measure what can be guessed).

    Args:
        n: number of people to learn.
        folder: an existing folder.
        seed: of names and values.
        skip: number of people to leave out. After ``prepare_people(10_000, ...)`` a ``skip`` of
            11,000 gives people who are neither in its training text nor in its control.

    Raises:
        ValueError: there are not enough names.
    """
    people = draw_people(skip + n + N_CONTROL, seed)[skip:]
    splits = {"train": people[:n], "valid": people[:n][:N_VALID], "test": people[n:]}
    for split, lines in splits.items():
        write_lines(folder / f"{split}.pieces", lines)
    words = [f"{name}{number}" for name in NAMES for number in range(N_NAMES)]
    words += [f"{name}{number}" for name in ATTRIBUTES for number in range(N_VALUES)]
    dictionary = folder / "words.txt"
    write_lines(dictionary, (f"{word} 1" for word in words))
    binarise({split: folder / f"{split}.pieces" for split in splits}, folder / "bin", dictionary)
