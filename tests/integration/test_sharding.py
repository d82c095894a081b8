"""--memory-shards: workers that hold a part of every value train as one that holds all of it."""

import json
from pathlib import Path

import pytest
import torch

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    TRAIN,
    load,
    run,
    train,
    train_on_two_workers,
    train_on_workers,
    values_of,
)
from .test_factored import EPS, assert_close_checkpoints

OPTIONS = ["--arch", "resm_roberta_tiny", *MEMORY, *EPS, "--memory-query-norm", "layer"]
OPTIONS += ["--dropout", "0", "--attention-dropout", "0", "--batch-size", "4"]
OPTIONS += ["--max-update", "6", "--memory-usage-interval", "2"]
OPTIONS += ["--save-interval-updates", "3"]
CLIP = ["--memory-value-clip-norm", "1e-3"]
VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"


def resume(start: Path, folder: Path, batches: int) -> Path:
    """A folder in which a training goes on from a checkpoint, with another number of workers.

    Args:
        start: the folder with the checkpoint.
        folder: to make.
        batches: that each worker has read; fairseq would let each go on at the old ones' number.
    """
    state = load(start / "checkpoint_1_3.pt")
    state["extra_state"]["train_iterator"]["iterations_in_epoch"] = batches
    folder.mkdir()
    torch.save(state, folder / "checkpoint_last.pt")
    return folder


def test_shards_train_resume_and_are_counted_as_a_whole_table(
    data_bin: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    whole = train(data_bin, one, *OPTIONS, *CLIP, "--update-freq", "2")
    split = train_on_two_workers(data_bin, two, *OPTIONS, *CLIP, "--memory-shards", "2")
    for key in ("loss", "value_gnorm"):
        assert values_of(split[0], key) == pytest.approx(values_of(whole, key), rel=1e-3), key
    assert_close_checkpoints(one, two)
    assert load(two / "checkpoint_last.pt")["model"][VALUES].shape == (256, 32)
    assert_close_counts(one, two)
    assert load(two / "checkpoint_last.pt")["cfg"]["model"]["memory_shards"] == 1  # not of a model

    train(data_bin, resume(two, tmp_path / "from_two", 6), *OPTIONS, *CLIP, "--update-freq", "2")
    assert_close_checkpoints(one, tmp_path / "from_two")
    from_one = resume(one, tmp_path / "from_one", 3)
    train_on_two_workers(data_bin, from_one, *OPTIONS, *CLIP, "--memory-shards", "2")
    assert_close_checkpoints(one, from_one)


def test_two_groups_of_two_shards_train_as_a_whole_table(data_bin: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    whole = train(data_bin, one, *OPTIONS, *CLIP, "--update-freq", "4")
    for form in ("factors", "dense"):
        four = tmp_path / form
        options = [*OPTIONS, *CLIP, "--memory-shards", "2", "--memory-exchange", form]
        split = train_on_workers(4, data_bin, four, *options)
        assert f"{form} (as told)" in split[0].output
        for key in ("loss", "value_gnorm"):
            assert values_of(split[0], key) == pytest.approx(values_of(whole, key), rel=1e-3), key
        assert_close_checkpoints(one, four)
        assert_close_counts(one, four)


def assert_close_counts(one: Path, two: Path) -> None:
    """The last counts of usage agree, also on how far values have moved."""
    whole, split = (
        json.loads((folder / "memory_usage.jsonl").read_text().splitlines()[-1])["layers"][0]
        for folder in (one, two)
    )
    assert whole["tokens"] == split["tokens"]
    moved = whole["staleness"]["moved"]
    assert moved["p50"] > 0 and split["staleness"]["moved"] == pytest.approx(moved, rel=1e-3)


def test_one_worker_cannot_split_a_table(data_bin: Path, tmp_path: Path) -> None:
    """What else is refused is in tests/unit/test_roberta.py."""
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, *OPTIONS]
    done = run(*command, "--save-dir", tmp_path, "--memory-shards", "2")
    last = done.output.rstrip().splitlines()[-1]
    assert done.status != 0
    assert last == (
        "pkm_roberta: memory-shards is 2, must be a divisor of the number of workers, which is 1"
    )
