"""What a kill, a lost worker and a full disk leave behind."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pkm_fairseq.experiments.runs.trainings import updates_of

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    Run,
    load,
    run,
    run_well,
    start_two_workers,
    train,
    train_on_two_workers,
    wait_for,
)
from .test_parts import LAST, PARTS, folders, references

VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
WITHIN = 600.0  # seconds; gloo itself would wait for 30 minutes


@pytest.mark.parametrize("stored", ["whole", "parts"])
def test_killed_trainings_go_on_from_their_last_checkpoint(
    data_bin: Path, tmp_path: Path, stored: str
) -> None:
    """Whether files are whole and losses equal is what the script looks at."""
    script = [sys.executable, ROOT / "scripts/kill_training.py", "--data", data_bin]
    options = ["--out", tmp_path / "out", "--kills", "4", "--updates", "80", "--interval", "5"]
    options += ["--", "--memory-n-keys", "64", "--memory-checkpoint", stored]
    said = run_well(*script, *options).output
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert "4 kills" in said and result["kills"] == len(result["each"]) == 4
    assert all(result["by_moment"].values())
    assert 0 <= result["most_lost"] <= 5
    assert result["updates_done"] >= 80
    assert result["equal"]["tensors"] > 100
    killed = tmp_path / "out/killed"
    if stored == "whole":
        assert len(load(killed / "checkpoint_last.pt")["model"][VALUES]) == 64**2
    else:
        assert len(load(tmp_path / "out/killed_merged.pt")["model"][VALUES]) == 64**2
        assert {x.name for x in killed.iterdir() if x.is_dir()} == set(references(killed).values())
    assert result["equal"]["validation_counts"] >= 16
    again = run(*script, *options)
    assert again.status == 1
    assert again.output.endswith("/out is not empty: choose a new folder\n")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_left_alone_ends(data_bin: Path, tmp_path: Path, victim: int) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "100000", "--no-save"]
    workers = start_two_workers(data_bin, tmp_path, *options)
    try:
        assert workers[0].stdout is not None
        for line in workers[0].stdout:
            if '"num_updates": "5"' in line:
                break
        workers[victim].kill()
        killed = time.monotonic()
        output = workers[1 - victim].communicate(timeout=WITHIN)[0]
        assert time.monotonic() - killed < WITHIN
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[1 - victim].returncode == 1
    assert "Connection closed by peer" in output or "Connection reset by peer" in output


def test_a_full_disk_leaves_the_checkpoint_before(
    data_bin: Path, resm_run: "tuple[Path, Run]", tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(resm_run[0], out)
    before = {file: file.read_bytes() for file in out.glob("*.pt")}
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *MEMORY]
    command += ["--arch", "resm_roberta_tiny", "--save-dir", out, "--max-update", "14"]
    # no file can have more than 200 kB
    failed = run("bash", "-c", 'ulimit -f 200 && exec "$@"', "bash", *command)
    assert failed.status == 1
    assert '"num_updates": "14"' in failed.output
    last_line = failed.output.strip().splitlines()[-1]
    name = next(name for name in ("checkpoint_best.pt", "checkpoint_last.pt") if name in last_line)
    assert last_line.startswith(f"{out / name} was not saved: File too large;")
    assert "Traceback" not in failed.output
    assert {file: file.read_bytes() for file in out.glob("*.pt")} == before
    assert not list(out.glob("*.part")) and not list(out.glob("*.tmp"))
    assert load(out / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 12


def test_a_full_disk_leaves_the_parts_before(data_bin: Path, tmp_path: Path) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-n-keys", "64", *PARTS]
    train(data_bin, tmp_path, *options, "--max-update", "2")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *options]
    command += ["--save-dir", tmp_path, "--max-update", "4"]
    # of a part no more than 900 kB; all other files are smaller
    failed = run("bash", "-c", 'ulimit -f 900 && exec "$@"', "bash", *command)
    assert failed.status == 1 and "Traceback" not in failed.output
    line = re.escape(f"{tmp_path}/values_4_") + r"\w{8} was not saved: File too large; earlier "
    assert re.fullmatch(line + "checkpoints are intact", failed.output.strip().splitlines()[-1])
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    usage = tmp_path / "memory_usage.jsonl"
    assert {**after, usage: before[usage]} == before
    train(data_bin, tmp_path, *options, "--max-update", "4")
    assert load(tmp_path / LAST)["optimizer_history"][-1]["num_updates"] == 4


def stop_while_saving(worker: "subprocess.Popen[str]", part: Path) -> bool:
    """Stop a worker in the middle of a save; False if there is none, or it has just ended."""
    if not (part / "__1_0.distcp").exists():
        return False
    worker.send_signal(signal.SIGSTOP)
    time.sleep(0.5)  # the other worker may need only this one's last word
    if part.is_dir():
        return True
    worker.send_signal(signal.SIGCONT)
    return False


@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_lost_while_saving_leaves_the_parts_before(
    data_bin: Path, tmp_path: Path, victim: int
) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-n-keys", "256", *PARTS]
    options += ["--memory-shards", "2", "--memory-query-norm", "layer", "--disable-validation"]
    options += ["--save-interval-updates", "1", "--keep-interval-updates", "1"]
    workers = start_two_workers(data_bin, tmp_path, *options, "--max-update", "100000")
    part = tmp_path / "saving_values.part"
    try:
        wait_for((tmp_path / "checkpoint_1_3.pt").exists, workers[0])
        deadline = time.monotonic() + WITHIN
        while not stop_while_saving(workers[victim], part):
            assert workers[0].poll() is None and time.monotonic() < deadline
        workers[victim].kill()
        output = workers[1 - victim].communicate(timeout=WITHIN)[0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert workers[1 - victim].returncode == 1
    assert "Connection closed by peer" in output or "Connection reset by peer" in output
    updates = updates_of(tmp_path / LAST)  # reads the metadata of its parts, too
    again = train_on_two_workers(data_bin, tmp_path, *options, "--max-update", str(updates + 1))
    assert f"@ {updates} updates" in again[0].output
    assert updates_of(tmp_path / LAST) == updates + 1
    assert set(folders(tmp_path)) == set(references(tmp_path).values())  # no leftovers
