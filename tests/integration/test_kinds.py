"""Kinds of queries, weights, values and output in real trainings, all at once."""

import shutil
import sys
from pathlib import Path

from .runs import MEMORY, ROOT, load, run_well, train, train_on_two_workers
from .test_factored import EPS, assert_close_checkpoints

KINDS = ["--memory-query", "mlp", "--memory-values", "experts", "--memory-output", "swilu"]
KINDS += ["--memory-score-activation", "relu", "--memory-learn-score-scale"]
KINDS += ["--memory-value-lr-schedule", "follow", "--memory-values-init", "zero"]
OPTIONS = ["--arch", "resm_roberta_tiny", *MEMORY, *EPS, "--memory-query-norm", "layer", *KINDS]
OPTIONS += ["--dropout", "0", "--attention-dropout", "0", "--batch-size", "4"]
OPTIONS += ["--lr-scheduler", "polynomial_decay", "--total-num-update", "8", "--max-update", "6"]
OPTIONS += ["--save-interval-updates", "3", "--memory-usage-interval", "2"]
MEMORY_OF = "encoder.sentence_encoder.layers.1.memory."


def test_kinds_start_from_a_plain_model_train_on_shards_resume_and_are_exact(
    data_bin: Path, plain_run: Path, tmp_path: Path
) -> None:
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    init = ["--init-from", plain_run / "checkpoint_last.pt"]
    whole = train(data_bin, one, *OPTIONS, "--update-freq", "2", *init)
    assert "newly initialised layers.1.memory.*;" in whole.output
    assert whole.logged("valid")[-1]["valid_memory1_entropy"] > "0"
    train_on_two_workers(data_bin, two, *OPTIONS, "--memory-shards", "2", *init)
    assert_close_checkpoints(one, two)
    state = load(two / "checkpoint_last.pt")["model"]
    for table in ("down", "up"):  # put together again
        assert state[f"{MEMORY_OF}values.{table}.weight"].shape == (256, 32)
        assert state[f"{MEMORY_OF}values.{table}.weight"].any()
    assert state[f"{MEMORY_OF}score_scale"] != 1
    resumed.mkdir()
    shutil.copy(one / "checkpoint_1_3.pt", resumed / "checkpoint_last.pt")
    train(data_bin, resumed, *OPTIONS, "--update-freq", "2")
    assert_close_checkpoints(one, resumed)
    judged = run_well(
        *(sys.executable, ROOT / "scripts/validate_faiss.py", "--data", data_bin),
        *("--checkpoint", two / "checkpoint_last.pt", "--queries", "200"),
    )
    assert "EXACT" in judged.output and "NOT EXACT" not in judged.output
