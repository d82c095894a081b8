"""pkm_adam in half precision, through the real fairseq-train and fairseq-hydra-train."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

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
    train,
    train_on_two_workers,
    values_of,
)
from .test_factored import tensors

VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
EMBEDDING = "encoder.sentence_encoder.embed_tokens.weight"
OPTIONS = ["--arch", "resm_roberta_tiny", *MEMORY, "--clip-norm", "0.5"]
FP16 = {
    "--memory-efficient-fp16": ["--memory-efficient-fp16"],
    "--fp16": ["--fp16", "--fp16-no-flatten-grads"],
}
BF16 = {
    "bf16": ["common.bf16=true"],
    "memory_efficient_bf16": ["common.bf16=true", "common.memory_efficient_bf16=true"],
}


@pytest.fixture(scope="module")
def full_precision(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(data_bin, tmp_path_factory.mktemp("full"), *OPTIONS, "--max-update", "6")


def hydra_train(data_bin: Path, out: Path, *options: str) -> Run:
    """The example's tiny model, 6 updates, a checkpoint after 3."""
    return run_well(
        *(ROOT / "user_dir_examples/pretraining/run.sh", "resm_tiny", data_bin, out),
        *("optimization.max_update=6", "checkpoint.save_interval_updates=3", "common.cpu=true"),
        *("common.log_interval=1", "lr_scheduler.warmup_updates=1", "model.memory_n_keys=16"),
        *options,
        env={"PATH": f"{BIN}:{os.environ['PATH']}"},
    )


def assert_same_ends(whole: Path, rest: Path) -> None:
    """The parameters and the optimizer's state are the same, to the bit."""
    one, other = (load(folder / "checkpoint_last.pt") for folder in (whole, rest))
    for part in ("model", "last_optimizer_state"):
        ours, theirs = tensors(one[part]), tensors(other[part])
        assert ours.keys() == theirs.keys() and ours
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def assert_values_are_in_float32(folder: Path, half: torch.dtype) -> None:
    """fairseq writes float32 whatever it was; only values were more than half precision."""
    model: Any = load(folder / "checkpoint_last.pt")["model"]
    assert torch.equal(model[EMBEDDING].to(half).float(), model[EMBEDDING])
    assert not torch.equal(model[VALUES].to(half).float(), model[VALUES])
    early = load(folder / "checkpoint_1_3.pt")["model"][VALUES]
    assert not torch.equal(early, model[VALUES])


@pytest.mark.parametrize("form", FP16)
def test_fp16_trains_as_full_precision_and_resumes(
    data_bin: Path, tmp_path: Path, full_precision: Run, form: str
) -> None:
    options = [*OPTIONS, *FP16[form], "--max-update", "6"]
    whole = train(data_bin, tmp_path / "whole", *options, "--save-interval-updates", "3")
    for key in ("loss", "gnorm"):
        expected = pytest.approx(values_of(full_precision, key), rel=5e-3)
        assert values_of(whole, key) == expected, key
    assert {log["loss_scale"] for log in whole.logged("train_inner")} == {"128"}
    assert_values_are_in_float32(tmp_path / "whole", torch.float16)
    start = ["--restore-file", tmp_path / "whole/checkpoint_1_3.pt"]
    rest = train(data_bin, tmp_path / "rest", *options, *start)
    assert [log["num_updates"] for log in rest.logged("train_inner")] == ["4", "5", "6"]
    assert_same_ends(tmp_path / "whole", tmp_path / "rest")


@pytest.mark.parametrize("form", BF16)
def test_bf16_trains_and_resumes(data_bin: Path, tmp_path: Path, form: str) -> None:
    whole = hydra_train(data_bin, tmp_path / "whole", *BF16[form])
    history = values_of(whole, "loss")
    assert len(history) == 6
    assert history[-1] < history[0]
    assert_values_are_in_float32(tmp_path / "whole", torch.bfloat16)
    start = f"checkpoint.restore_file={tmp_path / 'whole/checkpoint_1_3.pt'}"
    hydra_train(data_bin, tmp_path / "rest", *BF16[form], start)
    assert_same_ends(tmp_path / "whole", tmp_path / "rest")


def test_two_workers_in_fp16_train_as_one_that_accumulates(data_bin: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, *FP16["--fp16"], "--dropout", "0", "--attention-dropout", "0"]
    options += ["--batch-size", "4", "--max-update", "4"]
    options += ["--memory-query-norm", "layer"]  # batch: statistics of both workers together
    one = train(data_bin, tmp_path / "one", *options, "--update-freq", "2")
    workers = train_on_two_workers(data_bin, tmp_path / "two", *options)
    for key in ("loss", "gnorm"):
        expected = pytest.approx(values_of(one, key), rel=5e-3)
        assert values_of(workers[0], key) == expected, key
    tables = [
        load(tmp_path / run / "checkpoint_last.pt")["model"][VALUES] for run in ("one", "two")
    ]
    difference = (tables[0] - tables[1]).abs()
    # four updates of at most 1e-3; Adam makes full ones of gradients that are rounding alone
    assert difference.mean() < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="fairseq skips an overflow with CUDA")
def test_an_overflow_on_the_cpu_ends_in_one_line(data_bin: Path, tmp_path: Path) -> None:
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", tmp_path]
    done = run(*command, *OPTIONS, "--memory-efficient-fp16", "--fp16-init-scale", 2**30)
    assert done.status != 0
    assert "Traceback" not in done.output
    assert "use a smaller --fp16-init-scale" in done.output.splitlines()[-1]
