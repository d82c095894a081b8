"""Refuse trainings by transformers that cannot work with memories."""

from typing import Any

from accelerate.utils import parse_flag_from_env

from .models import MemoryModel

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def check_training(model: Any, args: Any) -> None:
    """Refuse a training that cannot work with memories.

    Args:
        model: the Trainer's model.
        args: its TrainingArguments.

    Raises:
        ValueError: the training cannot work; the message gives the reason and a remedy.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model is a PEFT model, and PEFT freezes or wraps memories: train the model "
            "itself, or merge the adapters and then call add_memories"
        )
    if not isinstance(model, MemoryModel):
        raise ValueError("the model has no memories: call add_memories first")
    for name in ("deepspeed", "fsdp"):
        # accelerate launch names them only in the environment
        if getattr(args, name) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ValueError(
                f"{name} splits or flattens parameters, but value tables must be whole: start "
                "data-parallel workers with torchrun"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process with {args.n_gpu} GPUs copies the model for each batch: start one "
            "process per GPU with torchrun"
        )


def check_optimizer(args: Any) -> None:
    """Refuse an optimizer that MemoryAdam cannot replace.

    Raises:
        ValueError: MemoryAdam has no such form; the message names the optimizer.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optim is {name}, must be one of {', '.join(OPTIMIZERS)} (MemoryAdam is their lazy "
            "form): for another optimizer use transformers' own Trainer, with dense gradients"
        )
