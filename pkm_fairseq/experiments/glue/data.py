"""Read prepared tasks, as ``prepare_glue.py`` writes them."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from fairseq.data import Dictionary, data_utils

from ...models import checkpoints
from .metrics import score
from .tasks import TASKS

DEV_SPLITS = ("valid", "valid1")


@dataclass(frozen=True)
class PreparedTask:
    """One task's binarised data.

    Attributes:
        name: the task's name.
        folder: folder with ``input0``, ``input1``, ``label``.
        labels: in class order; empty for regression.
        metrics: the official metrics; the first selects the checkpoint.
        dev_splits: valid, and valid1 if there are two.
        n_train: number of training examples.
        key: hash of the inputs of the preparation.
    """

    name: str
    folder: Path
    labels: Tuple[str, ...]
    metrics: Tuple[str, ...]
    dev_splits: Tuple[str, ...]
    n_train: int
    key: str

    @property
    def is_regression(self) -> bool:
        """Whether the task predicts a score, not a class."""
        return not self.labels

    @property
    def positive(self) -> str:
        """The positive label of F1: the second."""
        return self.labels[1]


def prepared_tasks(data: Path, names: Optional[Sequence[str]] = None) -> List[PreparedTask]:
    """The tasks with these names in a folder of prepared data, or all of them.

    Raises:
        ValueError: there are none, or a task is not prepared.
    """
    folders = [file.parent.name for file in data.glob("*/task.json")]
    found = {
        name for name in folders if "." not in name
    }  # with a dot: left by an interrupted preparation
    if not found:
        raise ValueError(f"--data {data} holds no prepared task: run scripts/prepare_glue.py")
    known = [*(name for name in TASKS if name in found), *sorted(found - set(TASKS))]
    for name in names or ():
        if name not in known:
            problem = "is not prepared" if name in TASKS else "is no task"
            raise ValueError(f"--tasks: {name} {problem}; --data {data} holds {', '.join(known)}")
    return [_read(data / name) for name in dict.fromkeys(names or known)]


def load_dictionary(tasks: Sequence[PreparedTask]) -> Dictionary:
    """The dictionary of all prepared tasks, with ``<mask>``.

    Raises:
        ValueError: two tasks have different dictionaries, or one is missing or is no dictionary.
    """
    files = [task.folder / "input0" / "dict.txt" for task in tasks]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; prepare the task again")
        if file.read_bytes() != files[0].read_bytes():
            raise ValueError(
                f"{file} differs from {files[0]}: prepare all tasks with one dictionary"
            )
    return checkpoints.load_dictionary(str(files[0]))


def majority_baseline(task: PreparedTask) -> Dict[str, float]:
    """Dev metrics, in per cent, of always answering the most frequent training label.

    For a regression the answer is a constant, and its correlations are 0.
    """
    scores: Dict[str, float] = {}
    trained = Counter([] if task.is_regression else targets_of(task, "train"))
    for split in task.dev_splits:
        if task.is_regression:
            scores |= {dev_name(metric, split): 0.0 for metric in task.metrics}
            continue
        targets = targets_of(task, split)
        answers = np.full(len(targets), max(task.labels, key=trained.__getitem__))
        for metric in task.metrics:
            scores[dev_name(metric, split)] = score(metric, answers, targets, task.positive)
    return scores


def dev_name(metric: str, split: str) -> str:
    """The name of a metric on a dev split: ``accuracy``, ``valid1_accuracy``."""
    return metric if split == "valid" else f"{split}_{metric}"


def _read(folder: Path) -> PreparedTask:
    file = folder / "task.json"
    try:
        read: Dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        splits = read["splits"]
        return PreparedTask(
            read["name"],
            folder.resolve(),
            tuple(read["labels"] or ()),
            tuple(read["metrics"]),
            tuple(split for split in DEV_SPLITS if split in splits),
            splits["train"],
            read["key"],
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} is not a file of prepare_glue.py: prepare the task again"
        ) from None


def targets_of(task: PreparedTask, split: str) -> np.ndarray:
    """The names of a split's labels, or a regression's scores, scaled to 0..1, (N,)."""
    folder = task.folder / "label"
    if task.is_regression:
        return np.loadtxt(folder / f"{split}.label", ndmin=1)
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    labels = data_utils.load_indexed_dataset(str(folder / split), dictionary)
    return np.array([dictionary[int(label[0])] for label in labels])
