"""How the scripts begin and end; to be imported before the package."""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Callable, NoReturn, Optional

INTERRUPTED = 130  # exit status


def run(main: Callable[[], None], hint: str = "; run it again to continue") -> None:
    """Run a script; what the user can mend ends it with one line, and so does Ctrl-C.

    SIGINT is minded in a background job, too, for which a shell without job control has it ignored.

    Args:
        main: the script.
        hint: what to say of an interrupted one.
    """
    name = Path(sys.argv[0]).name
    take_interrupts()
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        _leave(hint=hint)


def take_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt; to be called when everything is imported."""
    _listen(_interrupt)


def _is_script() -> bool:
    """Whether a script of this folder is what runs; another program's signals are its own."""
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
    """End at once: taking all that was imported apart takes seconds on a busy machine.

    While a script is importing nothing has begun, and what is being imported may catch any
    exception.
    """
    if signum is None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
    os.write(2, f"{Path(sys.argv[0]).name}: interrupted{hint}\n".encode())
    os._exit(INTERRUPTED)


_listen(_leave)
if _is_script():
    logging.disable(logging.INFO)  # fairseq's and matplotlib's notes when they are imported
