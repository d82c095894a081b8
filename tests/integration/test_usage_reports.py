"""memory_usage.jsonl and the times of reads of real trainings: restarts, workers, shared values."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from pkm_fairseq.memory.observe.log import FILE, INITIAL_VALUES, read_usage_log

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    PATIENCE,
    TRAIN,
    binarise,
    load,
    run_alike,
    train,
    train_on_two_workers,
    write_sentences,
)

ALL = ["--memory-usage-tokens", "100000"]  # more than the validation set has
RESM = ["--arch", "resm_roberta_tiny", *MEMORY]
EVERY = ["--validate-interval-updates", "4", "--save-interval-updates", "4"]


def counts(folder: Path, split: str) -> List[Dict[str, Any]]:
    return [line for line in read_usage_log(folder / FILE)[1] if line["split"] == split]


def times(folder: Path) -> Dict[str, torch.Tensor]:
    model = load(folder / "checkpoint_last.pt")["model"]
    found = {name: tensor for name, tensor in model.items() if ".reads.last_" in name}
    assert found
    return found


def assert_same_counts(one: Any, other: Any) -> None:
    """Equal counts; numbers that are sums of floats or moved values but for rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_counts(one[key], other[key])
    elif isinstance(one, list):
        for ours, theirs in zip(one, other, strict=True):
            assert_same_counts(ours, theirs)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    else:
        assert one == other


def test_a_restart_keeps_staleness_and_the_log(data_bin: Path, tmp_path: Path) -> None:
    straight, twice = tmp_path / "straight", tmp_path / "twice"
    train(data_bin, straight, *RESM, *ALL, *EVERY, "--max-update", "8")
    for last in ("4", "8"):
        train(data_bin, twice, *RESM, *ALL, *EVERY, "--max-update", last)
    for name, tensor in times(straight).items():
        assert torch.equal(tensor, times(twice)[name]), name
        assert tensor.max() == 8
    assert [line["update"] for line in counts(straight, "valid")] == [4, 8]
    assert counts(twice, "valid") == counts(straight, "valid")
    last = counts(twice, "valid")[-1]["layers"][0]["staleness"]
    assert last["updates"] == 8
    assert last["moved"]["max"] > 0


def test_a_kill_while_writing_loses_one_line_at_most(data_bin: Path, tmp_path: Path) -> None:
    train(data_bin, tmp_path, *RESM, *ALL, *EVERY, "--max-update", "4")
    whole = (tmp_path / FILE).read_bytes()
    with (tmp_path / FILE).open("ab") as log:
        log.write(whole.splitlines()[-1][:100])
    train(data_bin, tmp_path, *RESM, *ALL, *EVERY, "--max-update", "8")
    assert (tmp_path / FILE).read_bytes().startswith(whole)
    assert [line["update"] for line in counts(tmp_path, "valid")] == [4, 8]


def test_updates_after_the_last_checkpoint_are_counted_once(data_bin: Path, tmp_path: Path) -> None:
    interval = ["--memory-usage-interval", "1", "--memory-usage-tokens", "50", "--max-update", "60"]
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *RESM, *EVERY]
    command += [*interval, "--save-dir", tmp_path]
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        log = tmp_path / FILE
        if log.exists() and log.read_bytes().count(b"\n") > 7:  # after the first checkpoint
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / FILE).exists()
    last = tmp_path / "checkpoint_last.pt"  # fairseq copies it in place: take a whole one
    last.unlink(missing_ok=True)
    names = sorted(tmp_path.glob("checkpoint_1_*.pt"), key=lambda f: int(f.stem.split("_")[2]))
    if names:
        names[-1].rename(last)
    train(data_bin, tmp_path, *RESM, *EVERY, *interval)
    updates = [line["update"] for line in counts(tmp_path, "train")]
    assert updates == sorted(set(updates))
    assert updates[-1] == 60


@pytest.mark.parametrize("sharing", [[], ["--memory-share-values"]], ids=["own", "shared"])
def test_two_workers_report_what_one_that_accumulates_does(
    data_bin: Path, tmp_path: Path, sharing: List[str]
) -> None:
    options = [
        *RESM,
        *ALL,
        "--memory-layers",
        "0,1",
        *sharing,
        "--dropout",
        "0",
        "--max-update",
        "6",
    ]
    options += ["--attention-dropout", "0", "--memory-query-norm", "layer"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(data_bin, one, *options, "--update-freq", "2")
    train_on_two_workers(data_bin, two, *options)
    for name, tensor in times(one).items():
        assert torch.equal(tensor, times(two)[name]), name
    (ours,), (theirs,) = counts(one, "valid"), counts(two, "valid")
    assert ours["layers"][0]["tokens"] > 100
    assert (ours["shared"] is not None) == bool(sharing)
    assert_same_counts(ours, theirs)


def test_two_workers_note_the_reads_of_one_when_there_is_no_validation(tmp_path: Path) -> None:
    write_sentences(tmp_path / "train.txt", 58, seed=0)  # an odd number of batches
    write_sentences(tmp_path / "valid.txt", 10, seed=1)
    data = binarise(tmp_path, tmp_path / "bin")
    options = [*RESM, "--memory-n-keys", "32", "--max-epoch", "1", "--disable-validation"]
    options += ["--seed", "8"]  # then the batch that fills its time is one of an earlier update
    options += ["--dropout", "0", "--attention-dropout", "0", "--memory-query-norm", "layer"]
    one, two = tmp_path / "one", tmp_path / "two"
    accumulated = train(data, one, *options, "--update-freq", "2")
    first, _ = train_on_two_workers(data, two, *options)
    sizes = [[float(line["bsz"]) for line in run.logged("train_inner")]
             for run in (accumulated, first)]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert sizes[0][-1] <= 8 < sizes[0][0]  # in the end one of two workers has nothing to learn
    for name, tensor in times(one).items():
        assert torch.equal(tensor, times(two)[name]), name
        assert 0 in tensor


def test_two_workers_count_the_training_together(data_bin: Path, tmp_path: Path) -> None:
    options = [*RESM, "--memory-usage-tokens", "300", "--memory-usage-interval", "3"]
    train_on_two_workers(data_bin, tmp_path, *options, "--max-update", "6")
    lines = counts(tmp_path, "train")
    assert [line["layers"][0]["tokens"] for line in lines] == [300] * len(lines)
    assert [line["update"] for line in lines] == [1, 4]  # one update has more than 300 tokens


def test_init_starts_new_times_and_its_own_initial_values(
    data_bin: Path, tmp_path: Path, resm_run: Any
) -> None:
    start = resm_run[0] / "checkpoint_last.pt"
    train(data_bin, tmp_path, *RESM, "--init-from", start, "--max-update", "1")
    assert {float(t) for tensor in times(tmp_path).values() for t in tensor.unique()} == {0, 1}
    initial = torch.load(tmp_path / INITIAL_VALUES, weights_only=True)["1"]
    name = "encoder.sentence_encoder.layers.1.memory.values.weight"
    assert torch.equal(initial, load(start)["model"][name])


def test_an_error_is_the_last_line(data_bin: Path, tmp_path: Path) -> None:
    """What is left of a count is written at the end, and not told behind the error."""
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *RESM]
    command += ["--save-dir", tmp_path, "--max-update", "1", *ALL]
    stock = ["--task", "masked_lm", "--best-checkpoint-metric", "no_such_metric"]
    done = run_alike(*command, *stock)
    assert done.status == 1
    assert "no_such_metric" in done.output.strip().splitlines()[-1]
    assert counts(tmp_path, "")
