"""The arms of the study, their options, and all runs in their order."""

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Sequence

from pkm_fairseq.experiments.demo.presets import PRESETS, Preset, arm_flags
from pkm_fairseq.experiments.facts.training import PLAIN, epoch_of, memory_flags, training_flags
from pkm_fairseq.memory.kernels import float8

ARMS: Dict[str, List[str]] = {
    "float32": [],
    "bfloat16": ["--memory-value-dtype", "bfloat16", "--memory-moment-dtype", "bfloat16"],
    "float8": ["--memory-value-dtype", "bfloat16", "--memory-moment-dtype", "float8"],
}
BYTES = {"float32": 12.0, "bfloat16": 6.0, "float8": 2 + 2 * float8.BYTES}  # of a number
TASKS = ("text", "facts")
SEEDS = {"full": (1, 2, 3), "toy": (1,)}
SIZES = {"full": replace(PRESETS["default"], half=1000), "toy": replace(PRESETS["quick"], half=10)}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: "text" or "facts".
        arm: a key of ``ARMS``; "plain" for the start of facts.
        seed: of fairseq.
    """

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.task}_{self.arm}_seed{self.seed}"

    @property
    def start(self) -> Optional["Run"]:
        """The plain run that a memory starts from, at half of its updates; None for text."""
        if self.task == "text" or self.arm == "plain":
            return None
        return Run(self.task, "plain", self.seed)

    def updates(self, size: Preset) -> int:
        """Updates of this training, without those of its start."""
        if self.task == "text":
            return 2 * size.half
        return size.facts.updates // (2 if self.start else 1)

    def flags(self, size: Preset) -> List[str]:
        """Options of fairseq-train, except paths."""
        if self.task == "text":
            flags = arm_flags("resm", replace(size, seed=self.seed))
            most = ["--max-update", str(self.updates(size))]
            return [*flags, *most, "--disable-validation", *ARMS[self.arm]]
        facts = size.facts
        has_start = self.start is not None
        flags = training_flags(facts.updates, facts.lr, self.seed, half_epochs(size), has_start)
        if self.start is None:
            return [*flags, *PLAIN]
        memory = memory_flags("resm_roberta_tiny", facts.n_keys, facts.value_lr)
        return [*flags, *memory, *ARMS[self.arm]]


def half_epochs(size: Preset) -> int:
    """Epochs of the plain model's first half."""
    return size.facts.updates // 2 // epoch_of(size.facts.people)


def runs_in_order(seeds: Sequence[int]) -> List[Run]:
    """All runs of the study; starts come first."""
    runs = [Run("facts", "plain", seed) for seed in seeds]
    return runs + [Run(task, arm, seed) for task in TASKS for seed in seeds for arm in ARMS]
