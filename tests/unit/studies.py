"""Import the modules of a study, which have the same names in all studies."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Tuple

import pytest

STUDIES = Path(__file__).resolve().parents[2] / "user_dir_examples" / "studies"
PARTS = ("arms", "table", "train")


def fixture_of(study: str) -> Any:
    """A fixture with the modules ``arms`` and ``table``; its tests can import ``train``, too."""

    @pytest.fixture
    def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuple[ModuleType, ModuleType]]:
        monkeypatch.syspath_prepend(str(STUDIES / study))
        for name in PARTS:
            sys.modules.pop(name, None)
        yield importlib.import_module("arms"), importlib.import_module("table")
        for name in PARTS:
            sys.modules.pop(name, None)

    return modules
