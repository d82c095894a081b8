"""Check that the parts of sentence data match, before a training uses them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

from fairseq.data import Dictionary, data_utils


@dataclass(frozen=True)
class SentenceData:
    """A folder with ``input0``, ``input1`` for pairs, and ``label``.

    Attributes:
        folder: the folder of the parts.
        symbols: the dictionary of the inputs.
        labels: the dictionary of the labels; None for a regression.
        n_targets: number of classes, or of numbers per example.
    """

    folder: str
    symbols: Dictionary
    labels: Optional[Dictionary]
    n_targets: int

    def check(self, split: str, combine: bool = False, needs_targets: bool = True) -> None:
        """Compare all parts of a split.

        Args:
            split: such as train.
            combine: whether to read train1 and so on, too.
            needs_targets: whether it must have labels; a test set has none.

        Raises:
            ValueError: a part is missing or has another number of examples, the inputs have
                different dictionaries, or a label is invalid. The message names the place.
        """
        inputs = self._part("input0", split, self.symbols, combine)
        if inputs is None:
            raise ValueError(f"no split {split} in {self._path('input0')}")
        self._compare_inputs(split, len(inputs), combine)
        if self.labels is None:
            n_targets = self._check_numbers(split, needs_targets)
        else:
            n_targets = self._check_labels(split, combine, needs_targets)
        if n_targets not in (None, len(inputs)):
            name = split if self.labels is not None else f"{split}.label"
            raise ValueError(
                f"{self._path('label', name)} has {n_targets} examples, "
                f"{self._path('input0', split)} has {len(inputs)}"
            )

    def _path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def _part(self, part: str, split: str, dictionary: Dictionary, combine: bool) -> Any:
        """Binarised data; None if missing."""
        path = self._path(part, split)
        dataset = data_utils.load_indexed_dataset(path, dictionary, combine=combine)
        if dataset is not None and getattr(dataset, "supports_prefetch", False):
            dataset.prefetch(range(len(dataset)))
        return dataset

    def _compare_inputs(self, split: str, n_examples: int, combine: bool) -> None:
        """Compare the second sentences with the first ones."""
        folder = self._path("input1")
        if not os.path.isdir(folder):
            return
        second = self._part("input1", split, self.symbols, combine)
        if second is None:
            raise ValueError(f"no split {split} in {folder}, but one in {self._path('input0')}")
        if len(second) != n_examples:
            raise ValueError(
                f"{self._path('input1', split)} has {len(second)} examples, "
                f"{self._path('input0', split)} has {n_examples}"
            )
        files = [Path(self._path(part, "dict.txt")) for part in ("input1", "input0")]
        if files[0].is_file() and files[0].read_bytes() != files[1].read_bytes():
            own, first = (Dictionary.load(str(file)).symbols for file in files)
            if own != first:
                raise ValueError(f"{files[0]} and {files[1]} differ, must be one dictionary")

    # --- targets ------------------------------------------------------------------------------

    def _check_labels(self, split: str, combine: bool, needs_targets: bool) -> Optional[int]:
        """Check labels; return their number, None if missing."""
        assert self.labels is not None
        path = self._path("label", split)
        examples = self._part("label", split, self.labels, combine)
        if examples is None:
            if needs_targets:
                raise ValueError(f"no labels of split {split}: {path}.bin and .idx must be there")
            return None
        for number in range(len(examples)):
            problem = self._problem_of_label(examples[number].tolist())
            if problem:
                raise ValueError(f"{path}, example {number + 1}: {problem}")
        return len(examples)

    def _problem_of_label(self, symbols: List[int]) -> Optional[str]:
        """The problem with one example's label, if any."""
        assert self.labels is not None
        label = [symbol for symbol in symbols if symbol != self.labels.eos()]
        file = self._path("label", "dict.txt")
        names = " ".join(self.labels[symbol] for symbol in label if symbol < len(self.labels))
        if len(label) != 1:
            return f"must be one label, has {len(label)}: {names!r}"
        if not self.labels.nspecial <= label[0] < len(self.labels):
            return f"its label is not in {file}"
        label_class = label[0] - self.labels.nspecial
        if label_class >= self.n_targets:
            return (
                f"label {names!r} is number {label_class + 1} of {file}, but --num-classes is "
                f"{self.n_targets}"
            )
        return None

    def _check_numbers(self, split: str, needs_targets: bool) -> Optional[int]:
        """Check the numbers of a regression; return the number of examples, None if missing."""
        file = self._path("label", f"{split}.label")
        if not os.path.isfile(file):
            if needs_targets:
                raise ValueError(f"no numbers of split {split}: {file} must be there")
            return None
        count = 0
        for place, values in self.numbers(split):
            count += 1
            if len(values) != self.n_targets:
                raise ValueError(
                    f"{place}: {len(values)} numbers, but --num-classes is {self.n_targets}"
                )
        return count

    def numbers(self, split: str) -> Iterator[Tuple[str, List[float]]]:
        """The place, as ``file:line``, and the numbers of each example of a regression.

        Raises:
            ValueError: a text is not a finite number.
        """
        file = self._path("label", f"{split}.label")
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}:{number}"
                yield place, [_number(text, place) for text in line.split()]


def _number(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}: {text!r} is not a finite number")
    return value
