"""Ctrl-C ends the scripts and the examples' scripts, whatever they are doing."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .test_runs import is_running, wait_for

ROOT = Path(__file__).resolve().parents[2]
# what a library's bare except does to an interrupt while a script imports it
IMPORTING = """
import time
from _script import run
try:
    print("ready", flush=True)
    time.sleep(600)
except BaseException:
    print("swallowed", flush=True)
run(lambda: time.sleep(600))
"""
RUNNING = """
import time
from _script import run
def main():
    print("ready", flush=True)
    try:
        time.sleep(600)
    finally:
        print("cleaned", flush=True)
run(main)
"""
BASH = """
set -euo pipefail
source {processes}
job() {{ sleep 600; }}
start job
first=$!
{second}
echo ready
wait $first
"""


def started(command, tmp_path, is_ignored=False):
    """A process that is ready, and the file of what it prints."""
    output = tmp_path / "output"

    def at_start():
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    with output.open("w") as out:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=at_start,
        )
    wait_for(lambda: "ready" in output.read_text())
    return process, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_ignored", [False, True])
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (IMPORTING, ["ready", "script.py: interrupted"]),
        (RUNNING, ["ready", "cleaned", "script.py: interrupted; run it again to continue"]),
    ],
)
def test_a_script_ends_at_once(tmp_path, code, said, is_ignored, number):
    """Also where its shell has SIGINT ignored, as that of a background job."""
    shutil.copy(ROOT / "scripts" / "_script.py", tmp_path)
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "-S", tmp_path / "script.py"]
    process, output = started(command, tmp_path, is_ignored)
    process.send_signal(number)
    assert process.wait() == 130
    assert output.read_text().splitlines() == said


def group_of(group):
    """Processes of a session, by their parent's id at the start."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == group:
            found.append(int(folder.name))
    return [pid for pid in found if is_running(pid)]


@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("second", ["start job", "run sleep 0"])
def test_an_examples_script_ends_with_all_that_it_started(tmp_path, second, to_all):
    processes = ROOT / "user_dir_examples" / "processes.sh"
    code = BASH.format(processes=processes, second=second)
    process, _ = started(["bash", "-c", code], tmp_path)
    assert len(group_of(process.pid)) > 1
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    assert process.wait() == 130
    wait_for(lambda: not group_of(process.pid))


def test_an_examples_script_whose_half_fails_ends_the_other(tmp_path):
    """And what the half said is the last line."""
    second = "fails() { echo lost >&2; return 3; }\nstart fails\nwait -n"
    code = BASH.format(processes=ROOT / "user_dir_examples" / "processes.sh", second=second)
    with (tmp_path / "output").open("w") as out:
        process = subprocess.Popen(
            ["bash", "-c", code], stdout=out, stderr=out, start_new_session=True
        )
    assert process.wait() == 3
    wait_for(lambda: not group_of(process.pid))
    assert (tmp_path / "output").read_text() == "lost\n"


@pytest.mark.parametrize("example", ["glue", "pretraining"])
def test_an_examples_script_of_one_command_becomes_it(example):
    """A signal to the script is a signal to the training."""
    text = (ROOT / "user_dir_examples" / example / "run.sh").read_text()
    (line,) = [line for line in text.splitlines() if 'fairseq-hydra-train" ' in line]
    assert line.startswith("exec ")
