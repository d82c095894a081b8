"""Write files atomically: other programs never see a half-written file."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, Iterator, Optional


@contextlib.contextmanager
def whole_file(file: Path, part: Optional[Path] = None) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name; rename it when it is complete.

    After an exception no new file remains. A kill can leave the temporary file. fsync writes the
    data to disk before the rename, for two reasons: some file systems do the rename first and lose
    the data in a power cut, and some, such as NFS, report a full disk only at fsync.

    Args:
        file: replaced at the end.
        part: the temporary name, in the same folder (default: the file's name and ``.part``).

    Raises:
        OSError: the file could not be written. The error names it, unless it names another one,
            such as a missing input. An older file of this name is unchanged.
    """
    part = part or file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # torch.save closes its archive after a failed write, which raises a RuntimeError instead
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            if cause.filename in (None, str(part)):  # errors of write and fsync name no file
                cause.filename = str(file)
            raise cause from None
        raise


def write_file(file: Path, text: str) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    with whole_file(file) as out:
        out.write(text.encode())
