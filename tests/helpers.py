"""What several tests need: exactness checks, small models, small data."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterable, Optional

import torch
from fairseq.data import Dictionary, indexed_dataset
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import Tensor

import pkm_fairseq
from pkm_fairseq.memory import MemoryConfig, product_topk
from pkm_fairseq.memory.reference import full_keys, naive_topk

pkm_fairseq.register()

WIDTH, LAYERS = 16, 3
SMALL = MemoryConfig(n_keys=5, heads=2, knn=3, k_dim=4)


# --- search ---------------------------------------------------------------------------------


def integers(*shape: int, high: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every score is exact, and many are equal."""
    return torch.randint(-high, high + 1, shape).to(dtype)


def all_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Score of every slot, (N, H, n_slots)."""
    return torch.einsum("nhd,hmd->nhm", query.flatten(2), full_keys(keys))


def assert_exact_topk(query: Tensor, keys: Tensor, knn: int, atol: float = 0.0) -> None:
    """product_topk finds what the naive search over all slots finds.

    Which of several equal slots is kept is free, so slots are compared by their scores.
    """
    scores, slots = product_topk(query, keys, knn)
    expected, _ = naive_topk(query, keys, knn)
    assert scores.shape == slots.shape == expected.shape
    assert slots.dtype == torch.int64
    assert ((slots >= 0) & (slots < keys.shape[2] ** 2)).all()
    ascending = slots.sort(dim=-1).values
    assert (ascending[..., 1:] > ascending[..., :-1]).all(), "a slot was returned twice"
    assert (scores[..., 1:] <= scores[..., :-1]).all(), "scores do not descend"
    assert torch.allclose(scores, expected, rtol=0, atol=atol), "scores are not the best ones"
    rescored = all_scores(query, keys).gather(-1, slots)
    assert torch.allclose(rescored, scores, rtol=0, atol=atol), "slots do not have these scores"


# --- models ---------------------------------------------------------------------------------


def small_dictionary(n_symbols: int = 15) -> Dictionary:
    """Specials, ``n_symbols`` words and the mask."""
    dictionary = Dictionary()
    for index in range(n_symbols):
        dictionary.add_symbol(f"w{index}")
    dictionary.add_symbol("<mask>")
    return dictionary


def small_task(dictionary: Optional[Dictionary] = None) -> SimpleNamespace:
    """As much of a task as models and criteria look at."""
    dictionary = small_dictionary() if dictionary is None else dictionary
    return SimpleNamespace(
        source_dictionary=dictionary,
        target_dictionary=dictionary,
        label_dictionary=dictionary,
        max_positions=lambda: 12,
    )


def model_args(arch: str, **options: Any) -> Namespace:
    """fairseq's options of a very small model, completed by the architecture."""
    defaults = dict(
        arch=arch,
        encoder_layers=LAYERS,
        encoder_embed_dim=WIDTH,
        encoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        max_positions=12,
        optimizer="adam",
        fp16=False,
        bf16=False,
        memory_efficient_fp16=False,
        memory_efficient_bf16=False,
    )
    if arch != "roberta":
        defaults.update(
            memory_layers=[1],
            memory_n_keys=5,
            memory_heads=2,
            memory_knn=3,
            memory_k_dim=4,
            memory_share_values=False,
            init_from=None,
            save_dir="no-such-folder",
            restore_file="checkpoint_last.pt",
            checkpoint_suffix="",
        )
    args = Namespace(**{**defaults, **options})
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def build(arch: str, dictionary: Optional[Dictionary] = None, seed: int = 0, **options: Any) -> Any:
    """A very small model, built as fairseq builds it."""
    args = model_args(arch, **options)
    torch.manual_seed(seed)
    return ARCH_MODEL_REGISTRY[arch].build_model(args, small_task(dictionary))


def batch(dictionary: Dictionary, lengths: Iterable[int], extra: int = 0, seed: int = 3) -> Tensor:
    """Random sentences, right-padded to the longest plus ``extra``, (B, T)."""
    lengths = list(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths) + extra), dictionary.pad())
    for row, length in enumerate(lengths):
        words = torch.randint(dictionary.nspecial, len(dictionary), (length,), generator=generator)
        tokens[row, :length] = words
    return tokens


def mlm_sample(tokens: Tensor, dictionary: Dictionary, every: int = 3) -> dict:
    """A masked-LM batch whose targets are every third real token."""
    real = tokens.ne(dictionary.pad())
    chosen = real & (torch.arange(tokens.shape[1]) % every == 0)
    target = torch.full_like(tokens, dictionary.pad())
    target[chosen] = tokens[chosen]
    return {
        "net_input": {"src_tokens": tokens.masked_fill(chosen, dictionary.index("<mask>"))},
        "target": target,
        "ntokens": int(real.sum()),
        "nsentences": len(tokens),
    }


# --- data -----------------------------------------------------------------------------------


def write_split(folder: Path, split: str, dictionary: Dictionary, sentences: list) -> None:
    """Write sentences (lists of token ids) as fairseq-preprocess does."""
    folder.mkdir(parents=True, exist_ok=True)
    dictionary.save(str(folder / "dict.txt"))
    builder = indexed_dataset.make_builder(
        str(folder / f"{split}.bin"), impl="mmap", vocab_size=len(dictionary)
    )
    for sentence in sentences:
        builder.add_item(torch.tensor(sentence, dtype=torch.int32))
    builder.finalize(str(folder / f"{split}.idx"))
