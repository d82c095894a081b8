"""Small random models of transformers, of every architecture that takes memories."""

from typing import Any, Dict

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (requirements/huggingface.txt)"
)

from pkm_fairseq.huggingface import add_memories  # noqa: E402
from pkm_fairseq.memory import MemoryConfig  # noqa: E402

SMALL = MemoryConfig(n_keys=8, heads=2, knn=4, k_dim=8)
ZERO = MemoryConfig(n_keys=8, heads=2, knn=4, k_dim=8, values_init="zero")
N_SYMBOLS = 60

_SIZES: Dict[str, Any] = {
    "vocab_size": N_SYMBOLS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def configuration(model_type: str, dropout: float = 0.0, **more: Any) -> Any:
    """The configuration of a small model, by transformers' name of its type."""
    both = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    own: Dict[str, Dict[str, Any]] = {
        "electra": {"embedding_size": 12, **both},
        "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        "distilbert": {
            "dim": 16,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 24,
            "dropout": dropout,
            "attention_dropout": dropout,
        },
    }
    sizes = _SIZES
    if model_type == "distilbert":
        sizes = {name: _SIZES[name] for name in ("vocab_size", "max_position_embeddings")}
    settings = {**_IDS, **sizes, **own.get(model_type, both), **more}
    return transformers.CONFIG_MAPPING[model_type](**settings)


def plain(model_type: str, head: str = "MaskedLM", dropout: float = 0.0, **more: Any) -> Any:
    """A small random model without memory; no head with ``head=""``."""
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto.from_config(configuration(model_type, dropout), **more)


def with_memories(model_type: str, mode: str = "residual", head: str = "MaskedLM") -> Any:
    """A small random model with memories in layers 0 and 2."""
    return add_memories(plain(model_type, head), SMALL, [0, 2], mode)


def batch(head: str = "MaskedLM") -> Dict[str, Tensor]:
    """Three sentences, the second with padding."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, N_SYMBOLS, (3, 9), generator=generator)  # (B, T)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[mask == 0] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if head == "MultipleChoice":
        return {name: x[None] for name, x in given.items()}  # (1, choices, T)
    return given


def outputs(model: Any, given: Dict[str, Tensor], **more: Any) -> "list[Tensor]":
    """All that a model returns, hidden states included."""
    found = model(**given, output_hidden_states=True, **more).to_tuple()
    return [x for part in found for x in (part if isinstance(part, tuple) else (part,))]
