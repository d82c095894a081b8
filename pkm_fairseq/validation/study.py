"""Product-key search beside FAISS' exact and approximate indexes over the same full keys."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Callable, Dict, Iterator, List, Tuple

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..memory import product_topk
from .exact import Array, key_blocks

Slots = npt.NDArray[np.int64]
FLAT = "exact flat"
# index -> (FAISS' description, its parameter for the search, values of it)
INDEXES: Dict[str, Tuple[str, str, List[int]]] = {
    "scalar quantiser, 8 bit": ("SQ8", "", [0]),
    "scalar quantiser, 4 bit": ("SQ4", "", [0]),
    "IVF, 1024 lists": ("IVF1024,Flat", "nprobe", [4, 16, 64, 256]),
    "HNSW, 32 links": ("HNSW32", "efSearch", [32, 128, 512]),
}


@dataclass(frozen=True)
class StudyRow:
    """One search method at one setting.

    Attributes:
        method: its name.
        setting: its parameter for the search.
        recall_at_k: share of the exact k best slots that it finds.
        queries_per_second: median over the rounds, all queries in one batch.
        megabytes: size of the index, 1e6 bytes.
        build_seconds: time to train and fill the index.
    """

    method: str
    setting: str
    recall_at_k: float
    queries_per_second: float
    megabytes: float
    build_seconds: float


@dataclass(frozen=True)
class Method:
    """A way to search; ``search`` maps nothing to the slots (N, k) of all queries."""

    name: str
    setting: str
    megabytes: float
    build_seconds: float
    search: Callable[[], Slots]


@torch.no_grad()
def compare_indexes(
    query: Tensor,
    keys: Tensor,
    knn: int,
    rounds: int = 5,
    progress: Callable[[str], None] = print,
) -> List[StudyRow]:
    """Time every method on the same queries, in turns, and measure its recall.

    Args:
        query: queries of one head, (N, 2, D).
        keys: its sub-keys, (2, S, D).
        knn: slots to find.
        rounds: how often every method takes its turn.
        progress: told what is being done.

    Returns:
        A row for each method and setting, the product-key search first, exact flat next.

    Raises:
        ValueError: knn or rounds is out of range.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, must be at least 1")
    faiss.omp_set_num_threads(torch.get_num_threads())
    methods = [product_keys(query, keys, knn)]
    for method in full_key_methods(query, keys, knn):
        progress(f"built {method.name} {method.setting} in {method.build_seconds:.1f} s")
        methods.append(method)
    found = {id(method): method.search() for method in methods}  # also warms up
    seconds: Dict[int, List[float]] = {id(method): [] for method in methods}
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for method in methods:
            start = time.perf_counter()
            method.search()
            seconds[id(method)].append(time.perf_counter() - start)
    exact = next(found[id(method)] for method in methods if method.name == FLAT)
    return [
        StudyRow(
            method=method.name,
            setting=method.setting,
            recall_at_k=recall(found[id(method)], exact),
            queries_per_second=len(query) / median(seconds[id(method)]),
            megabytes=method.megabytes,
            build_seconds=method.build_seconds,
        )
        for method in methods
    ]


def product_keys(query: Tensor, keys: Tensor, knn: int) -> Method:
    """The search under study; its index is the sub-keys."""
    batch, heads = query[:, None], keys[None]  # (N, 1, 2, D), (1, 2, S, D)
    product_topk(batch[:1], heads, knn)  # complains of a wrong knn before anything is built

    def search() -> Slots:
        slots: Slots = product_topk(batch, heads, knn)[1][:, 0].numpy()
        return slots

    return Method("product keys", "", keys.numel() * keys.element_size() / 1e6, 0.0, search)


def full_key_methods(query: Tensor, keys: Tensor, knn: int) -> Iterator[Method]:
    """FAISS' indexes, each over all full keys."""
    queries = np.ascontiguousarray(query.flatten(1).float().numpy())  # (N, k_dim)
    table = np.concatenate([block.copy() for block in key_blocks(keys)])  # (S * S, k_dim)
    for name, (description, parameter, values) in {FLAT: ("Flat", "", [0]), **INDEXES}.items():
        start = time.perf_counter()
        index = _built(description, table)
        seconds = time.perf_counter() - start
        megabytes = faiss.serialize_index(index).nbytes / 1e6
        for value in values:
            setting = f"{parameter} {value}" if parameter else ""
            search = _search(index, queries, knn, parameter, value)
            yield Method(name, setting, megabytes, seconds, search)


def recall(found: Slots, exact: Slots) -> float:
    """Share of the exact slots (N, k) that are among the found ones (N, k)."""
    return float((exact[:, :, None] == found[:, None, :]).any(-1).mean())


def _built(description: str, table: Array) -> faiss.Index:
    index = faiss.index_factory(table.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    index.train(table)
    index.add(table)
    return index


def _search(
    index: faiss.Index, queries: Array, knn: int, parameter: str, value: int
) -> Callable[[], Slots]:
    def search() -> Slots:
        if parameter:
            faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        slots: Slots = index.search(queries, knn)[1]
        return slots

    return search
