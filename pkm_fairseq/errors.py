"""How an error that the user can mend ends a fairseq command: one line, and no traceback.

The library raises ValueError and the like, so that programs and notebooks can catch them. Only
where a command of fairseq runs does such an error become its last line; the standard library only,
since it is also needed where this package cannot be imported.
"""

import dis
import os
import sys
from typing import Any, Optional

MENDABLE = (ValueError, OSError, MemoryError, ImportError)
RAISE = dis.opmap["RAISE_VARARGS"]


def running_command() -> bool:
    """Whether a command of fairseq runs here: fairseq-train, -validate, -hydra-train or another.

    A program that calls fairseq's functions is none.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        folder = os.path.basename(os.path.dirname(frame.f_code.co_filename))
        if frame.f_code.co_name == "cli_main" and folder == "fairseq_cli":
            return True
        frame = frame.f_back
    return False


def for_command(error: Exception) -> BaseException:
    """What to raise for an error: where a command runs, what ends it with one line."""
    return SystemExit(str(error)) if running_command() else error


def line_of(error: Optional[BaseException]) -> Optional[str]:
    """The line for an error that our code has raised by intention; None if it is no such error.

    fairseq covers some with an exception of its own, such as all that arise while a model is
    loaded: then what it covers is asked for.
    """
    while error is not None:
        module, is_raised = _origin(error)
        if module.startswith("pkm_fairseq") and is_raised and isinstance(error, MENDABLE):
            return str(error)
        if module.partition(".")[0] not in ("fairseq", "fairseq_cli"):
            return None
        error = error.__cause__ or error.__context__
    return None


def _origin(error: BaseException) -> "tuple[str, bool]":
    """The module from which an error came, and whether by a raise statement."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code.co_code
    return str(trace.tb_frame.f_globals.get("__name__")), code[trace.tb_lasti] == RAISE
