"""Results of a comparison: plain numbers for reports."""

from dataclasses import dataclass, field
from typing import List

from torch import Tensor


@dataclass(frozen=True)
class HeadResult:
    """The comparison of one head's look-ups with the exact ones.

    Each difference is the maximum over all queries and neighbours. A row is tied at k if its k-th
    and (k + 1)-th exact scores differ by at most the tolerance. The search is then free to choose
    among the slots with about the k-th score, and recall ignores them. Verdicts are row by row.

    Attributes:
        head: its index.
        score_difference: between the scores of the search and of FAISS, both sorted.
        score_difference_relative: the same, relative to FAISS' score.
        score_tolerance: the smallest tolerance of any row.
        rescored_difference: between the sorted float64 scores of the slots found and FAISS' scores.
        weight_difference: between the weights and those of these float64 scores, slot by slot.
        weight_tolerance: the smallest tolerance of a weight of 1 in any row.
        recall_at_1: share of rows whose first slot has the best score, within tolerance.
        recall_at_k: share of FAISS' slots that were found or are free.
        same_at_1: share of rows whose first slot is the same as FAISS' slot.
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
    """The errors of a reduced precision, against the exact float32 search; no verdict.

    The attributes are those of ``HeadResult``, over all heads.
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
        read_difference: largest difference between the layer's read and the exact read.
        read_tolerance: the smallest tolerance of any read.
        output_difference: largest difference between the layer's output and the exact output for
            its read.
        output_tolerance: the smallest tolerance of any output.
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
