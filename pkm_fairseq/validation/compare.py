"""Compare a memory's look-ups with FAISS over all full keys, head by head: is it exact?"""

import copy
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..memory import ProductKeyMemory, product_topk
from .exact import BLOCK_BYTES, exact_topk
from .parts import Judged, Weighting, judge_output, judge_read
from .results import HeadResult, LayerResult, ReducedResult
from .tolerance import score_tolerance

CHUNK = 512  # tokens to look up at once
READ_CHUNK = 32  # tokens to read values for at once


class Found(NamedTuple):
    """A memory's results for N tokens."""

    scores: Tensor  # (N, H, K), of the search
    slots: Tensor  # (N, H, K), of the layer
    weights: Tensor  # (N, H, K), of the layer
    read: Tensor  # (N, V), the read before the output network
    output: Tensor  # (N, input_dim), of the layer


class Exact(NamedTuple):
    """FAISS' results for one head, with one rank more than the memory keeps."""

    query: Tensor  # (N, k_dim), float64
    keys: Tensor  # (2, S, D), float64
    scores: Tensor  # (N, K + 1), float64
    slots: Tensor  # (N, K + 1)
    tolerance: Tensor  # (N, 1), float64
    weighting: Weighting = Weighting()

    @property
    def knn(self) -> int:
        """K."""
        return self.scores.shape[1] - 1

    def tied_at(self, k: int) -> Tensor:
        """Rows (N,) whose k-th and (k + 1)-th scores are equal within tolerance."""
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
    """Compare a memory's look-ups with an exact FAISS search over all its full keys.

    The memory is a black box: the check judges its output, slots and weights, using only its
    queries, sub-keys and values.

    Args:
        memory: in float32 and in eval mode.
        tokens: inputs of the memory, (N, input_dim), without padding.
        layer: its index, for the report.
        source: the source of the tokens, for the report.
        dtypes: reduced precisions whose errors to report.
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
    _check_finite(scores=found.scores, read=found.read, output=found.output)
    heads = memory.config.heads
    exact = []
    for head in range(heads):
        step = None if progress is None else (lambda share: progress(share / heads))
        exact.append(
            exact_head(query[:, head], memory.keys[head], memory.config.knn, block_bytes, step)
        )
        exact[-1] = exact[-1]._replace(weighting=Weighting.of(memory))
    results = [compare_head(head, exact[head], found) for head in range(heads)]
    read, output = compare_read(memory, exact, found, tokens), compare_output(memory, found, tokens)
    config = memory.config
    return LayerResult(
        layer=layer,
        source=source,
        queries=len(tokens),
        n_keys=config.n_keys,
        n_slots=config.n_slots,
        k_dim=config.k_dim,
        v_dim=memory.values.v_dim,
        knn=config.knn,
        dtype=_name(memory.keys.dtype),
        exact=read.within and output.within and all(result.exact for result in results),
        read_difference=read.difference,
        read_tolerance=read.tolerance,
        output_difference=output.difference,
        output_tolerance=output.tolerance,
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
    """Run the layer, and its search separately for the scores, which the layer does not return."""
    parts, reads = [], []
    hook = memory.output_proj.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
    try:
        for part in _split(tokens, CHUNK):
            output, (slots, weights) = memory(part, return_lookup=True)
            scores, _ = product_topk(memory.query(part), memory.keys, memory.config.knn)
            parts.append((scores, slots, weights, reads.pop(), output))
    finally:
        hook.remove()
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
    expected = exact.weighting.weights(rescored)
    weight_off = (found.weights[:, head].cpu().double() - expected).abs()
    weight_bound = exact.weighting.tolerance(tolerance, rescored)  # (N, 1)
    tiny = torch.finfo(torch.float32).tiny
    first_off = best[:, 0] - rescored[:, 0]
    recall_at_1 = float((valid[:, 0] & (first_off <= tolerance[:, 0])).double().mean())
    same = (exact.slots[:, :knn, None] == slots[:, None, :]).any(-1)  # (N, K)
    free = exact.tied_at(knn)[:, None] & (best <= best[:, -1:] + tolerance)  # (N, K)
    recall_at_k = float((same | free).double().mean())
    within = (
        (score_off <= tolerance).all()
        & (rescored_off <= tolerance).all()
        & (weight_off <= exact.weighting.bound(weight_bound, expected) + tiny).all()
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


class Compared(NamedTuple):
    """The comparison of a result with its exact value."""

    difference: float  # the largest
    tolerance: float  # the least
    within: bool  # all are within theirs


def compare_read(
    memory: ProductKeyMemory, exact: List[Exact], found: Found, tokens: Tensor
) -> Compared:
    """Compare the layer's read with the exact read in float64.

    For tied rows the exact read uses the memory's slots, for all others FAISS' slots.
    """
    to_read = [_to_read(e, found, head) for head, e in enumerate(exact)]
    slots, weights, bounds = (torch.stack(x, dim=1) for x in zip(*to_read, strict=True))
    parts = []
    for rows in _split(torch.arange(len(slots)), READ_CHUNK):
        judged = Judged(weights[rows], bounds[rows])  # (n, H, K)
        x = tokens[rows.to(tokens.device)].cpu().double()
        parts.append(_compare(found.read[rows], judge_read(memory.values, slots[rows], judged, x)))
    return _worst(parts)


def compare_output(memory: ProductKeyMemory, found: Found, tokens: Tensor) -> Compared:
    """Compare the layer's output with the exact output for its read, in float64."""
    parts = []
    for rows in _split(torch.arange(len(tokens)), CHUNK):
        read, x = (t[rows.to(t.device)].cpu().double() for t in (found.read, tokens))
        parts.append(_compare(found.output[rows], judge_output(memory.output_proj, read, x)))
    return _worst(parts)


def _compare(found: Tensor, judged: Judged) -> Compared:
    off = (found.cpu().double() - judged.expected).abs()
    bound = judged.bound + torch.finfo(torch.float32).tiny
    return Compared(float(off.max()), float(bound.min()), bool((off <= bound).all()))


def _worst(parts: List[Compared]) -> Compared:
    differences, tolerances, within = zip(*parts, strict=True)
    return Compared(max(differences), min(tolerances), all(within))


def _to_read(exact: Exact, found: Found, head: int) -> Tuple[Tensor, Tensor, Tensor]:
    """The slots of an exact memory (for ties, the memory's own), their weights and bounds."""
    own = found.slots[:, head].cpu().clamp(0, exact.keys.shape[1] ** 2 - 1)
    slots = torch.where(exact.tied_at(exact.knn)[:, None], own, exact.slots[:, : exact.knn])
    scores, how = exact.rescore(slots), exact.weighting
    weights = how.weights(scores)  # (N, K)
    return slots, weights, how.bound(how.tolerance(exact.tolerance, scores), weights)


def _score_differences(exact: Exact, found: Found, head: int) -> Tensor:
    scores = found.scores[:, head].cpu().double().sort(dim=1, descending=True).values
    return scores - exact.scores[:, : exact.knn]  # (N, K)


def _valid(slots: Tensor, n_slots: int) -> Tensor:
    """Which slots (N, K) are in range and do not repeat an earlier slot of their row."""
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
        read_difference=compare_read(memory, exact, found, tokens).difference,
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
