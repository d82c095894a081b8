"""Choose the rows of a value table that an update trains: those its batch reads unusually often.

Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103) ranks slots by TF-IDF: their share of
the batch's reads, times a logarithm that is small if background text reads them, too.
"""

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Optional

import torch
from torch import Tensor

from .kernels import Entries
from .observe.slot_counts import SlotCounts

SCORES = {
    "tf-idf": "share of the reads x log of the slot's rarity in background text",
    "count": "number of reads",
}


@dataclass(frozen=True)
class RowBudget:
    """The number of rows to train.

    Attributes:
        count: a fixed number; None if ``share`` is given.
        share: a share of the rows that are read, in (0, 1], rounded up.
    """

    count: Optional[int] = None
    share: Optional[float] = None

    @classmethod
    def parse(cls, text: object) -> "RowBudget":
        """Read "24000", "0.5" or "50%".

        Raises:
            ValueError: the text is none of these; the message says what is allowed.
        """
        said = str(text).strip()
        try:
            if said.endswith("%"):
                budget = cls(share=float(Decimal(said[:-1]) / 100))  # 1.1 % is 0.011
            elif said.isdecimal():
                budget = cls(count=int(said))
            else:
                budget = cls(share=float(said))
        except (ValueError, ArithmeticError):  # of floats and of decimals
            budget = cls(count=0)
        if not (budget.count or 0) >= 1 and not 0 < (budget.share or 0) <= 1:
            raise ValueError(
                f"{text!r}, must be a number of rows, e.g. 1024, or a share of the rows that are "
                "read, e.g. 0.5 or 50%"
            )
        return budget

    def __str__(self) -> str:
        """The number or the share, in words."""
        return f"{self.count:,}" if self.count is not None else f"{100 * (self.share or 0):g} %"

    def rows(self, n_read: int) -> int:
        """How many of the rows that are read to train."""
        if self.count is not None:
            return min(self.count, n_read)
        assert self.share is not None
        share = Fraction(str(self.share))  # 7 % of 100 rows are 7; in floats a little more
        return min(math.ceil(share * n_read), n_read)


class RowChoice:
    """Chooses the rows of a value table that an update trains.

    ``score(i) = c(i) / sum c * log((B + 1) / (b(i) + 1))``, where the batch reads slot i c(i)
    times, and b(i) of B background batches read it. Among the rows that are read it chooses those
    with the highest scores; if scores are equal, the lower slot.

    Args:
        budget: how many rows to choose.
        background: counts of background text; None scores only by the number of reads.
        data: choose once, by the counts of this text; None chooses in each update.

    Raises:
        ValueError: the counts are of tables of different sizes, or of no batch.

    Attributes:
        n_read: rows that the last update read.
        n_chosen: rows that the last update trained.
    """

    def __init__(
        self,
        budget: RowBudget,
        background: Optional[SlotCounts] = None,
        data: Optional[SlotCounts] = None,
    ) -> None:
        self.budget = budget
        self.n_read = self.n_chosen = 0
        self._rarity = None if background is None else rarity(background)
        self._fixed: Optional[Tensor] = None
        if data is not None:
            if background is not None and background.n_slots != data.n_slots:
                raise ValueError(
                    f"background counts {background.n_slots} slots, data {data.n_slots}, must "
                    "count the same table"
                )
            self._fixed = torch.zeros(data.n_slots, dtype=torch.bool)
            self._fixed[self.choose(data.reads)] = True

    def choose(self, reads: Tensor) -> Tensor:
        """The rows with the highest scores, (T,), ascending.

        Args:
            reads: (n_slots,), int64: how often each slot is read.
        """
        read = reads.nonzero().squeeze(1)  # (R,), ascending
        scores = self.scores(reads)[read]
        best = scores.argsort(descending=True, stable=True)[: self.budget.rows(len(read))]
        return read[best].sort().values

    def scores(self, reads: Tensor) -> Tensor:
        """The scores of all slots, (n_slots,), float64, from their numbers of reads."""
        share = reads.double() / reads.sum().clamp(min=1)
        return share if self._rarity is None else share * self._rarity.to(share.device)

    def keep(self, entries: Entries, reads: Tensor) -> Entries:
        """The entries of a gradient whose rows are chosen.

        Args:
            entries: the gradient.
            reads: (n_slots,), int64: how often each slot is read, by all micro-batches and workers.
        """
        if self._fixed is None:
            may_move = torch.zeros_like(reads, dtype=torch.bool)
            may_move[self.choose(reads)] = True
        else:
            may_move = self._fixed.to(reads.device)
        self.n_read = int((reads > 0).sum())
        self.n_chosen = int((may_move & (reads > 0)).sum())
        kept = may_move[entries.slots]  # (E,)
        return Entries(
            entries.slots[kept], entries.weights[kept], entries.bags[kept], entries.grads
        )


def rarity(background: SlotCounts) -> Tensor:
    """``log((B + 1) / (b(i) + 1))`` of each slot i, (n_slots,), float64.

    Args:
        background: the counts b(i) and B.

    Raises:
        ValueError: there is no batch.
    """
    if not background.n_batches:
        raise ValueError("background has 0 batches, must have at least 1")
    return torch.log((background.n_batches + 1) / (background.batches.double() + 1))
