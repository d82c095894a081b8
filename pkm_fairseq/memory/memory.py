"""The memory: query -> search -> weights -> values -> output."""

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .config import FREEZABLE, MemoryConfig
from .kernels import is_compiled, is_plain, is_traced, outside_graphs
from .lookup import Lookup, Observation, Observer, restore
from .mapped import MappedTable
from .query import BatchQueryNorm, build_query_norm
from .registry import OUTPUTS, QUERIES, VALUES
from .run import RunState, is_repeated
from .search import draw_kept_keys, product_topk, product_topk_of
from .sharding import ColumnShards
from .values import ValueTable

WATCHED = (
    "observers are shown look-ups outside of the graphs of torch.compile: compile without "
    "fullgraph=True, or empty memory.observers"
)


class ProductKeyMemory(nn.Module):
    """A product-key memory (Lample et al. 2019).

    ``read = sum over heads h and neighbours k of softmax(scores)[h, k] * values[slots[h, k]]``
    The search finds the exact ``knn`` best of all ``n_keys ** 2`` slots for each head. The settings
    can choose other kinds of queries, weights, values and output. The memory drops padding before
    the query, so no statistic and no read includes it.

    Args:
        input_dim: width of the input and of the output.
        config: the settings.
        values: another memory's values to share, or a ``MappedTable``; None makes new ones.
        shards: workers that split the table by columns; None means no split.
        run: the state of the run, one for all memories of a model; None makes a new one.
        keeps_dtype: whether the table and the running statistics of the query keep their dtype
            when the model is converted to half precision.

    Attributes:
        observers: objects that receive each look-up, see ``Observer``.

    Raises:
        ValueError: the shared values do not match the settings, or the columns cannot be divided
            evenly among the workers.
    """

    def __init__(
        self,
        input_dim: int,
        config: Optional[MemoryConfig] = None,
        values: Optional[nn.Module] = None,
        shards: Optional[ColumnShards] = None,
        run: Optional[RunState] = None,
        keeps_dtype: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.run = run = RunState() if run is None else run
        self.observers: List[Observer] = []
        self.config = config = MemoryConfig() if config is None else config
        self.query_proj = QUERIES.build(config.query, input_dim, config)
        self.query_norm = build_query_norm(config, run, keeps_dtype)
        self.keys = nn.Parameter(torch.empty(config.heads, 2, config.n_keys, config.half_dim))
        if values is None:
            values = build_values(input_dim, config, shards, keeps_dtype)
        self.values: Any = values
        self._check_values()
        self.output_proj = OUTPUTS.build(config.output, input_dim, config)
        learns, scale = config.learn_score_scale, config.score_scale
        self.score_scale = nn.Parameter(torch.empty(1)) if learns else scale
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.query_dropout = nn.Dropout(config.query_dropout)
        self.read_dropout = nn.Dropout(config.read_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new sub-keys, and reset the learned scale; parts of the memory have their own."""
        bound = self.config.half_dim**-0.5  # Lample et al. 2019, published code
        nn.init.uniform_(self.keys, -bound, bound)
        if isinstance(self.score_scale, nn.Parameter):
            nn.init.constant_(self.score_scale, self.config.score_scale)

    def forward(
        self, x: Tensor, padding_mask: Optional[Tensor] = None, return_lookup: bool = False
    ) -> Union[Tensor, Tuple[Tensor, Lookup]]:
        """Read the memory for every token.

        Args:
            x: (..., input_dim), any leading dimensions.
            padding_mask: (...), bool, True at padding; None means that all are tokens.
            return_lookup: also return the slots and weights.

        Returns:
            The read, with the shape and dtype of x, zero at padding; with ``return_lookup`` the
            pair of the read and a ``Lookup``.

        Raises:
            ValueError: x or padding_mask has a wrong shape.
        """
        self._check_input(x, padding_mask)
        tokens = x.reshape(-1, self.input_dim)  # (all, input_dim)
        real = None if padding_mask is None else ~padding_mask.reshape(-1).bool()  # (all,)
        if real is not None and _drops_padding(self.training or self._counts_reads(), tokens):
            tokens = tokens[real]  # (N, input_dim)
        elif real is not None:  # NaN at padding would reach the gradients of the parameters
            tokens = tokens.masked_fill(~real[:, None], 0)
        slots, weights = self.search(tokens)  # (N, H, K)
        read = self._read(slots, weights, tokens).to(x.dtype)  # (N, v_dim)
        read = self.read_dropout(self.output_proj(read, tokens))  # (N, input_dim)
        read = restore(read.to(x.dtype), real, 0).view(x.shape)
        if not (return_lookup or self.observers):
            return read
        seen = Observation(x, padding_mask, slots, weights, self.training, self.run)
        if self.observers:
            (outside_graphs(self._show, WATCHED) if is_compiled() else self._show)(seen)
        return (read, seen.lookup()) if return_lookup else read

    def _counts_reads(self) -> bool:
        """Whether reads of this batch count for the choice of the rows that may change.

        With checkpointed activations, gradients are not enabled in the first of two passes.
        """
        is_trained = self.training or torch.is_grad_enabled()
        return is_trained and any(table.chooses_rows for table in self.values.tables().values())

    def _read(self, slots: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """The sums of values, (N, v_dim).

        If the optimizer chooses rows by their reads (the entries of the gradient), a dummy batch
        that trains them reads nothing and returns zeros.
        """
        if not (self.run.is_dummy and self._counts_reads()):
            return self.values(slots, weights, tokens)  # type: ignore[no-any-return]
        read = self.values(slots[:0], weights[:0], tokens[:0])  # with the workers of its table
        return torch.cat([read, read.new_zeros(len(tokens), read.shape[1])])

    @torch.no_grad()
    def _show(self, seen: Observation) -> None:
        if self.run.is_dummy or is_repeated() or is_traced():  # tracing sees no real batch
            return
        for observer in tuple(self.observers):  # an observer may remove itself
            observer.observe(seen)

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Add an observer while the context is open."""
        self.observers.append(observer)
        try:
            yield
        finally:
            at = [i for i, other in enumerate(self.observers) if other is observer]
            del self.observers[at[-1]]

    def search(self, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        """Slots and weights, each (N, H, K), of real tokens (N, input_dim)."""
        query, config = self.query(tokens), self.config
        if self.training and config.n_kept_keys < config.n_keys:
            kept = draw_kept_keys(config.heads, config.n_keys, config.n_kept_keys, query.device)
            scores, slots = product_topk_of(query, self.keys, kept, config.knn)
        else:
            scores, slots = product_topk(query, self.keys, config.knn)
        return slots, self.weigh(scores)

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights (N, H, K), from scores of the same shape in at least float32."""
        scores = scores * self.score_scale
        return scores.relu() if self.config.score_activation == "relu" else scores.softmax(dim=-1)

    def query(self, tokens: Tensor) -> Tensor:
        """Normalised queries, (N, H, 2, k_dim / 2), of real tokens (N, input_dim)."""
        query: Tensor = self.query_norm(self.query_proj(self.input_dropout(tokens)))
        query = self.query_dropout(query)  # (N, H * k_dim)
        return query.view(-1, self.config.heads, 2, self.config.half_dim)

    def freeze(self, part: str) -> None:
        """Freeze a part of the memory.

        Args:
            part: "values"; "keys" (the sub-keys); or "all", which includes the query network and
                the running statistics of its normalisation.

        Raises:
            ValueError: there is no such part.
        """
        if part not in FREEZABLE:
            raise ValueError(f"freeze is {part}, must be one of {', '.join(FREEZABLE)}")
        if part == "all":
            self.requires_grad_(False)
            if isinstance(self.query_norm, BatchQueryNorm):
                self.query_norm.is_frozen = True
        else:
            (self.keys if part == "keys" else self.values).requires_grad_(False)

    def _check_values(self) -> None:
        kind, config, values = VALUES[self.config.values], self.config, self.values
        if not isinstance(values, (kind, MappedTable) if kind is ValueTable else kind):
            raise ValueError(
                f"shared values are a {type(values).__name__}, must be a {kind.__name__}, "
                f"because the setting values is {config.values!r}"
            )
        shape, expected = (values.n_slots, values.v_dim), config.value_width(self.input_dim)
        if shape != (config.n_slots, expected):
            raise ValueError(
                f"shared values have shape {shape}, must be ({config.n_slots}, {expected})"
            )

    def _check_input(self, x: Tensor, padding_mask: Optional[Tensor]) -> None:
        if x.dim() < 1 or x.shape[-1] != self.input_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, must end in {self.input_dim}")
        if padding_mask is not None and padding_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)}, "
                f"must be {tuple(x.shape[:-1])} to fit x"
            )


def build_values(
    input_dim: int,
    config: MemoryConfig,
    shards: Optional[ColumnShards] = None,
    keeps_dtype: bool = False,
) -> nn.Module:
    """Build the values for a memory of this width and these settings."""
    return VALUES.build(config.values, input_dim, config, shards, keeps_dtype)


def _drops_padding(counts: bool, tokens: Tensor) -> bool:
    """Whether to drop padding, or to compute its read and overwrite it.

    Padding must be dropped if the batch counts, in statistics or in reads that choose rows.
    Otherwise it stays: on a GPU the host would have to wait for the number of real tokens, and a
    trace cannot know it.
    """
    return counts or (tokens.device.type == "cpu" and is_plain(tokens))
