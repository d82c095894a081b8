"""The memory: query -> search -> weights -> values -> output."""

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .config import FREEZABLE, MemoryConfig
from .kernels import is_compiled, is_plain, is_traced, outside_graphs
from .lookup import Lookup, Observation, Observer, restore
from .query import BatchQueryNorm, build_query_norm
from .registry import OUTPUTS, QUERIES, VALUES
from .run import RunState, is_repeated
from .search import draw_kept_keys, product_topk, product_topk_of
from .sharding import ColumnShards


class ProductKeyMemory(nn.Module):
    """A product-key memory (Lample et al. 2019).

    ``read = sum over heads h and neighbours k of softmax(scores)[h, k] * values[slots[h, k]]``
    with the ``knn`` best slots of each head found exactly among all ``n_keys ** 2``. The settings
    may name other kinds of queries, weights, values and output.
    Padding is no token: it is dropped on entry, so that it is in no statistic and in no read.

    Args:
        input_dim: width of the input and of the output.
        config: the settings.
        values: those of another memory to share; None makes own ones.
        shards: workers to split the own table over by columns; None means no split.
        run: the state of the run, one for all memories of a model; None makes an own one.
        keeps_dtype: whether the own table, and running statistics of the query, stay in their
            dtype when the model is converted to half precision.

    Attributes:
        observers: objects that are shown each look-up, see ``Observer``.

    Raises:
        ValueError: shared values are others than the settings ask for, or the workers
            cannot have equally many columns.
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
        scale = torch.tensor([float(config.score_scale)])
        self.score_scale = nn.Parameter(scale) if config.learn_score_scale else config.score_scale
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.query_dropout = nn.Dropout(config.query_dropout)
        self.read_dropout = nn.Dropout(config.read_dropout)
        bound = config.half_dim**-0.5  # Lample et al. 2019, published code
        nn.init.uniform_(self.keys, -bound, bound)

    def forward(
        self, x: Tensor, padding_mask: Optional[Tensor] = None, return_lookup: bool = False
    ) -> Union[Tensor, Tuple[Tensor, Lookup]]:
        """Read the memory for every token.

        Args:
            x: (..., input_dim), any leading dimensions.
            padding_mask: (...), bool, True at padding; None means that all are tokens.
            return_lookup: also return the slots and weights.

        Returns:
            The read, shaped and typed as x, zero at padding; with ``return_lookup`` the pair
            of it and a ``Lookup``.

        Raises:
            ValueError: x or padding_mask has another shape.
        """
        self._check_input(x, padding_mask)
        tokens = x.reshape(-1, self.input_dim)  # (all, input_dim)
        real = None if padding_mask is None else ~padding_mask.reshape(-1).bool()  # (all,)
        if real is not None and _drops_padding(self.training, tokens):
            tokens = tokens[real]  # (N, input_dim)
        slots, weights = self.search(tokens)  # (N, H, K)
        read = self._read(slots, weights, tokens).to(x.dtype)  # (N, v_dim)
        read = self.read_dropout(self.output_proj(read, tokens))  # (N, input_dim)
        read = restore(read.to(x.dtype), real, 0).view(x.shape)
        if not (return_lookup or self.observers):
            return read
        seen = Observation(x, padding_mask, slots, weights, self.training, self.run)
        if self.observers:
            (outside_graphs(self._show) if is_compiled() else self._show)(seen)
        return (read, seen.lookup()) if return_lookup else read

    def _read(self, slots: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """The sums of values, (N, v_dim).

        Where rows are chosen by their reads, which are entries of the gradient, a dummy batch of a
        training reads nothing, and gets zeros.
        """
        is_counted = any(table.chooses_rows for table in self.values.tables().values())
        if not (is_counted and self.training and self.run.is_dummy):
            return self.values(slots, weights, tokens)  # type: ignore[no-any-return]
        read = self.values(slots[:0], weights[:0], tokens[:0])  # with the workers of its table
        return torch.cat([read, read.new_zeros(len(tokens), read.shape[1])])

    @torch.no_grad()
    def _show(self, seen: Observation) -> None:
        if self.run.is_dummy or is_repeated() or is_traced():  # what is traced is no batch
            return
        for observer in tuple(self.observers):  # one may take itself off the list
            observer.observe(seen)

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Show an observer the look-ups that are done while the context is open."""
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
        """Take a part of the memory out of training.

        Args:
            part: "values"; "keys", the sub-keys; or "all", the query network and the running
                statistics of its normalisation, too.

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
        if not isinstance(values, kind):
            raise ValueError(
                f"shared values are a {type(values).__name__}, must be a {kind.__name__}, as the "
                f"settings say: values is {config.values!r}"
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
    """The values that a memory of this width and these settings reads."""
    return VALUES.build(config.values, input_dim, config, shards, keeps_dtype)


def _drops_padding(training: bool, tokens: Tensor) -> bool:
    """Whether padding leaves the batch, or its read is computed and then overwritten.

    It must leave where statistics are taken. Where they are not, a GPU would have to tell the host
    how many tokens remain, and the host to wait for it; what traces would not know their number.
    """
    return training or (tokens.device.type == "cpu" and is_plain(tokens))
