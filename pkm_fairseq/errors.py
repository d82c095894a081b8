"""End a fairseq command with one line, without traceback, after an error that the user can fix.

The library raises ValueError and the like, so that programs and notebooks can catch them. Only in
a fairseq command does such an error become the last line. This module imports only the standard
library, since it also handles failed imports of this package.
"""

import dis
import os
import sys
from typing import Any, Optional

OURS, FAIRSEQS = ("pkm_fairseq",), ("fairseq", "fairseq_cli")
MENDABLE = (ValueError, OSError, MemoryError, ImportError)
REASON = 300  # length of an error that fairseq wraps
RAISE = dis.opmap["RAISE_VARARGS"]


class TrainingError(ValueError, RuntimeError):
    """Ends a training whose state is intact.

    On a ValueError during an update fairseq writes ``crash.pt`` beside the checkpoints; on a
    RuntimeError it does not.
    """


def running_command() -> bool:
    """Whether this process is a fairseq command: fairseq-train, -validate, -hydra-train or another.

    A program that calls fairseq's functions does not count.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        folder = os.path.basename(os.path.dirname(frame.f_code.co_filename))
        if frame.f_code.co_name == "cli_main" and folder == "fairseq_cli":
            return True
        frame = frame.f_back
    return False


def for_command(error: Exception) -> BaseException:
    """The exception to raise for an error; in a command, one that ends it with one line."""
    return SystemExit(str(error)) if running_command() else error


def line_of(error: Optional[BaseException]) -> Optional[str]:
    """The line for an error that the user can fix; None for a probable bug.

    The user can fix errors that our code raises on purpose, and things that fairseq refuses, or
    cannot read or import. fairseq wraps some errors in its own, such as all errors while it loads a
    model; then the wrapped error decides.
    """
    refusal = None
    while error is not None:
        package, is_raised = _origin(error)
        if package in OURS and is_raised and isinstance(error, MENDABLE):
            return str(error)
        if package not in FAIRSEQS:
            is_torchs = refusal is not None and isinstance(error, RuntimeError)  # a shape, a name
            return f"{refusal} {_flat(error)[:REASON]}" if is_torchs else None
        refusal = _flat(error) if is_raised or isinstance(error, (OSError, ImportError)) else None
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context
    return refusal or None


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _origin(error: BaseException) -> "tuple[str, bool]":
    """The package that raised an error, and whether a raise statement did it."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module, code = trace.tb_frame.f_globals.get("__name__"), trace.tb_frame.f_code.co_code
    return str(module).partition(".")[0], code[trace.tb_lasti] == RAISE
