"""Import the modules of a study, which have the same names in all studies."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Tuple

STUDIES = Path(__file__).resolve().parents[2] / "user_dir_examples" / "studies"
PARTS = ("arms", "table", "train")


@contextmanager
def imported(study: str, monkeypatch: Any) -> Iterator[Tuple[ModuleType, ModuleType]]:
    """Its modules ``arms`` and ``table``; ``import train`` works while the context is open."""
    monkeypatch.syspath_prepend(str(STUDIES / study))
    for name in PARTS:
        sys.modules.pop(name, None)
    yield importlib.import_module("arms"), importlib.import_module("table")
    for name in PARTS:
        sys.modules.pop(name, None)
