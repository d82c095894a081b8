"""user_dir_examples/four_arms: five trainings, and what their logs and checkpoints say together."""

import json
import re
import sys
from pathlib import Path

from pkm_fairseq.memory.observe.log import FILE, read_usage_log

from .runs import ROOT, load, run, run_well

RUN = ROOT / "user_dir_examples" / "four_arms" / "run.sh"
MEMORY_ARMS = ("pkm", "pkm_init", "resm", "resm_init")


def test_the_four_arms_run_and_can_be_compared(data_bin: Path, tmp_path: Path) -> None:
    out = tmp_path / "arms"
    done = run_well(RUN, data_bin, out, "30")
    for arm in ("plain", *MEMORY_ARMS):
        updates = 15 if arm.endswith("init") else 30
        assert f"{arm} has had {updates} updates" in done.output
        history = load(out / arm / "checkpoint_last.pt")["optimizer_history"]
        assert history[-1]["num_updates"] == updates
    half = load(out / "plain" / "checkpoint_half.pt")
    assert half["optimizer_history"][-1]["num_updates"] == 15
    plain = half["model"]
    log = (out / "resm_init" / "train.log").read_text()
    assert f"loaded {len(plain)} tensors" in log
    for arm in MEMORY_ARMS:
        assert read_usage_log(out / arm / FILE)[1][-1]["split"] == "valid"
    files = [out / arm / name for name in ("checkpoint_last.pt", FILE) for arm in MEMORY_ARMS]
    command = [sys.executable, ROOT / "scripts" / "memory_usage.py", "--data", data_bin]
    command += ["--checkpoint", *files[:4], "--log", *files[4:], "--json", tmp_path / "usage.json"]
    run_well(*command)
    report = json.loads((tmp_path / "usage.json").read_text())
    assert [checkpoint["name"] for checkpoint in report["checkpoints"]] == list(MEMORY_ARMS)
    assert [log["name"] for log in report["logs"]] == list(MEMORY_ARMS)
    again = run_well(RUN, data_bin, out, "30")
    assert "updates" not in again.output  # nothing was left to do


def test_a_failed_arm_stops_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(RUN, tmp_path / "empty", tmp_path / "arms", "30")
    assert done.status != 0
    # one of the two that start at once
    first = r"^(plain|resm) failed: no dictionary at .*empty/dict.txt"
    assert re.search(first, done.output, re.MULTILINE)
