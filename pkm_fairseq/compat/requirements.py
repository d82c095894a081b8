"""Refuse fairseq's options whose requirements are missing."""

from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable

import torch
from fairseq.data import plasma_utils


def refuse_what_cannot_work(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``override_module_args``, the first function that reads a command's options."""

    @wraps(stock)
    def override_module_args(args: Any) -> Any:
        for option, is_there, needs in (
            ("profile", torch.cuda.is_available(), "CUDA"),
            ("use_plasma_view", plasma_utils.PYARROW_AVAILABLE, "plasma, of pyarrow before 12"),
            ("write_checkpoints_asynchronously", find_spec("iopath"), "iopath: pip install iopath"),
        ):
            if getattr(args, option, False) and not is_there:
                raise ValueError(f"--{option.replace('_', '-')} needs {needs}")
        if getattr(args, "optimizer", None) == "composite":
            raise ValueError(
                "--optimizer composite gets its groups from a configuration: use "
                "fairseq-hydra-train"
            )
        return stock(args)

    return override_module_args


def name_a_checkpoint_without_average(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``load_ema_from_checkpoint``, which --ema-seed-model calls."""

    @wraps(stock)
    def load_ema_from_checkpoint(file: Any) -> Any:
        if not Path(file).is_file():
            raise ValueError(f"--ema-seed-model: no checkpoint at {file}")
        try:
            return stock(file)
        except KeyError as error:
            if error.args != ("ema",):
                raise
            raise ValueError(
                f"--ema-seed-model: {file} holds no average; it must come from a training with "
                "--store-ema"
            ) from None

    return load_ema_from_checkpoint
