#!/usr/bin/env python3
"""Continue the masked language modelling of an encoder of transformers, with memories or without.

Lines of text are examples. With --memory-layers, memories are added to those blocks (INIT); their
values start at zero, so that the model starts as it is. Given again, it goes on where it was.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, List

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from pkm_fairseq.huggingface import MemoryTrainer, MemoryUsageCallback, add_memories
from pkm_fairseq.memory import MemoryConfig

MASKINGS = 4  # of each line that is evaluated, always the same
COMPUTED = 64  # lines at once


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="or a name on the hub")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--valid", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--memory-layers", type=int, nargs="*", default=[], metavar="LAYER")
    parser.add_argument("--memory-mode", default="residual", choices=("residual", "replace"))
    parser.add_argument("--n-keys", type=int, default=32, help="slots are its square")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--value-lr", type=float, default=1e-3)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="default: the CPU")
    return parser.parse_args()


def read(file: Path, tokenizer: Any) -> List[Dict[str, Any]]:
    """The examples of a file, one a line, cut at the longest that the model takes."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise SystemExit(f"masked_lm.py: {file} has no line")
    encoded = tokenizer(lines, truncation=True, return_special_tokens_mask=True)
    return [
        {"input_ids": ids, "special_tokens_mask": special}
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


@torch.no_grad()
def evaluate(model: Any, examples: List[Dict[str, Any]], tokenizer: Any) -> Dict[str, float]:
    """Masked accuracy and perplexity, over the same masks for every model."""
    collate = DataCollatorForLanguageModeling(tokenizer, seed=7)
    model.eval()
    right = total = 0
    loss = 0.0
    for _ in range(MASKINGS):
        for first in range(0, len(examples), COMPUTED):
            batch = collate(examples[first : first + COMPUTED]).to(model.device)
            labels = batch.pop("labels")
            masked = labels != -100
            logits = model(**batch).logits[masked]  # (masked, symbols)
            right += int((logits.argmax(-1) == labels[masked]).sum())
            loss += float(
                torch.nn.functional.cross_entropy(logits, labels[masked], reduction="sum")
            )
            total += int(masked.sum())
    return {"accuracy": right / total, "perplexity": math.exp(loss / total), "masked": total}


def main() -> None:
    """Load, add memories, train, evaluate."""
    args = parse()
    result = args.out / "result.json"
    if result.exists():
        print(f"{result} is there: {result.read_text().strip()}")
        return
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(args.model)
    if args.memory_layers:
        memory = MemoryConfig(
            n_keys=args.n_keys, knn=min(16, args.n_keys), k_dim=64, values_init="zero"
        )
        add_memories(model, memory, args.memory_layers, args.memory_mode)
    train, valid = (read(file, tokenizer) for file in (args.train, args.valid))
    found = {"start": evaluate(model, valid, tokenizer)}
    set_seed(args.seed)  # the same batches for every model
    settings = TrainingArguments(
        str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=args.steps // 20,
        logging_steps=max(1, args.steps // 8),
        save_steps=args.save_steps,
        save_total_limit=1,
        seed=args.seed,
        optim="adamw_torch",
        use_cpu=not args.gpu,
        report_to=[],
        disable_tqdm=True,
    )
    kind: Any = Trainer
    more: Dict[str, Any] = {}
    if args.memory_layers:
        usage = MemoryUsageCallback(interval=max(1, args.steps // 4))
        kind, more = MemoryTrainer, {"value_lr": args.value_lr, "callbacks": [usage]}
    collate = DataCollatorForLanguageModeling(tokenizer)
    trainer = kind(model, settings, data_collator=collate, train_dataset=train, **more)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.out) if args.out.exists() else None
    )
    found["end"] = evaluate(model, valid, tokenizer)
    trainer.save_model(str(args.out / "model"))
    tokenizer.save_pretrained(args.out / "model")
    part = result.with_name("result.json.part")
    part.write_text(json.dumps(found) + "\n")
    part.rename(result)
    print(f"accuracy of masked symbols {found['start']['accuracy']:.4f} at the start, "
          f"{found['end']['accuracy']:.4f} after {args.steps} updates")  # fmt: skip


if __name__ == "__main__":
    main()
