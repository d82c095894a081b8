#!/usr/bin/env python3
"""Finetune an encoder of transformers on a task of GLUE, with the memories that it has or without.

The task's folder is that of GLUE's download, with train.tsv and dev.tsv. Memories come from the
model, as masked_lm.py and scripts/convert_checkpoint.py write it, or from --memory-layers.
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pkm_fairseq.experiments.glue.metrics import score
from pkm_fairseq.experiments.glue.read import Rows, read_task
from pkm_fairseq.experiments.glue.tasks import TASKS
from pkm_fairseq.huggingface import MemoryModel, MemoryTrainer, add_memories
from pkm_fairseq.memory import MemoryConfig

CLASSES = [name for name, task in TASKS.items() if task.labels]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="or a name on the hub")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of all tasks")
    parser.add_argument("--task", required=True, choices=CLASSES)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--memory-layers", type=int, nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--value-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="default: the CPU")
    return parser.parse_args()


def encode(rows: Rows, tokenizer: Any) -> List[Dict[str, Any]]:
    """The examples of a split."""
    texts = [list(column) for column in zip(*rows.texts, strict=True)]
    encoded = tokenizer(*texts, truncation=True)
    parts = ({name: x[i] for name, x in encoded.items()} for i in range(len(rows.texts)))
    return [{**part, "label": y} for part, y in zip(parts, rows.targets, strict=True)]


def main() -> None:
    """Load, add memories, finetune, evaluate."""
    args = parse()
    task = TASKS[args.task]
    splits, notes = read_task(args.data / args.task, task)
    print("\n".join(notes))
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=len(task.labels)
    )
    if args.memory_layers:
        add_memories(model, MemoryConfig(values_init="zero"), args.memory_layers)

    def metrics(found: Any) -> Dict[str, float]:
        predicted = np.argmax(found.predictions, axis=-1)
        return {name: score(name, predicted, found.label_ids) for name in task.metrics}

    settings = TrainingArguments(
        str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        eval_strategy="epoch",
        save_strategy="no",
        seed=args.seed,
        optim="adamw_torch",
        use_cpu=not args.gpu,
        report_to=[],
        disable_tqdm=True,
    )
    has_memory = isinstance(model, MemoryModel)
    kind: Any = MemoryTrainer if has_memory else Trainer
    trainer = kind(
        model,
        settings,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=encode(splits["train"], tokenizer),
        eval_dataset=encode(splits["valid"], tokenizer),
        compute_metrics=metrics,
        **({"value_lr": args.value_lr} if has_memory else {}),
    )
    trainer.train()
    last = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    print(f"{args.task}: " + ", ".join(f"{x} {last[f'eval_{x}']:.2f} %" for x in task.metrics))


if __name__ == "__main__":
    main()
