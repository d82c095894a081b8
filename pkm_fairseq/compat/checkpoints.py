"""Checkpoints that are whole or absent.

fairseq 0.12.3 writes the first name of a checkpoint under a temporary one, but copies the other
names, checkpoint_last.pt among them, in place: a kill leaves half of the file that the training
is to go on from. It does not wait for the disk, and when writing fails it tries twice more, behind
what it has already written to the same file, ends with a page of traceback, and leaves the rest.
Both functions are replaced for local files; elsewhere, and for --write-checkpoints-asynchronously,
fairseq's own are called.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

import torch
from fairseq.file_io import PathManager

from ..memory.files import whole_file

COPY_BYTES = 2**24


class CheckpointNotSavedError(OSError, ValueError):
    """A checkpoint could not be written; what was saved before is whole."""


def save_whole_files(stock: Callable[..., None]) -> Callable[..., None]:
    """Replace ``checkpoint_utils.torch_persistent_save``."""

    def save_checkpoint_file(obj: Any, filename: str, async_write: bool = False) -> None:
        """Write a checkpoint."""
        if async_write or not PathManager.supports_rename(filename):
            stock(obj, filename, async_write)
            return
        with _checkpoint_file(filename) as out:
            torch.save(obj, out)

    return save_checkpoint_file


def copy_whole_files(stock: Any) -> Any:
    """Replace ``PathManager.copy``, a static method."""

    def copy_checkpoint_file(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Give a checkpoint another name too."""
        if not all(map(PathManager.supports_rename, (src_path, dst_path))):
            return bool(stock.__func__(src_path, dst_path, overwrite))
        with open(src_path, "rb") as source, _checkpoint_file(dst_path) as out:
            shutil.copyfileobj(source, out, COPY_BYTES)
        return True

    return staticmethod(copy_checkpoint_file)


@contextlib.contextmanager
def _checkpoint_file(filename: str) -> Iterator[BinaryIO]:
    """A file with one temporary name for each worker and folder.

    So that what a kill leaves is taken up by the next save, whatever that is of. No pattern for
    checkpoints matches it.

    Raises:
        CheckpointNotSavedError: with the reason.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    file = Path(filename)
    try:
        with whole_file(file, file.with_name(f"saving{rank}.part")) as out:
            yield out
    except OSError as error:
        raise CheckpointNotSavedError(
            f"{file} was not saved: {error.strerror or error}; earlier checkpoints are intact"
        ) from None
