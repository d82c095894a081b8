"""Query networks and query normalisations, computed in at least float32."""

from typing import Any, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import all_gather
from .config import MemoryConfig
from .kernels import at_least_float32, is_half
from .registry import QUERIES
from .run import RunState, is_repeated


@QUERIES.register("linear", "one layer")
class LinearQuery(nn.Linear):
    """The query ``x W + b`` (Lample et al. 2019)."""

    @classmethod
    def from_config(cls, input_dim: int, config: MemoryConfig) -> "LinearQuery":
        """A query network for a memory of this width and these settings."""
        return cls(input_dim, config.heads * config.k_dim)


@QUERIES.register("mlp", "two layers; the hidden layer is as wide as the encoder")
class MlpQuery(nn.Module):
    """The query ``relu(x W1 + b1) W2 + b2``.

    The published code of Lample et al. 2019 offers such networks; the hidden width is our choice.
    """

    def __init__(self, input_dim: int, query_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_dim, input_dim)
        self.out = nn.Linear(input_dim, query_dim)

    @classmethod
    def from_config(cls, input_dim: int, config: MemoryConfig) -> "MlpQuery":
        """A query network for a memory of this width and these settings."""
        return cls(input_dim, config.heads * config.k_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, input_dim) to queries (N, H * k_dim)."""
        query: Tensor = self.out(F.relu(self.hidden(tokens)))
        return query


def build_query_norm(
    config: MemoryConfig, run: Optional[RunState] = None, keeps_dtype: bool = False
) -> nn.Module:
    """The module that maps queries (N, H * k_dim) to normalised queries of the same shape.

    Args:
        config: the settings of the memory.
        run: as for ``BatchQueryNorm``.
        keeps_dtype: as for ``BatchQueryNorm``.
    """
    if config.query_norm == "batch":
        return BatchQueryNorm(config.heads * config.k_dim, run, keeps_dtype)
    if config.query_norm == "layer":
        return LayerQueryNorm(config.k_dim)
    return nn.Identity()


class BatchQueryNorm(nn.Module):
    """Batch normalisation over tokens (Lample et al. 2019).

    Its input must hold only real tokens; the memory drops padding before the query. Statistics need
    at least two tokens; the running statistics normalise smaller batches. Unlike torch's module it
    has no integer buffer, since fairseq's moving averages cannot handle one.

    Data-parallel workers compute joint statistics of all their tokens. In training each worker must
    therefore call this module equally often, forward and backward, even without tokens. Tokens of
    a dummy batch are normalised, but do not change the statistics.

    Args:
        n_features: H * k_dim.
        run: the state of the run, which names the workers; None makes a new one.
        keeps_dtype: whether the running statistics keep their dtype when the model is converted to
            half precision, which would lose small changes of them.

    Attributes:
        is_frozen: whether training, too, normalises by the running statistics and does not update
            them.
    """

    eps = 1e-5
    momentum = 0.1  # both as torch's BatchNorm1d

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, n_features: int, run: Optional[RunState] = None, keeps_dtype: bool = False
    ) -> None:
        super().__init__()
        self.run = RunState() if run is None else run
        self.keeps_dtype = keeps_dtype
        self.is_frozen = False
        self.weight = nn.Parameter(torch.empty(n_features))
        self.bias = nn.Parameter(torch.empty(n_features))
        self.register_buffer("running_mean", torch.empty(n_features))
        self.register_buffer("running_var", torch.empty(n_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again: no scale, no shift, no statistics."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean):
            nn.init.zeros_(zeros)

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchQueryNorm":
        """Convert as torch does, but leave statistics in their dtype if they keep it."""
        statistics = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.keeps_dtype and is_half(self.running_mean.dtype):
            device = self.running_mean.device
            self.running_mean, self.running_var = (x.to(device) for x in statistics)
        return self

    def forward(self, query: Tensor) -> Tensor:
        """Normalise (N, H * k_dim) over N."""
        takes_statistics = self.training and not self.is_frozen
        group = self.run.group() if takes_statistics else None
        if group is not None:
            return self._normalise_with_workers(at_least_float32(query), group)
        if takes_statistics and len(query) < 2:  # a branch, since a graph may know no bool
            takes_statistics = False
        return self._normalise(query, takes_statistics)

    def _normalise(self, query: Tensor, use_batch: bool) -> Tensor:
        mean, var = at_least_float32(self.running_mean), at_least_float32(self.running_var)
        updates = use_batch and not (self.run.is_dummy or is_repeated())
        if use_batch and not updates:  # torch updates copies
            mean, var = mean.clone(), var.clone()
        normed = F.batch_norm(
            at_least_float32(query),
            mean,
            var,
            at_least_float32(self.weight),
            at_least_float32(self.bias),
            training=use_batch,
            momentum=self.momentum,
            eps=self.eps,
        )
        if updates and mean is not self.running_mean:  # in half precision a copy was updated
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return normed

    def _normalise_with_workers(self, query: Tensor, group: Any) -> Tensor:
        tokens = query[:0] if self.run.is_dummy else query
        mean, var, count = _JointMoments.apply(tokens, group)  # type: ignore[no-untyped-call]
        if count < 2:  # on all workers
            return self._normalise(query, use_batch=False)
        if not is_repeated():
            self._update_statistics(mean, var * (count / (count - 1)))
        scale = at_least_float32(self.weight) * (var + self.eps).rsqrt()
        normed: Tensor = (query - mean) * scale + at_least_float32(self.bias)
        return normed

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, unbiased_var: Tensor) -> None:
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            running.copy_(torch.lerp(at_least_float32(running), now, self.momentum))


class _JointMoments(torch.autograd.Function):
    """Mean and biased variance, each (F,), of the tokens (N, F) of all workers, and their number.

    It merges the moments of parts as Chan, Golub and LeVeque (1983), without the cancellation in a
    difference of sums of squares. Each worker sends 2 F + 1 numbers, and 2 F in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: Any) -> Tuple[Tensor, Tensor, Tensor]:
        own_mean = tokens.sum(0) / max(1, len(tokens))
        own_squares = (tokens - own_mean).square().sum(0)
        own = torch.cat([own_mean.new_tensor([len(tokens)]), own_mean, own_squares])
        gathered = torch.stack(all_gather(own, group))  # (W, 2 F + 1)
        parts = torch.split(gathered, [1, len(own_mean), len(own_mean)], dim=1)
        counts, means, squares = parts  # (W, 1), (W, F), (W, F)
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp(min=1)
        var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
        ctx.save_for_backward(tokens, mean, count)
        ctx.group = group
        ctx.mark_non_differentiable(count)
        return mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> Tuple[Tensor, None]:
        tokens, mean, count = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_var])
        # the gradient of all workers' losses in the statistics
        dist.all_reduce(grads, group=ctx.group)
        return (grads[0] + 2 * grads[1] * (tokens - mean)) / count, None


class LayerQueryNorm(nn.LayerNorm):
    """Layer normalisation of each head's query separately; our choice, no paper tried it."""

    def forward(self, query: Tensor) -> Tensor:
        """Normalise (N, H * k_dim) over each k_dim."""
        (k_dim,) = self.normalized_shape
        heads = query.shape[-1] // k_dim
        per_head = at_least_float32(query).view(query.shape[0], heads, k_dim)  # (N, H, k_dim)
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(per_head, (k_dim,), weight, bias, self.eps).flatten(-2)
