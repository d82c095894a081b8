"""The nine GLUE tasks, and a user's own: files, columns, labels, metrics."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import yaml

from .metrics import CLASS_METRICS, SCORE_METRICS

TOKENIZER = "tokenizer"  # its folder, beside those of the tasks
SPLITS = ("train", "valid", "valid1", "test", "test1")


@dataclass(frozen=True)
class Columns:
    """The layout of one kind of file.

    Attributes:
        texts: the columns of the one or two sentences: header names, or indices from 0 if there is
            no header.
        label: the column of the label; None in test files.
        header: whether the first line names the columns.
        index: the column of a row's index; None if rows are counted from 0.
        width: number of columns if there is no header.
    """

    texts: Tuple[Union[str, int], ...]
    label: Optional[Union[str, int]]
    header: bool
    index: Optional[str] = None
    width: Optional[int] = None


@dataclass(frozen=True)
class SplitFile:
    """The file of one split.

    Attributes:
        name: the file's name in the task's folder.
        columns: its layout.
        rows: the published number of examples; None if unknown.
        submission: for a test file, the name of its prediction file.
    """

    name: str
    columns: Columns
    rows: Optional[int] = None
    submission: Optional[str] = None


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Attributes:
        name: also the name of its folder.
        labels: in class order: class i is ``labels[i]``; empty for regression.
        label_range: the range of a regression's scores, else None.
        metrics: the official metrics; the first selects the checkpoint. The positive label of F1 is
            the second.
        files: by split: train, valid, test, and valid1, test1 if there are two.
    """

    name: str
    labels: Tuple[str, ...]
    label_range: Optional[Tuple[float, float]]
    metrics: Tuple[str, ...]
    files: Dict[str, SplitFile]

    @property
    def is_regression(self) -> bool:
        """Whether the task predicts a score, not a class."""
        return self.label_range is not None

    @property
    def is_pair(self) -> bool:
        """Whether an example has two sentences."""
        return len(self.files["train"].columns.texts) == 2


def _tsv(texts: Tuple[str, ...], label: Optional[str], index: Optional[str] = None) -> Columns:
    return Columns(texts, label, header=True, index=index)


def _task(
    name: str,
    labels: Tuple[str, ...],
    metrics: Tuple[str, ...],
    columns: Tuple[Columns, Columns],
    rows: Tuple[int, int, int],
    label_range: Optional[Tuple[float, float]] = None,
) -> TaskSpec:
    """A task with train.tsv, dev.tsv and test.tsv; ``columns``: of labelled and of test files."""
    labelled, test = columns
    files = {
        "train": SplitFile("train.tsv", labelled, rows[0]),
        "valid": SplitFile("dev.tsv", labelled, rows[1]),
        "test": SplitFile("test.tsv", test, rows[2], f"{name}.tsv"),
    }
    return TaskSpec(name, labels, label_range, metrics, files)


def _mnli() -> TaskSpec:
    texts = ("sentence1", "sentence2")
    labelled, test = _tsv(texts, "gold_label"), _tsv(texts, None, "index")
    files = {
        "train": SplitFile("train.tsv", labelled, 392_702),
        "valid": SplitFile("dev_matched.tsv", labelled, 9_815),
        "valid1": SplitFile("dev_mismatched.tsv", labelled, 9_832),
        "test": SplitFile("test_matched.tsv", test, 9_796, "MNLI-m.tsv"),
        "test1": SplitFile("test_mismatched.tsv", test, 9_847, "MNLI-mm.tsv"),
    }
    return TaskSpec("MNLI", ("entailment", "neutral", "contradiction"), None, ("accuracy",), files)


def _both(texts: Tuple[str, ...], label: str, index: str = "index") -> Tuple[Columns, Columns]:
    return _tsv(texts, label), _tsv(texts, None, index)


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_COLA = (Columns((3,), 1, header=False, width=4), _tsv(("sentence",), None, "index"))

# Numbers of rows are those of gluebenchmark.com's data (QNLI in its second version).
TASKS: Dict[str, TaskSpec] = {
    task.name: task
    for task in (
        _task("CoLA", _BINARY, ("mcc",), _COLA, (8_551, 1_043, 1_063)),
        _task("SST-2", _BINARY, ("accuracy",), _both(("sentence",), "label"), (67_349, 872, 1_821)),
        _task(
            "MRPC",
            _BINARY,
            ("accuracy", "f1"),
            _both(("#1 String", "#2 String"), "Quality"),
            (3_668, 408, 1_725),
        ),
        _task(
            "STS-B",
            (),
            ("pearson", "spearman"),
            _both(_PAIR, "score"),
            (5_749, 1_500, 1_379),
            (0.0, 5.0),
        ),
        _task(
            "QQP",
            _BINARY,
            ("accuracy", "f1"),
            _both(("question1", "question2"), "is_duplicate", "id"),
            (363_846, 40_430, 390_965),
        ),
        _mnli(),
        _task(
            "QNLI",
            _ENTAILMENT,
            ("accuracy",),
            _both(("question", "sentence"), "label"),
            (104_743, 5_463, 5_463),
        ),
        _task("RTE", _ENTAILMENT, ("accuracy",), _both(_PAIR, "label"), (2_490, 277, 3_000)),
        _task("WNLI", _BINARY, ("accuracy",), _both(_PAIR, "label"), (635, 71, 146)),
    )
}


