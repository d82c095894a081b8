"""The memory's operations on the CPU, compiled by numba; the loops are in ``numba_kernels``."""

import contextlib
import logging
import os
import threading
from typing import Any, Callable, Iterator, Optional, Set, Tuple

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None  # type: ignore[assignment]

import numba
import numba.np.ufunc.parallel
import numpy as np
import torch
from torch import Tensor

from . import backends

if numba.config.DISABLE_JIT:
    raise RuntimeError("NUMBA_DISABLE_JIT is set")

from . import numba_kernels as loops
from .float8 import Float8Table, Table
from .tables import Entries, StochasticRounding, chance_of, is_half

Array = Any  # numpy's arrays; numba does not use type hints

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int8)  # of tables

TASKS_PER_THREAD = 4
NUMBERS = {
    torch.float32: np.dtype(np.float32).str,
    torch.float64: np.dtype(np.float64).str,
    torch.bfloat16: np.dtype(np.uint16).str,
    torch.int64: np.dtype(np.int64).str,
    torch.int8: np.dtype(np.int8).str,
    torch.uint8: np.dtype(np.uint8).str,
}
logger = logging.getLogger(__name__)
logging.getLogger("numba").setLevel(logging.WARNING)  # its debug output is too long
_one_at_a_time = threading.Lock()  # numba's simplest thread pool aborts when entered twice
_compiled: Set[Tuple[Any, ...]] = set()  # kernels and the types of their arguments


