"""Measure the cost of counting usage and recording times of reads in a training step."""

import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Callable, Iterator, List, Tuple

from ...memory import MemoryUsage
from ...memory.observe.count import Count
from ...memory.observe.staleness import ReadTimes
from . import models
from .output import Report
from .settings import Settings
from .timing import WARM_UP, Clock, compare, time_once

CALLS = "counting_calls"  # measured within steps
COUNTING, STEP = "counting", "its step"
ALWAYS = ("--memory-usage-tokens", str(10**9))  # the first count of usage never ends


def measure(settings: Settings, report: Report) -> None:
    """Measure the counting calls within a step, and a model that counts against one that does not.

    It measures the calls in processor seconds of all threads, which other processes do not affect.
    Here every step counts usage; a real training counts only in some steps. The end of a count,
    once per interval, is not measured.
    """
    chosen, pair = models.counted(settings)
    chosen = {name: replace(chosen[name], flags=(*chosen[name].flags, *ALWAYS)) for name in pair}
    model = chosen[pair[0]]
    where = models.SENTENCES * models.LENGTH, model.n_keys
    with models.built(chosen, pair[:1], settings.seed) as (problem, runs):
        if problem:
            report.skip(CALLS, *where, STEP, problem, subject=COUNTING)
        else:
            (run,) = runs.values()
            calls, steps = time_calls(run, settings.rounds)
            slots = run.distinct_slots()
            numbers = {**compare(calls, steps), "distinct_slots": slots}
            report.result(CALLS, *where, COUNTING, STEP, **numbers)
    models.measure_pair(chosen, pair, (models.TRAIN,), settings, report)


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    return 2


def time_calls(run: models.TrainedModel, rounds: int) -> Tuple[List[float], List[float]]:
    """Processor seconds of the counting calls in training steps, and of the whole steps."""
    calls, steps = [], []
    for turn in range(-WARM_UP, rounds):
        step = run.train_step(turn + WARM_UP)
        with stopwatch(time.process_time) as laps:
            took = time_once(step, time.process_time)
        if turn >= 0:
            calls.append(sum(laps))
            steps.append(took)
    return calls, steps


@contextmanager
def stopwatch(clock: Clock) -> Iterator[List[float]]:
    """Time every counting call while the context is open; yield their seconds."""
    laps: List[float] = []

    def timed(call: Callable) -> Callable:
        def lap(*args: Any) -> None:
            start = clock()
            call(*args)
            laps.append(clock() - start)

        return lap

    with ExitStack() as undo:
        for owner, name in (
            (MemoryUsage, "update"),
            (ReadTimes, "record"),
            (Count, "check"),  # whether enough is counted
        ):
            call = getattr(owner, name)
            setattr(owner, name, timed(call))
            undo.callback(setattr, owner, name, call)
        yield laps
