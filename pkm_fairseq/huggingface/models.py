"""Classes of models with memory, registered with transformers' Auto classes."""

import copy
import inspect
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..memory import (
    MemoryConfig,
    ProductKeyMemory,
    RunState,
    ValueTable,
    build_values,
    ignore_read_times_in_ddp,
)
from ..memory.gradient import is_table
from ..memory.kernels import is_half
from ..memory.observe.staleness import ReadTimes, origin_of
from ..memory.query import BatchQueryNorm, LayerQueryNorm
from .architectures import ARCHITECTURES, PREFIX, Architecture, architecture_of
from .blocks import (
    MODES,
    BertMemoryBlock,
    FeedForwardMemoryBlock,
    MadeLater,
    MemoryBlock,
    TellPadding,
    block_class,
    forget_padding,
)
from .card import write_card

# parts of names of tensors that stay in float32 when a model is loaded in half precision
FLOAT32 = ("reads", "memory.query_norm.running_mean", "memory.query_norm.running_var")


class MemoryModel(MadeLater):
    """Mixin for a model with memory, placed before transformers' own class.

    Its configuration describes the memories: ``memory_layers`` (counted from 0), ``memory_mode``
    and ``memory``, the settings of a ``MemoryConfig``.
    """

    config: Any
    base_model: Any
    _tied_weights_keys: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(config, "memory_layers", None):
            raise ValueError(
                f"{type(self).__name__}: the configuration has no memory_layers: load the model "
                "without memory, and call add_memories"
            )
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not self.memory_layers():  # for a head around AutoModel, the base model has them
            check_place(self, list(config.memory_layers), config.memory_mode)
            attach(self, build_memories(self, config))
        _complete(self)

    @property
    def run(self) -> RunState:
        """The state of the run, shared by all memories."""
        run: RunState = next(iter(self.memory_layers().values())).memory.run
        return run

    def memory_layers(self) -> Dict[int, MemoryBlock]:
        """The blocks with a memory, by their index."""
        blocks = architecture_of(self.config).blocks_of(self.base_model)
        return {i: block for i, block in enumerate(blocks) if isinstance(block, MemoryBlock)}

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, and write a model card unless there is one."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        if is_main_process:  # first, since the saved files may be pushed immediately
            write_card(self, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (ValueTable, BatchQueryNorm, LayerQueryNorm, ProductKeyMemory)):
            module.reset_parameters()
        elif isinstance(module, ReadTimes):
            nn.init.zeros_(module.last_read)
            nn.init.zeros_(module.last_top1)
            block = next(x for x in self.memory_layers().values() if x.reads is module)
            if not is_loaded(module.origin):
                is_new = not is_loaded(block.memory.keys)  # keys of a checkpoint may be trained
                nn.init.zeros_(module.origin)
                if is_new:
                    module.origin.copy_(origin_of(block.memory.keys, block.memory_mode))

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Mark weights that are tied to others, but no shared table that was not loaded.

        transformers marks the other names of a shared table, whose parameter is the same one, and
        then takes it for loaded.
        """
        tables = set(shared_tables(self).values())
        missing = {name for name in tables if not is_loaded(self.get_parameter(name))}  # type: ignore[attr-defined]
        super().mark_tied_weights_as_initialized(loading_info)  # type: ignore[misc]
        for name in missing:
            del self.get_parameter(name)._is_hf_initialized  # type: ignore[attr-defined]
        loading_info.missing_keys = {*loading_info.missing_keys, *missing}


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has loaded a tensor from a checkpoint."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def data_parallel_group() -> Any:
    """The process group of data-parallel workers; None for one worker."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def shared_tables(model: Any) -> Dict[str, str]:
    """Names of value tables that layers share, each with the name under which it is stored."""
    first: Dict[int, str] = {}
    tied = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ValueTable):
            source = first.setdefault(id(module), name)
            if source != name:
                tied[f"{name}.weight"] = f"{source}.weight"
    return tied


# --- adding memories --------------------------------------------------------------------------


