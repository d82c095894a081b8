"""What a comparison found: plain numbers for reports."""

from dataclasses import dataclass, field
from typing import List

from torch import Tensor


@dataclass(frozen=True)
class HeadResult:
    """How the look-ups of one head compare with the exact ones.

    A difference is the largest over all queries and neighbours. A row is tied at k if its k-th and
    (k + 1)-th exact scores differ by no more than the tolerance: which of the slots with about the
    k-th score are kept is then free, and recall does not ask for them. Verdicts are row by row.

    Attributes:
        head: its index.
        score_difference: of the search's scores from FAISS', both sorted.
        score_difference_relative: the same as a share of FAISS' score.
        score_tolerance: the least tolerance of any row.
        rescored_difference: of the float64 scores of the slots found, sorted, from FAISS' scores.
        weight_difference: of the weights from those of these float64 scores, slot by slot.
        weight_tolerance: the least tolerance of a weight of 1 in any row.
        recall_at_1: share of rows whose first slot has the best score, within tolerance.
        recall_at_k: share of FAISS' slots that were found or are free.
        same_at_1: share of rows whose first slot is the very slot FAISS returns.
        same_at_k: share of FAISS' slots that were found.
        ties_at_1: rows tied at 1.
        ties_at_k: rows tied at k.
        invalid_slots: slots out of range or returned twice in a row.
        exact: all of it is within tolerance.
    """

    head: int
    score_difference: float
    score_difference_relative: float
    score_tolerance: float
    rescored_difference: float
    weight_difference: float
    weight_tolerance: float
    recall_at_1: float
    recall_at_k: float
    same_at_1: float
    same_at_k: float
    ties_at_1: int
    ties_at_k: int
    invalid_slots: int
    exact: bool


@dataclass(frozen=True)
class ReducedResult:
    """What a reduced precision costs, against the exact float32 search; no verdict.

    Attributes as in ``HeadResult``, over all heads.
    """

    dtype: str
    score_difference: float
    weight_difference: float
    recall_at_1: float
    recall_at_k: float
    read_difference: float


@dataclass(frozen=True)
class LayerResult:
    """The comparison of one memory layer on queries of one source, "text" or "random".

    Attributes:
        read_difference: largest difference of what the layer read from the exact read.
        read_tolerance: the least tolerance of any read.
        output_difference: largest difference of the layer's output from what must be made of what
            it read.
        output_tolerance: the least tolerance of any output.
        exact: every head, the read and the output are within tolerance.
        differences: of all sorted scores, for plots; not in reports.
    """

    layer: int
    source: str
    queries: int
    n_keys: int
    n_slots: int
    k_dim: int
    v_dim: int
    knn: int
    dtype: str
    exact: bool
    read_difference: float
    read_tolerance: float
    output_difference: float
    output_tolerance: float
    heads: List[HeadResult]
    reduced: List[ReducedResult]
    differences: Tensor = field(repr=False, compare=False)
