"""The same 30 updates by fairseq-train and by transformers' Trainer have the same losses."""

import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

pytest.importorskip(
    "transformers", reason="transformers is not installed (requirements/huggingface.txt)"
)

import transformers

from pkm_fairseq.huggingface import MemoryTrainer, roberta

from .runs import MASKED_LM, MEMORY, MODEL, ROOT, TRAIN, run_well

UPDATES = 30


@pytest.fixture(scope="module")
def kept(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """The start, the batches and the losses of a ResM in fairseq."""
    folder = tmp_path_factory.mktemp("recorded")
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--dropout", "0", "--attention-dropout", "0"]
    options += ["--optimizer", "pkm_adam", "--adam-betas", "(0.9, 0.999)", "--adam-eps", "1e-16"]
    options += ["--lr", "1e-3", "--lr-scheduler", "fixed", "--clip-norm", "0", "--no-save"]
    options += ["--memory-value-lr", "1e-2", "--max-update", UPDATES, "--disable-validation"]
    script = Path(__file__).with_name("recorded_training.py")
    command = [sys.executable, script, folder / "kept.pt", data_bin, *TRAIN, *MASKED_LM, *MODEL]
    run_well(*command, *options, cwd=folder, env={"PYTHONPATH": str(ROOT)})
    found: Dict[str, Any] = torch.load(folder / "kept.pt", weights_only=True)
    return found


def test_thirty_updates_have_the_same_losses(kept: Dict[str, Any], tmp_path: Path) -> None:
    state = {name: x for name, x in kept["state"].items() if not name.endswith(".version")}
    model = roberta.to_transformers(roberta.Fairseq(kept["options"], state))
    model.roberta.embeddings.token_type_embeddings.requires_grad_(False)  # fairseq has none
    data = [
        {
            "input_ids": ids,
            "attention_mask": ids.ne(1).long(),
            "labels": target.masked_fill(target == 1, -100),
        }
        for ids, target in kept["batches"]
    ]
    assert len(data) == len(kept["losses"]) == UPDATES
    settings = transformers.TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=UPDATES,
        per_device_train_batch_size=1,  # an example is a batch
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        adam_epsilon=1e-16,  # fairseq's Adam and torch's add it in other places
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
    )
    trainer = MemoryTrainer(
        model, settings, data_collator=lambda given: given[0], train_dataset=data, value_lr=1e-2
    )
    trainer.train()
    ours = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])
    theirs = torch.tensor(kept["losses"])
    assert float(theirs[0] - theirs[-1]) > 0.1  # something was learnt
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4), (ours - theirs).abs().max()
