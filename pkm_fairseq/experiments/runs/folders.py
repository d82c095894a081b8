"""Folders that store the settings they were made with, so that no stale folder is reused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

from ...memory.files import write_file
from .lock import refuse_running

MARKER = "made_with.json"
PACKAGE = Path(__file__).resolve().parents[2]


def key_of(*settings: Any) -> str:
    """A hash of settings made of plain data."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def key_of_files(*files: Path) -> str:
    """A hash of the contents of files, in their order."""
    return key_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def key_of_code(*parts: str) -> str:
    """A hash of the code of some parts of this package."""
    return key_of_files(*sorted(file for part in parts for file in (PACKAGE / part).rglob("*.py")))


def begin(folder: Path, key: str) -> bool:
    """Prepare a folder for a step.

    If the step started with the same settings, the folder stays, and the step continues. Otherwise
    the folder of a finished step becomes ``*.old``, that of an unfinished one ``*.unfinished``.
    Each replaces an earlier folder of this name, so that no unfinished step costs a finished one.

    Args:
        folder: created if needed.
        key: hash of all inputs of the step.

    Returns:
        Whether there is work to do; False if the step is finished.

    Raises:
        ValueError: the folder holds files of another program, or another process trains in it or in
            a folder below.
    """
    made_with = _made_with(folder)
    if made_with.get("key") == key:
        return not made_with["finished"]
    if made_with:
        refuse_running(folder)
        name = "old" if made_with["finished"] else "unfinished"
        old = folder.with_name(f"{folder.name}.{name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        print(f"{folder} was made with other settings, text or code: moved to {old}", flush=True)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files of another program: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _mark(folder, key, finished=False)
    return True


def is_finished(folder: Path, key: str) -> bool:
    """Whether the folder holds the result of a finished step with these settings."""
    return _made_with(folder) == {"key": key, "finished": True}


def finish(folder: Path, key: str) -> None:
    """Mark a step as finished."""
    _mark(folder, key, finished=True)


def make_once(folder: Path, key: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made unless that was done with the same settings.

    Args:
        folder: created if needed.
        key: of the settings.
        make: fills the folder.

    Raises:
        ValueError: as ``begin``.
    """
    if begin(folder, key):
        make(folder)
        finish(folder, key)
    return folder


def _made_with(folder: Path) -> Dict[str, Any]:
    marker = folder / MARKER
    return json.loads(marker.read_text()) if marker.is_file() else {}


def _mark(folder: Path, key: str, finished: bool) -> None:
    write_file(folder / MARKER, json.dumps({"key": key, "finished": finished}))
