"""Product-key memory in plain torch; needs no fairseq."""

from .adam import MemoryAdam, memory_param_groups
from .config import MemoryConfig
from .ddp import ignore_read_times_in_ddp, ignore_tables_in_ddp
from .experts import Experts
from .finetune import FinetuneConfig, finetune_values
from .hosts import HasMemories
from .lookup import Lookup, Observation, Observer
from .mapped import MappedTable, ValuesFile, save_values
from .memory import ProductKeyMemory, build_values
from .observe.staleness import ReadTimes
from .observe.usage import MemoryUsage
from .output import LinearOutput, SwiluOutput
from .query import LinearQuery, MlpQuery
from .registry import OUTPUTS, QUERIES, VALUES
from .run import RunState
from .search import product_topk
from .sharding import ColumnShards
from .values import ValueTable

__all__ = [
    "OUTPUTS",
    "QUERIES",
    "VALUES",
    "ColumnShards",
    "Experts",
    "FinetuneConfig",
    "HasMemories",
    "LinearOutput",
    "LinearQuery",
    "Lookup",
    "MappedTable",
    "MemoryAdam",
    "MemoryConfig",
    "MemoryUsage",
    "MlpQuery",
    "Observation",
    "Observer",
    "ProductKeyMemory",
    "ReadTimes",
    "RunState",
    "SwiluOutput",
    "ValueTable",
    "ValuesFile",
    "build_values",
    "finetune_values",
    "ignore_read_times_in_ddp",
    "ignore_tables_in_ddp",
    "memory_param_groups",
    "product_topk",
    "save_values",
]
