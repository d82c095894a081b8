"""How an error that the user can mend ends a fairseq command: one line, and no traceback.

The library raises ValueError and the like, so that programs and notebooks can catch them. Only
where a command of fairseq runs does such an error become its last line; the standard library only,
since it is also needed where this package cannot be imported.
"""

import dis
import os
import sys
from typing import Any, Optional

OURS, FAIRSEQS = ("pkm_fairseq",), ("fairseq", "fairseq_cli")
MENDABLE = (ValueError, OSError, MemoryError, ImportError)
REASON = 300  # letters of an error that fairseq covers
RAISE = dis.opmap["RAISE_VARARGS"]


class TrainingError(ValueError, RuntimeError):
    """What ends a training although its state is sound.

    On a ValueError within an update fairseq writes ``crash.pt`` beside the checkpoints, on a
    RuntimeError it does not.
    """


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
    """The line for an error that the user can mend; None for what looks like a bug.

    That is what our code raises by intention, and what fairseq refuses, or cannot read or import.
    fairseq covers some errors with one of its own, such as all that arise while a model is loaded:
    then what it covers is asked for.
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
    """The package from which an error came, and whether by a raise statement."""
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module, code = trace.tb_frame.f_globals.get("__name__"), trace.tb_frame.f_code.co_code
    return str(module).partition(".")[0], code[trace.tb_lasti] == RAISE
