"""What ``parts.py`` needs of ``torch.distributed.checkpoint`` (DCP), which is slow to import."""

import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .parts import Block

METADATA = ".metadata"
# the classes in DCP's metadata, which is a pickle; anything else in it is refused
PLAIN = {
    **{
        name: "torch.distributed.checkpoint.metadata"
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
        )
    },
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
    "_get_layout": "torch.serialization",
    "Size": "torch",
}


def save(folder: Path, part: Path, tables: Mapping[str, Block]) -> None:
    """Write tables into ``part``, and rename it to ``folder``; see ``parts.write_parts``.

    Raises:
        OSError: as there.
    """
    planner, writer = _SavePlanner(tables), _Writer(part, folder)
    try:
        with warnings.catch_warnings():  # that a single process saves
            warnings.simplefilter("ignore", UserWarning)
            state_dict_saver.save(dict(tables), storage_writer=writer, planner=planner)
    except CheckpointException as failed:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise _reason_of(failed, f"{folder} was not saved") from None


def read_metadata(folder: Path) -> Metadata:
    """DCP's metadata of a folder, whose files are all there in their full length.

    Raises:
        ValueError: a file is missing, truncated or damaged.
    """
    file = folder / METADATA
    if not file.is_file():
        raise ValueError(f"{file}: no such file; the folder is incomplete")
    try:
        with file.open("rb") as opened:
            metadata: Metadata = _Plain(opened).load()
        ends = _ends_of_files(metadata)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is damaged ({reason})") from None
    for name, end in ends.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file; the folder is incomplete")
        size = (folder / name).stat().st_size
        if size < end:
            raise ValueError(f"{folder / name} has {size} bytes, must have {end}: it is truncated")
    return metadata


def load(folder: Path, metadata: Metadata, name: str, block: Block) -> None:
    """Read a block of a table, in place; see ``parts.PartsFolder.read``.

    It needs no other worker, unlike DCP's own function of this name.

    Raises:
        ValueError: the folder is damaged.
    """
    planner, reader = _LoadPlanner(), FileSystemReader(folder)
    planner.set_up_planner({name: block}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    try:
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{folder}: {name} cannot be read: {_flat(error)}") from None


def _ends_of_files(metadata: Metadata) -> Dict[str, int]:
    """The least length of each file, in bytes."""
    ends: Dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        if name != Path(name).name:
            raise ValueError(f"it names the file {name}, must name one beside it")
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
    if not all(isinstance(x, TensorStorageMetadata) for x in metadata.state_dict_metadata.values()):
        raise ValueError("it holds more than tables")
    return ends


class _Plain(pickle.Unpickler):
    """Reads plain data only."""

    def find_class(self, module: str, name: str) -> Any:
        """A class that DCP's metadata needs.

        Raises:
            UnpicklingError: it is another one.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and PLAIN.get(name) != module:
            raise pickle.UnpicklingError(f"it holds more than plain data: {module}.{name}")
        return super().find_class(module, name)


class _SavePlanner(DefaultSavePlanner):
    """Writes a table in blocks of rows, so that a reader needs to hold only some rows."""

    def __init__(self, tables: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = {
            MetadataIndex(name, block.first): block
            for name, table in tables.items()
            for block in table.rows()
        }

    def create_local_plan(self) -> SavePlan:
        """One item for each block of this worker."""
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(block),
                        properties=TensorProperties(dtype=block.tensor.dtype),
                        size=torch.Size(block.size),
                    ),
                )
                for index, block in self._blocks.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor of a block."""
        return self._blocks[index].tensor


class _LoadPlanner(LoadPlanner):
    """Reads one block of a table."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        """Keep the block and the metadata."""
        ((self._name, self._block),) = state_dict.items()
        self._metadata = metadata.state_dict_metadata[self._name]

    def create_local_plan(self) -> LoadPlan:
        """The stored blocks that overlap with this one.

        Raises:
            ValueError: they do not cover it.
        """
        chunk = _chunk(self._block)
        items = create_read_items_for_chunk_list(self._name, self._metadata, [chunk])
        found = sum(item.lengths.numel() for item in items)
        if found != self._block.tensor.numel():
            total = self._block.tensor.numel()
            raise ValueError(f"of {total} numbers only {found} are there")
        return LoadPlan(items)

    def create_global_plan(self, global_plan: List[LoadPlan]) -> List[LoadPlan]:
        """Every worker reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse what is no tensor."""
        raise ValueError("it holds more than tables")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place of a stored block in this worker's block."""
        place: Tensor = self._block.tensor
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: it was read in place."""


class _Writer(FileSystemWriter):
    """Writes into a temporary folder, and gives it its name when it is complete."""

    def __init__(self, part: Path, folder: Path) -> None:
        super().__init__(part)
        self._part, self._folder = part, folder

    def storage_meta(self) -> None:
        """None: DCP's own has the name of the temporary folder."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remove what a kill left; nobody writes before all have called this."""
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator and self._part.exists():
            shutil.rmtree(self._part)

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        """Write this worker's file.

        Raises:
            OSError: as the system says, also where torch.save covers it by a RuntimeError.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Write the metadata, wait for the disk, and rename; only the first worker calls it."""
        super().finish(metadata, results)
        _fsync(self._part)
        self._part.rename(self._folder)
        _fsync(self._folder.parent)


def _chunk(block: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(block.first), block.tensor.shape)


def _fsync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _reason_of(failed: CheckpointException, what: str) -> BaseException:
    """The error of the first worker that failed, in one line, as an OSError.

    An error that is no failure, such as an interrupt, stays as it is.
    """
    error = next(iter(failed.failures.values()))[0]
    if not isinstance(error, Exception):
        return error
    reason = getattr(error, "strerror", None) or _flat(error)
    return OSError(f"{what}: {reason}; earlier checkpoints are intact")


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
