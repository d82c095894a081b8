"""The layer with tables in float32, bfloat16 and 8 bits, against a textbook memory in float32.

And the parts of its step that read or write the table, against those in float32 and memcpy.
"""

import gc
from functools import partial
from itertools import product
from typing import Any, List

import torch
from torch import Tensor

from ...memory import kernels
from ...memory.kernels.float8 import BYTES
from . import subjects
from .layer import FORWARD, TRAIN, Place, check, shortage, time_all
from .machine import Memcpy
from .output import Report
from .parts import BYTES_OF_ENTRY, our_update, throughput
from .settings import Settings
from .subjects import ADAM, OURS, SLACK, TEXTBOOK, WIDTH, Subject
from .timing import Prepare, compare, interleave

# the subject's name in results, dtypes of values and of moments, bytes of values and both moments
NARROW = (
    (OURS, "float32", "float32", 12.0),
    ("ours, bfloat16", "bfloat16", "bfloat16", 6.0),
    ("ours, float8", "bfloat16", "float8", 2 + 2 * BYTES),
)
NAMES = {TRAIN: "narrow_train_step", FORWARD: "narrow_forward"}
AGAINST = {TRAIN: ADAM, FORWARD: TEXTBOOK}
UPDATE = "adam_rows"
PARTS = {name: f"narrow_{name}" for name in ("gather_sum", "gather_dot", UPDATE)}
BYTES_OF_READ = 8 + 4  # slot and weight


def measure(settings: Settings, report: Report, memcpy: Memcpy) -> None:
    """Measure; in a round, all memories get the same tokens. Skip sizes that do not fit."""
    for n_keys in settings.parts_n_keys:
        places = places_of(settings)
        torch.manual_seed(settings.seed)
        problem = shortage(needed_bytes(n_keys) + SLACK)
        if problem:
            for (what, tokens), (name, *_) in product(places, NARROW):
                report.skip(NAMES[what], tokens, n_keys, AGAINST[what], problem, subject=name)
            for part, tokens, (name, *_) in product(PARTS.values(), settings.grid_tokens, NARROW):
                report.skip(part, tokens, n_keys, OURS, problem, subject=name)
            continue
        gc.collect()  # tables of the last contest
        found = contestants(n_keys)
        seconds, distinct = time_all(found, places, settings.rounds)
        for place, (name, *_) in product(places, NARROW):
            what, tokens = place
            numbers = compare(seconds[name][place], seconds[ADAM][place])
            more = {"distinct_slots": distinct[place], "turns": "steps"}
            report.result(NAMES[what], tokens, n_keys, name, AGAINST[what], **numbers, **more)
        *ours, _ = found
        for tokens in settings.grid_tokens:
            _measure_parts(ours, tokens, settings.rounds, report, memcpy)


def contestants(n_keys: int) -> List[Subject]:
    """Our layers and a textbook memory, with equal weights but for the rounding of values."""
    memory = subjects.new_memory(n_keys)
    other = subjects.other(ADAM, memory)
    check(memory, other)
    found = [subjects.ours(memory, ADAM)]
    for name, value_dtype, moment_dtype, _ in NARROW[1:]:
        twin = subjects.new_memory(n_keys, value_dtype)
        twin.load_state_dict(memory.state_dict())
        found.append(subjects.ours(twin, ADAM, name, moment_dtype))
    return [*found, other]


def _measure_parts(
    ours: List[Subject], tokens: int, rounds: int, report: Report, memcpy: Memcpy
) -> None:
    module: Any = ours[0].module.train()
    (x,), (grad,) = subjects.batches(tokens, 1)
    with torch.no_grad():
        slots, weights = (found.flatten(1) for found in module.search(x))  # (N, T)
    rows = len(slots.unique())
    for part, what in PARTS.items():
        steps = {subject.name: step_of(part, subject, slots, weights, grad) for subject in ours}
        seconds = interleave({**steps, "memcpy": lambda _: memcpy}, rounds)
        copied = memcpy.note(seconds["memcpy"])
        for subject, (name, *_, size) in zip(ours, NARROW, strict=True):
            moved = rows * WIDTH * bytes_of(part, subject, size) + grad.nbytes
            moved += slots.numel() * (BYTES_OF_ENTRY if part == UPDATE else BYTES_OF_READ)
            numbers = compare(seconds[name], seconds[OURS])
            numbers |= throughput(int(moved), seconds[name], copied)
            more = {"distinct_slots": rows, "turns": "steps"}
            report.result(what, tokens, module.config.n_keys, name, OURS, **numbers, **more)


def step_of(part: str, subject: Subject, slots: Tensor, weights: Tensor, grad: Tensor) -> Prepare:
    """A part of a step; slots and weights are (N, T), the gradient of the read is (N, width)."""
    values: Any = subject.module.values.weight
    if part == UPDATE:
        (adam,) = subject.optimizers
        return our_update(adam, values, slots, weights, grad)
    operand = grad if part == "gather_dot" else weights
    return lambda _: partial(getattr(kernels, part), values.detach(), slots, operand)


def bytes_of(part: str, subject: Subject, size: float) -> float:
    """The bytes that a part moves for a number of the table.

    Args:
        part: a key of ``PARTS``.
        subject: the memory.
        size: bytes of a number and its moments.
    """
    values: Any = subject.module.values.weight
    return 2 * size if part == UPDATE else float(values.element_size())


def places_of(settings: Settings) -> List[Place]:
    """The measurements; inference comes first, since training changes weights."""
    return list(product((FORWARD, TRAIN), settings.grid_tokens))


def needed_bytes(n_keys: int) -> int:
    """The approximate memory of all contestants."""
    tables = subjects.TABLES[ADAM] + sum(size / 4 for *_, size in NARROW)
    return int(tables * subjects.table_bytes(n_keys))


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    whats = len(places_of(settings)) + len(PARTS) * len(settings.grid_tokens)
    return len(settings.parts_n_keys) * whats * len(NARROW)
