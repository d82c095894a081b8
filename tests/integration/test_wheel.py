"""pip install from a built wheel: the core, and a training with the --user-dir that it names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, Tuple

import pytest

from .runs import BIN, MASKED_LM, MEMORY, MODEL, ROOT, TRAIN, Run, run_well
from .test_readme import ten_lines

Installed = Tuple[Path, Dict[str, str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The folder that pip has installed a wheel into, and an environment that finds it first."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder / "base"]
    command += ["egg_info", "--egg-base", folder]
    command += ["bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "dist"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run_well(*pip, "--target", folder / "site", wheel, cwd=folder)
    return folder / "site", {"PYTHONPATH": str(folder / "site")}


def python(installed: Installed, *arguments: str) -> Run:
    site, environment = installed
    return run_well(sys.executable, *arguments, cwd=site.parent, env=environment)


def test_the_core_in_ten_lines_runs_from_a_wheel(installed: Installed) -> None:
    done = python(
        installed, "-c", ten_lines() + "\nimport pkm_fairseq\nprint(pkm_fairseq.__file__)"
    )
    assert "'top1_usage'" in done.output
    assert str(installed[0]) in done.output.splitlines()[-1]  # not the checkout


def test_a_training_from_a_wheel(installed: Installed, data_bin: Path, tmp_path: Path) -> None:
    about = json.loads(python(installed, "-m", "pkm_fairseq", "--json").output)
    assert about["user_dir"] == str(installed[0] / "pkm_fairseq")
    options = [*TRAIN, *MASKED_LM, *MODEL, *MEMORY, "--user-dir", about["user_dir"]]
    command = [BIN / "fairseq-train", data_bin, *options, "--arch", "resm_roberta_tiny"]
    command += ["--max-update", "20", "--save-dir", tmp_path / "run"]
    done = run_well(*command, cwd=tmp_path, env={**os.environ, **installed[1]})
    assert done.logged("train_inner")[-1]["num_updates"] == "20"
    assert "valid_memory1_top1_usage" in done.logged("valid")[-1]
