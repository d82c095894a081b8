"""Refuse impossible options and combinations of options, each in one line."""

from importlib.util import find_spec

from fairseq.distributed import utils as distributed_utils

from ..memory.option import declared_in, flag_of
from .config import PkmRobertaConfig
from .plan import Plan

# incompatible with pkm_adam: fairseq's option, its value, and the reason
NOT_WITH_PKM_ADAM = {
    ("zero_sharding", "os"): "a worker would lose the gradient of all tables except its share; "
    "use --zero-sharding none",
    ("ddp_backend", "fully_sharded"): "it flattens tables, which then have no rows; "
    "use --ddp-backend legacy_ddp",
    ("ddp_backend", "slowmo"): "its workers train apart, but would share the gradient of values "
    "in every update; use --ddp-backend legacy_ddp",
    ("tpu", True): "it cannot exchange the gradient of values there; use --optimizer adam",
}
# incompatible with shards: a worker would miss a read, or a part of a table would not be saved
NOT_WITH_SHARDS = {
    "encoder_layerdrop": "workers would drop different layers, and wait for each other's reads",
    "store_ema": "the average of a split table cannot be saved as a whole",
    "use_bmuf": "it averages the columns of different workers",
    "no_save_optimizer_state": "fairseq then does not tell all workers when it saves",
}


def check_plan(plan: Plan) -> None:
    """Check a model's options, alone, against each other, and against the run's options.

    Raises:
        ValueError: an option is impossible.
    """
    declared = declared_in(PkmRobertaConfig)
    declared["memory_mode"].check("memory-mode", plan.memory_mode)
    declared["memory_freeze"].check("memory-freeze", plan.freeze)
    _check_layers(plan)
    if plan.finetune.finetune is not None:
        _check_finetune(plan)
    if plan.memory_layers:
        _check_layerdrop(plan)
        _check_precision(plan)
        _check_average(plan)
        _check_optimizer(plan)
        _check_regularisation(plan)
    if plan.values_file is not None:
        _check_values_file(plan)
    if plan.n_shards != 1:
        _check_shards(plan)
    if plan.init_from is not None:
        _check_init_from(plan)


def _check_layers(plan: Plan) -> None:
    if not 0 <= plan.encoder_layerdrop < 1:
        raise ValueError(f"encoder-layerdrop is {plan.encoder_layerdrop}, must be in [0, 1)")
    for index in plan.memory_layers:
        if not 0 <= index < plan.n_layers:
            raise ValueError(
                f"memory-layers names layer {index}, must be in 0..{plan.n_layers - 1}: "
                f"the encoder has {plan.n_layers} layers, counted from 0"
            )
        if plan.memory_layers.count(index) > 1:
            raise ValueError(f"memory-layers names layer {index} twice, each may be named once")


def _check_layerdrop(plan: Plan) -> None:
    several = distributed_utils.get_data_parallel_world_size() > 1
    is_frozen = plan.freeze == "all" or plan.finetune.finetune is not None
    takes_statistics = plan.memory.query_norm == "batch" and not is_frozen
    if several and takes_statistics and plan.encoder_layerdrop > 0:
        raise ValueError(
            f"--encoder-layerdrop {plan.encoder_layerdrop} does not work with --memory-query-norm "
            "batch on several workers: they drop different layers and would wait for each "
            "other's statistics for ever; use --memory-query-norm layer"
        )


def _check_precision(plan: Plan) -> None:
    for half in ("fp16", "bf16"):
        if getattr(plan.run, f"memory_efficient_{half}") and not getattr(plan.run, half):
            raise ValueError(
                f"common.memory_efficient_{half} alone has no effect in fairseq-hydra-train: set "
                f"common.{half}=true, too"
            )
    # fairseq-train's reading of --bf16
    if plan.run.bf16 and plan.run.tpu and not find_spec("torch_xla"):
        raise ValueError(
            "--bf16 and --memory-efficient-bf16 of fairseq-train are for TPUs (torch_xla is not "
            "installed): use fairseq-hydra-train with common.bf16=true"
        )


