"""Normalisation of the query, computed in at least float32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MemoryConfig
from .dtypes import at_least_float32, is_half


def build_query_norm(config: MemoryConfig) -> nn.Module:
    """The module that maps queries (N, H * k_dim) to normalised queries of the same shape."""
    if config.query_norm == "batch":
        return BatchQueryNorm(config.heads * config.k_dim)
    if config.query_norm == "layer":
        return LayerQueryNorm(config.k_dim)
    return nn.Identity()


class BatchQueryNorm(nn.Module):
    """Batch normalisation over tokens (Lample et al. 2019).

    It must be given real tokens only: the memory drops padding before the query. Statistics
    of fewer than two tokens do not exist; such a batch is normalised by the running ones.
    Unlike torch's module it has no integer buffer, which fairseq's moving averages cannot take.

    Args:
        n_features: H * k_dim.

    Attributes:
        is_frozen: whether training, too, normalises by the running statistics and leaves them.
        keeps_dtype: whether the running statistics stay in their dtype when the model they are
            part of is converted to half precision, where small changes of them are lost.
    """

    eps = 1e-5
    momentum = 0.1  # both as torch's BatchNorm1d

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.is_frozen = self.keeps_dtype = False
        self.weight = nn.Parameter(torch.ones(n_features))
        self.bias = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("running_mean", torch.zeros(n_features))
        self.register_buffer("running_var", torch.ones(n_features))

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchQueryNorm":
        """Convert as torch does, but no statistics to half precision, if they keep their dtype."""
        statistics = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.keeps_dtype and is_half(self.running_mean.dtype):
            device = self.running_mean.device
            self.running_mean, self.running_var = (x.to(device) for x in statistics)
        return self

    def forward(self, query: Tensor) -> Tensor:
        """Normalise (N, H * k_dim) over N."""
        use_batch = self.training and not self.is_frozen and len(query) > 1
        mean, var = at_least_float32(self.running_mean), at_least_float32(self.running_var)
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
        if use_batch and mean is not self.running_mean:  # half precision: a copy was updated
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return normed


class LayerQueryNorm(nn.LayerNorm):
    """Layer normalisation of each head's query on its own; our choice, no paper tried it."""

    def forward(self, query: Tensor) -> Tensor:
        """Normalise (N, H * k_dim) over each k_dim."""
        (k_dim,) = self.normalized_shape
        per_head = at_least_float32(query)
        per_head = per_head.view(len(query), query.shape[-1] // k_dim, k_dim)  # (N, H, k_dim)
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(per_head, (k_dim,), weight, bias, self.eps).flatten(-2)
