"""The parts of a step one by one; parts that read or write tables are compared with memcpy."""

import gc
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory import ProductKeyMemory, kernels
from ...memory.adam import MOMENTS, MemoryAdam
from ...memory.gradient import FactoredGradient
from ...memory.search import candidate_ranks, half_scores, slot_of
from . import subjects
from .layer import check, shortage
from .machine import Memcpy
from .output import Report
from .settings import Settings
from .subjects import ADAM, FUSED, LR, OURS, SPARSE, TEXTBOOK, WIDTH
from .textbook import TextbookMemory
from .timing import Prepare, compare, interleave

BETAS, EPS = (0.9, 0.999), 1e-8
BYTES_OF_ENTRY = 8 + 8 + 4  # slot, row of the gradient, weight
UPDATES = (ADAM, FUSED, SPARSE)
OF_SEARCH = ("query", "half_scores", "topk_pairs", "score_gradients")
OF_TABLE = ("gather_sum", "gather_dot")


class Contest(NamedTuple):
    """One part, computed by our code and by another's.

    Attributes:
        bytes: the minimum traffic: each row that is read counts once, each operand once.
        bytes_by_entry: the same, but each row counts as often as it is read.
    """

    ours: Prepare
    other: Prepare
    bytes: Optional[int] = None
    bytes_by_entry: Optional[int] = None


class Setting:
    """One memory, its textbook copy and the intermediate results of a step, for one batch.

    Args:
        memory: in training mode, with the same weights as the textbook one.
        textbook: the other side.
        x: (N, width).
    """

    def __init__(self, memory: ProductKeyMemory, textbook: TextbookMemory, x: Tensor) -> None:
        self.memory, self.textbook, self.x = memory, textbook, x
        self.values = memory.values.weight.detach()
        self.knn = memory.config.knn
        with torch.no_grad():
            self.query = memory.query(x)  # (N, H, 2, D)
            slots, weights = memory.search(x)  # (N, H, K)
        self.slots, self.weights = slots.flatten(1), weights.flatten(1)  # (N, T)
        self.grad = torch.randn(len(x), WIDTH)
        self.rows = len(self.slots.unique())

    def bytes(self, tables: int, more: int, rows: Optional[int] = None) -> int:
        """Bytes of the rows in some tables, of one read or its gradient, and of extra operands."""
        rows = self.rows if rows is None else rows
        return (tables * rows + len(self.x)) * WIDTH * 4 + more


def measure(settings: Settings, report: Report, memcpy: Memcpy) -> None:
    """Measure the parts over the grid of sizes; skip sizes that do not fit into memory."""
    for n_keys in settings.parts_n_keys:
        gc.collect()  # tables of the last size
        problem = shortage(2 * subjects.table_bytes(n_keys) + subjects.SLACK)
        if problem:
            for tokens, (what, against) in product(settings.grid_tokens, names()):
                report.skip(what, tokens, n_keys, against, problem)
        else:
            torch.manual_seed(settings.seed)
            _measure_size(n_keys, settings.grid_tokens, Timer(settings.rounds, report, memcpy))


def _measure_size(n_keys: int, grid_tokens: Sequence[int], timer: "Timer") -> None:
    memory = subjects.new_memory(n_keys)
    textbook = TextbookMemory(memory)
    check(memory, subjects.Subject(TEXTBOOK, textbook, textbook, ()))
    for tokens in grid_tokens:
        setting = Setting(memory, textbook, torch.randn(tokens, WIDTH))
        for what, contest in {**of_search(setting), **of_table(setting)}.items():
            timer.measure(what, TEXTBOOK, setting, contest)
        for name in UPDATES:
            problem = update_problem(setting, name)
            if problem:
                timer.report.skip("adam_rows", tokens, n_keys, name, problem)
            else:  # no variable may keep the contest alive, since it holds tables
                timer.measure("adam_rows", name, setting, update(setting, name))
                textbook.values.weight.grad = None


def names() -> List[Any]:
    """The parts, each with its counterpart."""
    return [
        *product((*OF_SEARCH, *OF_TABLE), (TEXTBOOK,)),
        *product(("adam_rows",), UPDATES),
    ]


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    return len(settings.grid_tokens) * len(settings.parts_n_keys) * len(names())


def of_search(setting: Setting) -> Dict[str, Contest]:
    """From tokens to slots, and back from the gradient of scores."""
    memory, textbook, x, knn = setting.memory, setting.textbook, setting.x, setting.knn
    keys, query = memory.keys.detach(), setting.query
    half = half_scores(query, keys).permute(1, 2, 0, 3)  # (H, 2, N, S), as the search makes them
    their_half = textbook.half_scores(query).detach()  # (N, H, 2, S)
    ranks = candidate_ranks(knn, x.device)

    def topk_pairs() -> Tensor:
        _, index1, index2 = kernels.topk_pairs(half, knn, *ranks)
        return slot_of(index1, index2, keys.shape[2])

    return {
        "query": Contest(_always(_no_grad(memory.query, x)), _always(_no_grad(textbook.query, x))),
        "half_scores": Contest(
            _always(_no_grad(half_scores, query, keys)),
            _always(_no_grad(textbook.half_scores, query)),
        ),
        "topk_pairs": Contest(_always(topk_pairs), _always(_no_grad(textbook.search, their_half))),
        "score_gradients": _score_gradients(setting),
    }


