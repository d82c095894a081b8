"""Product-key memory in plain torch; needs no fairseq."""

from .adam import MemoryAdam, ignore_tables_in_ddp, memory_param_groups
from .config import MemoryConfig
from .layer import Lookup, ProductKeyMemory, build_values
from .search import product_topk
from .sharding import ColumnShards
from .staleness import ReadTimes
from .usage import MemoryUsage
from .values import ValueTable

__all__ = [
    "ColumnShards",
    "Lookup",
    "MemoryAdam",
    "MemoryConfig",
    "MemoryUsage",
    "ProductKeyMemory",
    "ReadTimes",
    "ValueTable",
    "build_values",
    "ignore_tables_in_ddp",
    "memory_param_groups",
    "product_topk",
]
