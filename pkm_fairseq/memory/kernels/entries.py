"""What reads leave of the gradient of a value table."""

from typing import NamedTuple

from torch import Tensor


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