def settings_of(config: MemoryConfig, layers: Iterable[int], mode: str) -> Dict[str, Any]:
    """The settings of the memories in a model's configuration."""
    return {"memory_layers": sorted(layers), "memory_mode": mode, "memory": asdict(config)}


def build_memories(model: Any, config: Any) -> Dict[int, ProductKeyMemory]:
    """The memories that a configuration names, by layer; the model does not change."""
    unknown = sorted(set(config.memory) - {x.name for x in fields(MemoryConfig)})
    if unknown:
        raise ValueError(
            f"the configuration's memory has {', '.join(unknown)}, which this version of "
            "pkm_fairseq does not know: load it with the version that saved it"
        )
    settings, width = MemoryConfig(**config.memory), config.hidden_size
    shared = build_values(width, settings, keeps_dtype=True) if settings.share_values else None
    run, memories = RunState(data_parallel_group), {}
    for index in config.memory_layers:
        memory = ProductKeyMemory(width, settings, shared, run=run, keeps_dtype=True)
        for module in memory.modules():
            if isinstance(module, nn.Linear):  # like every Linear of the model
                model._init_weights(module)
        memories[index] = memory
    return memories


def attach(model: Any, memories: Dict[int, ProductKeyMemory]) -> None:
    """Put memories into a model without memories, as its configuration says."""
    base, config = model.base_model, model.config
    if base is not model:
        base.__class__ = memory_class(type(base))
    architecture = architecture_of(config)
    dropout = float(getattr(config, architecture.dropout)) if architecture.dropout else 0.0
    blocks = architecture.blocks_of(base)
    for index, memory in memories.items():
        _put(architecture, blocks[index], memory, config.memory_mode, dropout)
    parameters = list(inspect.signature(type(base).forward).parameters)
    index = parameters.index("attention_mask") - 1  # without self
    base.register_forward_pre_hook(TellPadding(index), with_kwargs=True)
    base.register_forward_hook(forget_padding, always_call=True)


def _put(
    architecture: Architecture, block: Any, memory: ProductKeyMemory, mode: str, dropout: float
) -> None:
    architecture.check_block(block)
    if architecture.ffn is None:
        block.__class__ = block_class(type(block), BertMemoryBlock)
        block.put_memory(memory, mode, dropout)
    else:
        block.__class__ = block_class(type(block), FeedForwardMemoryBlock)
        block.put_memory_at(architecture.ffn, memory, mode, dropout)


def _complete(model: Any) -> None:
    """Tell transformers how to save and load a model with memories."""
    for part in {id(x): x for x in (model.base_model, model)}.values():
        if tied := shared_tables(part):
            part._tied_weights_keys = {**(part._tied_weights_keys or {}), **tied}
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
        part._keep_in_fp32_modules_strict = {*(part._keep_in_fp32_modules_strict or ()), *FLOAT32}
        blocks = {type(block).__name__ for block in model.memory_layers().values()}
        part._no_split_modules = {*(part._no_split_modules or ()), *blocks}
        if part.config.memory["value_dtype"] == "float32":
            part._keep_in_fp32_modules_strict.add("memory.values")
        ignore_read_times_in_ddp(part)


def change_in_place(model: Any, settings: Dict[str, Any]) -> None:
    """Turn a model into one with memory: its classes, its configuration, its blocks."""
    plain = model.config
    config = copy.deepcopy(plain)
    config.__class__ = config_class(type(plain))
    for name, value in settings.items():
        setattr(config, name, value)
    memories = build_memories(model, config)  # a table may not fit; the model is as it was
    for module in model.modules():
        if getattr(module, "config", None) is plain:
            module.config = config
    device, dtype = model.device, model.dtype
    model.__class__ = memory_class(type(model))
    attach(model, memories)
    for block in model.memory_layers().values():
        for part in (block.memory, block.reads):
            part._apply(lambda x: _like_model(x, device, dtype))
        block.train(model.training)
    _complete(model)


