"""Value tables in a folder beside a checkpoint: each worker writes and reads its own columns.

The folder is a checkpoint of ``torch.distributed.checkpoint``. In a state, a reference stands in
place of each table: the name of the folder and the number of the table, as bytes.
"""

import logging
import re
import secrets
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor

from .archive import offset_of, read_without_data
from .sharding import ROWS, ColumnShards

logger = logging.getLogger(__name__)

PARTS = "parts"  # the key of a reference, or the end of its key
TABLE = "values"  # the name of a table in its folder, after its number
OF_TRAININGS = re.compile(r"values_\d+_[0-9a-f]{8}")  # folders that trainings write
TEMPORARY = "saving_values.part"
MERGE = "scripts/merge_checkpoint.py"


class Block(NamedTuple):
    """A tensor that is a block of a whole table.

    Attributes:
        tensor: (rows, columns), on any device.
        size: the shape of the whole table, (n_slots, V).
        first: the block's first row and first column in the table.
    """

    tensor: Tensor
    size: Tuple[int, int]
    first: Tuple[int, int]

    def rows(self) -> "Iterator[Block]":
        """The block in blocks of some rows, which share its memory."""
        for start in range(0, len(self.tensor), ROWS):
            first = self.first[0] + start, self.first[1]
            yield Block(self.tensor[start : start + ROWS], self.size, first)


def block_of(columns: Tensor, shards: Optional[ColumnShards]) -> Block:
    """This worker's columns of a table, or of its moments; all columns if ``shards`` is None."""
    n_slots, width = columns.shape
    if shards is None:
        return Block(columns.detach(), (n_slots, width), (0, 0))
    return Block(columns.detach(), (n_slots, width * shards.n_shards), (0, shards.rank * width))


def new_name(updates: int) -> str:
    """A new name for a folder of a training; a folder is never written twice."""
    return f"values_{updates}_{secrets.token_hex(4)}"


def write_parts(folder: Path, tables: Mapping[str, Block]) -> None:
    """Write tables into a new folder, which is complete or absent.

    Every worker must call it. Each writes its blocks into a file of its own; of equal blocks only
    one is written. No worker holds more than some rows in addition to its blocks. The folder is
    written under the name ``TEMPORARY``, and what a kill left there is removed first.

    Args:
        folder: reachable by all workers under this name.
        tables: this worker's blocks by name of the table.

    Raises:
        OSError: on every worker, if a worker could not write; the message gives the reason.
    """
    from .dcp import save  # takes most of a second to import

    save(folder, folder.with_name(TEMPORARY), tables)


class PartsFolder:
    """A folder that ``write_parts`` has written, with any number of workers.

    No code from the folder is run.

    Args:
        folder: its path.

    Raises:
        ValueError: the folder or a file is missing, truncated or damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        from .dcp import read_metadata

        self.folder = folder
        self._metadata = read_metadata(folder)
        self._tables: Dict[str, Any] = self._metadata.state_dict_metadata

    def size(self, name: str) -> Optional[Tuple[int, int]]:
        """The shape of a table, (n_slots, V); None if the folder does not hold it."""
        found = self._tables.get(name)
        return None if found is None else tuple(found.size)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a table."""
        dtype: torch.dtype = self._tables[name].properties.dtype
        return dtype

    def read(self, name: str, block: Block) -> None:
        """Read a block of a table into ``block.tensor``, and convert it to its dtype.

        It reads some rows at once. Other workers need not call it.

        Raises:
            ValueError: the folder does not hold this table, its shape differs, or it is damaged.
        """
        from .dcp import load

        size = self.size(name)
        if size is None:
            raise ValueError(f"{self.folder} does not hold {name}")
        if size != block.size:
            raise ValueError(
                f"{self.folder}: {name} has shape {size}, must be that of the model, {block.size}"
            )
        load(self.folder, self._metadata, name, block)


# --- references -------------------------------------------------------------------------------


def reference_to(folder: str, number: int) -> Tensor:
    """The reference to a table in a folder, (n,), uint8."""
    return _encoded(f"{folder}/{number}")


def open_reference(reference: Tensor) -> "Tuple[PartsFolder, str]":
    """The folder of a reference, and the prefix of the names of its table and moments there.

    Raises:
        ValueError: as ``PartsFolder``.
    """
    folder, _, number = _decoded(reference).rpartition("/")
    return PartsFolder(Path(folder)), f"{number}."


def place_parts(state: Any, file: Path) -> None:
    """Give the references in a state the path of their folder, which lies beside its file.

    It changes the state in place, and checks that the folder is complete.

    Args:
        state: what the file holds; dictionaries in it are searched, too.
        file: the checkpoint.

    Raises:
        ValueError: a reference names a folder that is not beside the file, or as ``PartsFolder``.
    """
    checked = set()
    for holder, key in _references(state):
        name, _, number = _decoded(holder[key]).rpartition("/")
        if name in ("", ".", "..") or name != Path(name).name or not number.isdigit():
            raise ValueError(f"{file} names the folder {name!r}, must name one beside it")
        folder = file.absolute().parent / name
        if folder not in checked:
            if not folder.is_dir():
                raise ValueError(f"{file}: its values are in the folder {folder}, which is missing")
            PartsFolder(folder)
            checked.add(folder)
        holder[key] = _encoded(f"{folder}/{number}")


def has_parts(state: Any) -> bool:
    """Whether a state has references in place of tables."""
    return next(_references(state), None) is not None


def remove_unused_parts(folder: Path) -> None:
    """Remove the folders of trainings in a folder to which none of its checkpoints refers.

    If a file cannot be read, nothing is removed.
    """
    found = [x for x in folder.glob("values_*") if OF_TRAININGS.fullmatch(x.name) and x.is_dir()]
    if not found:
        return
    used: Set[str] = set()
    for file in folder.glob("*.pt"):
        try:
            used.update(_folders_of(file))
        except Exception as error:  # a damaged file can raise nearly anything
            logger.warning(f"{file} is not readable ({error}): no old folder of values is removed")
            return
    for unused in found:
        if unused.name not in used:
            shutil.rmtree(unused, ignore_errors=True)


def _folders_of(file: Path) -> Set[str]:
    """The names of the folders to which a file refers."""
    names = set()
    with file.open("rb") as opened:
        for holder, key in _references(read_without_data(file)):
            start = offset_of(holder[key])
            assert start is not None
            opened.seek(start)
            text = opened.read(holder[key].numel()).decode(errors="replace")
            names.add(text.rpartition("/")[0])
    return names


def _references(state: Any) -> Iterator[Tuple[Dict[Any, Any], Any]]:
    """The dictionaries in a state, and their keys of references."""
    if not isinstance(state, dict):
        return
    for key, value in list(state.items()):
        is_named = isinstance(key, str) and (key == PARTS or key.endswith(f".{PARTS}"))
        if is_named and isinstance(value, Tensor) and value.dtype == torch.uint8:
            yield state, key
        else:
            yield from _references(value)


def _encoded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _decoded(reference: Tensor) -> str:
    return bytes(reference.tolist()).decode(errors="replace")
