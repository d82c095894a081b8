"""Write checkpoints atomically: each is complete or absent.

fairseq 0.12.3 writes the first name of a checkpoint under a temporary name, but copies the other
names, including checkpoint_last.pt, in place. A kill can leave half of the file from which the
training resumes. fairseq does not call fsync. If a write fails, it tries twice more and appends to
the same file, prints a long traceback, and leaves the broken file. We replace both functions for
local files. For other files and --write-checkpoints-asynchronously we call fairseq's functions.
"""

import contextlib
import shutil
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

import torch
from fairseq.file_io import PathManager

from ..memory.files import whole_file

COPY_BYTES = 2**24


class CheckpointNotSavedError(OSError, ValueError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


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
        """Copy a checkpoint to another name."""
        if not all(map(PathManager.supports_rename, (src_path, dst_path))):
            return bool(stock.__func__(src_path, dst_path, overwrite))
        with open(src_path, "rb") as source, _checkpoint_file(dst_path) as out:
            shutil.copyfileobj(source, out, COPY_BYTES)
        return True

    return staticmethod(copy_checkpoint_file)


def remove_leftovers_first(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``save_checkpoint``: what a kill left must not take the disk from the next save."""

    @wraps(stock)
    def save_checkpoint(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if not cfg.no_save:
            with contextlib.suppress(OSError):  # a worker that saves nothing may not write here
                _temporary(Path(cfg.save_dir)).unlink()
        return stock(cfg, *args, **kwargs)

    return save_checkpoint


def _temporary(folder: Path) -> Path:
    """This worker's temporary name in a folder. No checkpoint pattern matches it."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return folder / f"saving{torch.distributed.get_rank() if distributed else 0}.part"


@contextlib.contextmanager
def _checkpoint_file(filename: str) -> Iterator[BinaryIO]:
    """Open a file with one temporary name per worker and folder.

    Raises:
        CheckpointNotSavedError: the message gives the reason.
    """
    file = Path(filename)
    try:
        with whole_file(file, _temporary(file.parent)) as out:
            yield out
    except OSError as error:
        raise CheckpointNotSavedError(
            f"{file} was not saved: {error.strerror or error}; earlier checkpoints are intact"
        ) from None
