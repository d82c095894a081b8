"""The measured settings of the demo, and the flags of its arms."""

from dataclasses import asdict, dataclass, field
from typing import Dict, List

ARMS = ("plain", "resm_init", "pkm")
TITLES = {"plain": "plain RoBERTa", "resm_init": "ResM + INIT", "pkm": "PKM"}


@dataclass(frozen=True)
class Facts:
    """Settings of the part on facts; all our choice, found by measurement.

    Attributes:
        people: to learn.
        updates: of plain; half of them must be whole epochs. ResM + INIT starts after that half.
        n_keys: the memory has ``n_keys ** 2`` slots.
        lr: learning rate of everything except values.
        value_lr: learning rate of values.
    """

    people: int
    updates: int
    n_keys: int
    lr: float = 5e-3
    value_lr: float = 1e-2


@dataclass(frozen=True)
class Preset:
    """Settings of one demo; all our choice, found by measurement on 2 CPU cores.

    Attributes:
        half: N; every arm is trained for 2N updates; for resm_init, N of them are its start's.
        interval: updates between two validations; each validation also saves a checkpoint.
        model: sizes that all arms share, as fairseq flags.
        memory: settings of the memories, as flags.
        facts: the part on facts, which trains its own models.
    """

    half: int
    interval: int
    facts: Facts
    vocabulary: int = 1000
    tokens_per_sample: int = 32
    batch_size: int = 64
    lr: float = 3e-3
    warmup: int = 200
    memory_value_lr: float = 1e-3
    seed: int = 1
    model: Dict[str, int] = field(
        default_factory=lambda: {
            "encoder-layers": 3,
            "encoder-embed-dim": 128,
            "encoder-ffn-embed-dim": 256,
            "encoder-attention-heads": 4,
        }
    )
    memory: Dict[str, int] = field(
        default_factory=lambda: {
            "memory-layers": 1,
            "memory-n-keys": 64,
            "memory-heads": 4,
            "memory-knn": 16,
            "memory-k-dim": 64,
        }
    )

    def settings(self) -> Dict[str, object]:
        """All settings, as plain data."""
        return asdict(self)


PRESETS = {
    "default": Preset(half=2000, interval=250, facts=Facts(people=2000, updates=1000, n_keys=128)),
    "quick": Preset(
        half=60,
        interval=20,
        facts=Facts(people=100, updates=20, n_keys=32),
        vocabulary=300,
        batch_size=32,
        warmup=10,
        model={
            "encoder-layers": 2,
            "encoder-embed-dim": 64,
            "encoder-ffn-embed-dim": 128,
            "encoder-attention-heads": 2,
        },
        memory={
            "memory-layers": 1,
            "memory-n-keys": 32,
            "memory-heads": 4,
            "memory-knn": 8,
            "memory-k-dim": 32,
        },
    ),
}


def arm_flags(arm: str, preset: Preset) -> List[str]:
    """The flags of fairseq-train that do not depend on paths or on the arm's progress.

    The learning rate of resm_init starts at plain's rate after N updates, and falls linearly to 0
    over its own N updates. This is the second half of plain's schedule.
    """
    start = arm == "resm_init"
    total = preset.half if start else 2 * preset.half
    lr = preset.lr * preset.half / (2 * preset.half - preset.warmup) if start else preset.lr
    options = {
        "task": "pkm_masked_lm",
        "tokens-per-sample": preset.tokens_per_sample,
        "max-positions": preset.tokens_per_sample,
        "batch-size": preset.batch_size,
        "required-batch-size-multiple": 1,  # else fairseq leaves out the last validation examples
        "seed": preset.seed,
        **preset.model,
        "dropout": 0,
        "attention-dropout": 0,
        "adam-betas": "(0.9, 0.98)",
        "adam-eps": 1e-6,
        "weight-decay": 0.01,
        "clip-norm": 1.0,
        "lr": lr,
        "lr-scheduler": "polynomial_decay",
        "warmup-updates": 0 if start else preset.warmup,
        "total-num-update": total,
        "save-interval-updates": preset.interval,
        "keep-interval-updates": 1,
        "validate-interval-updates": preset.interval,
        "save-interval": 1_000_000,  # epochs: only updates count
        "validate-interval": 1_000_000,
        "num-workers": 0,
        "log-format": "json",
        "log-interval": max(1, preset.interval // 10),
    }
    if arm == "plain":
        options |= {"arch": "roberta", "criterion": "masked_lm", "optimizer": "adam"}
    else:
        arch = "pkm_roberta_tiny" if arm == "pkm" else "resm_roberta_tiny"
        options |= {"arch": arch, "criterion": "pkm_masked_lm", "optimizer": "pkm_adam"}
        options |= {"memory-value-lr": preset.memory_value_lr, **preset.memory}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*flags, "--cpu", "--no-epoch-checkpoints"]