def topk_pairs(
    half_scores: Tensor, knn: int, rank1: Tensor, rank2: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.topk_pairs``."""
    heads, _, n, _ = half_scores.shape
    scores = half_scores.new_empty(n, heads, knn)
    index1, index2 = rank1.new_empty(2, n, heads, knn)
    _run(loops.topk_pairs, *map(_array, (half_scores, rank1, rank2, scores, index1, index2)))
    return scores, index1, index2


def score_gradients(
    query: Tensor, keys: Tensor, index1: Tensor, index2: Tensor, grad_scores: Tensor
) -> Tuple[Tensor, Tensor]:
    """See ``pkm_fairseq.memory.kernels.score_gradients``."""
    grad_query, grad_keys = torch.empty_like(query), torch.zeros_like(keys)
    _run(loops.grad_query, *map(_array, (keys, index1, index2, grad_scores, grad_query)))
    _run(loops.grad_keys, *map(_array, (query, index1, index2, grad_scores, grad_keys)))
    return grad_query, grad_keys


def gather_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_sum``."""
    out = weights.new_empty(len(slots), values.shape[1])
    _run(loops.gather_sum, *map(_array, (values, slots, weights, out)))
    return out


def gather_dot(values: Tensor, slots: Tensor, grad_read: Tensor) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.gather_dot``."""
    out = grad_read.new_empty(slots.shape)
    rows, starts, order = _group(slots.view(-1), len(values))
    given = _array(values), rows, starts, order, _array(grad_read)
    _run(loops.gather_dot, *given, slots.shape[1], _array(out.view(-1)))
    return out


def adam_rows(
    values: Tensor,
    exp_avg: Table,
    exp_avg_sq: Table,
    entries: Entries,
    step_size: float,
    betas: Tuple[float, float],
    eps: float,
    rounding: Optional[StochasticRounding] = None,
) -> None:
    """See ``pkm_fairseq.memory.kernels.adam_rows``."""
    number = _array(entries.grads).dtype.type
    settings = map(number, (step_size, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps))
    tables = values, exp_avg, exp_avg_sq
    given = *map(_table, tables), *_row_entries(entries, len(values)), *settings
    if not any(is_half(table.dtype) for table in tables):
        rounding = None  # no random bits are needed
    _run(loops.adam_rows, *given, *chance_of(rounding))


def squared_norm(entries: Entries, n_slots: int) -> Tensor:
    """See ``pkm_fairseq.memory.kernels.squared_norm``."""
    rows, *given = _row_entries(entries, n_slots)
    squares = np.empty(len(rows), dtype=np.float64)
    _run(loops.row_squares, *given, squares)
    return torch.tensor(squares.sum(), device=entries.grads.device)


def _row_entries(entries: Entries, n_slots: int) -> Tuple[Array, ...]:
    """The rows read (R,), the starts of their entries (R + 1,), the entries' order, and entries."""
    rows, starts, order = _group(entries.slots, n_slots)
    return rows, starts, order, *map(_array, (entries.bags, entries.weights, entries.grads))


class _Memory:
    """numpy's array interface to a tensor's memory; bfloat16 looks like uint16.

    ``Tensor.numpy`` would permanently keep torch from freeing or resizing the memory. FSDP does
    both to parameters that it has gathered.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.__array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.element_size() for stride in x.stride()),
            "typestr": NUMBERS[x.dtype],
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def _array(x: Tensor) -> Array:
    """The tensor's memory as a numpy array."""
    if x.numel() and not x.data_ptr():
        raise RuntimeError(f"the memory of a tensor of shape {tuple(x.shape)} has been freed")
    return np.asarray(_Memory(x))


def _table(table: Table) -> Any:
    """The memory of a table; of one in 8 bits, that of its codes and exponents."""
    if isinstance(table, Float8Table):
        return _array(table.codes), _array(table.exponents)
    return _array(table)


def _group(slots: Tensor, n_slots: int) -> Tuple[Array, Array, Array]:
    args = _array(slots), n_slots
    _compile(loops.group, args)
    grouped: Tuple[Array, Array, Array] = loops.group(*args)
    return grouped


def _run(kernel: Callable[..., None], *args: Any) -> None:
    """Run a kernel on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    args = (*args, threads * TASKS_PER_THREAD)
    _compile(kernel, args)
    with _one_at_a_time:
        numba.set_num_threads(threads)
        kernel(*args)


def _compile(kernel: Any, args: Tuple[Any, ...]) -> None:
    """Compile or load a kernel for arguments of these types, in one process at a time.

    If two processes compile a function for different types at the same time, numba's cache on disk
    can mix up their code. The wrong code then computes nonsense without an error.

    Raises:
        CannotRunError: the kernel can be neither compiled nor loaded; nothing has run yet.
    """
    kind = (kernel, *map(_kind, args))
    if kind not in _compiled:
        try:
            with _cache_locked(kernel.stats.cache_path):
                kernel.compile(tuple(map(numba.typeof, args)))
        except Exception as error:
            raise backends.CannotRunError(backends.one_line(error)) from error
        _compiled.add(kind)


def _kind(x: Any) -> Any:
    """What numba compiles for: equal for arguments of one type."""
    if isinstance(x, tuple):
        return tuple(map(_kind, x))
    return (x.dtype.char, x.flags.c_contiguous) if isinstance(x, np.ndarray) else type(x)


@contextlib.contextmanager
def _cache_locked(folder: Optional[str]) -> Iterator[None]:
    if folder is None or fcntl is None:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    file = os.open(os.path.join(folder, "pkm_fairseq.lock"), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning(
                f"memory kernels: {folder} cannot be locked ({error}): do not start "
                "several processes for the first time at once"
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a child forked meanwhile has the file open, too
        os.close(file)


def _start_threads() -> None:
    """Start numba's threads, and restore torch's number of threads, which numba changes."""
    threads = torch.get_num_threads()
    numba.set_num_threads(1)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _after_fork() -> None:
    """Use no threads in a forked child, because it does not have its parent's threads.

    numba's OpenMP would kill the child; torch's would wait forever for its threads.
    """
    backends.give_up("numba", "this process was forked from one that ran numba")
    torch.set_num_threads(1)


if os.getpid() != backends.PROCESS and numba.np.ufunc.parallel._is_initialized:
    raise RuntimeError("this process was forked from one that ran numba")
_start_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
