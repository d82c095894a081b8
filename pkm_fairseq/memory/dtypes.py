"""Precision: what is stored in half precision is computed in float32."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float32 and float64 in themselves."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Is this floating dtype half precision?"""
    return compute_dtype(dtype) != dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(compute_dtype(x.dtype))
