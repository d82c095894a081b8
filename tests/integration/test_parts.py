"""--memory-checkpoint parts: values and moments in a folder beside fairseq's file."""

import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from pkm_fairseq.models.checkpoints import read_checkpoint
from pkm_fairseq.models.merge import merge
from tests.faults import differing

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    USER_DIR,
    Run,
    load,
    run,
    run_alike,
    run_well,
    train_on_two_workers,
)
from .test_bad_input import last_line
from .test_sharding import resume

RESM = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-query-norm", "layer"]
RESM += ["--save-interval-updates", "3"]
PARTS = ["--memory-checkpoint", "parts"]
LAST = "checkpoint_last.pt"
KINDS = {
    "adam": [],
    "bfloat16": ["--memory-value-dtype", "bfloat16", "--memory-moment-dtype", "bfloat16"],
    "sgd": ["--memory-value-optimizer", "sgd"],
    "shared": ["--memory-layers", "0,1", "--memory-share-values"],
    "experts": ["--memory-values", "experts", "--memory-layers", "0,1"],
}
KINDS["experts"] += ["--memory-value-optimizer", "adam"]


def training(data: Path, out: Path, *options: Any) -> List[Any]:
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, *RESM]
    return [*command, "--save-dir", out, *options]


def train(data: Path, out: Path, *options: Any) -> Run:
    done = run_alike(*training(data, out, *options))
    assert done.status == 0, done.output[-3000:]
    return done


def folders(out: Path) -> List[str]:
    return sorted(x.name for x in out.iterdir() if x.is_dir())


def state_of(file: Path) -> Dict[str, Any]:
    """Model and optimizer of a checkpoint, merged if it is in parts."""
    if any(name.endswith(".parts") for name in load(file)["model"]):
        whole = file.with_name("merged")
        merge(file, whole)
        file = whole
    state = load(file)
    return {key: state[key] for key in ("model", "last_optimizer_state")}


def assert_equal(one: Path, other: Path) -> None:
    assert not differing(state_of(one / LAST), state_of(other / LAST))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_resume_to_the_bit_and_merge_to_the_whole_checkpoint(
    data_bin: Path, tmp_path: Path, kind: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data_bin, whole, *KINDS[kind], "--max-update", "6")
    train(data_bin, parts, *KINDS[kind], *PARTS, "--max-update", "3")
    assert not differing(state_of(parts / LAST), state_of(whole / "checkpoint_1_3.pt"))
    tables = [x for x in load(parts / LAST)["model"].values() if x.shape[0] == 256 and x.dim() == 2]
    assert not tables and len(folders(parts)) == 1
    resumed = train(data_bin, parts, *KINDS[kind], *PARTS, "--max-update", "6")
    assert len(resumed.logged("train_inner")) == 3
    assert_equal(parts, whole)
    train(data_bin, parts, *KINDS[kind], "--max-update", "9")  # and without parts again
    train(data_bin, whole, *KINDS[kind], "--max-update", "9")
    assert_equal(parts, whole)
