"""Large tables in large pages: random rows then cost fewer look-ups of addresses."""

import ctypes
import sys

from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most others
MADV_HUGEPAGE = 14  # <linux/mman.h>


def advise_huge_pages(table: Tensor) -> None:
    """Ask Linux to back a table that nothing was written to yet with huge pages.

    It is advice: where the system does not follow it, reads are slower and nothing else changes.
    """
    start = -(-table.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (table.data_ptr() + table.nbytes) // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and table.device.type == "cpu" and start < end:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
