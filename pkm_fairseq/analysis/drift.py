"""Measure how far memories moved from one checkpoint to another."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..memory import ProductKeyMemory
from ..models.capture import capture_inputs
from ..models.roberta import PkmRobertaModel

TOKENS = 128  # tokens to compare at once
ROWS = 8192  # rows of a value table to compare at once
QUANTILES = (50, 90, 99)


@torch.no_grad()
def drift(
    before: Dict[int, ProductKeyMemory],
    after: Dict[int, ProductKeyMemory],
    inputs_before: Dict[int, Tensor],
    inputs_after: Dict[int, Tensor],
) -> List[Dict[str, Any]]:
    """Compare the look-ups of memories for the same tokens, and their parameters.

    Args:
        before: memories by layer, in eval mode.
        after: the same memories later, in eval mode.
        inputs_before: by layer, the inputs of the memories before, (N, input_dim).
        inputs_after: by layer, the inputs of the memories after, for the same tokens.

    Returns:
        For each layer ``layer``, ``tokens``, and means over tokens and heads: ``topk_jaccard``,
        the overlap of the slots read; ``top1_same``, the share of unchanged first choices;
        ``query_cosine`` and ``query_moved``, the cosine similarity and relative L2 distance of
        queries. ``keys_moved`` and ``values_moved``: relative L2 distance of all sub-keys and of
        the value table; ``values_moved_p50``, ``_p90``, ``_p99``, ``_max``: of single slots,
        relative to the root mean square of the L2 norms of the slots before; ``values_unmoved``:
        share of slots that did not change. ``heads``: all numbers that exist per head.
        A distance is relative to the size before, and None if that is zero.

    Raises:
        ValueError: layers or shapes differ, or there is no token.
    """
    if list(before) != list(after):
        raise ValueError(f"memories are in layers {list(before)} before, {list(after)} after")
    found = []
    for layer in before:
        _check_shapes(layer, before[layer], after[layer])
        x, y = inputs_before[layer], inputs_after[layer]
        if len(x) != len(y) or not len(x):
            raise ValueError(
                f"layer {layer}: {len(x)} tokens before and {len(y)} after, must be the same tokens"
            )
        heads = _drift_of_heads(before[layer], after[layer], x, y)
        found.append(
            {
                "layer": layer,
                "tokens": len(x),
                **{name: _mean([head[name] for head in heads]) for name in heads[0]},
                "keys_moved": _relative(before[layer].keys, after[layer].keys),
                **_drift_of_values(_tables(before[layer]), _tables(after[layer])),
                "heads": [{"head": i, **head} for i, head in enumerate(heads)],
            }
        )
    return found


def drift_of_models(
    before: PkmRobertaModel,
    after: PkmRobertaModel,
    sequences: Sequence[Tensor],
    pad: int,
    n_tokens: int,
) -> List[Dict[str, Any]]:
    """``drift`` of the memories of two models in eval mode that read the same tokens.

    Args:
        before: a model.
        after: the model later.
        sequences: token ids, each (T,).
        pad: the padding id.
        n_tokens: number of tokens to use; all if there are fewer.

    Raises:
        ValueError: see ``drift``; raised before any text is read.
    """
    memories = [
        {index: layer.memory for index, layer in model.memory_layers().items()}
        for model in (before, after)
    ]
    for layer in memories[0].keys() & memories[1].keys():
        _check_shapes(layer, memories[0][layer], memories[1][layer])
    n_tokens = min(n_tokens, sum(map(len, sequences)))
    if n_tokens < 1:
        raise ValueError("drift needs at least one token")
    inputs = [capture_inputs(model, sequences, pad, n_tokens) for model in (before, after)]
    return drift(*memories, *inputs)


def _tables(memory: ProductKeyMemory) -> List[Tensor]:
    return [table.weight for table in memory.values.tables().values()]


def _shape(memory: ProductKeyMemory) -> Dict[str, Any]:
    config = memory.config
    return {
        "values": config.values,
        "n_slots": config.n_slots,
        "heads": config.heads,
        "knn": config.knn,
        "k_dim": config.k_dim,
        "v_dim": memory.values.v_dim,
    }


def _check_shapes(layer: int, before: ProductKeyMemory, after: ProductKeyMemory) -> None:
    shapes = _shape(before), _shape(after)
    if shapes[0] != shapes[1]:
        texts = [" ".join(f"{name}={size}" for name, size in shape.items()) for shape in shapes]
        raise ValueError(
            f"layer {layer}: a memory of {texts[0]} cannot be compared with one of {texts[1]}"
        )


def _drift_of_heads(
    before: ProductKeyMemory, after: ProductKeyMemory, x: Tensor, y: Tensor
) -> List[Dict[str, Any]]:
    """Compare the look-ups of each head; x and y (N, input_dim)."""
    names = ("topk_jaccard", "top1_same", "query_cosine", "query_moved")
    sums = torch.zeros(before.config.heads, len(names), dtype=torch.float64)
    for part_x, part_y in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        parts = _compare_lookups(before, after, part_x, part_y)  # each (n, H)
        sums += torch.stack([part.double().sum(0) for part in parts], dim=1)
    means = (sums / len(x)).tolist()  # (H, 4)
    found: List[Dict[str, Any]] = []
    for head, row in enumerate(means):
        numbers = {name: _finite(mean) for name, mean in zip(names, row, strict=True)}
        moved = _relative(before.keys[head], after.keys[head])
        found.append({**numbers, "keys_moved": moved})
    return found


def _compare_lookups(
    before: ProductKeyMemory, after: ProductKeyMemory, x: Tensor, y: Tensor
) -> Tuple[Tensor, ...]:
    """Overlap, equality of first choices, cosine and distance of queries, each (n, H)."""
    slots, others = before.search(x)[0], after.search(y)[0]  # (n, H, K)
    common = (slots[..., :, None] == others[..., None, :]).sum(dim=(-2, -1))
    jaccard = common / (slots.shape[-1] + others.shape[-1] - common)
    query, other = (m.query(z).flatten(2).double() for m, z in ((before, x), (after, y)))
    cosine = torch.cosine_similarity(query, other, dim=-1)
    moved = (other - query).norm(dim=-1) / query.norm(dim=-1)
    return jaccard, slots[..., 0] == others[..., 0], cosine, moved


def _drift_of_values(before: List[Tensor], after: List[Tensor]) -> Dict[str, Any]:
    """Distances of slots; a slot's rows in all tables (n_slots, width) count as one vector."""
    squares, size = torch.zeros(len(before[0]), dtype=torch.float64), 0.0
    for table, later in zip(before, after, strict=True):
        moved = []
        for was, now in zip(table.split(ROWS), later.split(ROWS), strict=True):
            moved.append((now.float() - was.float()).norm(dim=1).double().square())
            size += float(was.double().square().sum())
        squares += torch.cat(moved).cpu()
    distances = squares.sqrt()  # (n_slots,)
    typical = math.sqrt(size / len(distances))
    ranked = distances.sort().values
    at = {f"p{q}": ranked[math.ceil(q * len(ranked) / 100) - 1] for q in QUANTILES}
    return {
        "values_moved": _ratio(float(distances.norm()), math.sqrt(size)),
        **{f"values_moved_{q}": _ratio(float(distance), typical) for q, distance in at.items()},
        "values_moved_max": _ratio(float(ranked[-1]), typical),
        "values_unmoved": float((distances == 0).double().mean()),
    }


def _relative(before: Tensor, after: Tensor) -> Optional[float]:
    return _ratio(float((after.double() - before.double()).norm()), float(before.double().norm()))


def _ratio(moved: float, size: float) -> Optional[float]:
    if size == 0:
        return None if moved else 0.0
    return moved / size


def _finite(number: float) -> Optional[float]:
    return number if math.isfinite(number) else None


def _mean(numbers: Sequence[Optional[float]]) -> Optional[float]:
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if len(known) == len(numbers) else None
