"""On CUDA: every way that fairseq has to train in mixed precision, with pkm_adam."""

import os
from pathlib import Path

import pytest
import torch

from ..integration.conftest import data_bin  # noqa: F401  (a fixture)
from ..integration.runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    Run,
    load,
    run_well,
    values_of,
)
from ..integration.test_factored import tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
FLAGS = {
    "--fp16": ["--fp16"],
    "--fp16-no-flatten-grads": ["--fp16", "--fp16-no-flatten-grads"],
    "--memory-efficient-fp16": ["--memory-efficient-fp16"],
    "--amp": ["--amp"],
}
BF16 = {
    "bf16": ["common.bf16=true"],
    "memory_efficient_bf16": ["common.bf16=true", "common.memory_efficient_bf16=true"],
}


def train(data: Path, save_dir: Path, *options: object) -> Run:
    """Run fairseq-train on the GPU, for 6 updates."""
    base = [option for option in TRAIN if option != "--cpu"]
    command = [BIN / "fairseq-train", data, *base, *MASKED_LM, *MODEL, *MEMORY]
    command += ["--arch", "resm_roberta_tiny", "--clip-norm", "0.5", "--max-update", "6"]
    return run_well(*command, "--save-dir", save_dir, *options)


@pytest.fixture(scope="module")
def full_precision(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:  # noqa: F811
    return train(data_bin, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("form", FLAGS)
def test_it_trains_as_full_precision_and_resumes(
    data_bin: Path,  # noqa: F811
    tmp_path: Path,
    full_precision: Run,
    form: str,
) -> None:
    options = [*FLAGS[form], "--save-interval-updates", "3"]
    whole = train(data_bin, tmp_path / "whole", *options)
    assert "memory kernels: triton on cuda" in whole.output
    for key in ("loss", "gnorm"):
        expected = pytest.approx(values_of(full_precision, key), rel=1e-2)
        assert values_of(whole, key) == expected, key
    start = ["--restore-file", tmp_path / "whole/checkpoint_1_3.pt"]
    rest = train(data_bin, tmp_path / "rest", *FLAGS[form], *start)
    assert values_of(rest, "loss") == pytest.approx(values_of(whole, "loss")[3:], rel=1e-3)
    ends = [load(tmp_path / run / "checkpoint_last.pt") for run in ("whole", "rest")]
    states = [tensors(end["last_optimizer_state"]) for end in ends]
    assert states[0].keys() == states[1].keys()
    assert all(state.dtype == torch.float32 for state in states[0].values())


@pytest.mark.parametrize("form", FLAGS)
def test_an_overflow_is_skipped(data_bin: Path, tmp_path: Path, form: str) -> None:  # noqa: F811
    done = train(data_bin, tmp_path, *FLAGS[form], "--fp16-init-scale", str(2**24))
    assert "overflow detected" in done.output
    logs = done.logged("train_inner")
    assert float(logs[-1]["loss_scale"]) < 2**24
    assert logs[-1]["num_updates"] == "6"
    assert load(tmp_path / "checkpoint_last.pt")["model"][VALUES].isfinite().all()


@pytest.mark.parametrize("form", BF16)
def test_bf16_trains(data_bin: Path, tmp_path: Path, form: str) -> None:  # noqa: F811
    done = run_well(
        *(ROOT / "user_dir_examples/pretraining/run.sh", "resm_tiny", data_bin, tmp_path / "out"),
        *("optimization.max_update=6", "common.log_interval=1", "lr_scheduler.warmup_updates=1"),
        *("model.memory_n_keys=16", *BF16[form]),
        env={"PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    history = values_of(done, "loss")
    assert len(history) == 6
    assert history[-1] < history[0]
    values = load(tmp_path / "out/checkpoint_last.pt")["model"][VALUES]
    assert not torch.equal(values.bfloat16().float(), values)
