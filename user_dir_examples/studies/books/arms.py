"""The arms of the study, their options, and all runs in their order."""

import shlex
from dataclasses import dataclass
from typing import List, Optional, Tuple

from pkm_fairseq.experiments.runs.study import schedule

ARMS = ("plain", "pkm", "resm", "pkm_init", "resm_init")
MEMORY_ARMS = ARMS[1:]
LONGER = "plain_longer"  # with 1.5 times the updates, as a memory costs time
LR, VALUE_LR, HIGH_VALUE_LR = 1e-3, 1e-3, 4e-3
MODEL = shlex.split("""--task pkm_masked_lm --tokens-per-sample 32 --max-positions 128
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512
    --encoder-attention-heads 4 --dropout 0 --attention-dropout 0""")
TRAINING = shlex.split("""--batch-size 64 --adam-betas (0.9,0.98) --adam-eps 1e-6
    --weight-decay 0.01 --clip-norm 1.0 --lr-scheduler polynomial_decay --num-workers 0 --cpu
    --no-epoch-checkpoints --log-format json --log-interval 50 --no-save-optimizer-state
    --disable-validation --required-batch-size-multiple 1""")
PLAIN = shlex.split("--arch roberta --criterion masked_lm --optimizer adam")
MEMORY = shlex.split("""--criterion pkm_masked_lm --optimizer pkm_adam --memory-layers 1
    --memory-heads 4 --memory-k-dim 64""")


@dataclass(frozen=True)
class Size:
    """The sizes of the study."""

    updates: int
    n_keys: Tuple[int, ...]
    knn: int
    seeds: Tuple[int, ...]
    vocabulary: int


SIZES = {
    "full": Size(12_500, (64, 128), 32, (1, 2, 3), 1000),
    "toy": Size(20, (16,), 8, (1,), 300),  # only a trial run
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        updates: total; for an arm with INIT, half of them are its start's.
        n_keys: 0 without a memory.
        value_schedule: ``follow`` if the values' rate falls like the others', else ``constant``.
        stops_at_half: ends after half of its updates, where arms with INIT start.
    """

    arm: str
    seed: int
    updates: int
    n_keys: int = 0
    value_lr: float = 0.0
    value_schedule: str = "constant"
    stops_at_half: bool = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        memory = f"_{self.n_keys}keys_values{self.value_lr:g}" if self.n_keys else ""
        memory += "_follow" if self.value_schedule == "follow" else ""
        half = "_half" if self.stops_at_half else ""
        return f"{self.arm}{memory}{half}_seed{self.seed}"

    @property
    def start(self) -> Optional["Run"]:
        """The plain run that an arm with INIT starts from, at half of its updates; else None."""
        if not self.arm.endswith("_init"):
            return None
        return Run("plain", self.seed, self.updates)

    @property
    def own_updates(self) -> int:
        """Updates of this training, without those of its start."""
        return self.updates // 2 if self.start or self.stops_at_half else self.updates

    def flags(self, size: Size) -> List[str]:
        """Options of fairseq-train, except paths."""
        warm_up = self.updates * 400 // 12_500
        rates = schedule(self.updates, LR, self.start is not None, warm_up)
        rates["--max-update"] = str(self.own_updates)
        flags = [*MODEL, *TRAINING, "--seed", str(self.seed)]
        flags += [part for pair in rates.items() for part in pair]
        if not self.n_keys:
            half = str(self.updates // 2)
            return [*flags, *PLAIN, "--save-interval-updates", half]
        arch = "pkm_roberta_tiny" if self.arm.startswith("pkm") else "resm_roberta_tiny"
        flags += ["--arch", arch, *MEMORY, "--memory-n-keys", str(self.n_keys)]
        flags += ["--memory-knn", str(size.knn), "--memory-value-lr", str(self.value_lr)]
        flags += ["--memory-value-lr-schedule", self.value_schedule]
        return [*flags, "--memory-usage-interval", str(self.updates // 20)]


def run_of(
    size: Size,
    arm: str,
    seed: int,
    n_keys: int,
    value_lr: float = VALUE_LR,
    value_schedule: str = "constant",
) -> Run:
    """The run of an arm; a plain one has neither slots nor a rate of values."""
    if arm == LONGER:
        return Run(arm, seed, size.updates * 3 // 2)
    if arm == "plain":
        return Run(arm, seed, size.updates)
    return Run(arm, seed, size.updates, n_keys, value_lr, value_schedule)


def runs_in_order(size: Size) -> List[Run]:
    """All runs of the study."""
    few, *more = size.n_keys
    runs = [run_of(size, arm, seed, few) for seed in size.seeds for arm in ARMS]
    runs += [run_of(size, LONGER, seed, few) for seed in size.seeds]
    runs += [run_of(size, "resm_init", seed, few, HIGH_VALUE_LR) for seed in size.seeds]
    runs += [run_of(size, "resm", seed, few, value_schedule="follow") for seed in size.seeds]
    for n_keys in more:
        runs += [run_of(size, arm, seed, n_keys) for seed in size.seeds for arm in MEMORY_ARMS]
    return runs
