"""Read the files of a task; report each row that cannot be read, with its file and line."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from .tasks import Columns, SplitFile, TaskSpec

BOM = b"\xef\xbb\xbf"
MAX_LEFT_OUT = 5  # allowed malformed rows; or one in a thousand
RAW_MRPC_TRAIN, RAW_MRPC_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
RAW_MRPC_COLUMNS = Columns(("#1 String", "#2 String"), "Quality", header=True)

PartOf = Callable[[int, bytes], str]  # the part of a row, from its line number and its line


@dataclass
class Rows:
    """The examples of one file.

    Attributes:
        texts: one or two sentences each.
        targets: class, or score in the task's own range; empty for a test file.
        indices: the index of each row of a test file.
        left_out: malformed rows, as ``file:line: problem``.
    """

    texts: List[Tuple[str, ...]] = field(default_factory=list)
    targets: List[Union[int, float]] = field(default_factory=list)
    indices: List[str] = field(default_factory=list)
    left_out: List[str] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Rows of the file, including malformed ones."""
        return len(self.texts) + len(self.left_out)


def read_task(folder: Path, spec: TaskSpec) -> Tuple[Dict[str, Rows], List[str]]:
    """Read all files of a task.

    Args:
        folder: the task's folder.
        spec: the task.

    Returns:
        Rows by split, and warnings.

    Raises:
        ValueError: a file of train or dev is missing; a file has the wrong columns, no rows or
            too many malformed ones; a row of a test file is malformed.
    """
    if spec.name == "MRPC" and _is_raw_mrpc(folder):
        splits, notes = _read_raw_mrpc(folder, spec)
    else:
        splits, notes = {}, []
        for split, file in spec.files.items():
            if (folder / file.name).is_file():
                splits[split] = read_file(folder / file.name, file.columns, spec)
            elif split.startswith("test"):
                notes.append(f"{spec.name}: no {file.name}, so no predictions for it")
            else:
                raise ValueError(f"{folder / file.name}: no such file")
    for split, rows in splits.items():
        notes += _notes(spec, split, spec.files[split], rows)
    return splits, notes


def files_of(folder: Path, spec: TaskSpec) -> List[Path]:
    """The existing files that ``read_task`` reads."""
    names = [file.name for file in spec.files.values()]
    if spec.name == "MRPC" and _is_raw_mrpc(folder):
        names = [RAW_MRPC_TRAIN, RAW_MRPC_TEST, "dev_ids.tsv"]
    return [folder / name for name in names if (folder / name).is_file()]


def read_file(file: Path, columns: Columns, spec: TaskSpec) -> Rows:
    """Read a file of tab-separated columns without quoting.

    Args:
        file: UTF-8, one example per line; may begin with a byte-order mark.
        columns: its layout; without a label it is a test file.
        spec: the task.

    Raises:
        ValueError: see ``read_task``.
    """
    return _read_parts(file, columns, spec, ["all"], lambda number, line: "all")["all"]


def _read_parts(
    file: Path, columns: Columns, spec: TaskSpec, parts: Sequence[str], part_of: PartOf
) -> Dict[str, Rows]:
    """Read a file whose rows belong to several parts; each row is in exactly one."""
    found, is_test = {part: Rows() for part in parts}, columns.label is None
    lines = _lines(file)
    names = _header(file, lines, columns)
    width = len(names) if columns.header else columns.width
    at = {
        column: names.index(column) if columns.header else column
        for column in (*columns.texts, columns.label, columns.index)
        if column is not None
    }
    for number, line in lines:
        rows = found[part_of(number, line)]
        try:
            _add(rows, split_line(line, width), at, columns, spec)
        except ValueError as error:
            if is_test:
                raise ValueError(f"{file}:{number}: {error}") from None
            rows.left_out.append(f"{file}:{number}: {error}")
    for rows in found.values():
        if len(set(rows.indices)) < len(rows.indices):
            twice = next(index for index, n in Counter(rows.indices).items() if n > 1)
            raise ValueError(f"{file}: index {twice} occurs twice, must be different in each row")
    _check_left_out(file, list(found.values()))
    return found


def numbered_lines(stream: BinaryIO) -> Iterator[Tuple[int, bytes]]:
    """Lines with numbers from 1, without line ends; only a line feed ends a line."""
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _lines(file: Path) -> Iterator[Tuple[int, bytes]]:
    """Lines with numbers, without blank lines at the end."""
    blank: List[Tuple[int, bytes]] = []
    with file.open("rb") as stream:
        for numbered in numbered_lines(stream):
            if numbered[1]:
                yield from blank
                yield numbered
                blank = []
            else:
                blank.append(numbered)


