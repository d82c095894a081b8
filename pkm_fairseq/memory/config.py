"""The settings of one product-key memory, each declared and checked once."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Optional

from .option import (
    BERGES,
    CSORDAS,
    LAMPLE,
    LAMPLE_CODE,
    OUR_CHOICE,
    declared_in,
    integer,
    option,
    positive,
    share,
    switch,
)
from .registry import OUTPUTS, QUERIES, VALUES

QUERY_NORMS = {
    "batch": "over the tokens of all workers",
    "layer": "each head's query separately; our choice",
    "none": "our choice",
}
VALUES_INITS = {
    "normal": "N(0, v_dim^-1/2)",
    "zero": "a residual memory starts exactly as the plain model; our choice",
}
VALUE_DTYPES = {
    "float32": "",
    "bfloat16": "halves the table, and takes less time; computation stays in float32. MemoryAdam "
    "and pkm_adam round updates stochastically, other optimizers round small updates away",
}
SCORE_ACTIVATIONS = {
    "softmax": "over the kept scores of a head",
    "relu": "of each kept score; weights need not sum to 1",
}
FREEZABLE = {"values": "", "keys": "its sub-keys", "all": ""}  # parts of a memory


def _knn(name: str, value: Any) -> None:
    integer(1)(name, value)
    if value == 1:
        raise ValueError(
            f"{name} is 1, must be at least 2: a softmax over one score is always 1 "
            "and teaches the keys nothing"
        )


def _even(name: str, value: Any) -> None:
    integer(2)(name, value)
    if value % 2:
        raise ValueError(f"{name} is {value}, must be even: a query is split in two halves")


@dataclass(frozen=True)
class MemoryConfig:
    """The settings of a ``ProductKeyMemory``.

    The arguments are the fields below. Each declares its meaning and the source of its default;
    ``docs/settings.md`` lists them.

    Raises:
        ValueError: a value is impossible; the message names it and what is allowed.
    """

    n_keys: int = option(
        512, "sub-keys per half, S; the memory has S squared slots", LAMPLE, test=integer(2)
    )
    heads: int = option(
        4, "independent queries per token; all heads read one value table", LAMPLE, test=integer(1)
    )
    knn: int = option(
        32, "slots each head reads, from 2 to the sub-keys per half", LAMPLE, test=_knn
    )
    k_dim: int = option(
        256,
        "width of a query; must be even, since each half has half of it",
        f"{LAMPLE_CODE}, whose text has 512",
        test=_even,
    )
    v_dim: Optional[int] = option(
        None,
        "width of a value; if it differs from the encoder's, the memory has an output projection "
        "(our choice)",
        LAMPLE,
        test=integer(1),
        default_text="the encoder's width",
    )
    query_norm: str = option(
        "batch",
        "normalisation of the query",
        f"recommended by {LAMPLE}",
        choices=QUERY_NORMS,
    )
    values_init: str = option(
        "normal",
        "initial values",
        LAMPLE_CODE,
        choices=VALUES_INITS,
    )
    value_dtype: str = option(
        "float32",
        "dtype in which values are stored, in mixed precision too",
        OUR_CHOICE,
        choices=VALUE_DTYPES,
    )
    input_dropout: float = option(
        0.0, "dropout on the input of the query network", OUR_CHOICE, test=share
    )
    query_dropout: float = option(0.0, "dropout on the normalised query", OUR_CHOICE, test=share)
    read_dropout: float = option(
        0.0, "dropout on the read, before the model's own dropout", OUR_CHOICE, test=share
    )
    key_dropout: float = option(
        0.0,
        "share of sub-keys that each training step drops from the search, chosen at random per "
        "head and half, so that other sub-keys are trained too",
        "a secondary source says that Kim & Jung 2020 propose structured dropout on keys as future "
        "work; the form is our choice",
        test=share,
    )
    share_values: bool = option(
        False, "one value table for all memory layers of a model", BERGES, test=switch
    )
    query: str = option(
        "linear",
        "the query network",
        LAMPLE,
        choices=QUERIES.meanings,
    )
    score_activation: str = option(
        "softmax",
        "function that turns the kept scores into weights",
        f"{LAMPLE}; relu: {CSORDAS}",
        choices=SCORE_ACTIVATIONS,
    )
    score_scale: float = option(
        1.0,
        "factor on the scores before that function, an inverse temperature",
        f"an option in the {LAMPLE_CODE}",
        test=positive,
    )
    learn_score_scale: bool = option(
        False,
        "learn that factor, one per memory, starting at --memory-score-scale",
        "as Henry et al. 2020 do for attention",
        test=switch,
    )
    values: str = option(
        "table",
        "what a slot holds",
        LAMPLE,
        choices=VALUES.meanings,
    )
    output: str = option(
        "linear",
        "network after the read",
        OUR_CHOICE,
        choices=OUTPUTS.meanings,
    )

    def __post_init__(self) -> None:
        for name, declared in declared_in(self).items():
            declared.check(name, getattr(self, name))
        if self.knn > self.n_keys:
            raise ValueError(f"knn is {self.knn}, must be at most n_keys, which is {self.n_keys}")
        if self.n_kept_keys < self.knn:
            raise ValueError(
                f"key_dropout is {self.key_dropout}, which leaves {self.n_kept_keys} of "
                f"{self.n_keys} sub-keys, must leave at least knn, which is {self.knn}"
            )

    @property
    def n_slots(self) -> int:
        """Number of slots, ``n_keys ** 2``."""
        return self.n_keys**2

    @property
    def n_kept_keys(self) -> int:
        """Sub-keys per half that remain in a training step after key dropout."""
        # as a fraction: 0.29 * 100 is below 29
        return self.n_keys - int(Fraction(str(self.key_dropout)) * self.n_keys)

    def value_width(self, input_dim: int) -> int:
        """Width of a value, V, for an input of this width."""
        return input_dim if self.v_dim is None else self.v_dim

    @property
    def half_dim(self) -> int:
        """Width of a half query and of a sub-key, D."""
        return self.k_dim // 2
