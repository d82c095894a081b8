"""The few cures fairseq needs on current torch and numpy; importing this module applies them."""

import argparse
import atexit
import contextlib
import queue
import shutil
import sys
import threading
import types
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import numpy
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from .files import whole_file

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, which is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

# numpy 2.0 removed np.compat; fairseq's TokenBlockDataset takes np.compat.long, which was int,
# for --sample-break-mode eos.
if not hasattr(numpy, "compat"):
    numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

JOIN_SECONDS = 10.0
COPY_BYTES = 2**24


@atexit.register
def end_prefetching() -> None:
    """End the threads in which fairseq prepares batches that nobody will ask for.

    A training that stops within an epoch leaves such a thread running. If Python ends while it is
    inside torch, the process aborts ("terminate called without an active exception") with status
    134 after a training that went well.
    """
    iterators = sys.modules.get("fairseq.data.iterators")
    if iterators is None:
        return
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._queue.put = _end_thread
            with contextlib.suppress(queue.Empty):
                thread._queue.get_nowait()  # wakes it up if it waits for room
            thread.join(JOIN_SECONDS)


def _end_thread(item: Any) -> None:
    raise SystemExit  # ends a thread quietly


# --- checkpoints that are whole or absent ---------------------------------------------------------
#
# fairseq 0.12.3 writes the first name of a checkpoint under a temporary one, but copies the other
# names, checkpoint_last.pt among them, in place: a kill leaves half of the file that the training
# is to go on from. It does not wait for the disk, and when writing fails it tries twice more,
# behind what it has already written to the same file, ends with a page of traceback, and leaves
# the rest. Both functions are replaced for local files; elsewhere, and for
# --write-checkpoints-asynchronously, fairseq's own are called.

_save_elsewhere = checkpoint_utils.torch_persistent_save
_copy_elsewhere = PathManager.copy


def save_checkpoint_file(obj: Any, filename: str, async_write: bool = False) -> None:
    """Write a checkpoint; stops the training with one line if that fails."""
    if async_write or not PathManager.supports_rename(filename):
        _save_elsewhere(obj, filename, async_write)
        return
    with _checkpoint_file(filename) as out:
        torch.save(obj, out)


def copy_checkpoint_file(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Give a checkpoint another name too; stops the training with one line if that fails."""
    if not all(map(PathManager.supports_rename, (src_path, dst_path))):
        return bool(_copy_elsewhere(src_path, dst_path, overwrite))
    with open(src_path, "rb") as source, _checkpoint_file(dst_path) as out:
        shutil.copyfileobj(source, out, COPY_BYTES)
    return True


@contextlib.contextmanager
def _checkpoint_file(filename: str) -> Iterator[BinaryIO]:
    """A file with one temporary name for each worker and folder.

    So that what a kill leaves is taken up by the next save, whatever that is of. No pattern for
    checkpoints matches it.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    file = Path(filename)
    try:
        with whole_file(file, file.with_name(f"saving{rank}.part")) as out:
            yield out
    except OSError as error:
        raise SystemExit(
            f"{file} was not saved: {error.strerror or error}; what was saved before is whole"
        ) from None


checkpoint_utils.torch_persistent_save = save_checkpoint_file
PathManager.copy = staticmethod(copy_checkpoint_file)
