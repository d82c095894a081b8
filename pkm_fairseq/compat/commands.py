"""End fairseq's commands with one line after errors that the user can fix.

The library raises exceptions, which a program can catch. Only in a command does an uncaught
exception become one line. ``LOGLEVEL=DEBUG``, or ``hydra.verbose=true``, also shows the traceback.
"""

import logging
import multiprocessing
import sys
from dataclasses import dataclass
from functools import wraps
from typing import Any, Callable, Optional

from torch.multiprocessing.spawn import ProcessRaisedException

from ..errors import line_of, running_command

logger = logging.getLogger(__name__)


def end_in_one_line() -> None:
    """If a fairseq command loads the plugin, make uncaught errors end it with one line."""
    if running_command():
        sys.excepthook = _say_one_line(sys.excepthook)


def _say_one_line(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def excepthook(kind: Any, error: Any, trace: Any) -> None:
        line = _of_worker(error) or line_of(error)
        if line is None:
            stock(kind, error, trace)
        else:
            logger.debug("the command ends with an error", exc_info=error)
            print(line, file=sys.stderr)

    return excepthook


def end_jobs_in_one_line(stock: property) -> property:
    """Replace hydra's ``JobReturn.return_value``, the result of a job.

    hydra catches a job's exception, stores it there, and prints its traceback at the end.
    """

    def keep(self: Any, value: Any) -> None:
        line = line_of(value) if isinstance(value, Exception) and running_command() else None
        if line is not None:
            logger.debug("the job ends with an error", exc_info=value)
            raise SystemExit(line) from None
        assert stock.fset is not None
        stock.fset(self, value)

    return property(stock.fget, keep)


class Stopped(Exception):  # noqa: N818
    """Carries the line of a spawned worker to the process that started it."""


@dataclass(frozen=True)
class Stoppable:
    """The main function of a command; spawned workers get a copy of it."""

    main: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            Stopped: in a spawned worker, it ended with an error that the user can fix.
        """
        try:
            return self.main(*args, **kwargs)
        except Exception as error:
            line = line_of(error)
            if line is None or multiprocessing.parent_process() is None:
                raise
            raise Stopped(line) from None


def hand_over_lines(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``call_main``: torch passes on a worker's exception as the text of a traceback."""

    @wraps(stock)
    def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
        return stock(cfg, Stoppable(main) if running_command() else main, **kwargs)

    return call_main


def _of_worker(error: BaseException) -> Optional[str]:
    """The line with which a spawned worker stopped."""
    if not isinstance(error, ProcessRaisedException):
        return None
    _, _, line = error.msg.partition(f"{Stopped.__module__}.{Stopped.__qualname__}: ")
    return line.strip() or None
