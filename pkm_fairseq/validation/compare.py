"""Is a memory's search exact? Its look-ups against FAISS over all full keys, head by head."""

import copy
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..memory import ProductKeyMemory, product_topk
from .exact import BLOCK_BYTES, exact_topk
from .results import HeadResult, LayerResult, ReducedResult
from .tolerance import read_tolerance, score_tolerance, weight_tolerance

CHUNK = 512  # tokens looked up at once
READ_CHUNK = 32  # tokens whose values are gathered at once


class Found(NamedTuple):
    """What a memory did with N tokens."""

    scores: Tensor  # (N, H, K), of the search
    slots: Tensor  # (N, H, K), of the layer
    weights: Tensor  # (N, H, K), of the layer
    read: Tensor  # (N, input_dim), of the layer


class Exact(NamedTuple):
    """What FAISS found for one head, one rank more than the memory keeps."""

    query: Tensor  # (N, k_dim), float64
    keys: Tensor  # (2, S, D), float64
    scores: Tensor  # (N, K + 1), float64
    slots: Tensor  # (N, K + 1)
    tolerance: Tensor  # (N, 1), float64

    @property
    def knn(self) -> int:
        """K."""
        return self.scores.shape[1] - 1

    def tied_at(self, k: int) -> Tensor:
        """Rows (N,) whose k-th and (k + 1)-th scores cannot be told apart."""
        return self.scores[:, k - 1] - self.scores[:, k] <= self.tolerance[:, 0]

    def rescore(self, slots: Tensor) -> Tensor:
        """Scores of slots (N, K) in float64, by the definition of a slot."""
        n_keys = self.keys.shape[1]
        first, second = self.query.chunk(2, dim=1)  # (N, D), (N, D)
        index1, index2 = slots // n_keys, slots % n_keys
        half1 = (first @ self.keys[0].t()).gather(1, index1)
        return half1 + (second @ self.keys[1].t()).gather(1, index2)


@torch.no_grad()
def validate_memory(
    memory: ProductKeyMemory,
    tokens: Tensor,
    layer: int = 0,
    source: str = "text",
    dtypes: Sequence[torch.dtype] = (),
    block_bytes: int = BLOCK_BYTES,
    progress: Optional[Callable[[float], None]] = None,
) -> LayerResult:
    """Compare what a memory looks up with the exact search by FAISS over all its full keys.

    The memory is a black box: its own output, slots and weights are judged, from nothing but its
    queries, sub-keys and values.

    Args:
        memory: in float32 and in eval mode.
        tokens: inputs of the memory, (N, input_dim), without padding.
        layer: its index, for the report.
        source: where the tokens come from, for the report.
        dtypes: reduced precisions whose cost to report.
        block_bytes: size of a block of full keys.
        progress: called with shares of the work that add up to 1.

    Returns:
        The comparison.

    Raises:
        ValueError: the memory is not in float32 or in training mode, there is no token, or
            something is not finite.
    """
    _check(memory, tokens)
    query = torch.cat([memory.query(part) for part in _split(tokens, CHUNK)])  # (N, H, 2, D)
    _check_finite(query=query, keys=memory.keys)
    found = look_up(memory, tokens)
    _check_finite(scores=found.scores, read=found.read)
    heads = memory.config.heads
    exact = []
    for head in range(heads):
        step = None if progress is None else (lambda share: progress(share / heads))
        exact.append(
            exact_head(query[:, head], memory.keys[head], memory.config.knn, block_bytes, step)
        )
    results = [compare_head(head, exact[head], found) for head in range(heads)]
    read, least_tolerance, within = compare_read(memory, exact, found)
    config = memory.config
    return LayerResult(
        layer=layer,
        source=source,
        queries=len(tokens),
        n_keys=config.n_keys,
        n_slots=config.n_slots,
        k_dim=config.k_dim,
        v_dim=memory.values.weight.shape[1],
        knn=config.knn,
        dtype=_name(memory.keys.dtype),
        exact=within and all(result.exact for result in results),
        read_difference=read,
        read_tolerance=least_tolerance,
        heads=results,
        reduced=[_reduced(memory, tokens, dtype, exact) for dtype in dtypes],
        differences=torch.stack([_score_differences(exact[h], found, h) for h in range(heads)]),
    )


