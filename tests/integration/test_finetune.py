"""--memory-finetune by the real commands: what moves, and how it resumes."""

import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from pkm_fairseq.memory.observe.slot_counts import CountsFile, SlotCounts, save_counts

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    TRAIN,
    USER_DIR,
    Run,
    load,
    run_alike,
    values_of,
)

VALUES = "encoder.sentence_encoder.layers.1.memory.values.weight"
N_SLOTS, SLOTS = 256, 20
COMMON = ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-usage-interval", "0"]
COMMON += ["--dropout", "0", "--attention-dropout", "0", "--batch-size", "4"]


@pytest.fixture(scope="module")
def chosen(resm_run: "Tuple[Path, Run]", tmp_path_factory: pytest.TempPathFactory) -> List[str]:
    """Options of a finetuning of some slots of a trained model."""
    counts, generator = SlotCounts(N_SLOTS), torch.Generator().manual_seed(0)
    for _ in range(9):
        counts.update(torch.randint(N_SLOTS, (80,), generator=generator))
        counts.end_batch()
    background = tmp_path_factory.mktemp("finetune") / "background.pt"
    save_counts(background, CountsFile({(1,): counts}, {}))
    start = ["--finetune-from-model", str(resm_run[0] / "checkpoint_last.pt")]
    return [*start, *_slots(background)]


def _slots(background: Path) -> List[str]:
    options = ["--memory-finetune", "slots", "--memory-finetune-slots", str(SLOTS)]
    return [*options, "--memory-background", str(background)]


def finetune(data: Path, out: Path, *options: Any) -> Run:
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, *COMMON]
    done = run_alike(*command, "--save-dir", out, *options)
    assert done.status == 0, done.output[-4000:]
    return done


@pytest.fixture(scope="module")
def finetuned(
    data_bin: Path, chosen: List[str], tmp_path_factory: pytest.TempPathFactory
) -> "Tuple[Path, Run]":
    """The folder and log of a finetuning of two micro-batches an update."""
    out = tmp_path_factory.mktemp("finetuned")
    options = ["--update-freq", "2", "--max-update", "6", "--save-interval-updates", "3"]
    return out, finetune(data_bin, out, *chosen, *options)


def model_of(folder: Path) -> Dict[str, torch.Tensor]:
    return dict(load(folder / "checkpoint_last.pt")["model"])


def moved_rows(before: torch.Tensor, after: torch.Tensor) -> int:
    return int((before != after).any(dim=1).sum())


def assert_only_values_moved(start: Path, out: Path, most: int) -> None:
    before, after = model_of(start), model_of(out)
    assert set(before) == set(after)
    for name, tensor in before.items():
        if not re.search(r"\.reads\.last_|values\.weight$", name):
            assert torch.equal(after[name], tensor.to(after[name])), name
    assert 0 < moved_rows(before[VALUES], after[VALUES]) <= most


def test_only_chosen_rows_of_values_move(
    resm_run: "Tuple[Path, Run]", finetuned: "Tuple[Path, Run]"
) -> None:
    out, done = finetuned
    assert_only_values_moved(resm_run[0], out, 6 * SLOTS)
    assert values_of(done, "value_rows_chosen") == 6 * [SLOTS]
    assert all(SLOTS < read <= N_SLOTS for read in values_of(done, "value_rows_read"))
    assert "--memory-finetune slots: 8,192 parameters of values are trained" in done.output
    # nobody who loads the checkpoint is asked for counts, or finds anything frozen
    options = load(out / "checkpoint_last.pt")["cfg"]["model"]
    assert options["memory_finetune"] is None and options["memory_background"] is None


def test_a_finetuning_resumes_to_the_bit(
    data_bin: Path, chosen: List[str], finetuned: "Tuple[Path, Run]", tmp_path: Path
) -> None:
    (tmp_path / "checkpoint_last.pt").write_bytes((finetuned[0] / "checkpoint_1_3.pt").read_bytes())
    finetune(data_bin, tmp_path, *chosen, "--update-freq", "2", "--max-update", "6")
    whole, resumed = (load(x / "checkpoint_last.pt") for x in (finetuned[0], tmp_path))
    assert torch.equal(whole["model"][VALUES], resumed["model"][VALUES])
    for place, state in whole["last_optimizer_state"]["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs = resumed["last_optimizer_state"]["state"][place][moment]
            assert torch.equal(state[moment], theirs)


@pytest.mark.parametrize("precision", ["bf16", "memory_efficient_fp16"])
def test_hydra_and_half_precision(
    data_bin: Path,
    chosen: List[str],
    resm_run: "Tuple[Path, Run]",
    finetuned: "Tuple[Path, Run]",
    tmp_path: Path,
    precision: str,
) -> None:
    """Values are in full precision in all of them."""
    hydra = hydra_command(data_bin, tmp_path, chosen)
    common = ["common.bf16=true"] if precision == "bf16" else ["common.fp16=true"]
    common += ["common.memory_efficient_fp16=true"] if precision != "bf16" else []
    done = run_alike(*hydra, *common, cwd=tmp_path)
    assert done.status == 0, done.output[-4000:]
    assert [int(log["value_rows_chosen"]) for log in done.logged("train_inner")] == 3 * [SLOTS]
    before, after = model_of(resm_run[0])[VALUES], model_of(tmp_path / "out")[VALUES]
    assert after.dtype == torch.float32
    assert 0 < moved_rows(before, after) <= 3 * SLOTS
    one = load(finetuned[0] / "checkpoint_1_3.pt")["model"][VALUES]
    assert float((after - one).abs().max()) < 5e-3  # of rates of 1e-3; it sees the same batches


def hydra_command(data: Path, folder: Path, chosen: List[str]) -> List[Any]:
    """fairseq-hydra-train with the settings of the finetuning, for three updates."""
    text = f"""# @package _group_
common: {{user_dir: {USER_DIR}, cpu: true, log_format: json, log_interval: 1, seed: 7}}
task: {{_name: pkm_masked_lm, data: {data}, tokens_per_sample: 32}}
criterion: {{_name: pkm_masked_lm, memory_usage_interval: 0}}
model:
  _name: resm_roberta_tiny
  encoder_layers: 2
  encoder_embed_dim: 32
  encoder_ffn_embed_dim: 64
  encoder_attention_heads: 2
  dropout: 0.0
  attention_dropout: 0.0
  memory_layers: [1]
  memory_n_keys: 16
  memory_heads: 2
  memory_knn: 4
  memory_k_dim: 16
  memory_finetune: slots
  memory_finetune_slots: {SLOTS}
  memory_background: {chosen[-1]}
optimizer: {{_name: pkm_adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{lr: [0.001], max_update: 3, update_freq: [2]}}
dataset: {{batch_size: 4, num_workers: 0, disable_validation: true}}
checkpoint:
  save_dir: {folder / "out"}
  finetune_from_model: {chosen[1]}
  no_epoch_checkpoints: true
"""
    (folder / "finetune.yaml").write_text(text)
    return [BIN / "fairseq-hydra-train", "--config-dir", folder, "--config-name", "finetune"]
