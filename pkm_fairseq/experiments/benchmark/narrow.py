"""The layer with tables in float32, bfloat16 and 8 bits, against a textbook memory in float32."""

import gc
from itertools import product
from typing import List

import torch

from ...memory.kernels.float8 import BYTES
from . import subjects
from .layer import FORWARD, TRAIN, Place, check, shortage, time_all
from .output import Report
from .settings import Settings
from .subjects import ADAM, OURS, SLACK, TEXTBOOK, Subject
from .timing import compare

# the subject's name in results, dtypes of values and of moments, bytes of values and both moments
NARROW = (
    (OURS, "float32", "float32", 12.0),
    ("ours, bfloat16", "bfloat16", "bfloat16", 6.0),
    ("ours, float8", "bfloat16", "float8", 2 + 2 * BYTES),
)
NAMES = {TRAIN: "narrow_train_step", FORWARD: "narrow_forward"}
AGAINST = {TRAIN: ADAM, FORWARD: TEXTBOOK}


def measure(settings: Settings, report: Report) -> None:
    """Measure; in a round, all memories get the same tokens. Skip sizes that do not fit."""
    for n_keys in settings.parts_n_keys:
        places = places_of(settings)
        torch.manual_seed(settings.seed)
        problem = shortage(needed_bytes(n_keys) + SLACK)
        if problem:
            for (what, tokens), (name, *_) in product(places, NARROW):
                report.skip(NAMES[what], tokens, n_keys, AGAINST[what], problem, subject=name)
            continue
        gc.collect()  # tables of the last contest
        seconds, distinct = time_all(contestants(n_keys), places, settings.rounds)
        for place, (name, *_) in product(places, NARROW):
            what, tokens = place
            numbers = compare(seconds[name][place], seconds[ADAM][place])
            more = {"distinct_slots": distinct[place], "turns": "steps"}
            report.result(NAMES[what], tokens, n_keys, name, AGAINST[what], **numbers, **more)


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


def places_of(settings: Settings) -> List[Place]:
    """The measurements; inference comes first, since training changes weights."""
    return list(product((FORWARD, TRAIN), settings.grid_tokens))


def needed_bytes(n_keys: int) -> int:
    """The approximate memory of all contestants."""
    tables = subjects.TABLES[ADAM] + sum(size / 4 for *_, size in NARROW)
    return int(tables * subjects.table_bytes(n_keys))


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    return len(settings.parts_n_keys) * len(places_of(settings)) * len(NARROW)
