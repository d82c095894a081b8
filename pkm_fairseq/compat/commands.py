"""Commands of fairseq end with one line where the user can mend what is wrong."""

from dataclasses import dataclass
from functools import wraps
from typing import Any, Callable, Optional

from torch.multiprocessing.spawn import ProcessRaisedException

from ..errors import line_of, running_command


class Stopped(Exception):  # noqa: N818
    """Carries the line from the main function of a command to where the command began."""


@dataclass(frozen=True)
class Stoppable:
    """The main function of a command; workers that are spawned get a copy of it."""

    main: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            Stopped: it ended with an error that the user can mend.
        """
        try:
            return self.main(*args, **kwargs)
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            raise Stopped(line) from None


def end_in_one_line(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``call_main``, by which all commands but fairseq-hydra-train begin.

    fairseq-hydra-train loads the plugin when it has begun: see :func:`end_jobs_in_one_line`.
    """

    @wraps(stock)
    def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
        if not running_command():
            return stock(cfg, main, **kwargs)
        try:
            return stock(cfg, Stoppable(main), **kwargs)
        except Stopped as stopped:
            raise SystemExit(str(stopped)) from None
        except ProcessRaisedException as error:
            line = _of_worker(error)
            if line is None:
                raise
            raise SystemExit(line) from None

    return call_main


def _of_worker(error: ProcessRaisedException) -> Optional[str]:
    """The line with which a spawned worker stopped; torch hands over its traceback as text."""
    mark = f"{Stopped.__module__}.{Stopped.__qualname__}: "
    _, found, line = error.msg.partition(mark)
    return line.strip() if found else None


def end_jobs_in_one_line(stock: property) -> property:
    """Replace ``JobReturn.return_value`` of hydra, by which a job says how it ended.

    hydra keeps an error of a job there, and prints its traceback in the end.
    """

    def keep(self: Any, value: Any) -> None:
        line = line_of(value) if isinstance(value, Exception) and running_command() else None
        if line is not None:
            raise SystemExit(line) from None
        assert stock.fset is not None
        stock.fset(self, value)

    return property(stock.fget, keep)