def task_names(names: Optional[Sequence[str]]) -> List[TaskSpec]:
    """The tasks of these names, in this order; all nine for None.

    Raises:
        ValueError: a name is unknown.
    """
    for name in names or ():
        if name not in TASKS:
            raise ValueError(f"no task {name!r}: the tasks are {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names or TASKS)]


# --- a user's own task ------------------------------------------------------------------------

_NEEDED = {"name", "sentences", "label", "metrics", "files"}
_OPTIONAL = {"labels", "label_range", "index"}


def load_task_spec(file: Path) -> TaskSpec:
    """Read the description of a user's own task.

    Args:
        file: yaml with the keys ``name``, ``sentences`` (one or two column names), ``label``
            (column name), ``labels`` (in class order) or ``label_range`` (lowest, highest),
            ``metrics``, ``files`` (by split), and optionally ``index`` (column of test files).

    Raises:
        ValueError: the file is missing, not yaml, or a key is missing, unknown or wrong.
    """
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"task spec {file}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"task spec {file} is not yaml: {' '.join(str(error).split())}") from None
    try:
        return _spec(read)
    except ValueError as error:
        raise ValueError(f"task spec {file}: {error}") from None


def _spec(read: Any) -> TaskSpec:
    if not isinstance(read, dict):
        raise ValueError("must hold keys and values, such as name: mine")
    missing = sorted(_NEEDED - set(read))
    unknown = sorted(map(str, set(read) - _NEEDED - _OPTIONAL))
    if missing or unknown:
        problems = [
            f"{kind} {', '.join(keys)}"
            for kind, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise ValueError(f"keys {' and '.join(problems)}")
    name = _string(read, "name")
    if not re.fullmatch(r"[\w-]+", name) or name in (*TASKS, TOKENIZER):
        raise ValueError(
            f"name is {name!r}, must be letters, digits, - and _, and not a task of GLUE "
            f"or {TOKENIZER}"
        )
    labels, label_range = _labels(read)
    metrics = _strings(read, "metrics")
    allowed = SCORE_METRICS if label_range else CLASS_METRICS
    for metric in metrics:
        if metric not in allowed:
            raise ValueError(f"metric is {metric!r}, must be one of {', '.join(allowed)}")
    if "f1" in metrics and len(labels) != 2:
        raise ValueError(f"metric f1 needs two labels, not {len(labels)}; the second is positive")
    return TaskSpec(name, labels, label_range, metrics, _files(read, name))


def _labels(read: Dict[str, Any]) -> Tuple[Tuple[str, ...], Optional[Tuple[float, float]]]:
    if ("labels" in read) == ("label_range" in read):
        raise ValueError("must have either labels (classes) or label_range (a score)")
    if "labels" in read:
        labels = _strings(read, "labels")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels are {', '.join(labels)}, must be two or more different ones")
        for label in labels:
            if not re.fullmatch(r"[^\s<>]+( [^\s<>]+)*", label):
                raise ValueError(
                    f"label {label!r} may hold no < or >, and only single blanks inside"
                )
        return labels, None
    bounds = read["label_range"]
    numbers = isinstance(bounds, list) and all(type(bound) in (int, float) for bound in bounds)
    if not numbers or len(bounds) != 2 or not -float("inf") < bounds[0] < bounds[1] < float("inf"):
        raise ValueError(f"label_range is {bounds}, must be [lowest, highest]")
    return (), (float(bounds[0]), float(bounds[1]))


def _files(read: Dict[str, Any], name: str) -> Dict[str, SplitFile]:
    names, texts = read["files"], _strings(read, "sentences")
    if len(texts) > 2 or len(set(texts)) < len(texts):
        raise ValueError(f"sentences are {', '.join(texts)}, must be one or two columns")
    if not isinstance(names, dict) or not {"train", "valid"} <= set(names) <= set(SPLITS):
        raise ValueError(
            f"files is {names}, must name the files of train and valid, and may name those of "
            f"{', '.join(SPLITS[2:])}"
        )
    labelled = _tsv(texts, _string(read, "label"))
    test = _tsv(texts, None, _string(read, "index") if "index" in read else None)
    return {
        split: SplitFile(_string(names, split), labelled)
        if not split.startswith("test")
        else SplitFile(_string(names, split), test, None, f"{name}{split[4:] and '-1'}.tsv")
        for split in SPLITS
        if split in names
    }


def _strings(read: Dict[str, Any], key: str) -> Tuple[str, ...]:
    values = read[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} is {values!r}, must be a list such as [a, b]")
    return tuple(_string({key: value}, key) for value in values)


def _string(read: Dict[str, Any], key: str) -> str:
    """Text, or a number as its text; yaml's yes, no and null are neither."""
    value = read[key]
    if type(value) not in (str, int, float) or value == "":
        raise ValueError(f"{key} holds {value!r}, must be text; put it in quotes")
    return str(value)
