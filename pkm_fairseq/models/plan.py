"""The plan of a model: fairseq's options, read once."""

from dataclasses import dataclass, fields
from typing import Any, Dict, Optional, Tuple

from fairseq.utils import safe_getattr
from omegaconf import OmegaConf, open_dict

from ..memory import MemoryConfig
from ..memory.finetune import FinetuneConfig
from ..memory.option import declared_in
from .architectures import base_architecture
from .config import RunOptions, finetune_config, layer_indices, memory_config
from .prune import kept_memory_layers, layers_to_keep


@dataclass(frozen=True)
class Plan:
    """A model to build, and the options of its run that it needs.

    Attributes:
        memory_layers: indices of the layers with a memory, counted from 0 in the built model, that
            is, without the layers that ``--encoder-layers-to-keep`` removes.
        memory_mode: "replace" or "residual".
        memory: settings of every memory.
        freeze: the frozen part of the memory; None for none.
        finetune: which parameters to train, if this is a finetuning of values.
        n_shards: number of workers that share one copy of each value table.
        values_file: the file from which the memories read their values; None for tables in memory.
        init_from: the checkpoint from which a fresh run starts; None for none.
        n_layers: layers of the built encoder.
        kept_layers: indices of these layers in the whole encoder; None for all.
        encoder_layerdrop: probability that a training step skips a layer.
        ffn_reg_scale_factor: of AdaPruning; 0 for none.
        ffn_blocks_to_remove: of AdaPruning; -1 for none.
        grouped_optimizers: the optimizers of fairseq's ``composite``.
        run: the options of the run that the model needs.
    """

    memory_layers: Tuple[int, ...]
    memory_mode: str
    memory: MemoryConfig
    freeze: Optional[str]
    finetune: FinetuneConfig
    n_shards: int
    values_file: Optional[str]
    init_from: Optional[str]
    n_layers: int
    kept_layers: Optional[Tuple[int, ...]]
    encoder_layerdrop: float
    ffn_reg_scale_factor: float
    ffn_blocks_to_remove: int
    grouped_optimizers: Tuple[str, ...]
    run: RunOptions


def complete_options(args: Any, task: Any) -> None:
    """Fill in the options that neither the user nor an architecture has set."""
    base_architecture(args)
    if safe_getattr(args, "max_positions") is None:
        args.max_positions = task.max_positions()
    if safe_getattr(args, "offload_activations"):
        args.checkpoint_activations = True  # as fairseq's transformer


def read_plan(args: Any) -> Plan:
    """Read fairseq's options, completed by ``complete_options``.

    Raises:
        ValueError: an option cannot be read.
    """
    memory_layers = layer_indices(args.memory_layers)
    kept = layers_to_keep(safe_getattr(args, "encoder_layers_to_keep"), args.encoder_layers)
    if kept is not None:
        memory_layers = kept_memory_layers(memory_layers, kept)
    return Plan(
        memory_layers=tuple(memory_layers),
        memory_mode=args.memory_mode,
        memory=memory_config(args),
        freeze=safe_getattr(args, "memory_freeze"),
        finetune=finetune_config(args),
        n_shards=safe_getattr(args, "memory_shards", 1),
        values_file=safe_getattr(args, "memory_values_file"),
        init_from=safe_getattr(args, "init_from"),
        n_layers=args.encoder_layers if kept is None else len(kept),
        kept_layers=None if kept is None else tuple(kept),
        encoder_layerdrop=args.encoder_layerdrop,
        ffn_reg_scale_factor=safe_getattr(args, "ffn_reg_scale_factor", 0.0),
        ffn_blocks_to_remove=safe_getattr(args, "ffn_blocks_to_remove", -1),
        grouped_optimizers=_grouped_optimizers(safe_getattr(args, "optimizer")),
        run=_run_options(args),
    )


def write_back(plan: Plan, args: Any) -> None:
    """Set the options to those of the built model; the run's checkpoints store them.

    It clears options that belong to this run only. Loading the run's checkpoints then needs neither
    its initial checkpoint, nor the same number of workers, nor its slot counts; it freezes nothing,
    and prunes no layers again.

    Args:
        plan: the plan of the model.
        args: fairseq's model options.
    """
    changed: Dict[str, Any] = {"init_from": None, "memory_shards": 1}
    changed.update({f"memory_{name}": None for name in declared_in(FinetuneConfig)})
    if plan.kept_layers is not None:
        changed["encoder_layers_to_keep"] = None
        changed["encoder_layers"] = plan.n_layers
        changed["memory_layers"] = list(plan.memory_layers)
    for name, value in changed.items():
        setattr(args, name, value)
    root = args._get_parent() if OmegaConf.is_config(args) else None
    if root is None or root.get("model") is None:
        return
    with open_dict(root):  # args is a copy if the model is given by its bare name
        root.model.update({name: v for name, v in changed.items() if name in root.model})


def _run_options(args: Any) -> RunOptions:
    found: Dict[str, Any] = {}
    for option in fields(RunOptions):
        value = safe_getattr(args, option.name)
        found[option.name] = option.default if value is None else value
    return RunOptions(**{**found, "optimizer": _name_of(found["optimizer"])})


def _name_of(optimizer: Any) -> Optional[str]:
    """The name of an optimizer, given as a name or as a config."""
    name = safe_getattr(optimizer, "_name") if OmegaConf.is_config(optimizer) else optimizer
    return name if isinstance(name, str) else None


def _grouped_optimizers(optimizer: Any) -> Tuple[str, ...]:
    """The optimizers of fairseq's composite, which only hydra can configure."""
    groups = (safe_getattr(optimizer, "groups") or {}) if OmegaConf.is_dict(optimizer) else {}
    return tuple(str(safe_getattr(group.optimizer, "_name")) for group in groups.values())