def _score_gradients(setting: Setting) -> Contest:
    keys, query = setting.memory.keys.detach(), setting.query
    half = half_scores(query, keys).permute(1, 2, 0, 3)
    ranks = candidate_ranks(setting.knn, query.device)
    scores, index1, index2 = kernels.topk_pairs(half, setting.knn, *ranks)
    grad = torch.randn_like(scores)  # (N, H, K)

    def theirs(_: int) -> Callable[[], object]:
        leaf = query.detach().requires_grad_()
        found = setting.textbook.search(setting.textbook.half_scores(leaf))
        into = (leaf, setting.textbook.keys)
        return partial(torch.autograd.grad, found.scores, into, grad)

    ours = partial(kernels.score_gradients, query, keys, index1, index2, grad)
    return Contest(_always(ours), theirs)


def of_table(setting: Setting) -> Dict[str, Contest]:
    """The reads of the table: forward, and backward to the weights."""
    slots, weights, grad = setting.slots, setting.weights, setting.grad
    entries = slots.numel()
    operands = slots.nbytes + weights.nbytes
    values, their_values = setting.values, setting.textbook.values.weight.detach()

    def their_gradient(_: int) -> Callable[[], object]:
        leaf = weights.detach().requires_grad_()
        read = F.embedding_bag(slots, their_values, per_sample_weights=leaf, mode="sum")
        return partial(torch.autograd.grad, read, leaf, grad)

    read = partial(F.embedding_bag, slots, their_values, mode="sum", per_sample_weights=weights)
    sizes = setting.bytes(1, operands), setting.bytes(1, operands, rows=entries)
    return {
        "gather_sum": Contest(
            _always(partial(kernels.gather_sum, values, slots, weights)), _always(read), *sizes
        ),
        "gather_dot": Contest(
            _always(partial(kernels.gather_dot, values, slots, grad)), their_gradient, *sizes
        ),
    }


def update_problem(setting: Setting, name: str) -> str:
    """Why an update does not fit into memory; empty if it fits."""
    more = subjects.TABLES[name] - 1 + len(MOMENTS)  # tables that are not there yet
    gathered = subjects.GATHERED.get(name, 0) * setting.slots.numel() * WIDTH * 4
    return shortage(more * setting.values.nbytes + gathered + subjects.SLACK)


def update(setting: Setting, name: str) -> Contest:
    """Adam on the rows read, against the backward pass to the table and an optimizer's step."""
    slots, weights = setting.slots, setting.weights
    values = setting.memory.values.weight
    lazy = MemoryAdam([values], lr=LR, betas=BETAS, eps=EPS)

    table = setting.textbook.values.weight
    if name == SPARSE:
        optimizer: torch.optim.Optimizer = torch.optim.SparseAdam([table], LR, BETAS, EPS)
    else:
        optimizer = torch.optim.Adam([table], LR, BETAS, EPS, fused=subjects.is_fused(name))

    def theirs(_: int) -> Callable[[], object]:
        optimizer.zero_grad()
        read = F.embedding_bag(
            slots, table, mode="sum", sparse=name == SPARSE, per_sample_weights=weights
        )
        return lambda: (read.backward(setting.grad), optimizer.step())

    operands = slots.numel() * BYTES_OF_ENTRY
    tables = 2 * len(("values", *MOMENTS))  # each is read and written
    ours = our_update(lazy, values, slots, weights, setting.grad)
    return Contest(ours, theirs, setting.bytes(tables, operands))


def our_update(
    adam: torch.optim.Optimizer, values: Any, slots: Tensor, weights: Tensor, grad: Tensor
) -> Prepare:
    """Our update of the values alone, with a gradient as the backward pass makes it.

    Args:
        adam: a ``MemoryAdam`` that has the values.
        values: the table.
        slots: (N, T).
        weights: (N, T).
        grad: the gradient of the read, (N, width).
    """

    def prepare(_: int) -> Callable[[], object]:
        adam.zero_grad()
        values.grad = FactoredGradient.of_read(values, slots, weights, grad)
        return adam.step

    return prepare


class Timer(NamedTuple):
    """Measures contests and records the results."""

    rounds: int
    report: Report
    memcpy: Memcpy

    def measure(self, what: str, against: str, setting: Setting, contest: Contest) -> None:
        """Time both sides alternately, and also memcpy if the contest counts bytes."""
        sides = {OURS: contest.ours, against: contest.other}
        if contest.bytes is not None:
            sides["memcpy"] = _always(self.memcpy)
        seconds = interleave(sides, self.rounds)
        numbers = compare(seconds[OURS], seconds[against])
        if contest.bytes is not None:
            copied = self.memcpy.note(seconds["memcpy"])
            numbers |= throughput(contest.bytes, seconds[OURS], copied)
            if contest.bytes_by_entry is not None:
                by_entry = throughput(contest.bytes_by_entry, seconds[OURS], copied)
                numbers |= {f"{key}_by_entry": number for key, number in by_entry.items()}
        sizes = len(setting.x), setting.memory.config.n_keys
        more = {"distinct_slots": setting.rows, "turns": "steps"}
        self.report.result(what, *sizes, OURS, against, **numbers, **more)


def throughput(n_bytes: int, seconds: List[float], memcpy: List[float]) -> Dict[str, Any]:
    """Bytes per second, and the share of memcpy's of the same round; medians."""
    speeds = [n_bytes / took / 1e9 for took in seconds]
    shares = [speed / copied for speed, copied in zip(speeds, memcpy, strict=True)]
    return {"bytes": n_bytes, "gb_s": median(speeds), "share_of_memcpy": median(shares)}


def _always(step: Callable[[], object]) -> Prepare:
    """The same step in every round, with nothing to prepare."""
    return lambda _: step


def _no_grad(function: Callable[..., object], *args: Any) -> Callable[[], object]:
    return torch.no_grad()(partial(function, *args))
