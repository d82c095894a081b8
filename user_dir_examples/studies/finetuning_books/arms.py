"""The arms of the study, their options, and all runs in their order."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from pkm_fairseq.experiments.demo.presets import PRESETS, Preset

HERE = Path(__file__).resolve().parent
LOW_RANK = HERE.parent / "new_people" / "low_rank"  # models with low-rank additions
COMMON = shlex.split("""--task pkm_masked_lm --dropout 0 --attention-dropout 0 --adam-eps 1e-6
    --weight-decay 0.01 --clip-norm 1.0 --batch-size 16 --lr-scheduler fixed --num-workers 0 --cpu
    --no-epoch-checkpoints --log-format json --disable-validation
    --no-save-optimizer-state --required-batch-size-multiple 1""")
PLAIN = shlex.split("--arch roberta --criterion masked_lm --optimizer adam")
MEMORY = shlex.split("""--arch resm_roberta_tiny --criterion pkm_masked_lm --optimizer pkm_adam
    --memory-usage-interval 0""")

Rates = Sequence[Tuple[float, float]]  # (--lr, --memory-value-lr)
BOTH: Rates = ((1e-4, 1e-3), (1e-3, 1e-3))
FROZEN: Rates = ((1e-4, 0.0), (1e-3, 0.0))
VALUES: Rates = ((0.0, 1e-3), (0.0, 1e-2))
ADDITIONS: Rates = ((1e-4, 0.0), (3e-4, 0.0), (1e-3, 0.0), (3e-3, 0.0))

# by part of the study, the arms and the rates of each
PARTS: Dict[str, Dict[str, Rates]] = {
    "first": {
        **{"full": BOTH, "key dropout": BOTH, "freeze": FROZEN, "values": VALUES},
        **{f"slots {top}": VALUES for top in ("16", "64", "256", "1024", "50%")},
    },
    "further": {
        "full": ((1e-5, 1e-5), (3e-5, 3e-5)),
        "values": ((0.0, 3e-3),),
        "slots 1024": ((0.0, 3e-2),),
        "slots 50%": ((0.0, 3e-2),),
        "slots 75%": ((0.0, 1e-2),),
        "slots 50% by count": ((0.0, 1e-2),),
        "slots 1024 once": ((0.0, 1e-2),),
        "slots 50% once": ((0.0, 1e-2),),
    },
    "dense": {
        "low rank": ADDITIONS,
        "plain full": ((1e-5, 0.0), (3e-5, 0.0), (1e-4, 0.0), (1e-3, 0.0)),
        "plain low rank": ADDITIONS,
    },
}


@dataclass(frozen=True)
class Size:
    """The sizes of the study.

    Attributes:
        preset: of the demo whose models are finetuned.
        rates: of an arm, at most.
        arms: those that are run.
    """

    preset: Preset
    updates: int
    seeds: Tuple[int, ...]
    rates: int
    arms: Tuple[str, ...]


TOY_ARMS = ("full", "key dropout", "values", "slots 16", "slots 50% by count", "slots 50% once",
            "low rank", "plain low rank")  # fmt: skip
ALL_ARMS = tuple(dict.fromkeys(arm for part in PARTS.values() for arm in part))
SIZES = {
    "full": Size(PRESETS["default"], 200, (1, 2, 3), 4, ALL_ARMS),
    "toy": Size(PRESETS["quick"], 4, (1,), 1, TOY_ARMS),  # only a trial run
}


@dataclass(frozen=True)
class Run:
    """One finetuning.

    Attributes:
        arm: what is trained; slots have their T, and how they are chosen.
        lr: of everything but values.
        value_lr: 0 where no values are trained.
        seed: of fairseq: order and masks.
    """

    arm: str
    lr: float
    value_lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        arm = self.arm.replace(" ", "_").replace("%", "pct")
        return f"{arm}_lr{self.lr:g}_values{self.value_lr:g}_seed{self.seed}"

    @property
    def kind(self) -> str:
        """The arm, for slots without their choice."""
        return "slots" if self.arm.startswith("slots") else self.arm

    @property
    def start(self) -> str:
        """The arm of the demo whose model is finetuned."""
        return "plain" if self.arm.startswith("plain") else "resm_init"

    def flags(self, size: Size, counts: Dict[str, Path]) -> List[str]:
        """Options of fairseq-train, except paths of data, start and checkpoints."""
        preset = size.preset
        options: Dict[str, Any] = {
            **preset.model,
            "tokens-per-sample": preset.tokens_per_sample,
            "max-positions": preset.tokens_per_sample,
            "seed": self.seed,
            "lr": self.lr,
            "max-update": size.updates,
            "log-interval": max(1, size.updates // 10),
        }
        flags = [*COMMON, *(PLAIN if self.start == "plain" else MEMORY)]
        if self.start != "plain":
            options |= preset.memory
        if self.value_lr:
            options["memory-value-lr"] = self.value_lr
        flags += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [*flags, *self._choice(counts)]

    def _choice(self, counts: Dict[str, Path]) -> List[str]:
        """The options that choose what is trained."""
        if self.arm.endswith("low rank"):
            plain = self.start == "plain"
            flags = ["--arch", "low_rank_roberta_any" if plain else "low_rank_resm_roberta_tiny"]
            return flags if plain else [*flags, "--memory-freeze", "all"]
        if self.arm == "key dropout":
            return ["--memory-key-dropout", "0.3"]
        if self.arm == "freeze":
            return ["--memory-freeze", "all"]
        if self.arm == "values":
            return ["--memory-finetune", "values"]
        if self.kind != "slots":
            return []
        top = self.arm.split()[1]
        flags = ["--memory-finetune", "slots", "--memory-finetune-slots", top]
        if self.arm.endswith("by count"):
            return [*flags, "--memory-finetune-score", "count"]
        flags += ["--memory-background", str(counts["old"])]
        if self.arm.endswith("once"):
            flags += ["--memory-finetune-scope", "data"]
            flags += ["--memory-finetune-counts", str(counts["new"])]
        return flags


def runs_of(size: Size, part: str) -> List[Run]:
    """The runs of a part of the study, seed by seed."""
    return [
        Run(arm, *rate, seed=seed)
        for seed in size.seeds
        for arm, rates in PARTS[part].items()
        if arm in size.arms
        for rate in rates[: size.rates]
    ]
