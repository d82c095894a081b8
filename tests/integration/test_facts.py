"""The study of facts at toy size, from end to end, and its scripts."""

import json
import sys
from pathlib import Path

import pytest

from .conftest import Shared
from .runs import ROOT, run, run_well

STUDY = ROOT / "user_dir_examples/studies/facts/run.sh"
SCRIPTS = ROOT / "scripts"
MEMORY = "resm_init_200people_20updates_lr0.002_32keys_values0.01_seed1"


@pytest.fixture(scope="module")
def toy(shared: Shared) -> Path:
    """The study's folder."""

    def fill(folder: Path) -> None:
        (folder / "output").write_text(run_well(STUDY, folder, "toy").output)

    return shared("facts", fill)


def test_the_study_runs_through_and_is_not_repeated(toy: Path) -> None:
    results = json.loads((toy / "results.json").read_text())
    arms = {(r["run"]["arm"], r["run"]["people"], r["run"]["updates"]) for r in results}
    names = ("plain", "wide", "plain2", "plain4", "resm", "pkm", "resm_init", "pkm_init")
    expected = {(arm, 200, 20) for arm in names}
    expected |= {(arm, 200, 80) for arm in ("plain", "wide")}
    expected |= {(arm, n, 20) for arm in ("plain", "wide", "resm_init") for n in (100, 400)}
    times = json.loads((toy / "step_times.json").read_text())
    assert list(times) == ["plain", "wide", "plain2", "plain4", "resm", "pkm"]
    assert times["plain"] == {"multiple": 1, "low": 1, "high": 1}
    assert all(0 < t["low"] <= t["multiple"] <= t["high"] for t in times.values())
    assert times["resm"]["low"] > 1  # a memory is extra work
    assert arms == expected and len(results) == len(expected) + 2  # fewer slots, a falling rate
    before = (toy / "results.json").read_bytes()
    timed = (toy / "step_times.json").read_bytes()
    changed = {file: file.stat().st_mtime_ns for file in toy.glob("runs/*/result.json")}
    again = run_well(STUDY, toy, "toy")
    assert "open, runs are missing" not in again.output and "recall by name, %" in again.output
    assert (toy / "results.json").read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in changed} == changed
    assert (toy / "step_times.json").read_bytes() == timed


def test_an_arm_with_init_starts_from_plains_half(toy: Path) -> None:
    log = (toy / "runs" / MEMORY / "train.log").read_text()
    assert "plain_200people_20updates_lr0.002_seed1/checkpoint10.pt" in log
    way = json.loads((toy / "runs" / MEMORY / "result.json").read_text())["way"]
    assert list(way) == ["15", "20"]


def test_measure_recall_says_what_the_study_says(toy: Path, tmp_path: Path) -> None:
    folder = toy / "runs" / MEMORY
    command = [sys.executable, SCRIPTS / "measure_recall.py", folder / "checkpoint_last.pt"]
    command += ["--data", toy / "people200" / "bin"]
    done = run_well(*command, "--ablate", "--json", tmp_path / "recall.json")
    (found,) = json.loads((tmp_path / "recall.json").read_text())
    stored = json.loads((folder / "result.json").read_text())["train"]
    assert {name: found[name] for name in stored} == stored
    assert "with values of zero" in done.output
    for options, said in (
        (["--split", "none"], "has no split none"),
        (["--people", "0"], "--people is 0, must be at least 1"),
    ):
        refused = run(*command, *options)
        assert refused.status == 1 and said in refused.output.splitlines()[-1]


def test_prepare_people_makes_the_data_of_the_study(toy: Path, tmp_path: Path) -> None:
    script = [sys.executable, SCRIPTS / "prepare_people.py", tmp_path / "people", "--people"]
    run_well(*script, "200")
    for name in ("train.bin", "test.bin", "dict.txt"):
        ours, theirs = tmp_path / "people/bin" / name, toy / "people200/bin" / name
        assert ours.read_bytes() == theirs.read_bytes()
    refused = run(*script, "100000")
    assert refused.status == 1 and "--people is 100000, must be in 1..89,000" in refused.output
    assert (tmp_path / "people/bin/train.bin").exists()


def test_the_study_of_new_people_runs_through_and_is_not_repeated(
    toy: Path, tmp_path: Path
) -> None:
    script = STUDY.parents[1] / "new_people" / "run.sh"
    run_well(script, toy, tmp_path, "toy")
    stored = (tmp_path / "results.json").read_bytes()
    results = {result["run"]["arm"]: result for result in json.loads(stored)}
    assert len(results) == 8
    before = json.loads((toy / "runs" / MEMORY / "result.json").read_text())["train"]
    for arm, result in results.items():
        points = [point["updates"] for point in result["way"]]
        assert points == [0, 1, 2, 4, 8, 16]
        if not arm.startswith("plain"):
            start = result["way"][0]["old"]["with_others"]["recall"]
            assert start == pytest.approx(before["with_others"]["recall"], abs=1e-6)
        change = result["change"]
        if arm == "values" or arm.startswith("slots"):  # nothing else may move
            assert change["bytes"] == change["rows"] * (8 + 4 * 64) > 0
        elif arm.endswith("low_rank"):  # two layers: attention's four weights, two of the FFN
            assert change == {"rows": 0, "bytes": 4 * 2 * 16 * (4 * (64 + 64) + 2 * (64 + 128))}
    assert results["slots_256"]["rows_chosen"] <= 256 < results["slots_256"]["rows_read"]
    again = run_well(script, toy, tmp_path, "toy")
    assert "open, runs are missing" in again.output  # of the arms that only the full size has
    assert (tmp_path / "results.json").read_bytes() == stored
    refused = run(script, tmp_path, tmp_path / "other", "toy")
    assert refused.status != 0 and "has no finished run of" in refused.output.splitlines()[-1]