def random_like(tokens: Tensor, seed: int = 0) -> Tensor:
    """Random tokens with the mean and spread of the given ones, feature by feature."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens.shape, generator=generator).to(tokens)
    return tokens.mean(0) + tokens.std(0, correction=0) * noise


def look_up(memory: ProductKeyMemory, tokens: Tensor) -> Found:
    """Run the layer, and its search alone for the scores that the layer does not hand out."""
    parts = []
    for part in _split(tokens, CHUNK):
        read, (slots, weights) = memory(part, return_lookup=True)
        scores, _ = product_topk(memory.query(part), memory.keys, memory.config.knn)
        parts.append((scores, slots, weights, read))
    return Found(*(torch.cat(column) for column in zip(*parts, strict=True)))


def exact_head(
    query: Tensor,
    keys: Tensor,
    knn: int,
    block_bytes: int = BLOCK_BYTES,
    progress: Optional[Callable[[float], None]] = None,
) -> Exact:
    """Search one head exactly; query (N, 2, D), keys (2, S, D)."""
    flat = query.flatten(1)  # (N, k_dim)
    scores, slots = exact_topk(flat, keys, knn + 1, block_bytes, progress)
    return Exact(
        flat.double().cpu(),
        keys.double().cpu(),
        torch.from_numpy(scores).double(),
        torch.from_numpy(slots),
        score_tolerance(query, keys),
    )


def compare_head(head: int, exact: Exact, found: Found) -> HeadResult:
    """Compare one head's look-ups with the exact ones."""
    knn, tolerance = exact.knn, exact.tolerance
    slots = found.slots[:, head].cpu()  # (N, K)
    valid = _valid(slots, exact.keys.shape[1] ** 2)
    rescored = exact.rescore(slots.clamp(0, exact.keys.shape[1] ** 2 - 1))  # (N, K)
    best = exact.scores[:, :knn]
    score_off = _score_differences(exact, found, head).abs()
    rescored_off = (rescored.sort(dim=1, descending=True).values - best).abs()
    expected = rescored.softmax(dim=1)
    weight_off = (found.weights[:, head].cpu().double() - expected).abs()
    weight_bound = weight_tolerance(tolerance, knn)  # (N, 1), relative
    first_off = best[:, 0] - rescored[:, 0]
    recall_at_1 = float((valid[:, 0] & (first_off <= tolerance[:, 0])).double().mean())
    same = (exact.slots[:, :knn, None] == slots[:, None, :]).any(-1)  # (N, K)
    free = exact.tied_at(knn)[:, None] & (best <= best[:, -1:] + tolerance)  # (N, K)
    recall_at_k = float((same | free).double().mean())
    within = (
        (score_off <= tolerance).all()
        & (rescored_off <= tolerance).all()
        & (weight_off <= weight_bound * expected + torch.finfo(torch.float32).tiny).all()
        & valid.all()
    )
    return HeadResult(
        head=head,
        score_difference=float(score_off.max()),
        score_difference_relative=float((score_off / best.abs().clamp(min=1e-30)).max()),
        score_tolerance=float(tolerance.min()),
        rescored_difference=float(rescored_off.max()),
        weight_difference=float(weight_off.max()),
        weight_tolerance=float(weight_bound.min()),
        recall_at_1=recall_at_1,
        recall_at_k=recall_at_k,
        same_at_1=float((slots[:, 0] == exact.slots[:, 0]).double().mean()),
        same_at_k=float(same.double().mean()),
        ties_at_1=int(exact.tied_at(1).sum()),
        ties_at_k=int(exact.tied_at(knn).sum()),
        invalid_slots=int((~valid).sum()),
        exact=bool(within) and recall_at_1 == recall_at_k == 1,
    )