def _check_average(plan: Plan) -> None:
    run = plan.run
    if run.store_ema and plan.memory.value_dtype == "bfloat16" and not run.ema_fp32:
        raise ValueError(
            "--store-ema with --memory-value-dtype bfloat16 needs --ema-fp32: steps of an average "
            "in bfloat16 are too small to move it"
        )


def _check_optimizer(plan: Plan) -> None:
    if plan.run.optimizer == "pkm_adam":
        for (option, value), reason in NOT_WITH_PKM_ADAM.items():
            if getattr(plan.run, option) == value:
                flag = flag_of(option) + ("" if value is True else f" {value}")
                raise ValueError(f"{flag} does not work with --optimizer pkm_adam: {reason}")
    if "pkm_adam" in plan.grouped_optimizers:
        raise ValueError(
            "optimizer composite does not work with pkm_adam in a group: use pkm_adam alone, "
            "which gives values a learning rate of their own"
        )


def _check_regularisation(plan: Plan) -> None:
    for option, default in (("ffn_reg_scale_factor", 0.0), ("ffn_blocks_to_remove", -1)):
        if plan.memory_mode == "replace" and getattr(plan, option) != default:
            raise ValueError(
                f"{flag_of(option)} does not work with --memory-mode replace: there is no FFN"
            )


def _check_finetune(plan: Plan) -> None:
    flag = f"--memory-finetune {plan.finetune.finetune}"
    if not plan.memory_layers:
        raise ValueError(f"{flag}: no layer has a memory")
    if plan.freeze is not None:
        raise ValueError(f"{flag} and --memory-freeze {plan.freeze} exclude each other")
    if plan.run.optimizer != "pkm_adam":
        raise ValueError(
            f"{flag} does not work with --optimizer {plan.run.optimizer}, which also moves "
            "rows that were not read: use --optimizer pkm_adam"
        )
    several = distributed_utils.get_data_parallel_world_size() > 1
    if several and plan.run.ddp_backend in ("pytorch_ddp", "c10d"):
        raise ValueError(
            f"{flag} does not work with --ddp-backend {plan.run.ddp_backend} on several workers: "
            "it needs trainable parameters besides values; use --ddp-backend legacy_ddp"
        )


def _check_values_file(plan: Plan) -> None:
    flag = f"--memory-values-file {plan.values_file}"
    if not plan.memory_layers:
        raise ValueError(f"{flag}: no layer has a memory")
    if plan.memory.values != "table":
        raise ValueError(f"{flag} does not work with --memory-values {plan.memory.values}")
    if plan.n_shards != 1:
        raise ValueError(f"{flag} does not work with --memory-shards {plan.n_shards}")


def _check_shards(plan: Plan) -> None:
    n_shards, optimizer = plan.n_shards, plan.run.optimizer
    if not plan.memory_layers:
        raise ValueError(f"memory-shards is {n_shards}, must be 1: no layer has a memory")
    if optimizer != "pkm_adam":
        raise ValueError(
            f"memory-shards is {n_shards}, which --optimizer {optimizer} cannot train: fairseq "
            "would average the columns of different workers; use --optimizer pkm_adam"
        )
    if plan.freeze in ("values", "all"):
        raise ValueError(
            f"--memory-freeze {plan.freeze} does not work with --memory-shards {n_shards}: the "
            "optimizer joins the shards for saving, but gets no frozen tables"
        )
    for option, reason in NOT_WITH_SHARDS.items():
        if getattr(plan, option, None) or getattr(plan.run, option, None):
            raise ValueError(
                f"{flag_of(option)} does not work with --memory-shards {n_shards}: {reason}"
            )


def _check_init_from(plan: Plan) -> None:
    for option in ("restore_file", "finetune_from_model", "continue_once"):
        file = getattr(plan.run, option)
        if file not in (None, "checkpoint_last.pt"):
            raise ValueError(
                f"--init-from {plan.init_from} and {flag_of(option)} {file} exclude each other"
            )