def _header(file: Path, lines: Iterator[Tuple[int, bytes]], columns: Columns) -> List[str]:
    if not columns.header:
        return []
    line = next(lines, (1, b""))[1]
    names = line.decode("utf-8", errors="replace").split("\t")
    for column in (*columns.texts, columns.label, columns.index):
        if column is not None and names.count(str(column)) != 1:
            raise ValueError(
                f"{file} must have one column {column!r}, its first line is {_short(line)}"
            )
    return names


def split_line(line: bytes, width: Optional[int]) -> List[str]:
    """The tab-separated columns of a line.

    Raises:
        ValueError: the line is not UTF-8, or has another number of columns.
    """
    try:
        fields = line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        raise ValueError(f"not UTF-8: {_short(line)}") from None
    if len(fields) != width:
        raise ValueError(f"{len(fields)} columns, must be {width}: {_short(line)}")
    return fields


def _add(
    rows: Rows, fields: List[str], at: Dict[Union[str, int], int], columns: Columns, spec: TaskSpec
) -> None:
    texts = tuple(fields[at[column]] for column in columns.texts)
    if columns.label is None:
        rows.indices.append(fields[at[columns.index]] if columns.index else str(len(rows.texts)))
    elif not all(map(str.strip, texts)):
        raise ValueError("an empty sentence")
    else:
        rows.targets.append(_target(fields[at[columns.label]], spec))
    rows.texts.append(texts)


def _target(label: str, spec: TaskSpec) -> Union[int, float]:
    if spec.label_range is None:
        if label not in spec.labels:
            raise ValueError(f"label is {label!r}, must be one of {', '.join(spec.labels)}")
        return spec.labels.index(label)
    low, high = spec.label_range
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise ValueError(f"score is {label!r}, must be a number in {low:g}..{high:g}")
    return score


def _check_left_out(file: Path, parts: Sequence[Rows]) -> None:
    n_rows = sum(rows.n_rows for rows in parts)
    left_out = [problem for rows in parts for problem in rows.left_out]
    if not n_rows:
        raise ValueError(f"{file} holds no example")
    if len(left_out) > max(MAX_LEFT_OUT, n_rows / 1000) or len(left_out) == n_rows:
        first = "; ".join(left_out[:3])
        raise ValueError(f"{len(left_out)} of {n_rows} rows are malformed, the first: {first}")


def _notes(spec: TaskSpec, split: str, file: SplitFile, rows: Rows) -> List[str]:
    notes = [f"{spec.name} {split}: row left out: {problem}" for problem in rows.left_out]
    if file.rows not in (None, rows.n_rows):
        notes.append(f"{spec.name} {split}: {rows.n_rows:,} rows, GLUE's has {file.rows:,}")
    return notes


def _short(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- MRPC as Microsoft serves it --------------------------------------------------------------


def _is_raw_mrpc(folder: Path) -> bool:
    return not (folder / "train.tsv").is_file() and (folder / RAW_MRPC_TRAIN).is_file()


def _read_raw_mrpc(folder: Path, spec: TaskSpec) -> Tuple[Dict[str, Rows], List[str]]:
    """Split train by GLUE's list of dev pairs; without the list, the last tenth is dev."""
    train, test, ids = (folder / n for n in (RAW_MRPC_TRAIN, RAW_MRPC_TEST, "dev_ids.tsv"))
    notes = []
    if ids.is_file():
        pairs = {tuple(line.split(b"\t")) for _, line in _lines(ids)}
        is_dev = lambda number, line: tuple(line.split(b"\t")[1:3]) in pairs  # noqa: E731
    else:
        last = sum(1 for _ in _lines(train))
        is_dev = lambda number, line: 10 * (last - number) < last - 1  # noqa: E731
        notes.append(
            f"MRPC: no dev_ids.tsv, so the last tenth of {RAW_MRPC_TRAIN} is dev, "
            "which is not GLUE's split"
        )
    part_of: PartOf = lambda *row: "valid" if is_dev(*row) else "train"  # noqa: E731
    splits = _read_parts(train, RAW_MRPC_COLUMNS, spec, ("train", "valid"), part_of)
    if ids.is_file() and not splits["valid"].n_rows:
        raise ValueError(f"no pair of {ids} is in {train.name}")
    for split, rows in splits.items():
        if not rows.texts:
            raise ValueError(f"{train} leaves no pair for {split}")
    if test.is_file():
        unlabelled = Columns(RAW_MRPC_COLUMNS.texts, None, header=True)
        splits["test"] = read_file(test, unlabelled, spec)
    else:
        notes.append(f"MRPC: no {test.name}, so no predictions for it")
    return splits, notes
