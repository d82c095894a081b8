"""Check with FAISS that the product-key search is exact; the only importer of faiss."""

from .compare import random_like, validate_memory
from .exact import exact_topk, key_blocks
from .results import HeadResult, LayerResult, ReducedResult

__all__ = [
    "HeadResult",
    "LayerResult",
    "ReducedResult",
    "exact_topk",
    "key_blocks",
    "random_like",
    "validate_memory",
]
