"""Exact FAISS search over full keys, block by block: the reference for the product-key search."""

from typing import Any, Callable, Iterator, Optional, Tuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    import faiss
    from faiss.contrib.exhaustive_search import knn_ground_truth
except ImportError as error:
    raise ImportError(
        f"faiss cannot be imported ({error}); install it with: pip install faiss-cpu"
    ) from None

Array = npt.NDArray[np.float32]
BLOCK_BYTES = 128 * 2**20  # FAISS holds a copy: a search needs about twice this


def key_blocks(keys: Tensor, block_bytes: int = BLOCK_BYTES) -> Iterator[Array]:
    """The full keys of one head, in the order of their slots, in blocks.

    The key of slot ``i1 * S + i2`` is sub-key ``i1`` of the first half followed by ``i2`` of the
    second. A block holds all keys of some ``i1``; the next block overwrites it.

    Args:
        keys: sub-keys of one head, (2, S, D).
        block_bytes: size of a block; the minimum is all slots of one ``i1``.

    Yields:
        (B, 2 * D), float32.
    """
    first, second = keys.detach().float().cpu().numpy()  # (S, D), (S, D)
    n_keys, half_dim = first.shape
    per_block = min(n_keys, max(1, block_bytes // (n_keys * 2 * half_dim * 4)))
    block = np.empty((per_block, n_keys, 2, half_dim), dtype=np.float32)
    block[:, :, 1] = second
    for start in range(0, n_keys, per_block):
        part = first[start : start + per_block]
        block[: len(part), :, 0] = part[:, None]
        yield block[: len(part)].reshape(-1, 2 * half_dim)


def exact_topk(
    query: Tensor,
    keys: Tensor,
    k: int,
    block_bytes: int = BLOCK_BYTES,
    progress: Optional[Callable[[float], None]] = None,
) -> Tuple[Array, npt.NDArray[np.int64]]:
    """The ``k`` best of all S * S slots of one head: FAISS' exact inner products, float32.

    It searches blocks one by one (``IndexFlatIP``; on all GPUs if FAISS has any) and merges their
    results. Keys that fit into one block form one index.

    Args:
        query: (N, 2 * D).
        keys: sub-keys of one head, (2, S, D).
        k: results per query.
        block_bytes: size of a block of keys.
        progress: called after each block with the share of slots it holds.

    Returns:
        Scores and slots, each (N, k), scores descending.

    Raises:
        ValueError: k is out of range.
    """
    n_slots = keys.shape[1] ** 2
    if not 1 <= k <= n_slots:
        raise ValueError(f"k is {k}, must be between 1 and the size of the index, {n_slots}")

    def blocks() -> Iterator[Array]:
        for block in key_blocks(keys, block_bytes):
            yield block
            if progress is not None:
                progress(len(block) / n_slots)

    faiss.omp_set_num_threads(
        torch.get_num_threads()
    )  # FAISS has its own thread pool; use torch's number
    queries = np.ascontiguousarray(query.detach().float().cpu().numpy())
    search: Any = knn_ground_truth  # untyped
    scores, slots = search(queries, blocks(), k, faiss.METRIC_INNER_PRODUCT)
    return scores, slots
