"""The options of fairseq-train for models that learn people."""

import math
import shlex
from typing import List

from ..runs.study import schedule

BATCH_SIZE = 512  # people
COMMON = shlex.split(f"""--task pkm_masked_lm --sample-break-mode eos --tokens-per-sample 8
    --max-positions 8 --batch-size {BATCH_SIZE} --mask-prob 0.3 --encoder-layers 2
    --encoder-attention-heads 4 --dropout 0 --attention-dropout 0 --adam-betas (0.9,0.98)
    --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --lr-scheduler polynomial_decay
    --num-workers 0 --cpu --log-format json --log-interval 100 --validate-interval 1000000
    --no-save-optimizer-state""")
WIDTH, FFN = 64, 128  # a backbone too small for all facts
PLAIN = shlex.split("--arch roberta --criterion masked_lm --optimizer adam")
HEADS, KNN, K_DIM = 4, 32, 64
MEMORY = shlex.split(f"""--criterion pkm_masked_lm --optimizer pkm_adam --memory-layers 1
    --memory-heads {HEADS} --memory-k-dim {K_DIM}""")


def epoch_of(people: int, batch_size: int = BATCH_SIZE) -> int:
    """Updates per epoch."""
    return math.ceil(people / batch_size)


def training_flags(
    updates: int,
    lr: float,
    seed: int,
    save_interval: int,
    starts_at_half: bool = False,
    width: int = WIDTH,
    ffn: int = FFN,
) -> List[str]:
    """The options of a training from scratch or with INIT; ``PLAIN`` or ``memory_flags`` follow.

    Args:
        updates: of the whole schedule.
        lr: the highest rate.
        seed: of fairseq.
        save_interval: epochs between checkpoints.
        starts_at_half: whether it starts from a model that was trained for half of the updates.
        width: of the encoder.
        ffn: width of its FFN.
    """
    sizes = ["--encoder-embed-dim", str(width), "--encoder-ffn-embed-dim", str(ffn)]
    rates = schedule(updates, lr, starts_at_half)
    flags = [*COMMON, *sizes, *(part for pair in rates.items() for part in pair)]
    return [*flags, "--seed", str(seed), "--save-interval", str(save_interval)]


def memory_flags(arch: str, n_keys: int, value_lr: float) -> List[str]:
    """The options of a model with memory, in place of ``PLAIN``."""
    sizes = ["--memory-n-keys", str(n_keys), "--memory-knn", str(min(KNN, n_keys))]
    return ["--arch", arch, *MEMORY, *sizes, "--memory-value-lr", str(value_lr)]
