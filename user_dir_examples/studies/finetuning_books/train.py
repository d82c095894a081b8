#!/usr/bin/env python3
"""The runs of the study, one after the other; what is finished is skipped.

fairseq is imported once; each run is a child of this process, and ends as fairseq-train would.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Dict, List

import torch

# isort: off
from fairseq_cli import train as fairseq_train
import pkm_fairseq
# isort: on

SEEDS = (1, 2, 3)
COMMON = shlex.split("""--task pkm_masked_lm --criterion pkm_masked_lm --tokens-per-sample 32
    --max-positions 32 --arch resm_roberta_tiny --encoder-layers 3 --encoder-embed-dim 128
    --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 --dropout 0 --attention-dropout 0
    --memory-layers 1 --memory-n-keys 64 --memory-heads 4 --memory-knn 16 --memory-k-dim 64
    --optimizer pkm_adam --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --batch-size 16
    --lr-scheduler fixed --max-update 200 --num-workers 0 --cpu --no-epoch-checkpoints
    --log-format json --log-interval 20 --disable-validation --no-save-optimizer-state
    --memory-usage-interval 0 --required-batch-size-multiple 1""")


def arms(background: Path) -> Dict[str, List[str]]:
    """By arm, its options."""
    found: Dict[str, List[str]] = {}
    for lr in ("1e-4", "1e-3"):
        found[f"full_lr{lr}"] = ["--lr", lr]
        found[f"key_dropout_lr{lr}"] = ["--lr", lr, "--memory-key-dropout", "0.3"]
        found[f"freeze_lr{lr}"] = ["--lr", lr, "--memory-freeze", "all"]
    for lr in ("1e-3", "1e-2"):
        values = ["--lr", "0", "--memory-value-lr", lr]
        found[f"values_lr{lr}"] = [*values, "--memory-finetune", "values"]
        for top in ("16", "64", "256", "1024", "50%"):
            slots = ["--memory-finetune", "slots", "--memory-finetune-slots", top]
            slots += ["--memory-background", str(background)]
            found[f"slots_{top.replace('%', 'pct')}_lr{lr}"] = [*values, *slots]
    return found


def further_arms(out: Path) -> Dict[str, List[str]]:
    """By arm, the options of those that were added when the first table was there."""
    slots = ["--memory-finetune", "slots", "--memory-background", str(out / "background.pt")]
    by_count = ["--memory-finetune", "slots", "--memory-finetune-score", "count"]
    once = [*slots, "--memory-finetune-scope", "data"]
    once += ["--memory-finetune-counts", str(out / "new_counts.pt")]

    def of_values(lr: str, choice: List[str], top: str = "") -> List[str]:
        top_flags = ["--memory-finetune-slots", top] if top else []
        return ["--lr", "0", "--memory-value-lr", lr, *choice, *top_flags]

    return {
        "full_lr1e-5": ["--lr", "1e-5", "--memory-value-lr", "1e-5"],
        "full_lr3e-5": ["--lr", "3e-5", "--memory-value-lr", "3e-5"],
        "values_lr3e-3": of_values("3e-3", ["--memory-finetune", "values"]),
        "slots_1024_lr3e-2": of_values("3e-2", slots, "1024"),
        "slots_50pct_lr3e-2": of_values("3e-2", slots, "50%"),
        "slots_75pct_lr1e-2": of_values("1e-2", slots, "75%"),
        "slots_50pct_by_count_lr1e-2": of_values("1e-2", by_count, "50%"),
        "slots_1024_once_lr1e-2": of_values("1e-2", once, "1024"),
        "slots_50pct_once_lr1e-2": of_values("1e-2", once, "50%"),
    }


def train(folder: Path, options: List[str]) -> int:
    """Run fairseq-train in a child; its status."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        log = os.open(folder / "train.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["fairseq-train", *options, "--save-dir", str(folder)]
        sys.exit(fairseq_train.cli_main())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Train every arm with every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path, help="the checkpoint that all runs start from")
    parser.add_argument("data", type=Path, help="the new text")
    parser.add_argument(
        "out", type=Path, help="has background.pt, gets runs/seed<k>/<arm>/, or further/"
    )
    parser.add_argument("--further", action="store_true", help="the arms that were added later")
    args = parser.parse_args()
    torch.set_num_threads(1)
    package = str(Path(pkm_fairseq.__file__).parent)
    start = ["--user-dir", package, "--finetune-from-model", str(args.start)]
    for seed in SEEDS:
        chosen = further_arms(args.out) if args.further else arms(args.out / "background.pt")
        for arm, options in chosen.items():
            folder = args.out / ("further" if args.further else "runs") / f"seed{seed}" / arm
            if (folder / "finished").exists():
                continue
            (folder / "checkpoint_last.pt").unlink(missing_ok=True)
            command = [str(args.data), *start, *COMMON, *options, "--seed", str(seed)]
            if train(folder, command):
                raise SystemExit(f"{arm}, seed {seed} failed, see {folder / 'train.log'}")
            (folder / "finished").touch()
            print(f"seed {seed}: {arm}", flush=True)


if __name__ == "__main__":
    main()
