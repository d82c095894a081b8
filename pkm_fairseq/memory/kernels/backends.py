"""Which backend runs: the choice, forced or not, and the line in the log."""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "numba", "triton")
FASTEST = {"cpu": "numba", "cuda": "triton"}  # elsewhere torch


def backend_for(x: Tensor) -> ModuleType:
    """The module that runs operations on tensors of this device and dtype.

    Raises:
        RuntimeError: PKM_BACKEND names a backend that does not exist or cannot run.
    """
    return _choose(os.environ.get("PKM_BACKEND") or None, x.device.type, x.dtype)


@cache
def _choose(forced: Optional[str], device: str, dtype: torch.dtype) -> ModuleType:
    if forced is not None and forced not in BACKENDS:
        raise RuntimeError(f"PKM_BACKEND is {forced}, must be one of {', '.join(BACKENDS)}")
    name = forced or FASTEST.get(device, "torch")
    problem = _problem(name, device, dtype)
    if problem and forced:
        raise RuntimeError(f"PKM_BACKEND is {forced}, but {problem}")
    where = f"on {device} in {str(dtype).removeprefix('torch.')}"
    if problem:
        logger.warning("memory kernels: torch %s, which is slower: %s", where, problem)
        name = "torch"
    else:
        logger.info("memory kernels: %s %s", name, where)
    return _load(name)


def _load(name: str) -> ModuleType:
    return import_module(f".{name}_backend", __package__)


def _problem(name: str, device: str, dtype: torch.dtype) -> Optional[str]:
    """Why a backend cannot run; None if it can."""
    try:
        backend = _load(name)
    except Exception as error:  # numba raises RuntimeError where it finds no folder for its cache
        return f"{name} cannot be imported ({error})"
    if device not in backend.DEVICES:
        return f"{name} does not run on {device}"
    if dtype not in backend.DTYPES:
        return f"{name} does not know {str(dtype).removeprefix('torch.')}"
    return None
