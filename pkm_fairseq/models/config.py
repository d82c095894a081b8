"""Options of ``pkm_roberta``: those of fairseq's RoBERTa, and the memory's.

fairseq reads this dataclass for its flags and for hydra. A field that an architecture may set
defaults to None, "ask the architecture"; a concrete default would win over it under hydra.
"""

from dataclasses import dataclass, field, fields
from typing import Any, List, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP
from omegaconf import II

from ..memory import MemoryConfig
from ..memory.config import QUERY_NORMS, VALUE_DTYPES, VALUES_INITS
from ..memory.memory import FREEZABLE
from .encoder_layer import MEMORY_MODES

ACTIVATION_FNS = ChoiceEnum(utils.get_available_activation_fns())


def option(help: str, default: Any = None) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class PkmRobertaConfig(FairseqDataclass):
    """Options of ``pkm_roberta``."""

    # fairseq's RoBERTa
    encoder_layers: Optional[int] = option("num encoder layers")
    encoder_embed_dim: Optional[int] = option("encoder embedding dimension")
    encoder_ffn_embed_dim: Optional[int] = option("encoder embedding dimension for FFN")
    encoder_attention_heads: Optional[int] = option("num encoder attention heads")
    activation_fn: Optional[ACTIVATION_FNS] = option("activation function to use")
    pooler_activation_fn: Optional[ACTIVATION_FNS] = option(
        "activation function to use for pooler layer"
    )
    encoder_normalize_before: Optional[bool] = option("apply layernorm before each encoder block")
    layernorm_embedding: Optional[bool] = option("add layernorm to embedding (default: yes)")
    dropout: Optional[float] = option("dropout probability")
    attention_dropout: Optional[float] = option("dropout probability for attention weights")
    activation_dropout: Optional[float] = option("dropout probability after activation in FFN")
    pooler_dropout: Optional[float] = option("dropout probability in the masked_lm pooler layers")
    max_positions: Optional[int] = option("number of positional embeddings to learn")
    load_checkpoint_heads: bool = option(
        "(re-)register and load heads when loading checkpoints", False
    )
    untie_weights_roberta: bool = option(
        "untie weights between embeddings and classifiers in RoBERTa", False
    )
    encoder_layerdrop: float = option("LayerDrop probability for encoder", 0.0)
    encoder_layers_to_keep: Optional[str] = option(
        "which layers to *keep* when pruning as a comma-separated list; these and memory layers "
        "are counted in the whole encoder"
    )
    checkpoint_activations: bool = option(
        "keep only the inputs of layers, and run each layer again in backward (as fairseq's "
        "transformer, default: off)",
        False,
    )
    offload_activations: bool = option(
        "keep those inputs on the CPU (as fairseq's transformer, default: off); sets "
        "--checkpoint-activations",
        False,
    )
    quant_noise_pq: float = option("iterative PQ quantization noise at training time", 0.0)
    quant_noise_pq_block_size: int = option("block size of quantization noise", 8)
    quant_noise_scalar: float = option(
        "scalar quantization noise and scalar quantization at training time", 0.0
    )
    spectral_norm_classification_head: bool = option(
        "apply spectral normalization on the classification head", False
    )
    min_params_to_wrap: int = option(
        "minimum number of params for a layer to be wrapped with FSDP()",
        DEFAULT_MIN_PARAMS_TO_WRAP,
    )
    mha_reg_scale_factor: float = option("regularization of attention heads (AdaPruning)", 0.0)
    ffn_reg_scale_factor: float = option("regularization of FFN units (AdaPruning)", 0.0)
    mha_heads_to_keep: int = option("attention heads to keep per layer, -1: all", -1)
    ffn_blocks_to_remove: int = option("FFN units to remove per layer, -1: none", -1)

    # the memory; each name is "memory_" + a field of MemoryConfig, but for layers, mode, freeze
    memory_layers: Optional[List[int]] = option(
        "encoder layers with a memory, 0-based, as in 3,7; [] for none (default of the base size: "
        "3,7, the paper's 4th and 8th block as recalled, unverified)"
    )
    memory_mode: Optional[ChoiceEnum(MEMORY_MODES)] = option(  # type: ignore[valid-type]
        "replace: the memory stands in place of the FFN (Lample et al. 2019; default of "
        "pkm_roberta*); residual: beside it (Kim & Jung 2020; default of resm_roberta*)"
    )
    memory_n_keys: Optional[int] = option(
        "sub-keys per half; the memory has this number squared of slots "
        "(default of base and large: 512; Lample et al. 2019)"
    )
    memory_heads: Optional[int] = option("queries per token (default: 4; Lample et al. 2019)")
    memory_knn: Optional[int] = option(
        "slots each head reads, 2 to n_keys (default of base and large: 32; Lample et al. 2019)"
    )
    memory_k_dim: Optional[int] = option(
        "width of a query, even (default of base and large: 256; published code of "
        "Lample et al. 2019)"
    )
    memory_v_dim: Optional[int] = option(
        "width of a value (default: encoder width, Lample et al. 2019); another one adds an "
        "output projection, our choice"
    )
    memory_query_norm: Optional[ChoiceEnum(QUERY_NORMS)] = option(  # type: ignore[valid-type]
        "normalisation of the query (default: batch, recommended by Lample et al. 2019; "
        "layer and none: our choice)"
    )
    memory_values_init: Optional[ChoiceEnum(VALUES_INITS)] = option(  # type: ignore[valid-type]
        "normal: N(0, v_dim^-1/2) (default; published code of Lample et al. 2019); zero: a "
        "residual memory then starts as the plain model (our choice)"
    )
    memory_value_dtype: Optional[ChoiceEnum(VALUE_DTYPES)] = option(  # type: ignore[valid-type]
        "what values are stored in (default: float32); bfloat16 halves the table, and rounds "
        "small updates away (our choice)"
    )
    memory_input_dropout: Optional[float] = option(
        "dropout on the input of the query network (default: 0; our choice)"
    )
    memory_query_dropout: Optional[float] = option("dropout on the query (default: 0; our choice)")
    memory_read_dropout: Optional[float] = option(
        "dropout on what was read (default: 0; our choice)"
    )
    memory_key_dropout: Optional[float] = option(
        "share of the sub-keys that a training step searches without (default: 0; structured "
        "dropout on keys: future work of Kim & Jung 2020 by a secondary source, the form is our "
        "choice)"
    )
    memory_freeze: Optional[ChoiceEnum(FREEZABLE)] = option(  # type: ignore[valid-type]
        "do not train the memory's values, its sub-keys (keys), or all of it (default: train all; "
        "our choice)"
    )
    memory_share_values: bool = option(
        "one value table for all memory layers (Memory Layers at Scale, 2024)", False
    )
    memory_shards: int = option(
        "split values and their moments by columns over so many data-parallel workers, a divisor "
        "of their number, with --optimizer pkm_adam (default: 1, every worker has whole tables; "
        "Memory Layers at Scale, 2024)",
        1,
    )
    init_from: Optional[str] = option(
        "start a fresh run from the parameters of this checkpoint, pretrained without memory or "
        "one of ours (INIT; Kim & Jung 2020); ignored when the run resumes"
    )

    # no help text, no flag: what the model must know of the rest of the run
    optimizer: Any = II("optimizer")
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    memory_efficient_bf16: bool = II("common.memory_efficient_bf16")
    tpu: bool = II("common.tpu")
    ddp_backend: Any = II("distributed_training.ddp_backend")
    zero_sharding: Any = II("distributed_training.zero_sharding")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    checkpoint_suffix: str = II("checkpoint.checkpoint_suffix")
    no_save_optimizer_state: bool = II("checkpoint.no_save_optimizer_state")
    store_ema: bool = II("ema.store_ema")
    use_bmuf: bool = II("optimization.use_bmuf")


def memory_config(args: Any) -> MemoryConfig:
    """The memory's settings from fairseq's options.

    Raises:
        ValueError: a setting is impossible.
    """
    settings = {f.name: getattr(args, f"memory_{f.name}") for f in fields(MemoryConfig)}
    for choice in ("query_norm", "values_init", "value_dtype"):
        settings[choice] = str(settings[choice])  # hydra hands over an Enum
    return MemoryConfig(**settings)
