"""The study of narrow tables at toy size, from end to end."""

import json
import shutil
from pathlib import Path

from .runs import ROOT, run, run_well

STUDY = ROOT / "user_dir_examples/studies/narrow_tables/run.sh"


def test_the_study_runs_through_and_is_not_repeated(data_bin: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(data_bin, data)
    for file in data.glob("valid.*"):
        shutil.copy(file, data / f"test{file.suffix}")
    done = run_well(STUDY, data, out, "toy")
    assert "open, runs are missing" not in done.output
    stored = (out / "results.json").read_bytes()
    results = json.loads(stored)
    assert len(results) == 7  # three arms of two tasks, and a start
    measured = {(r["run"]["task"], r["run"]["arm"]): r for r in results}
    text = [measured["text", arm]["perplexity"] for arm in ("float32", "bfloat16", "float8")]
    assert len(set(text)) == 3 and max(text) - min(text) < 0.01 * text[0]
    log = (out / "runs/facts_float8_seed1/train.log").read_text()
    assert "memory_moment_dtype': 'float8'" in log and "facts_plain_seed1/checkpoint" in log
    again = run_well(STUDY, data, out, "toy")
    assert "[1/7]" in done.output and "[1/" not in again.output  # nothing is trained again
    assert (out / "results.json").read_bytes() == stored
    refused = run(STUDY, tmp_path, out, "toy")
    assert refused.status == 2 and "no file" in refused.output
