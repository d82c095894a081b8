"""Start and end of every script; import this module before the package."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Callable, NoReturn, Optional, Sequence

INTERRUPTED = 130  # exit status


def run(main: Callable[[], None], hint: str = "; run it again to continue") -> None:
    """Run a script; Ctrl-C and errors that the user can fix end it with one line.

    SIGINT works in background jobs, too; a shell without job control ignores it there.

    Args:
        main: the script.
        hint: the end of the line after an interrupt.
    """
    name = Path(sys.argv[0]).name
    take_interrupts()
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        _leave(hint=hint)


def check_output(option: str, file: Optional[Path], formats: Sequence[str] = ()) -> None:
    """Check an output file before the work.

    Args:
        option: the option that named it, for messages.
        file: None if the option was not given.
        formats: ends of names that are allowed, such as ``.png`` (default: all).

    Raises:
        ValueError: it is a folder, its folder does not exist, or its name has another end.
    """
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file} must be a file in a folder that exists")
    if formats and file.suffix not in formats:
        raise ValueError(f"{option} is {file}, must end in {', '.join(formats)}")


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def take_interrupts() -> None:
    """Make Ctrl-C raise KeyboardInterrupt; call this after all imports."""
    _listen(_interrupt)


def _is_script() -> bool:
    """Whether a script of this folder is running; other programs handle their own signals."""
    main = getattr(sys.modules["__main__"], "__file__", None) or ""
    return Path(main).resolve().parent == Path(__file__).resolve().parent


def _listen(handler: Callable[[int, Optional[FrameType]], None]) -> None:
    if _is_script():
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, handler)


def _interrupt(signum: int, frame: Optional[FrameType]) -> None:
    raise KeyboardInterrupt


def _leave(
    signum: Optional[int] = None, frame: Optional[FrameType] = None, hint: str = ""
) -> NoReturn:
    """Exit immediately: Python's normal shutdown takes seconds on a busy machine.

    During imports no work has begun, and an imported module may catch any exception.
    """
    if signum is None:
        with contextlib.suppress(OSError):  # the reader is gone
            sys.stdout.flush()
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted{hint}\n".encode())
    os._exit(INTERRUPTED)


_listen(_leave)
if _is_script():
    logging.disable(logging.INFO)  # messages of fairseq and matplotlib at import
