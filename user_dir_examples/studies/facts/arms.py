"""The arms of the study, their options, and all runs in their order."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from pkm_fairseq.experiments.facts.training import (
    FFN,
    PLAIN,
    WIDTH,
    epoch_of,
    memory_flags,
    training_flags,
)

WIDTHS = {  # and those of the FFN
    "plain": (WIDTH, FFN),
    "wide": (WIDTH, 480),
    "plain2": (2 * WIDTH, 2 * FFN),
    "plain4": (4 * WIDTH, 4 * FFN),
}
MEMORIES = ("resm_init", "pkm_init", "resm", "pkm")

STEP_TIMES = "step_times.json"  # beside results.json
EDGES = {1e-3: 5e-4, 5e-3: 1e-2}  # next rate to try if the best is the first or last
VALUE_EDGES = {3e-3: 1e-3, 3e-2: 1e-1}


@dataclass(frozen=True)
class Size:
    """The sizes of the study."""

    people: int
    fewer: int
    more: int
    updates: int
    n_keys: int
    smaller: Tuple[int, ...]
    seeds: Tuple[int, ...]
    rates: Tuple[float, ...]  # of dense arms
    value_rates: Tuple[float, ...]


SIZES = {
    "full": Size(10_000, 5_000, 20_000, 4_000, 256, (32, 64, 128), (1, 2, 3),
                 (1e-3, 2e-3, 5e-3), (3e-3, 1e-2, 3e-2)),
    "toy": Size(200, 100, 400, 20, 32, (16,), (1,), (2e-3,), (1e-2,)),  # only a trial run
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        updates: total; for an arm with INIT, half of them are its start's.
        n_keys: 0 without a memory.
        value_schedule: ``follow`` if the values' rate falls like the others', else ``constant``.
    """

    arm: str
    people: int
    updates: int
    seed: int
    lr: float
    value_lr: float = 0.0
    n_keys: int = 0
    value_schedule: str = "constant"

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        memory = f"_{self.n_keys}keys_values{self.value_lr:g}" if self.n_keys else ""
        memory += "_follow" if self.value_schedule == "follow" else ""
        return (
            f"{self.arm}_{self.people}people_{self.updates}updates_lr{self.lr:g}{memory}"
            f"_seed{self.seed}"
        )

    @property
    def start(self) -> Optional["Run"]:
        """The plain run that an arm with INIT starts from, at half of its updates; else None."""
        if not self.arm.endswith("_init"):
            return None
        return Run("plain", self.people, self.updates, self.seed, self.lr)

    @property
    def own_updates(self) -> int:
        """Updates of this training, without those of its start."""
        return self.updates // 2 if self.start else self.updates

    def flags(self) -> List[str]:
        """Options of fairseq-train, except paths."""
        width, ffn = WIDTHS.get(self.arm, WIDTHS["plain"])
        quarter = self.updates // 4 // epoch_of(self.people)
        flags = training_flags(
            self.updates, self.lr, self.seed, quarter, self.start is not None, width, ffn
        )
        if not self.n_keys:
            return [*flags, *PLAIN]
        arch = "pkm_roberta_tiny" if self.arm.startswith("pkm") else "resm_roberta_tiny"
        flags += memory_flags(arch, self.n_keys, self.value_lr)
        return [*flags, "--memory-value-lr-schedule", self.value_schedule]


Results = Dict[Run, float]  # recall by name of finished runs
Wave = Callable[[Size, Results], List[Run]]


def tried(results: Results, size: Size, arm: str) -> List[Run]:
    """An arm's runs that choose its rate: the first seed, and the study's number of people."""
    n_keys = size.n_keys if arm in MEMORIES else 0
    return [
        run
        for run in results
        if (run.arm, run.people, run.seed) == (arm, size.people, size.seeds[0])
        and (run.updates, run.n_keys) == (size.updates, n_keys)
        and run.value_schedule == "constant"
    ]


def best(results: Results, size: Size, arm: str) -> Run:
    """An arm's run with the best rate."""
    return max(tried(results, size, arm), key=lambda run: results[run])


