"""scripts/gpu_check.sh: its arguments, what it downloads, and what it keeps when time runs out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import _gpu_check

    return _gpu_check


@pytest.fixture
def wheels(tmp_path):
    """A folder that looks filled."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "a-1-py3-none-any.whl").touch()
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either OUT"),
        (["out", "--collect", "w"], "give either OUT"),
        (["--collect", "w", "--dry-run"], "give either OUT"),
        (["out", "nothing"], "nothing holds no wheels; --collect nothing fills it"),
        (["used", "wheels"], "used must be a new or an empty folder"),
        (["out", "wheels", "more"], "unrecognized arguments: more"),
    ],
)
def test_mistakes_are_one_line(script, wheels, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(wheels.parent)
    Path("used").mkdir()
    Path("used/result.json").touch()
    with pytest.raises(SystemExit, match="2"):
        script.main(argv)
    error = capsys.readouterr().err
    assert error.startswith("gpu_check: error: ") and message in error
    assert error.count("\n") == 1 and not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_ends_in_one_line(wheels):
    out = wheels.parent / "out"
    command = ["sh", ROOT / "scripts/gpu_check.sh", out, wheels]
    env = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr == "gpu_check: error: torch sees no CUDA device (--dry-run needs none)\n"


def test_what_is_downloaded_is_small_pinned_and_for_python_312(script, wheels, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    assert script.main(["--collect", str(wheels)]) == 0
    downloads = [command for command in ran if "download" in command]
    assert len(downloads) == 2
    for command in downloads:
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        assert command[command.index("--python-version") + 1] == "3.12"
    assert {"--require-hashes", str(ROOT / "requirements/fairseq-ve.txt")} < set(downloads[0])
    assert not {"torch", "triton", "numba", "transformers"} & {
        word for words in ran for word in words
    }


TESTS = """
import time
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise OSError
def test_is_not_left_well(broken): pass
def test_takes_long(): time.sleep(600)
"""


def run_step(script, folder, dry_run, limit):
    """The result of one step, and its log."""
    tests = folder / "test_some.py"
    tests.write_text(TESTS)
    check = script.Check(folder / "out", None, dry_run)
    with open(folder / "log.txt", "w") as log:
        check.run(sys.executable, "some", limit, (str(tests),), log)
    return json.loads((folder / "out/result.json").read_text()), (folder / "log.txt").read_text()


def test_what_was_finished_is_kept_when_time_runs_out(script, tmp_path, monkeypatch):
    outcomes, started = tmp_path / "out/outcomes.jsonl", subprocess.Popen

    class Process(started):
        """Its time runs out as soon as all tests but the long one have ended."""

        def wait(self, timeout=None):
            if timeout != 20.0:
                return super().wait(timeout)
            deadline = time.monotonic() + 240
            while not outcomes.exists() or outcomes.read_text().count("\n") < 5:
                assert time.monotonic() < deadline and self.poll() is None
                time.sleep(0.1)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(script.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    result, log = run_step(script, tmp_path, dry_run=False, limit=20.0)
    assert [step["status"] for step in result["steps"]] == ["out of time"], log
    names = [name.partition("::")[2] for name in result["tests"].pop("names")]
    assert names == ["test_fails", "test_is_not_left_well"]
    assert result["tests"] == {"passed": 1, "failed": 2, "skipped": 1}


def test_a_dry_run_collects_and_runs_nothing(script, tmp_path):
    result, log = run_step(script, tmp_path, dry_run=True, limit=60.0)
    assert [step["status"] for step in result["steps"]] == ["done"]
    assert result["tests"] == {"passed": 0, "failed": 0, "skipped": 0, "names": []}
    assert "5 tests collected" in log


def test_a_wheel_that_cannot_be_installed_ends_it(script, wheels, monkeypatch):
    monkeypatch.setattr(script, "device", lambda: "a device")
    out = wheels.parent / "out"
    assert script.main([str(out), str(wheels)]) == 1
    result = json.loads((out / "result.json").read_text())
    assert [(step["name"], step["status"]) for step in result["steps"]] == [("install", "failed")]
    assert (
        result["device"] == "a device" and "a-1-py3-none-any.whl" in (out / "log.txt").read_text()
    )


def test_all_steps_fit_into_ten_minutes(script):
    assert script.BUDGET < 600 and script.INSTALL < script.BUDGET
    for _, limit, tests in script.STEPS:
        assert limit < script.BUDGET and all((ROOT / test).exists() for test in tests)
