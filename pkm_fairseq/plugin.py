"""Register the plugin with fairseq.

fairseq's ``import_user_module`` imports the last part of ``--user-dir`` as a top-level module. If
a module of that name is already imported, fairseq only checks whether its ``__path__`` contains the
folder.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from typing import Any, Iterator, List

from .errors import for_command

NAME = "pkm_fairseq"


def register() -> None:
    """Register models, tasks, criteria and the optimizer with fairseq; a second call does nothing.

    Raises:
        ImportError: fairseq is not installed.
    """
    if importlib.util.find_spec("fairseq") is None:
        raise ImportError(
            "the plugin needs fairseq: install ve-fairseq or fairseq-fixed; "
            "pkm_fairseq.memory works without it"
        )
    with _no_logging_set_up():
        from . import compat
    compat.apply()
    import pkm_fairseq.criterions.masked_lm
    import pkm_fairseq.criterions.sentence_prediction
    import pkm_fairseq.models.roberta
    import pkm_fairseq.optim.pkm_adam
    import pkm_fairseq.tasks.masked_lm
    import pkm_fairseq.tasks.sentence_prediction  # noqa: F401  (importing registers)


@contextlib.contextmanager
def _no_logging_set_up() -> Iterator[None]:
    """Keep fairseq's import from configuring the root logger.

    Some of fairseq's modules call ``logging.basicConfig``, which does nothing if the logger already
    has a handler.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def check_name(name: str) -> None:
    """Refuse to import the package under another name.

    numba's cache imports modules by the name that they had when the cache was filled.

    Raises:
        ImportError: the name is wrong; the message says which.
    """
    if name != NAME:
        raise for_command(
            ImportError(f"--user-dir: {name} is a link or copy of {NAME}, must have that name")
        )


def is_loading() -> bool:
    """Whether fairseq is now loading a user-dir: this package, or one that imports it."""
    load = getattr(sys.modules.get("fairseq.utils"), "import_user_module", None)
    code = getattr(load, "__code__", None)
    frame: Any = None if code is None else sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Places(List[str]):
    """The ``__path__`` of this package; it registers the plugin when fairseq looks up a folder."""

    def __contains__(self, folder: Any) -> bool:
        if not is_loading():
            return super().__contains__(folder)
        if not any(os.path.samefile(folder, place) for place in self):
            raise for_command(
                ImportError(
                    f"--user-dir {folder}: {NAME} is already imported from {self[0]}, "
                    "and a process can use one copy only"
                )
            )
        register()
        return True
