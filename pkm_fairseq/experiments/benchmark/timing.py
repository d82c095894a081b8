"""Time two or more computations alternately, and compare their times."""

import gc
import time
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any, Callable, Dict, Iterator, List, Sequence

# Prepares round i (not timed), and returns the function to time.
Prepare = Callable[[int], Callable[[], object]]
Clock = Callable[[], float]

WARM_UP = 2  # uncounted rounds: compilation, first use of memory, moments


def interleave(
    contestants: Dict[str, Prepare],
    rounds: int,
    warm_up: int = WARM_UP,
    clock: Clock = time.perf_counter,
) -> Dict[str, List[float]]:
    """Time contestants alternately, so that a slow phase of the machine affects all of them.

    The order changes from round to round, so that each contestant follows every other one about
    equally often: a step can slow the one after it. Python's cyclic garbage collection is off
    meanwhile; with fairseq imported it takes longer than a step.

    Args:
        contestants: what to time, by name.
        rounds: number of timed rounds.
        warm_up: number of rounds before, not timed.
        clock: returns seconds.

    Returns:
        The seconds of every timed round, by name.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, must be at least 1")
    seconds: Dict[str, List[float]] = {name: [] for name in contestants}
    orders = balanced_orders(list(contestants))
    with _no_collection():
        for turn in range(-warm_up, rounds):
            for name in orders[turn % len(orders)]:
                took = time_once(contestants[name](turn + warm_up), clock)
                if turn >= 0:
                    seconds[name].append(took)
    return seconds


def balanced_orders(names: Sequence[str]) -> List[List[str]]:
    """Orders of names; within them, each name follows every other one equally often.

    For an even number of names these are a Latin square (Williams 1949, "Experimental designs
    balanced for the estimation of residual effects of treatments"), else it and its reverse.
    """
    n = len(names)
    zigzag = [i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]  # 0, n - 1, 1, n - 2, ...
    orders = [[names[(place + first) % n] for place in zigzag] for first in range(n)]
    return orders + [order[::-1] for order in orders] if n % 2 else orders


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def time_once(step: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, including the release of its garbage."""
    start = clock()
    step()
    return clock() - start


def compare(subject: Sequence[float], against: Sequence[float]) -> Dict[str, Any]:
    """Compare pairs of times; a ratio above 1 means that the subject is faster.

    Args:
        subject: seconds of the subject, one per pair.
        against: seconds of the other side, one per pair.

    Returns:
        The medians in milliseconds, the median of the ratios against / subject, their quartiles
        as ``spread``, and the number of pairs.
    """
    ratios = [b / a for a, b in zip(subject, against, strict=True)]
    return {
        "ratio": median(ratios),
        "subject_ms": 1e3 * median(subject),
        "against_ms": 1e3 * median(against),
        "spread": quartiles(ratios),
        "pairs": len(ratios),
    }


def quartiles(numbers: Sequence[float]) -> List[float]:
    """The first and the third quartile."""
    if len(numbers) < 2:
        return [numbers[0], numbers[0]]
    low, _, high = quantiles(numbers, n=4, method="inclusive")
    return [low, high]
