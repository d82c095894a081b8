"""What operations work on: tables, entries of their gradient, and the precision of both."""

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
        grads: (B, V), the gradients of what was read, in at least float32.
    """

    slots: Tensor
    weights: Tensor
    bags: Tensor
    grads: Tensor


class StochasticRounding(NamedTuple):
    """How tables in bfloat16 are rounded: up or down by chance, so that the mean is the number.

    Rounding to nearest loses every update below half of the last place; the mean of stochastic
    rounding keeps it (Gupta et al. 2015, arXiv 1502.02551). The chance is a hash of seed, step,
    table, slot and column: the same in every run, on every device and for every worker.

    Attributes:
        seed: another one for each value table.
        step: the number of the update.
        first_column: of a table whose columns are split over workers, the first of this worker.
    """

    seed: int
    step: int
    first_column: int = 0

    def key(self, table: int) -> int:
        """32 bits for one of the tables of an update: 0 values, 1 and 2 its moments."""
        return mix(mix(mix(self.seed) + self.step) + table)


NEAREST = -1  # in place of a key: round to nearest, ties to even


def mix(x: int) -> int:
    """A hash of 32 bits: MurmurHash3's finaliser (A. Appleby, public domain)."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def keys_of(rounding: Optional[StochasticRounding]) -> Tuple[int, int, int, int]:
    """What kernels are given of a rounding: the keys of values and moments, the first column."""
    if rounding is None:
        return NEAREST, NEAREST, NEAREST, 0
    return rounding.key(0), rounding.key(1), rounding.key(2), rounding.first_column


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Is this floating dtype half precision?"""
    return compute_dtype(dtype) != dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(compute_dtype(x.dtype))


def allocate(
    n_slots: int,
    v_dim: int,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Memory for a table, (n_slots, v_dim), not initialised.

    Raises:
        MemoryError: it does not fit; the message says how large it is.
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
    """Ask Linux to back a table that nothing was written to yet with huge pages.

    Random rows then cost fewer look-ups of addresses. It is advice: where the system does not
    follow it, reads are slower and nothing else changes.
    """
    start = -(-table.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (table.data_ptr() + table.nbytes) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and table.device.type == "cpu" and start < end:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
