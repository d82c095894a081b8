"""Deltas: the rows of values that a finetuning changed. Apply and revert them exactly."""

import contextlib
import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from .files import whole_file
from .kernels import at_least_float32

KIND, VERSION = "pkm_fairseq delta", 1
VALUES = re.compile(r"(^|\.)values\.(\w+\.)*weight$")  # tables of values in a state
# not in a delta, and not compared: times of reads, and heads of tasks
APART = re.compile(r"\.reads\.\w+$|^classification_heads\.")


class TableRows(NamedTuple):
    """Rows of a table of values.

    Attributes:
        slots: (R,), int64, ascending.
        before: (R, V), the rows of the base.
        after: (R, V), the rows of the finetuned model.
    """

    slots: Tensor
    before: Tensor
    after: Tensor


class Delta(NamedTuple):
    """Rows that a finetuning changed.

    Attributes:
        base: ``hash_of`` the state before finetuning.
        tables: the changed rows, by the name of their table in the state.
        about: plain data on the delta's origin.
    """

    base: str
    tables: Dict[str, TableRows]
    about: Dict[str, Any]


def hash_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of all tensors of a model's state except times of reads and heads."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not APART.search(name):
            digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}\n".encode())
            digest.update(bits_of(state[name]).numpy().data)
    return digest.hexdigest()


def make_delta(
    base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], about: Mapping[str, Any]
) -> Delta:
    """The rows of values in which two states differ.

    Args:
        base: a model's state before finetuning.
        finetuned: the state after it.
        about: plain data to keep.

    Raises:
        ValueError: the states differ in more than rows of values, or not at all.
    """
    names = {name for name in base if not APART.search(name)}
    theirs = {name for name in finetuned if not APART.search(name)}
    if names != theirs:
        raise ValueError(f"{min(names ^ theirs)} is in one of the two models only")
    tables: Dict[str, TableRows] = {}
    for name in sorted(names):
        was, now = base[name], finetuned[name]
        if (was.dtype, was.shape) != (now.dtype, now.shape):
            raise ValueError(
                f"{name} is {_shown(now)} in the finetuned model, must be {_shown(was)}"
            )
        if torch.equal(bits_of(was), bits_of(now)):
            continue
        if not VALUES.search(name):
            raise ValueError(
                f"{name} differs: a delta holds only rows of values, as --memory-finetune trains"
            )
        slots = _differing(was, now)
        rows = TableRows(slots, was[slots].clone(), now[slots].clone())
        # a table that layers share has several names, and is stored once
        tables[name] = next((other for other in tables.values() if _is_same(rows, other)), rows)
    if not tables:
        raise ValueError("no value differs")
    return Delta(hash_of(base), tables, dict(about))


def combine(deltas: Sequence[Delta], adds_up: bool = False) -> Dict[str, TableRows]:
    """Combine the rows of several deltas of one base; their order does not matter.

    Args:
        deltas: at least one.
        adds_up: whether to add up changes of the same row, in at least float32, and round once;
            otherwise deltas that change the same rows are refused.

    Raises:
        ValueError: the deltas have different bases, or change the same rows.
    """
    if len({delta.base for delta in deltas}) != 1:
        bases = ", ".join(delta.base[:12] for delta in deltas)
        raise ValueError(f"deltas have different bases ({bases}), must have one")
    parts: Dict[str, List[TableRows]] = defaultdict(list)
    for delta in sorted(deltas, key=_fingerprint):  # sums of floats depend on their order
        for name, rows in delta.tables.items():
            parts[name].append(rows)
    return {name: _joined(name, of_table, adds_up) for name, of_table in parts.items()}


def _fingerprint(delta: Delta) -> str:
    digest = hashlib.sha256()
    for name, rows in sorted(delta.tables.items()):
        digest.update(name.encode())
        for tensor in rows:
            digest.update(bits_of(tensor).numpy().tobytes())
    return digest.hexdigest()


