"""Tables in 8-bit floats that share an exponent: moments in about a quarter of float32's bytes.

A row is split into blocks of 64 columns. A block stores the exponent E of its largest magnitude,
and for each number a code. With ``k = code // 8``, ``m = code % 8`` and T the largest k,

    number = 2^(E - T) * 2^k * (1 + m / 8)        for k > 0
    number = 2^(E - T) * 2 * m / 8                for k = 0

That is the idea of block-wise 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861), with the
floats of the OCP microscaling formats, whose scales are powers of two, too. So the numbers have the
same bits on every backend, and bfloat16 holds each of them exactly.
"""

from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # columns that share an exponent
BYTES = 1 + 1 / BLOCK  # of a number
LEAST_EXPONENT, NO_NUMBER = 64, 255  # biased; the latter is of a block with NaN or infinity
LEAST_PART, NEAREST_PART = 0xFFFFF, 0x7FFFF  # of the 20 bits that a code cuts off
ROWS = 8192  # rows to convert at once


class Float8Table:
    """A table of numbers in 8 bits, and the exponents of its blocks; all numbers are 0 at first.

    Args:
        n_slots: number of rows.
        width: number of columns.
        signed: whether numbers can be negative; codes then have 4 bits for k, else 5.
        device: where to store it.

    Attributes:
        codes: (n_slots, V); int8 with the sign of the number if signed, else uint8.
        exponents: (n_slots, blocks), uint8: E + 127, or 255 if a number of the block is none.
    """

    dtype = torch.bfloat16  # of the rows that are read

    def __init__(
        self, n_slots: int, width: int, signed: bool, device: Optional[torch.device] = None
    ) -> None:
        dtype = torch.int8 if signed else torch.uint8
        blocks = -(-width // BLOCK)
        self.codes = torch.zeros(n_slots, width, dtype=dtype, device=device)
        self.exponents = torch.full(
            (n_slots, blocks), LEAST_EXPONENT, dtype=torch.uint8, device=device
        )

    @property
    def shape(self) -> torch.Size:
        """(n_slots, V)."""
        return self.codes.shape

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.codes)

    def __getitem__(self, rows: object) -> Tensor:
        """Rows of the table, (R, V), in bfloat16, which holds them exactly."""
        return decode(self.codes[rows], self.exponents[rows])  # type: ignore[index]

    def store(self, rows: object, x: Tensor, noise: Optional[Tensor] = None) -> None:
        """Round rows to this table's numbers.

        Args:
            rows: an index of R rows.
            x: (R, V), float32.
            noise: (R, V), int64, random in 0..2^20 - 1: round up or down at random, exact in
                expectation; None rounds to nearest, ties to even.
        """
        self.codes[rows], self.exponents[rows] = encode(x, self.codes.dtype, noise)  # type: ignore[index]

    def copy_(self, table: Tensor) -> "Float8Table":
        """Round a whole table, (n_slots, V), to nearest; numbers of another Float8Table stay."""
        for start in range(0, len(self), ROWS):
            rows = slice(start, start + ROWS)
            self.store(rows, table[rows].to(self.codes.device, torch.float32))
        return self

    def decoded(self) -> Tensor:
        """The whole table, (n_slots, V), in bfloat16 on the CPU."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        for start in range(0, len(self), ROWS):
            whole[start : start + ROWS] = self[start : start + ROWS]
        return whole


Table = Union[Tensor, Float8Table]


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """The numbers, (R, V) in bfloat16, of codes (R, V) and exponents (R, blocks)."""
    lowest, base = limits(codes.dtype.is_signed)
    magnitude = codes.int().abs()
    is_low = (magnitude < 8).int()
    unit = (magnitude + base + 8 * is_low << 20).view(torch.float32) - is_low * lowest
    scale = (exponents.int() << 23).view(torch.float32)  # 2^E
    wide = scale.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    return (unit * wide * codes.sign()).bfloat16()


def encode(x: Tensor, dtype: torch.dtype, noise: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """The codes, (R, V) in dtype, and exponents, (R, blocks), of numbers (R, V) in float32.

    A positive number of an unsigned table never becomes 0: Adam divides by its root.
    """
    lowest, base = limits(dtype.is_signed)
    bits = (x.contiguous().view(torch.int32) & 0x7FFFFFFF).long()
    blocks = F.pad(bits, (0, -x.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
    exponents = (blocks.amax(2) + LEAST_PART >> 23).clamp(min=LEAST_EXPONENT)
    exponents[exponents > 253] = NO_NUMBER
    scale = (254 - exponents).clamp(min=0).int() << 23  # 2^-E; 0 for no numbers
    wide = scale.view(torch.float32).repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]
    y = torch.where(wide > 0, x.abs() * wide, 0.0)
    is_low = (y < lowest).int()
    bits = (y + is_low * lowest).view(torch.int32)
    if noise is None:
        noise = NEAREST_PART + (bits >> 20 & 1)
    magnitude = (bits + noise.int() >> 20) - base - 8 * is_low
    if not dtype.is_signed:
        return magnitude.maximum((y > 0).int()).to(dtype), exponents.byte()
    return (magnitude * x.sign().nan_to_num()).to(dtype), exponents.byte()


def limits(signed: bool) -> Tuple[float, int]:
    """The number at k = 1, m = 0 and E = 0, and 8 times the biased exponent of k = 0."""
    top = 15 if signed else 31
    return 2.0 ** (1 - top), (127 - top) << 3
