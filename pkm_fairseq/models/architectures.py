"""The architectures of ``pkm_roberta``: defaults of options."""

from copy import copy
from dataclasses import fields
from typing import Any, Callable, Dict

from fairseq.models.roberta import base_architecture as roberta_base_architecture
from fairseq.utils import safe_getattr

from ..memory import MemoryConfig

Architecture = Callable[[Any], None]

# options that a size sets; all others are those of RoBERTa-base and MemoryConfig
SIZES: Dict[str, Dict[str, Any]] = {
    # small enough to learn on a laptop's CPU within minutes (our choice)
    "tiny": {
        "encoder_layers": 3,
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "encoder_attention_heads": 4,
        "memory_layers": [1],
        "memory_n_keys": 64,
        "memory_knn": 16,
        "memory_k_dim": 64,
    },
    "base": {"memory_layers": [3, 7]},
    # memories at the same relative depth as in the base size (our choice)
    "large": {
        "encoder_layers": 24,
        "encoder_embed_dim": 1024,
        "encoder_ffn_embed_dim": 4096,
        "encoder_attention_heads": 16,
        "memory_layers": [7, 15],
    },
}


def base_architecture(args: Any) -> None:
    """RoBERTa-base, memories instead of the FFN in layers 3 and 7; sizes: Lample et al. 2019."""
    _complete(args, SIZES["base"])
    _complete(args, {"memory_mode": "replace", "encoder_layerdrop": 0.0})
    _complete(args, {f"memory_{f.name}": f.default for f in fields(MemoryConfig)})
    roberta_base_architecture(args)


def tiny_architecture(args: Any) -> None:
    """Three layers of width 128 with a memory of 64 x 64 slots in the middle one (our choice)."""
    _complete(args, SIZES["tiny"])
    base_architecture(args)


def large_architecture(args: Any) -> None:
    """RoBERTa-large with memories at the same relative depth as the base size (our choice)."""
    _complete(args, SIZES["large"])
    base_architecture(args)


def residual(architecture: Architecture) -> Architecture:
    """An architecture with the memory added to the FFN (Kim & Jung 2020)."""

    def resm_architecture(args: Any) -> None:
        _complete(args, {"memory_mode": "residual"})
        architecture(args)

    return resm_architecture


def _complete(args: Any, defaults: Dict[str, Any]) -> None:
    for name, default in defaults.items():
        setattr(args, name, safe_getattr(args, name, copy(default)))