def is_tuned(results: Results, size: Size, arm: str) -> bool:
    """Whether all rates of an arm were tried, so that its best one does not change any more."""
    rates, edges, name = size.rates, EDGES, "lr"
    if arm in MEMORIES:
        if not is_tuned(results, size, "plain"):  # its rate is that of all but values
            return False
        rates, edges, name = size.value_rates, VALUE_EDGES, "value_lr"
    known = {getattr(run, name) for run in tried(results, size, arm)}
    if not known.issuperset(rates):
        return False
    chosen_rate = getattr(best(results, size, arm), name)
    return edges.get(chosen_rate, chosen_rate) in known


def dense(size: Size, arm: str, lr: float, **changed: int) -> Run:
    """A run without a memory."""
    settings = {"people": size.people, "updates": size.updates, "seed": size.seeds[0], **changed}
    return Run(arm, lr=lr, **settings)


def memory(size: Size, results: Results, arm: str, value_lr: float, **changed: Any) -> Run:
    """A run with a memory; everything except values has the rate of the best plain run."""
    settings = {"people": size.people, "updates": size.updates, "seed": size.seeds[0], **changed}
    settings = {"n_keys": size.n_keys, **settings}
    return Run(arm, lr=best(results, size, "plain").lr, value_lr=value_lr, **settings)


def chosen(size: Size, results: Results, arm: str, **changed: Any) -> Run:
    """A run of an arm with its best rate."""
    run = best(results, size, arm)
    if arm in MEMORIES:
        return memory(size, results, arm, run.value_lr, **changed)
    return dense(size, arm, run.lr, **changed)


def _rates(arm: str) -> Iterator[Wave]:
    """Try all rates, and one more if the best is the first or last."""
    if arm in MEMORIES:
        yield lambda size, results: [memory(size, results, arm, rate) for rate in size.value_rates]
        yield lambda size, results: [
            memory(size, results, arm, VALUE_EDGES[edge])
            for edge in [best(results, size, arm).value_lr]
            if edge in VALUE_EDGES
        ]
    else:
        yield lambda size, results: [dense(size, arm, rate) for rate in size.rates]
        yield lambda size, results: [
            dense(size, arm, EDGES[edge]) for edge in [best(results, size, arm).lr] if edge in EDGES
        ]


def _all_seeds(*arms: str) -> Wave:
    return lambda size, results: [
        chosen(size, results, arm, seed=seed) for seed in size.seeds for arm in arms
    ]


def _longer(size: Size, results: Results) -> List[Run]:
    """Dense arms with four times as many updates."""
    return [
        chosen(size, results, arm, updates=4 * size.updates, seed=seed)
        for seed in size.seeds
        for arm in ("plain", "wide")
    ]


def _smaller(size: Size, results: Results) -> List[Run]:
    return [
        chosen(size, results, "resm_init", n_keys=n_keys, seed=seed)
        for seed in size.seeds
        for n_keys in reversed(size.smaller)
    ]


def _other_people(size: Size, results: Results) -> List[Run]:
    return [
        chosen(size, results, arm, people=people, seed=seed)
        for seed in size.seeds
        for people in (size.more, size.fewer)
        for arm in ("plain", "wide", "resm_init")
    ]


def _falling(size: Size, results: Results) -> List[Run]:
    """The memory with a rate of values that falls."""
    return [
        chosen(size, results, "resm_init", value_schedule="follow", seed=seed)
        for seed in size.seeds
    ]


def is_complete(size: Size, results: Results) -> bool:
    """Whether all runs of the study have finished."""
    waves = (wave(size, results) for wave in WAVES)  # a wave may need the runs of those before
    return all(run in results for runs in waves for run in runs)


WAVES: List[Wave] = [  # what decides a criterion comes first
    *_rates("plain"),
    *_rates("resm_init"),
    *_rates("wide"),
    _all_seeds("plain", "wide", "resm_init"),
    *_rates("pkm_init"),
    lambda size, results: [run for run in _longer(size, results) if run.arm == "plain"],
    _smaller,
    _all_seeds("pkm_init"),
    *_rates("resm"),
    _all_seeds("resm"),
    _longer,
    _other_people,
    _falling,
    *_rates("pkm"),
    *_rates("plain2"),
    *_rates("plain4"),
    _all_seeds("pkm", "plain2", "plain4"),
]
