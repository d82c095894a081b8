"""A textbook product-key memory, like public implementations: the baseline."""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from ...memory import MemoryConfig, ProductKeyMemory

TOLERANCE = (
    1e-4  # relative to the largest element, for float32 sums of 1,000 terms in another order
)
TIES = 0.01  # share of tokens that may read other slots with the same score up to rounding


class MismatchError(RuntimeError):
    """The two sides compute different results, so that comparing their speed makes no sense."""


class Found(NamedTuple):
    """The results of the search, each (N, H, K), scores descending."""

    scores: Tensor
    slots: Tensor


class TextbookMemory(nn.Module):
    """A product-key memory (Lample et al. 2019) in torch's own operations.

    It computes half scores by einsum, the best of each half and then of all ``knn ** 2`` sums by
    ``topk``, and reads with an ``EmbeddingBag`` over the values.

    Args:
        memory: it copies this memory's settings and weights; the memory must use batch
            normalisation of the query and no dropout.
        sparse: whether the gradient of the values is a sparse tensor, for ``SparseAdam``.
    """

    def __init__(self, memory: ProductKeyMemory, sparse: bool = False) -> None:
        super().__init__()
        config = memory.config
        if config.query_norm != "batch":
            raise ValueError(f"query_norm is {config.query_norm}, must be batch")
        for name in ("query", "score_activation", "score_scale", "values", "output"):
            kind, plain = getattr(config, name), getattr(MemoryConfig, name)
            if kind != plain:
                raise ValueError(f"{name} is {kind}, must be {plain}")
        self.heads, self.knn, self.n_keys = config.heads, config.knn, config.n_keys
        self.query_proj = nn.Linear(memory.input_dim, config.heads * config.k_dim)
        self.query_norm = nn.BatchNorm1d(config.heads * config.k_dim)
        self.keys = nn.Parameter(memory.keys.detach().clone())  # (H, 2, S, D)
        self.values = nn.EmbeddingBag.from_pretrained(
            memory.values.weight.detach().clone(), freeze=False, mode="sum", sparse=sparse
        )
        self.to(memory.keys.dtype)
        self.query_proj.load_state_dict(memory.query_proj.state_dict())
        self.query_norm.load_state_dict(memory.query_norm.state_dict(), strict=False)

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory for every token, (N, width)."""
        return self.read(*self.look_up(x))

    def look_up(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Slots and softmax weights, each (N, H, K)."""
        scores, slots = self.search(self.half_scores(self.query(x)))
        return slots, scores.softmax(dim=-1)

    def query(self, x: Tensor) -> Tensor:
        """Normalised queries, (N, H, 2, D)."""
        query: Tensor = self.query_norm(self.query_proj(x))  # (N, H * k_dim)
        return query.view(len(x), self.heads, 2, -1)

    def half_scores(self, query: Tensor) -> Tensor:
        """Scores of each half against its sub-keys, (N, H, 2, S)."""
        return torch.einsum("nhpd,hpsd->nhps", query, self.keys)

    def search(self, half_scores: Tensor) -> Found:
        """The best slots of each head."""
        top, index = half_scores.topk(self.knn, dim=-1)  # (N, H, 2, K)
        sums = top[:, :, 0, :, None] + top[:, :, 1, None, :]  # (N, H, K, K)
        slots = index[:, :, 0, :, None] * self.n_keys + index[:, :, 1, None, :]
        scores, best = sums.flatten(2).topk(self.knn, dim=-1)  # (N, H, K)
        return Found(scores, slots.flatten(2).gather(-1, best))

    def read(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Sum the values of slots (N, H, K), weighted, over heads and neighbours."""
        read: Tensor = self.values(slots.flatten(1), per_sample_weights=weights.flatten(1))
        return read


@torch.no_grad()
def check_same_read(memory: ProductKeyMemory, textbook: TextbookMemory, x: Tensor) -> None:
    """Check that both sides read the same for tokens x, in training and in evaluation.

    If two slots have equal scores up to rounding, each side may read either.

    Args:
        memory: the memory under test.
        textbook: a copy of it.
        x: (N, width).

    Raises:
        MismatchError: the results differ; the message names them.
    """
    was_training = memory.training
    for training in (True, False):
        memory.train(training)
        textbook.train(training)
        ours, (slots, weights) = memory(x, return_lookup=True)
        their_slots, their_weights = textbook.look_up(
            x
        )  # only once, since it changes running statistics
        theirs = textbook.read(their_slots, their_weights)
        mode = "training" if training else "evaluation"
        _require_close(weights, their_weights, f"weights in {mode}")
        same = _sorted(slots).eq(_sorted(their_slots)).flatten(1).all(dim=1)  # (N,)
        if float(same.double().mean()) < 1 - TIES:
            raise MismatchError(
                f"slots in {mode} differ for {int((~same).sum())} of {len(x)} tokens"
            )
        _require_close(ours[same], theirs[same], f"reads in {mode}")
    memory.train(was_training)
    textbook.train(was_training)


def _require_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    difference = float((ours - theirs).abs().max())
    allowed = TOLERANCE * float(theirs.abs().max())
    if not difference <= allowed:  # true for NaN, too
        raise MismatchError(f"{what} differ by {difference:.1e}, may by {allowed:.1e}")


def _sorted(slots: Tensor) -> Tensor:
    return slots.sort(dim=-1).values


def optimizers(
    textbook: TextbookMemory, lr: float, fused: Optional[bool]
) -> Tuple[torch.optim.Optimizer, ...]:
    """Adam for all parameters; SparseAdam for values with a sparse gradient."""
    if not textbook.values.sparse:
        return (torch.optim.Adam(textbook.parameters(), lr=lr, fused=fused),)
    values = list(textbook.values.parameters())
    rest = [p for p in textbook.parameters() if p is not values[0]]
    return torch.optim.Adam(rest, lr=lr, fused=fused), torch.optim.SparseAdam(values, lr=lr)