def _like_model(x: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a memory in a model's dtype; values in half precision keep theirs."""
    keeps = not x.is_floating_point() or (is_table(x) and is_half(x.dtype))
    return x.to(device) if keeps else x.to(device, dtype)


def check_model(model: Any, layers: List[int], mode: str) -> None:
    """Refuse a model to which memories cannot be added.

    Raises:
        ValueError: the message gives the reason.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"the model is a {type(model).__name__}, must be one of transformers")
    if isinstance(model, MemoryModel):
        raise ValueError(
            f"the model already has memories in layers {sorted(model.memory_layers())}"
        )
    check_place(model, layers, mode)


def check_place(model: Any, layers: List[int], mode: str) -> None:
    """Refuse layers, a mode or a configuration that do not fit to a model's blocks.

    Raises:
        ValueError: the message gives the reason.
    """
    architecture = architecture_of(model.config)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, must be one of {', '.join(MODES)}")
    blocks = architecture.blocks_of(model.base_model)
    wrong = [i for i in layers if not isinstance(i, int) or not 0 <= i < len(blocks)]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"layers are {layers}, must be one or more different numbers in 0..{len(blocks) - 1}"
        )
    for index in layers:
        architecture.check_block(blocks[index])
    if architecture.dropout and not hasattr(model.config, architecture.dropout):
        raise ValueError(
            f"the architecture's dropout is {architecture.dropout!r}, must be an entry of "
            f"{type(model.config).__name__}"
        )
    if getattr(model.config, "is_decoder", False):
        raise ValueError("the model is a decoder (config.is_decoder), must be an encoder")
    if chunk := getattr(model.config, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"config.chunk_size_feed_forward is {chunk}, must be 0: a memory normalises queries "
            "over all tokens of a batch"
        )


# --- classes ----------------------------------------------------------------------------------

_CLASSES: Dict[type, type] = {}


def _keep(plain: type, made: type) -> type:
    globals().setdefault(made.__name__, made)  # where pickle looks for it
    _CLASSES[plain] = made
    return made


def config_class(plain: type) -> type:
    """The configuration class for models with memory, with type ``pkm_<type>``."""
    if plain not in _CLASSES:
        model_type = f"{PREFIX}{plain.model_type}"  # type: ignore[attr-defined]
        body = {"__module__": __name__, "model_type": model_type}
        _keep(plain, type(f"Pkm{plain.__name__}", (plain,), body))
    return _CLASSES[plain]


def memory_class(plain: type) -> type:
    """The class with memory for a model class without, from transformers or your own code.

    Args:
        plain: a model class of a known architecture.

    Returns:
        The class; its ``from_pretrained`` loads models from its ``save_pretrained``.
    """
    if issubclass(plain, MemoryModel):
        return plain
    if plain not in _CLASSES:
        body = {
            "__module__": __name__,
            "config_class": config_class(plain.config_class),  # type: ignore[attr-defined]
            "_made_of": (memory_class, plain),
        }
        _keep(plain, type(f"Pkm{plain.__name__}", (MemoryModel, plain), body))
    return _CLASSES[plain]


def register_architecture(
    config: type, architecture: Architecture, models: Iterable[type] = ()
) -> None:
    """Register an architecture, so that memories can be added, saved and loaded.

    Args:
        config: transformers' configuration class.
        architecture: the places of its blocks and their feed-forwards.
        models: model classes that transformers' Auto classes do not know; each must have
            ``config_class``. ``memory_class`` returns their class with memory.

    Raises:
        ValueError: the architecture is already registered.
    """
    model_type = config.model_type  # type: ignore[attr-defined]
    if model_type in ARCHITECTURES:
        raise ValueError(f"the architecture {model_type!r} is already registered")
    ARCHITECTURES[model_type] = architecture
    _register(config, models)


def _register(config: type, models: Iterable[type] = ()) -> None:
    with_memory = config_class(config)
    AutoConfig.register(with_memory.model_type, with_memory)  # type: ignore[attr-defined]
    for model in models:
        memory_class(model)
    for auto in vars(modeling_auto).values():
        is_auto = isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)
        mapping: Optional[Any] = getattr(auto, "_model_mapping", None) if is_auto else None
        if mapping is not None and config in mapping:
            auto.register(with_memory, memory_class(mapping[config]))


for _model_type in ARCHITECTURES:
    _register(CONFIG_MAPPING[_model_type])
