"""Tables and the entries of their gradients, and the precision of both."""

import ctypes
import sys
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most others
MADV_HUGEPAGE = 14  # <linux/mman.h>


class Entries(NamedTuple):
    """The gradient of a value table as a sum of outer products, one entry per value read.

    ``gradient[slots[e]] += weights[e] * grads[bags[e]]`` for every entry e.

    Attributes:
        slots: (E,), int64.
        weights: (E,), in the dtype of grads.
        bags: (E,), int64, the row of grads that belongs to the entry.
        grads: (B, V), the gradients of the reads, in at least float32.
    """

    slots: Tensor
    weights: Tensor
    bags: Tensor
    grads: Tensor


class StochasticRounding(NamedTuple):
    """Stochastic rounding of tables in bfloat16: up or down at random, exact in expectation.

    Rounding to nearest loses every update below half a unit in the last place; stochastic rounding
    keeps it in the mean (Gupta et al. 2015, arXiv 1502.02551). The random bits are a hash of seed,
    step, slot and column: the same in every run, on every device and for every worker. Values and
    moments share the hash, since it is a large part of an update's work; each multiplies it by its
    number in ``FACTORS``, and takes the highest bits.

    Attributes:
        seed: different for each value table.
        step: the number of the update.
        first_column: this worker's first column, if workers split the table by columns.
    """

    seed: int
    step: int
    first_column: int = 0

    def key(self) -> int:
        """A key of 32 bits for an update."""
        return mix(mix(self.seed) + self.step)


FACTORS = (1, 0x9E3779B1, 0x85EBCA77)  # odd, so they keep all 32 bits; of values and both moments
NEAREST = -1  # in place of a key: round to nearest, ties to even


def mix(x: int) -> int:
    """A hash of 32 bits: MurmurHash3's finaliser (A. Appleby, public domain)."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def chance_of(rounding: Optional[StochasticRounding]) -> Tuple[int, int]:
    """The arguments of kernels for rounding: the key, and the first column."""
    return (NEAREST, 0) if rounding is None else (rounding.key(), rounding.first_column)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations: float32 for half precision; float32 and float64 stay."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Whether a floating dtype is half precision."""
    return compute_dtype(dtype) != dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay."""
    return x.to(compute_dtype(x.dtype))


def allocate(
    n_slots: int,
    v_dim: int,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Allocate an uninitialised table, (n_slots, v_dim).

    Raises:
        MemoryError: the table does not fit; the message says how large it is.
    """
    try:
        table = torch.empty(n_slots, v_dim, dtype=dtype, device=device)
    except RuntimeError as error:
        size = n_slots * v_dim * (dtype or torch.get_default_dtype()).itemsize
        raise MemoryError(
            f"a table of {n_slots:,} slots of width {v_dim} takes {size:,} bytes "
            f"({size / 2**30:,.1f} GiB), which could not be had"
        ) from error
    _advise_huge_pages(table)
    return table


def _advise_huge_pages(table: Tensor) -> None:
    """Ask Linux for huge pages for a table, before the first write to it.

    Reads of random rows then need fewer address translations. Linux may ignore this advice; reads
    are slower then, and nothing else changes.
    """
    start = -(-table.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (table.data_ptr() + table.nbytes) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and table.device.type == "cpu" and start < end:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
