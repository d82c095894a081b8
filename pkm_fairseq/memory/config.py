"""The settings of one product-key memory, checked once."""

from dataclasses import dataclass
from typing import Optional

QUERY_NORMS = ("batch", "layer", "none")
VALUES_INITS = ("normal", "zero")
VALUE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class MemoryConfig:
    """Everything that shapes a :class:`~pkm_fairseq.memory.ProductKeyMemory`.

    Sizes default to Lample et al. (2019) and their published code.

    Args:
        n_keys: sub-keys per half, S; the memory has ``n_keys ** 2`` slots.
        heads: independent queries per token, H; all heads read one value table.
        knn: slots each head reads, K.
        k_dim: width of a query; each half has ``k_dim // 2``.
        v_dim: width of a value; None means the width of the input. Any other
            width adds an output projection.
        query_norm: normalisation of the query: "batch", "layer" or "none".
        values_init: "normal", N(0, v_dim ** -0.5), or "zero".
        value_dtype: what values are stored in: "float32", or "bfloat16", half as large and read
            in half the time, but small updates are rounded away; computed in float32 both.
        input_dropout: dropout on what the query network sees.
        query_dropout: dropout on the normalised query.
        read_dropout: dropout on what was read.
        key_dropout: share of each head's sub-keys of each half that a training step searches
            without, other ones in every step (structured dropout on keys, which Kim & Jung 2020
            propose as future work, by a secondary source); the form is our choice.
        share_values: one value table for all memory layers of a model.

    Raises:
        ValueError: a value is impossible; the message names it and what is allowed.
    """

    n_keys: int = 512
    heads: int = 4
    knn: int = 32
    k_dim: int = 256
    v_dim: Optional[int] = None
    query_norm: str = "batch"
    values_init: str = "normal"
    value_dtype: str = "float32"
    input_dropout: float = 0.0
    query_dropout: float = 0.0
    read_dropout: float = 0.0
    key_dropout: float = 0.0
    share_values: bool = False

    def __post_init__(self) -> None:
        _check_integer("n_keys", self.n_keys, least=2)
        _check_integer("heads", self.heads, least=1)
        _check_integer("knn", self.knn, least=1)
        _check_integer("k_dim", self.k_dim, least=2)
        if self.v_dim is not None:
            _check_integer("v_dim", self.v_dim, least=1)
        if self.knn == 1:
            raise ValueError(
                "knn is 1, must be at least 2: a softmax over one score is always 1 "
                "and teaches the keys nothing"
            )
        if self.knn > self.n_keys:
            raise ValueError(f"knn is {self.knn}, must be at most n_keys, which is {self.n_keys}")
        if self.k_dim % 2:
            raise ValueError(f"k_dim is {self.k_dim}, must be even: a query is split in two halves")
        _check_choice("query_norm", self.query_norm, QUERY_NORMS)
        _check_choice("values_init", self.values_init, VALUES_INITS)
        _check_choice("value_dtype", self.value_dtype, VALUE_DTYPES)
        for name in ("input_dropout", "query_dropout", "read_dropout", "key_dropout"):
            _check_dropout(name, getattr(self, name))
        if self.n_kept_keys < self.knn:
            raise ValueError(
                f"key_dropout is {self.key_dropout}, which leaves {self.n_kept_keys} of "
                f"{self.n_keys} sub-keys, must leave at least knn, which is {self.knn}"
            )
        if not isinstance(self.share_values, bool):
            raise ValueError(f"share_values is {self.share_values!r}, must be True or False")

    @property
    def n_slots(self) -> int:
        """Number of slots, ``n_keys ** 2``."""
        return self.n_keys**2

    @property
    def n_kept_keys(self) -> int:
        """Sub-keys per half that key dropout leaves in a training step."""
        return self.n_keys - int(self.key_dropout * self.n_keys)

    @property
    def half_dim(self) -> int:
        """Width of a half query and of a sub-key, D."""
        return self.k_dim // 2


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, must be an integer of at least {least}")


def _check_choice(name: str, value: object, choices: "tuple[str, ...]") -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(choices)}")


def _check_dropout(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, must be a number in [0, 1)")
