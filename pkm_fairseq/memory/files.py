"""Files that are never seen half-written."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, Iterator, Optional


@contextlib.contextmanager
def whole_file(file: Path, part: Optional[Path] = None) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is whole, or else leaves no trace.

    A kill can leave what was written under the temporary name. The data are on the disk (fsync)
    before the rename: a file system may do the rename first, and lose the data in a power cut; and
    some, such as NFS, say only then that there is no room.

    Args:
        file: replaced at the end.
        part: the temporary name, in the same folder (default: that of the file, and ``.part``).

    Raises:
        OSError: the file, which the error names, could not be written; what stood under its name
            is untouched.
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
            cause.filename = str(file)  # writing and fsync name no file
            raise cause from None
        raise


def write_file(file: Path, text: str) -> None:
    """Write a file under a temporary name, and rename it when it is whole."""
    with whole_file(file) as out:
        out.write(text.encode())
