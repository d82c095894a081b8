"""Options of ``pkm_roberta``: fairseq's RoBERTa options, the memory's, and those of the run.

fairseq makes its flags and hydra's fields from the dataclass. Fields that an architecture may set
default to None ("ask the architecture"); under hydra a concrete default would override it.
"""

import argparse
import ast
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Iterable, List, Optional, Tuple

from fairseq import utils
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import DEFAULT_MIN_PARAMS_TO_WRAP
from omegaconf import II

from ..memory import MemoryConfig
from ..memory.config import FREEZABLE
from ..memory.finetune import FinetuneConfig
from ..memory.option import (
    BERGES,
    KIM,
    LAMPLE,
    OUR_CHOICE,
    Option,
    declared_in,
    field_of,
    flag_of,
    option,
)
from .architectures import SIZES
from .encoder_layer import MEMORY_MODES

ACTIVATION_FNS = ChoiceEnum(utils.get_available_activation_fns())


def repeated(help: str, default: Any = None) -> Any:
    """A field for an option of fairseq's own RoBERTa."""
    return field(default=default, metadata={"help": help})


@dataclass
class RobertaOptions(FairseqDataclass):
    """Copy of the options of fairseq's ``roberta``, which fairseq declares without a dataclass."""

    encoder_layers: Optional[int] = repeated("num encoder layers")
    encoder_embed_dim: Optional[int] = repeated("encoder embedding dimension")
    encoder_ffn_embed_dim: Optional[int] = repeated("encoder embedding dimension for FFN")
    encoder_attention_heads: Optional[int] = repeated("num encoder attention heads")
    activation_fn: Optional[ACTIVATION_FNS] = repeated(  # type: ignore[valid-type]
        "activation function to use"
    )
    pooler_activation_fn: Optional[ACTIVATION_FNS] = repeated(  # type: ignore[valid-type]
        "activation function to use for pooler layer"
    )
    encoder_normalize_before: Optional[bool] = repeated("apply layernorm before each encoder block")
    layernorm_embedding: Optional[bool] = repeated("add layernorm to embedding (default: yes)")
    dropout: Optional[float] = repeated("dropout probability")
    attention_dropout: Optional[float] = repeated("dropout probability for attention weights")
    activation_dropout: Optional[float] = repeated("dropout probability after activation in FFN")
    pooler_dropout: Optional[float] = repeated("dropout probability in the masked_lm pooler layers")
    max_positions: Optional[int] = repeated("number of positional embeddings to learn")
    load_checkpoint_heads: bool = repeated(
        "(re-)register and load heads when loading checkpoints", False
    )
    untie_weights_roberta: bool = repeated(
        "untie weights between embeddings and classifiers in RoBERTa", False
    )
    encoder_layerdrop: float = repeated("LayerDrop probability for encoder", 0.0)
    encoder_layers_to_keep: Optional[str] = repeated(
        "which layers to *keep* when pruning as a comma-separated list; this list and "
        "--memory-layers count the layers of the whole encoder"
    )
    checkpoint_activations: bool = repeated(
        "store only the inputs of layers, and recompute each layer in the backward pass (as "
        "fairseq's transformer, default: off)",
        False,
    )
    offload_activations: bool = repeated(
        "store those inputs on the CPU (as fairseq's transformer, default: off); sets "
        "--checkpoint-activations",
        False,
    )
    quant_noise_pq: float = repeated("iterative PQ quantization noise at training time", 0.0)
    quant_noise_pq_block_size: int = repeated("block size of quantization noise", 8)
    quant_noise_scalar: float = repeated(
        "scalar quantization noise and scalar quantization at training time", 0.0
    )
    spectral_norm_classification_head: bool = repeated(
        "apply spectral normalization on the classification head", False
    )
    min_params_to_wrap: int = repeated(
        "minimum number of params for a layer to be wrapped with FSDP()",
        DEFAULT_MIN_PARAMS_TO_WRAP,
    )
    mha_reg_scale_factor: float = repeated("regularization of attention heads (AdaPruning)", 0.0)
    ffn_reg_scale_factor: float = repeated("regularization of FFN units (AdaPruning)", 0.0)
    mha_heads_to_keep: int = repeated("attention heads to keep per layer, -1: all", -1)
    ffn_blocks_to_remove: int = repeated("FFN units to remove per layer, -1: none", -1)


def default_by_size(name: str, declared: Option) -> str:
    """A model option's default in words, with the defaults of sizes that differ."""
    texts = {size: declared.default_in_words(own.get(name)) for size, own in SIZES.items()}
    others = [f"{size}: {text}" for size, text in texts.items() if text != texts["base"]]
    return "; ".join([texts["base"], *others])


def _memory_flags() -> List[Tuple[str, Any, Any]]:
    """A field for each memory setting, its name prefixed with ``memory_``."""
    found = []
    for setting in fields(MemoryConfig):
        name, declared = f"memory_{setting.name}", setting.metadata["option"]
        is_switch = setting.type is bool  # off unless given: no architecture sets it
        kind: Any = bool if is_switch else Optional[setting.type]
        default = declared.default if is_switch else None
        found.append((name, kind, field_of(declared, default, default_by_size(name, declared))))
    return found


def _finetune_flags() -> List[Tuple[str, Any, Any]]:
    """A field for each finetuning option, its name prefixed with ``memory_``."""
    return [
        (f"memory_{name}", Optional[str], field_of(declared, None))
        for name, declared in declared_in(FinetuneConfig).items()
    ]


def of_run(node: str, default: Any = None) -> Any:
    """A field that reads ``node`` of fairseq's configuration, with a default."""
    return field(default=default, metadata={"node": node})