def compare_read(
    memory: ProductKeyMemory, exact: List[Exact], found: Found
) -> Tuple[float, float, bool]:
    """Compare the layer's output with the exact read in float64.

    A tied row is read at the slots that the memory chose, every other at those of FAISS.

    Returns:
        Largest difference, least tolerance, and whether all outputs are within theirs.
    """
    to_read = [_to_read(e, found, head) for head, e in enumerate(exact)]
    slots = torch.stack([head[0] for head in to_read], dim=1)  # (N, H, K)
    weights = torch.stack([head[1] for head in to_read], dim=1)  # (N, H, K)
    tolerance = torch.cat([e.tolerance for e in exact], dim=1).amax(1)  # (N,)
    table, read = memory.values.weight, found.read.cpu().double()
    projection = None
    if isinstance(memory.output_proj, nn.Linear):
        projection = memory.output_proj.weight.cpu().double()  # (input_dim, V)
    relative = read_tolerance(tolerance, slots[0].numel(), exact[0].knn, table.shape[1])  # (N,)
    worst, least, within = 0.0, float("inf"), True
    for rows in _split(torch.arange(len(slots)), READ_CHUNK):
        values = table[slots[rows].to(table.device)].cpu().double()  # (n, H, K, V)
        weighted = weights[rows, ..., None] * values
        expected, scale = weighted.sum((1, 2)), weighted.abs().sum((1, 2))  # (n, V)
        if projection is not None:
            expected, scale = expected @ projection.t(), scale @ projection.t().abs()
        off = (read[rows] - expected).abs()
        bound = relative[rows, None] * scale + torch.finfo(torch.float32).tiny
        worst, least = max(worst, float(off.max())), min(least, float(bound.min()))
        within = within and bool((off <= bound).all())
    return worst, least, within


def _to_read(exact: Exact, found: Found, head: int) -> Tuple[Tensor, Tensor]:
    """The slots that an exact memory reads, ties left to the memory, and their weights."""
    own = found.slots[:, head].cpu().clamp(0, exact.keys.shape[1] ** 2 - 1)
    slots = torch.where(exact.tied_at(exact.knn)[:, None], own, exact.slots[:, : exact.knn])
    return slots, exact.rescore(slots).softmax(dim=1)


def _score_differences(exact: Exact, found: Found, head: int) -> Tensor:
    scores = found.scores[:, head].cpu().double().sort(dim=1, descending=True).values
    return scores - exact.scores[:, : exact.knn]  # (N, K)


def _valid(slots: Tensor, n_slots: int) -> Tensor:
    """Which slots (N, K) are in range and not a repetition of an earlier one of their row."""
    equal = slots[:, :, None] == slots[:, None, :]  # (N, K, K)
    repeated = equal.tril(-1).any(-1)
    return (slots >= 0) & (slots < n_slots) & ~repeated


def _reduced(
    memory: ProductKeyMemory, tokens: Tensor, dtype: torch.dtype, exact: List[Exact]
) -> ReducedResult:
    found = look_up(_converted(memory, dtype), tokens.to(dtype))
    heads = [compare_head(head, exact[head], found) for head in range(len(exact))]
    return ReducedResult(
        dtype=_name(dtype),
        score_difference=max(head.score_difference for head in heads),
        weight_difference=max(head.weight_difference for head in heads),
        recall_at_1=sum(head.recall_at_1 for head in heads) / len(heads),
        recall_at_k=sum(head.recall_at_k for head in heads) / len(heads),
        read_difference=compare_read(memory, exact, found)[0],
    )


def _converted(memory: ProductKeyMemory, dtype: torch.dtype) -> ProductKeyMemory:
    """A copy in another precision, without a second copy of the values in float32."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in memory.parameters()
    }
    return copy.deepcopy(memory, memo).to(dtype)


def _split(rows: Tensor, size: int) -> Tuple[Tensor, ...]:
    parts: Tuple[Tensor, ...] = rows.split(size)  # type: ignore[no-untyped-call]
    return parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(memory: ProductKeyMemory, tokens: Tensor) -> None:
    if memory.keys.dtype != torch.float32:
        raise ValueError(f"the memory is in {_name(memory.keys.dtype)}, must be in float32")
    if memory.training:
        raise ValueError("the memory is in training mode, must be in eval mode")
    if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] != memory.input_dim:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}, must be (N, {memory.input_dim}) with N >= 1"
        )


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the memory's {name} are not all finite numbers: nothing to judge")
