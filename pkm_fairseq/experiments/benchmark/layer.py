"""The whole layer: its training step and its forward pass, against other implementations."""

import gc
from functools import partial
from itertools import product
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from . import subjects
from .machine import available_bytes
from .output import Report
from .settings import Settings
from .subjects import OURS, Subject
from .textbook import TextbookMemory, check_same_read
from .timing import Prepare, compare, interleave

TRAIN, FORWARD = "layer_train_step", "layer_forward"
# Inference has no optimizer: the name of the comparison, and the contestant that runs it.
FORWARD_AGAINST = {subjects.ADAM: subjects.TEXTBOOK, subjects.PACKAGE: subjects.PACKAGE}
SHARE_TO_TAKE = 0.9  # of free memory: a system without free memory kills processes
CHECKED = 64  # tokens for which both sides must read the same before timing

Place = Tuple[str, int]  # what to measure, number of tokens


def measure(settings: Settings, report: Report) -> None:
    """Measure the layer over the grid of sizes; skip sizes that do not fit into memory."""
    for n_keys, name in product(settings.grid_n_keys, subjects.OTHERS):
        places = places_of(name, settings.grid_tokens)
        torch.manual_seed(settings.seed)
        problem = subjects.problem(name) or memory_problem(name, max(settings.grid_tokens), n_keys)
        if problem:
            for what, tokens in places:
                report.skip(what, tokens, n_keys, against_of(what, name), problem)
            continue
        gc.collect()  # tables of the last contest
        seconds, distinct, turns = contest(name, n_keys, places, settings.rounds)
        for place in places:
            what, tokens = place
            numbers = compare(seconds[OURS][place], seconds[name][place])
            more = {"distinct_slots": distinct[place], "turns": turns}
            report.result(what, tokens, n_keys, OURS, against_of(what, name), **numbers, **more)


def places_of(name: str, tokens: Sequence[int]) -> List[Place]:
    """The measurements of a contestant; inference comes first, since training changes weights."""
    whats = [FORWARD, TRAIN] if name in FORWARD_AGAINST else [TRAIN]
    return [(what, n) for what in whats for n in tokens]


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    tokens = settings.grid_tokens
    return len(settings.grid_n_keys) * sum(len(places_of(n, tokens)) for n in subjects.OTHERS)


def against_of(what: str, name: str) -> str:
    """The name of a contestant in results."""
    return FORWARD_AGAINST[name] if what == FORWARD else name


def memory_problem(name: str, tokens: int, n_keys: int) -> str:
    """Why a contestant does not fit into memory even alone; empty if it fits."""
    needed = subjects.SLACK + max(subjects.needed_bytes(n, tokens, n_keys) for n in (name, OURS))
    return shortage(needed)


def shortage(needed: int) -> str:
    """A message if this many bytes are not free; else empty."""
    free = available_bytes()
    if needed <= SHARE_TO_TAKE * free:
        return ""
    return f"needs about {needed / 2**30:.1f} of the {free / 2**30:.1f} GiB that are free"


def contest(
    name: str, n_keys: int, places: List[Place], rounds: int
) -> Tuple[Dict[str, Dict[Place, List[float]]], Dict[Place, int], str]:
    """Time our layer and another alternately: by steps, or by blocks if only one fits into memory.

    Returns:
        Seconds by name and place, the number of distinct slots read by place, and the alternating
        unit.
    """
    tokens = max(n for _, n in places)
    needed = sum(subjects.needed_bytes(n, tokens, n_keys) for n in (name, OURS))
    if not shortage(needed + subjects.SLACK):
        memory = subjects.new_memory(n_keys)
        other = subjects.other(name, memory)
        check(memory, other)
        seconds, distinct = time_all([subjects.ours(memory, name), other], places, rounds)
        return seconds, distinct, "steps"
    memory = subjects.new_memory(n_keys)
    check(memory, subjects.other(name, memory))
    del memory
    return *in_blocks(name, n_keys, places, rounds), "blocks"


def check(memory: Any, other: Subject) -> None:
    """Check that a textbook contestant computes the same as the memory."""
    if isinstance(other.module, TextbookMemory):
        check_same_read(memory, other.module, torch.randn(CHECKED, subjects.WIDTH))


def in_blocks(
    name: str, n_keys: int, places: List[Place], rounds: int
) -> Tuple[Dict[str, Dict[Place, List[float]]], Dict[Place, int]]:
    """Blocks in the order ours, other, other, ours, each newly built, to cancel slow drift."""
    seconds: Dict[str, Dict[Place, List[float]]] = {OURS: {}, name: {}}
    distinct: Dict[Place, int] = {}
    for turn, who in enumerate((OURS, name, name, OURS)):
        memory = subjects.new_memory(n_keys)
        subject = subjects.ours(memory, name) if who == OURS else subjects.other(name, memory)
        del memory
        share = (rounds + 1) // 2 if turn < 2 else rounds // 2
        if not share:
            break
        found, read = time_all([subject], places, share)
        del subject
        for place, times in found[who].items():
            seconds[who].setdefault(place, []).extend(times)
        distinct.update(read)
    return seconds, distinct


def time_all(
    contestants: List[Subject], places: List[Place], rounds: int
) -> Tuple[Dict[str, Dict[Place, List[float]]], Dict[Place, int]]:
    """Time contestants at every place; in a round, all get the same tokens."""
    seconds: Dict[str, Dict[Place, List[float]]] = {c.name: {} for c in contestants}
    distinct: Dict[Place, int] = {}
    for place in places:
        what, tokens = place
        x, grad = subjects.batches(tokens)
        for contestant in contestants:
            contestant.module.train(what == TRAIN)
            if contestant.name == OURS:
                distinct[place] = subjects.distinct_slots(contestant, x[0])
        steps = {c.name: prepare(c, what, x, grad) for c in contestants}
        for name, times in interleave(steps, rounds).items():
            seconds[name][place] = times
    return seconds, distinct


def prepare(subject: Subject, what: str, x: Tensor, grad: Tensor) -> Prepare:
    """The step to time, with a new batch in every round; x and grad: (batches, N, width)."""
    if what == TRAIN:
        return lambda turn: partial(subject.train_step, x[turn % len(x)], grad[turn % len(x)])
    return lambda turn: partial(subject.forward, x[turn % len(x)])
