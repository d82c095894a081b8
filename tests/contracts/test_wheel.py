"""A wheel holds all that the package needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pkm_fairseq"
OF_THE_SOURCE_ONLY = {"__pycache__"}


def files_of(folder: Path) -> "set[str]":
    return {
        str(file.relative_to(folder))
        for file in (folder / PACKAGE).rglob("*")
        if file.is_file() and not OF_THE_SOURCE_ONLY & set(file.parts)
    }


def test_what_is_installed_is_the_whole_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")]
    command += ["egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = files_of(tmp_path / "base" / "lib")
    assert built == files_of(ROOT)
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/experiments/runs/logs.py"} <= built
    kinds = {Path(name).suffix for name in built}
    assert {".py", ".html", ".yaml"} <= kinds
