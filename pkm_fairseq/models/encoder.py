"""RoBERTa's encoder with memories in some of its layers."""

from pathlib import Path
from typing import Any, List, Optional

from fairseq.distributed import fsdp_wrap
from fairseq.distributed import utils as distributed_utils
from fairseq.models.roberta import RobertaEncoder
from fairseq.models.transformer import TransformerConfig, TransformerEncoder
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import nn

from ..memory import ColumnShards, ProductKeyMemory, RunState, ValuesFile, build_values
from .encoder_layer import MemoryEncoderLayer
from .plan import Plan


class MemoryTransformerEncoder(TransformerEncoder):
    """fairseq's transformer encoder; the plan's ``memory_layers`` get a memory.

    Args:
        args: fairseq's model options.
        dictionary: the input dictionary.
        embed_tokens: the input embedding.
        plan: the layers with a memory, and the memory's settings.

    Attributes:
        run: the state of the run, for all memories.
    """

    def __init__(self, args: Any, dictionary: Any, embed_tokens: nn.Embedding, plan: Plan) -> None:
        # set before super().__init__, which builds the layers without telling their index
        self._plan = plan
        self._shards = None if plan.n_shards == 1 else ColumnShards(plan.n_shards)
        self._values_file = None if plan.values_file is None else ValuesFile(Path(plan.values_file))
        self.run = RunState(data_parallel_group)
        self._n_built = 0
        self._shared_values: List[
            nn.Module
        ] = []  # in a list, so that torch does not register it twice
        super().__init__(args, dictionary, embed_tokens)

    def build_encoder_layer(self, args: Any) -> nn.Module:
        """Build the next layer: fairseq's own, or one with a memory."""
        index, self._n_built = self._n_built, self._n_built + 1
        if index not in self._plan.memory_layers:
            return super().build_encoder_layer(args)
        cfg = TransformerConfig.from_namespace(args)
        width = cfg.encoder.embed_dim
        memory = ProductKeyMemory(
            width,
            self._plan.memory,
            self._given_values(index, width),
            self._shards,
            self.run,
            keeps_dtype=True,  # in fairseq's half precision, see docs/design.md
        )
        layer = MemoryEncoderLayer(cfg, memory, self._plan.memory_mode)
        if cfg.checkpoint_activations:  # wrapped as fairseq wraps its own layer
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        least = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
        return fsdp_wrap(layer, min_num_params=least)

    def _given_values(self, index: int, width: int) -> Optional[nn.Module]:
        """The values of a layer that are shared or in a file; None lets the memory make its own."""
        if not self._plan.memory.share_values:
            return self._values_in_file(index)
        if not self._shared_values:
            values = self._values_in_file(index)
            if values is None:
                values = build_values(width, self._plan.memory, self._shards, keeps_dtype=True)
            self._shared_values.append(values)
        return self._shared_values[0]

    def _values_in_file(self, index: int) -> Optional[nn.Module]:
        if self._values_file is None:
            return None
        kept = self._plan.kept_layers  # the file counts the layers of the whole encoder
        return self._values_file.table(str(index if kept is None else kept[index]))


class MemoryRobertaEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder around a ``MemoryTransformerEncoder``."""

    def __init__(self, args: Any, dictionary: Any, plan: Plan) -> None:
        self._plan = plan
        super().__init__(args, dictionary)

    def build_encoder(self, args: Any, dictionary: Any, embed_tokens: nn.Embedding) -> nn.Module:
        """Build the transformer with fairseq's initialisation.

        ``init_bert_params`` draws every Linear from N(0, 0.02), including the memory's query and
        output projection. Sub-keys and values keep the memory's own initialisation.
        """
        encoder = MemoryTransformerEncoder(args, dictionary, embed_tokens, self._plan)
        encoder.apply(init_bert_params)
        return encoder


def data_parallel_group() -> Any:
    """The process group of data-parallel workers; None for one worker."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return None
    return distributed_utils.get_data_parallel_group()