def _joined(name: str, parts: Sequence[TableRows], adds_up: bool) -> TableRows:
    slots, counts = torch.unique(torch.cat([rows.slots for rows in parts]), return_counts=True)
    both = slots[counts > 1]
    if len(both) and not adds_up:
        raise ValueError(
            f"two deltas both change {len(both)} rows of {name}, such as {int(both[0])}: apply "
            "one, or add their changes up with --sum"
        )
    places = [torch.searchsorted(slots, rows.slots) for rows in parts]
    before = parts[0].before.new_empty(len(slots), parts[0].before.shape[1])
    change = at_least_float32(torch.zeros_like(before))
    for rows, at in zip(parts, places, strict=True):
        before[at] = rows.before
        change[at] += at_least_float32(rows.after) - at_least_float32(rows.before)
    after = (at_least_float32(before) + change).to(before.dtype)
    for rows, at in zip(parts, places, strict=True):  # rows that only one delta changed, exactly
        alone = counts[at] == 1
        after[at[alone]] = rows.after[alone]
    return TableRows(slots, before, after)


def check_base(state: Mapping[str, Tensor], base: str) -> None:
    """Check that a state is the base of a delta.

    Raises:
        ValueError: the state is not the base.
    """
    ours = hash_of(state)
    if ours != base:
        raise ValueError(f"the model ({ours[:12]}) is not the delta's base ({base[:12]})")


def rows_that_differ(state: Mapping[str, Tensor], name: str, rows: TableRows) -> Tensor:
    """The slots of a delta whose rows in a state have other bits, (R,).

    A state may have the same numbers in another dtype.

    Raises:
        ValueError: the state has no table of this name that fits the delta.
    """
    table, theirs = state.get(name), rows.after
    if table is None or table.shape[1:] != theirs.shape[1:] or len(table) <= rows.slots[-1]:
        raise ValueError(f"the model has no table {name} that fits the delta")
    ours = table[rows.slots]
    if ours.dtype != theirs.dtype:
        ours, theirs = ours.double(), theirs.double()
    return rows.slots[_differing(ours, theirs)]


def check_applied(state: Mapping[str, Tensor], rows: Mapping[str, TableRows], base: str) -> None:
    """Check that a state is the base with these rows applied, and nothing else.

    Raises:
        ValueError: the state differs from that.
    """
    reverted = dict(state)
    for name, table in rows.items():
        wrong = rows_that_differ(state, name, table)
        if state[name].dtype != table.after.dtype:
            raise ValueError(
                f"{name} is {state[name].dtype}, must be {table.after.dtype} as in the delta"
            )
        if len(wrong):
            raise ValueError(
                f"row {int(wrong[0])} of {name} differs from the delta's row: the delta was not "
                "applied, or another one was applied, too"
            )
        reverted[name] = state[name].index_copy(0, table.slots, table.before)
    check_base(reverted, base)


def save_delta(file: Path, delta: Delta) -> None:
    """Write a delta; the file is complete or absent."""
    tables = {name: rows._asdict() for name, rows in delta.tables.items()}
    content = {"kind": KIND, "version": VERSION, "base": delta.base, "about": delta.about}
    with whole_file(file) as out:
        torch.save({**content, "tables": tables}, out)


def load_delta(file: Path) -> Delta:
    """Read a delta, without running code from the file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    content: Any = None
    with contextlib.suppress(Exception):  # torch.load can raise nearly anything
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{file} holds no delta")
    if content.get("version") != VERSION:
        raise ValueError(f"{file}: its version is {content.get('version')}, must be {VERSION}")
    tables = {name: TableRows(**rows) for name, rows in content["tables"].items()}
    return Delta(content["base"], tables, content["about"])


def moved_by(rows: TableRows) -> List[float]:
    """The L2 norm of each row's change, (R,)."""
    change = at_least_float32(rows.after) - at_least_float32(rows.before)
    return change.norm(dim=1).tolist()  # type: ignore[no-any-return]


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """Which rows differ in any bit, (R,)."""
    bits = [bits_of(x).view(len(x), -1) for x in (one, other)]
    return (bits[0] != bits[1]).any(dim=1).nonzero().squeeze(1)


def bits_of(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals NaN, and 0 is not -0."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8)


def _is_same(one: TableRows, other: TableRows) -> bool:
    return all(torch.equal(bits_of(x), bits_of(y)) for x, y in zip(one, other, strict=True))


def _shown(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
