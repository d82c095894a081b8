"""The arms of the study, their options, and the choice of rates."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from pkm_fairseq.experiments.facts.training import (
    COMMON,
    FFN,
    KNN,
    PLAIN,
    WIDTH,
    epoch_of,
    memory_flags,
)

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 256
WIDTHS = ["--encoder-embed-dim", str(WIDTH), "--encoder-ffn-embed-dim", str(FFN)]  # of all starts
# what differs from the training of the starts
FINETUNING = shlex.split(f"""--batch-size {BATCH_SIZE} --lr-scheduler fixed --weight-decay 0
    --disable-validation""")
SHARES = (16, 8, 4, 2, 1)  # of all updates, one over these: when recall is measured
LEARNED = 0.9  # recall of new people that counts as learned


@dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
        start: the arm of the study of facts whose model is finetuned.
        rates: (``--lr``, ``--memory-value-lr``) to try with the first seed.
        flags: further options of fairseq-train.
        slots: number of rows that an update may move, chosen by TF-IDF; None for no choice.
        once: whether the rows are chosen once, over all new people.
    """

    start: str
    rates: Tuple[Tuple[float, float], ...]
    flags: Tuple[str, ...] = ()
    slots: Optional[int] = None
    once: bool = False


def _values(rates: Tuple[float, ...], slots: Optional[int] = None, once: bool = False) -> Arm:
    part = ("--memory-finetune", "slots" if slots else "values")
    return Arm("resm_init", tuple((0.0, rate) for rate in rates), part, slots, once)


def _dense(start: str, rates: Tuple[float, ...], *flags: str) -> Arm:
    return Arm(start, tuple((rate, 0.0) for rate in rates), flags)


FROZEN = ("--memory-freeze", "all")
BOTH = ((1e-4, 3e-2), (3e-4, 3e-2), (1e-3, 3e-2), (1e-4, 1e-1), (3e-4, 1e-1))

ARMS = {
    "values": _values((3e-2, 1e-1, 3e-1)),
    "full": Arm("resm_init", BOTH),
    "low_rank": _dense("resm_init", (1e-3, 3e-3, 1e-2), *FROZEN),
    **{f"slots_{n}": _values((1e-1, 3e-1), n) for n in (24000, 8192)},
    **{f"slots_{n}_once": _values((1e-1, 3e-1), n, once=True) for n in (24000, 8192, 1024)},
    "freeze": _dense("resm_init", (3e-4, 1e-3), *FROZEN),
    "key_dropout": Arm("resm_init", (BOTH[1], BOTH[3]), ("--memory-key-dropout", "0.3")),
    "plain_full": _dense("plain", (1e-3, 3e-3)),
    "plain_low_rank": _dense("plain", (3e-3, 1e-2)),
    **{f"slots_{n}": _values((3e-1,), n) for n in (1024, 256, 16)},
}


@dataclass(frozen=True)
class Size:
    """The sizes of the study."""

    old: int
    new: int
    updates: int
    seeds: Tuple[int, ...]
    rates: int  # to try, at most
    arms: Tuple[str, ...] = tuple(ARMS)


TOY_ARMS = ("values", "full", "low_rank", "slots_256", "slots_1024_once", "freeze", "key_dropout",
            "plain_low_rank")  # fmt: skip
SIZES = {
    "full": Size(10_000, 2_000, 640, (1, 2, 3), 5),
    "toy": Size(200, 50, 16, (1,), 1, arms=TOY_ARMS),  # only a trial run
}


@dataclass(frozen=True)
class Run:
    """One finetuning."""

    arm: str
    lr: float
    value_lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.arm}_lr{self.lr:g}_values{self.value_lr:g}_seed{self.seed}"

    def flags(self, size: Size, n_keys: int, counts: Dict[str, Path]) -> List[str]:
        """Options of fairseq-train, except paths of data, start and checkpoints."""
        arm = ARMS[self.arm]
        flags = [*COMMON, *WIDTHS, *FINETUNING, "--seed", str(self.seed), "--lr", str(self.lr)]
        flags += ["--max-update", str(size.updates)]
        flags += ["--log-interval", str(size.updates // SHARES[0])]
        flags += [
            "--save-interval",
            str(size.updates // SHARES[0] // epoch_of(size.new, BATCH_SIZE)),
        ]
        if n_keys:
            flags += memory_flags("resm_roberta_tiny", n_keys, self.value_lr)
            flags += ["--memory-knn", str(min(KNN, n_keys // 2))]  # key dropout needs room
        else:
            flags += PLAIN
        if self.arm.endswith("low_rank"):
            flags += ["--arch", f"low_rank_{'resm_roberta_tiny' if n_keys else 'roberta_any'}"]
        if arm.slots:
            flags += ["--memory-finetune-slots", str(arm.slots)]
            flags += ["--memory-background", str(counts["old"])]
        if arm.once:
            flags += ["--memory-finetune-scope", "data"]
            flags += ["--memory-finetune-counts", str(counts["new"])]
        return [*flags, *arm.flags]


Results = Dict[Run, Dict[str, Any]]  # what finished runs found


def kept(found: Dict[str, Any]) -> Optional[float]:
    """The highest recall of old people where that of new ones is enough; None if it never is."""
    learned = [point for point in found["way"] if recall(point, "new") >= LEARNED]
    return max((recall(point, "old") for point in learned), default=None)


def recall(point: Dict[str, Any], people: str) -> float:
    """Recall with the others given."""
    share: float = point[people]["with_others"]["recall"]
    return share


def tried(size: Size, arm: str) -> List[Run]:
    """An arm's runs with the first seed, one for each rate."""
    return [Run(arm, *rates, seed=size.seeds[0]) for rates in ARMS[arm].rates[: size.rates]]


def best(results: Results, size: Size, arm: str) -> Run:
    """An arm's run with the best of the rates that have run, for the first seed.

    The best rate keeps most of the old people where new ones are learned. If no rate learns them,
    it is the one that learns most.
    """
    runs = tried(size, arm)

    def merit(run: Run) -> Tuple[float, float]:
        most = max(recall(point, "new") for point in results[run]["way"])
        share = kept(results[run])
        return (-1.0, most) if share is None else (share, 0.0)

    return max(filter(results.__contains__, runs), key=merit)


def runs_to_do(size: Size, results: Results) -> List[Run]:
    """The next runs: all rates with the first seed, then the best ones with the other seeds."""
    runs = [run for arm in size.arms for run in tried(size, arm) if run not in results]
    if runs:
        return runs
    best_runs = [best(results, size, arm) for arm in size.arms]
    others = [
        Run(run.arm, run.lr, run.value_lr, seed) for run in best_runs for seed in size.seeds[1:]
    ]
    return [run for run in others if run not in results]