@dataclass(frozen=True)
class RunOptions:
    """The options of the run that a model needs.

    Attributes:
        optimizer: its name; under hydra, a config that holds the name.
    """

    optimizer: Any = of_run("optimizer")
    fp16: bool = of_run("common.fp16", False)
    bf16: bool = of_run("common.bf16", False)
    memory_efficient_fp16: bool = of_run("common.memory_efficient_fp16", False)
    memory_efficient_bf16: bool = of_run("common.memory_efficient_bf16", False)
    tpu: bool = of_run("common.tpu", False)
    ddp_backend: Any = of_run("distributed_training.ddp_backend")
    zero_sharding: Any = of_run("distributed_training.zero_sharding")
    save_dir: str = of_run("checkpoint.save_dir", "checkpoints")
    restore_file: str = of_run("checkpoint.restore_file", "checkpoint_last.pt")
    finetune_from_model: Optional[str] = of_run("checkpoint.finetune_from_model")
    continue_once: Optional[str] = of_run("checkpoint.continue_once")
    checkpoint_suffix: str = of_run("checkpoint.checkpoint_suffix", "")
    no_save_optimizer_state: bool = of_run("checkpoint.no_save_optimizer_state", False)
    store_ema: bool = of_run("ema.store_ema", False)
    ema_fp32: bool = of_run("ema.ema_fp32", False)
    use_bmuf: bool = of_run("optimization.use_bmuf", False)


def _run_nodes() -> List[Tuple[str, Any, Any]]:
    # no help text, no flag
    return [(f.name, f.type, field(default=II(f.metadata["node"]))) for f in fields(RunOptions)]


_IN_THIS_MODULE = {"__module__": __name__}  # where pickle looks for a class
MemoryFlags = make_dataclass(
    "MemoryFlags",
    [*_memory_flags(), *_finetune_flags()],
    bases=(FairseqDataclass,),
    namespace=_IN_THIS_MODULE,
)
RunNodes = make_dataclass(
    "RunNodes", _run_nodes(), bases=(FairseqDataclass,), namespace=_IN_THIS_MODULE
)

_LAYERS = Option(
    None,
    "encoder layers with a memory, counted from 0, e.g. 3,7; [] for none",
    "base: 4th and 8th block, recalled from the paper, unverified; other sizes: our choice",
)


@dataclass
class PkmRobertaConfig(RunNodes, MemoryFlags, RobertaOptions):  # type: ignore[misc,valid-type]
    """Options of ``pkm_roberta``."""

    memory_layers: Optional[List[int]] = field_of(
        _LAYERS, None, default_by_size("memory_layers", _LAYERS)
    )
    memory_mode: Optional[str] = option(
        None,
        "position of the memory",
        f"{LAMPLE}; {KIM}",
        choices=MEMORY_MODES,
        default_text="replace; resm_roberta*: residual",
    )
    memory_freeze: Optional[str] = option(
        None,
        "part of the memory to freeze",
        OUR_CHOICE,
        choices=FREEZABLE,
    )
    memory_shards: int = option(
        1,
        "number of data-parallel workers that share one copy of the values and their moments, "
        "split by columns; must divide the number of workers and needs --optimizer pkm_adam; "
        "1: every worker holds whole tables",
        BERGES,
    )
    memory_values_file: Optional[str] = option(
        None,
        "read the values from this file of scripts/export_memory.py, without a table in memory; "
        "for inference on the CPU",
        OUR_CHOICE,
    )
    init_from: Optional[str] = option(
        None,
        "start a fresh run from this checkpoint's parameters (INIT): a model pretrained without "
        "memory, or one with memory; ignored when the run resumes",
        KIM,
    )


class ParserWithChoices:
    """fairseq's parser, with the current choices of our options.

    fairseq takes choices only from Enums, and an Enum cannot be extended later. It also cuts the
    fractions off a list of integers.
    """

    def __init__(self, parser: Any, config: type) -> None:
        self._parser = parser
        self._options = {flag_of(name): option for name, option in declared_in(config).items()}

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add a flag, as ``argparse.ArgumentParser.add_argument`` does."""
        declared = self._options.get(names[0])
        if declared is not None and declared.allowed():
            settings["choices"] = tuple(declared.allowed())
        if declared is _LAYERS:
            settings["type"] = _layers_of_flag
        return self._parser.add_argument(*names, **settings)


def layer_indices(given: Iterable[Any]) -> List[int]:
    """The memory layers, as fairseq's options hold them.

    Raises:
        ValueError: one is no whole number.
    """
    layers = list(given)
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"memory-layers names layer {index!r}, must be a whole number")
    return layers


def _layers_of_flag(text: str) -> List[int]:
    """Read ``--memory-layers``: ``3,7``, ``[3,7]`` or ``3``; nothing or ``[]`` for none."""
    try:
        given = ast.literal_eval(text or "[]")
    except (ValueError, TypeError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers, such as 3,7") from None
    try:
        return layer_indices(given if isinstance(given, (list, tuple, str)) else [given])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory-layers ")) from None


def memory_config(args: Any) -> MemoryConfig:
    """The memory's settings, read from fairseq's options.

    Raises:
        ValueError: a setting is impossible.
    """
    return MemoryConfig(**{f.name: getattr(args, f"memory_{f.name}") for f in fields(MemoryConfig)})


def finetune_config(args: Any) -> FinetuneConfig:
    """The finetuning settings, read from fairseq's options.

    Raises:
        ValueError: an option is impossible, or has no effect.
    """
    given = {name: getattr(args, f"memory_{name}", None) for name in declared_in(FinetuneConfig)}
    return FinetuneConfig(**{n: None if x is None else str(x) for n, x in given.items()})
