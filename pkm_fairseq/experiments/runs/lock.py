"""The lock of a folder in which a process trains."""

import fcntl
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Iterator

LOCK = "lock"  # the file's name


@contextmanager
def locked(file: Path) -> Iterator[IO[str]]:
    """Hold a lock; a child that inherits the open file holds it, too.

    Args:
        file: created if needed.

    Raises:
        ValueError: another process holds the lock.
    """
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{file.parent} is being trained by another process") from None
        yield opened


def refuse_running(folder: Path) -> None:
    """Raise ValueError if a process trains in a folder or below."""
    for file in folder.rglob(LOCK):
        with locked(file):
            pass
