"""A fresh environment with the wheel: the report, README's ten lines, and a training."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from .runs import MASKED_LM, MEMORY, MODEL, ROOT, TRAIN, Run, run_well
from .test_readme import ten_lines


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new environment into which pip has installed a new wheel, and no more."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder / "base"]
    command += ["egg_info", "--egg-base", folder]
    command += ["bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "dist"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    run_well(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv", "install", "-q"]
    run_well(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "venv"


def python(environment: Path, *arguments: Any) -> Run:
    """Run the environment's Python; it finds torch and fairseq in this one, not this checkout."""
    lent = f"{sysconfig.get_path('purelib')}:{sysconfig.get_path('platlib')}"
    command = [environment / "bin/python", *arguments]
    return run_well(*command, cwd=environment, env={"PYTHONPATH": lent})


def test_alone_it_says_how_to_get_each_part(fresh: Path) -> None:
    printed = python(fresh, "-I", "-m", "pkm_fairseq").output  # -I: nothing is lent
    assert "missing: torch, numpy\n" in printed
    for extra in ("kernels", "fairseq", "text", "reports", "glue", "validation", "huggingface"):
        assert f"; pip install 'pkm_fairseq[{extra}]'\n" in printed


def test_the_core_in_ten_lines_runs_from_a_wheel(fresh: Path) -> None:
    where = "\nimport pkm_fairseq\nprint(pkm_fairseq.__file__)"
    done = python(fresh, "-c", ten_lines() + where)
    assert "'top1_usage'" in done.output
    assert str(fresh) in done.output.splitlines()[-1]  # not the checkout


def test_a_training_from_a_wheel(fresh: Path, data_bin: Path, tmp_path: Path) -> None:
    about = json.loads(python(fresh, "-m", "pkm_fairseq", "--json").output)
    assert about["user_dir"].startswith(str(fresh))
    options = [*TRAIN, *MASKED_LM, *MODEL, *MEMORY, "--user-dir", about["user_dir"]]
    options += ["--arch", "resm_roberta_tiny", "--max-update", "20", "--save-dir", tmp_path]
    done = python(fresh, "-m", "fairseq_cli.train", data_bin, *options)
    assert done.logged("train_inner")[-1]["num_updates"] == "20"
    assert "valid_memory1_top1_usage" in done.logged("valid")[-1]
