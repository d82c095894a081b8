"""Merge a checkpoint whose values are in a folder beside it into one file."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor

from ..memory.adam import MOMENTS
from ..memory.archive import save_in_blocks
from ..memory.files import whole_file
from ..memory.kernels import is_half
from ..memory.parts import PARTS, TABLE, Block, PartsFolder, has_parts, open_reference
from ..memory.sharding import ROWS
from .checkpoints import read_checkpoint


class Merged(NamedTuple):
    """A merged checkpoint.

    Attributes:
        tables: the shape of each table.
        bytes: of the new file.
    """

    tables: List[Tuple[int, int]]
    bytes: int


def merge(source: Path, target: Path) -> Merged:
    """Write a checkpoint with whole tables and moments, as fairseq writes it without parts.

    Tables are copied some rows at a time, so no whole table is in memory. As in fairseq's
    checkpoints, values and moments in half precision become float32.

    Args:
        source: a checkpoint of ``--memory-checkpoint parts``.
        target: the new file, complete or absent.

    Raises:
        ValueError: the source is unreadable, its parts are incomplete, or it has none.
        OSError: the file cannot be written.
    """
    stored = read_checkpoint(str(source), "PARTS", is_mapped=True)
    if not has_parts(stored):
        raise ValueError(f"PARTS {source}: its values are in the file itself already")
    if target.exists() and target.samefile(source):
        raise ValueError(f"PARTS {source} would be replaced: choose another file")
    found: Dict[Tuple[Path, str], Tuple[Tensor, Iterator[Tensor]]] = {}
    content = {**stored, "model": _whole_model(stored["model"], found)}
    shapes = [(len(table), table.shape[1]) for table, _ in found.values()]
    if isinstance(stored.get("last_optimizer_state"), dict):
        content["last_optimizer_state"] = _whole_moments(stored["last_optimizer_state"], found)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out:
        save_in_blocks(out, content, list(found.values()))
    return Merged(shapes, target.stat().st_size)


def _whole_model(state: Dict[str, Tensor], found: Any) -> Dict[str, Tensor]:
    """A model's state with a table, still without data, in place of each reference."""
    whole = {}
    for name, tensor in state.items():
        if name.endswith(f".{PARTS}"):
            folder, number = open_reference(tensor)
            name = f"{name.removesuffix(PARTS)}weight"
            tensor = _table(folder, f"{number}{TABLE}", found)
        whole[name] = tensor
    return whole


def _whole_moments(state: Dict[str, Any], found: Any) -> Dict[str, Any]:
    """An optimizer's state with moments, still without data, in place of each reference."""
    whole = dict(state["state"])
    for place, saved in whole.items():
        if PARTS in saved:
            folder, number = open_reference(saved[PARTS])
            names = [moment for moment in MOMENTS if folder.size(f"{number}{moment}") is not None]
            moments = {moment: _table(folder, f"{number}{moment}", found) for moment in names}
            whole[place] = {**{k: v for k, v in saved.items() if k != PARTS}, **moments}
    return {**state, "state": whole}


def _table(folder: PartsFolder, name: str, found: Any) -> Tensor:
    """A table without data, once for each name; ``found`` gets it and its rows."""
    key = folder.folder, name
    if key not in found:
        size, dtype = folder.size(name), folder.dtype(name)
        if size is None:
            raise ValueError(f"{folder.folder} does not hold {name}")
        table = torch.empty(size, dtype=torch.float32 if is_half(dtype) else dtype)
        found[key] = table, _rows(folder, name, table)
    table = found[key][0]
    return table


def _rows(folder: PartsFolder, name: str, table: Tensor) -> Iterator[Tensor]:
    n_slots, width = table.shape
    for start in range(0, n_slots, ROWS):
        rows = torch.empty(min(ROWS, n_slots - start), width, dtype=table.dtype)
        folder.read(name, Block(rows, (n_slots, width), (start, 0)))
        yield rows
