"""Options that are impossible, alone or together, each refused in one line."""

from importlib.util import find_spec
from typing import Any, List, Optional

from fairseq.distributed import utils as distributed_utils
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf

from ..memory import MemoryConfig
from .config import memory_config
from .encoder_layer import MEMORY_MODES

# what pkm_adam cannot be part of: options of fairseq's, values of theirs, and why
NOT_WITH_PKM_ADAM = (
    (
        *("zero_sharding", "os"),
        "a worker would forget the gradient of all tables but its own share; "
        "use --zero-sharding none",
    ),
    (
        *("ddp_backend", "fully_sharded"),
        "it flattens tables, which then have no rows; use --ddp-backend legacy_ddp",
    ),
    (
        *("ddp_backend", "slowmo"),
        "its workers train apart, but would share the gradient of values in every update; "
        "use --ddp-backend legacy_ddp",
    ),
    ("tpu", "True", "it cannot exchange the gradient of values there; use --optimizer adam"),
)


def check_memory_options(args: Any) -> "tuple[List[int], str, MemoryConfig]":
    """The memory options, checked against each other and the rest of the model.

    Returns:
        Memory layers, mode and settings.

    Raises:
        ValueError: an option is impossible.
    """
    config, mode = memory_config(args), str(args.memory_mode)
    layers = [int(index) for index in args.memory_layers]
    if mode not in MEMORY_MODES:
        raise ValueError(f"memory-mode is {mode}, must be one of {', '.join(MEMORY_MODES)}")
    if not 0 <= args.encoder_layerdrop < 1:
        raise ValueError(f"encoder-layerdrop is {args.encoder_layerdrop}, must be in [0, 1)")
    n_layers = args.encoder_layers
    for index in layers:
        if not 0 <= index < n_layers:
            raise ValueError(
                f"memory-layers names layer {index}, must be in 0..{n_layers - 1}: "
                f"the encoder has {n_layers} layers, counted from 0"
            )
        if layers.count(index) > 1:
            raise ValueError(f"memory-layers names layer {index} twice, each may be named once")
    if layers:
        _check_layerdrop(args, config)
        _check_precision(args)
        _check_optimizer(args)
        _check_regularisation(args, mode)
    return layers, mode, config


def _check_layerdrop(args: Any, config: MemoryConfig) -> None:
    several = distributed_utils.get_data_parallel_world_size() > 1
    is_frozen = str(safe_getattr(args, "memory_freeze")) == "all"
    takes_statistics = config.query_norm == "batch" and not is_frozen
    if several and takes_statistics and args.encoder_layerdrop > 0:
        raise ValueError(
            f"--encoder-layerdrop {args.encoder_layerdrop} does not work with --memory-query-norm "
            "batch on several workers: they drop different layers and would wait for each "
            "other's statistics for ever; use --memory-query-norm layer"
        )


def _check_precision(args: Any) -> None:
    for half in ("fp16", "bf16"):
        if safe_getattr(args, f"memory_efficient_{half}") and not safe_getattr(args, half):
            raise ValueError(
                f"common.memory_efficient_{half} alone has no effect in fairseq-hydra-train: set "
                f"common.{half}=true, too"
            )
    # what fairseq-train makes of --bf16
    if safe_getattr(args, "bf16") and safe_getattr(args, "tpu") and not find_spec("torch_xla"):
        raise ValueError(
            "--bf16 and --memory-efficient-bf16 of fairseq-train are for TPUs (torch_xla is not "
            "installed): use fairseq-hydra-train with common.bf16=true"
        )


def _check_optimizer(args: Any) -> None:
    for option, value, reason in NOT_WITH_PKM_ADAM if optimizer_name(args) == "pkm_adam" else ():
        if str(safe_getattr(args, option)) == value:
            flag = flag_of(option) + (f" {value}" if value != "True" else "")
            raise ValueError(f"{flag} does not work with --optimizer pkm_adam: {reason}")
    if "pkm_adam" in _grouped_optimizer_names(args):
        raise ValueError(
            "optimizer composite does not work with pkm_adam in a group: use pkm_adam alone, "
            "which gives values a learning rate of their own"
        )


def _check_regularisation(args: Any, mode: str) -> None:
    for option, default in (("ffn_reg_scale_factor", 0.0), ("ffn_blocks_to_remove", -1)):
        if mode == "replace" and safe_getattr(args, option, default) != default:
            raise ValueError(
                f"{flag_of(option)} does not work with --memory-mode replace: there is no FFN"
            )


def flag_of(option: str) -> str:
    """An option's flag on the command line."""
    return "--" + option.replace("_", "-")


def optimizer_name(args: Any) -> Optional[str]:
    """The name of the run's optimizer."""
    optimizer = safe_getattr(args, "optimizer")  # a config that has a name, or the name
    return safe_getattr(optimizer, "_name") if OmegaConf.is_config(optimizer) else optimizer


def _grouped_optimizer_names(args: Any) -> List[Optional[str]]:
    """The optimizers of fairseq's composite, which hydra alone can configure."""
    optimizer = safe_getattr(args, "optimizer")
    groups = (safe_getattr(optimizer, "groups") or {}) if OmegaConf.is_dict(optimizer) else {}
    return [safe_getattr(group.optimizer, "_name") for group in groups.values()]
