"""Settings of the benchmark: what to measure, and how often; checked once."""

import os
from dataclasses import dataclass
from typing import Optional, Tuple

from ...memory import MemoryConfig

KNN = MemoryConfig().knn  # of every memory here, the minimum number of sub-keys
WHAT = ("layer", "parts", "model", "memory", "usage", "narrow")
TOKENS, N_KEYS, PAIRS = (256, 1024, 4096), (128, 256, 512, 1024), 11
QUICK_TOKENS, QUICK_N_KEYS, QUICK_PAIRS = (256, 1024), (128, 256), 3
MOST_TOKENS, MOST_N_KEYS = 65536, 4096
MEMORY_TOKENS, MEMORY_N_KEYS = (1024,), (512,)  # default sizes for peak memory


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        what: names in ``WHAT``.
        tokens: tokens per batch for the layer and its parts; None takes the default.
        n_keys: sub-keys per half for the same; None takes the default.
        pairs: pairs per comparison; None takes the default.
        threads: threads of torch and of the kernels; None does not change them.
        seed: seed of weights and inputs.
        quick: fewer and smaller sizes, and small models.

    Raises:
        ValueError: a setting is impossible; the message names it and what is allowed.
    """

    what: Tuple[str, ...] = WHAT
    tokens: Optional[Tuple[int, ...]] = None
    n_keys: Optional[Tuple[int, ...]] = None
    pairs: Optional[int] = None
    threads: Optional[int] = None
    seed: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        for name in self.what:
            if name not in WHAT:
                raise ValueError(f"what is {name}, must be among {', '.join(WHAT)}")
        for tokens in self.tokens or ():
            _check_range("tokens", tokens, 2, MOST_TOKENS)
        for n_keys in self.n_keys or ():
            _check_range("n-keys", n_keys, KNN, MOST_N_KEYS)
        if self.pairs is not None:
            _check_range("pairs", self.pairs, 1, 1000)
        if self.threads is not None:
            _check_range("threads", self.threads, 1, os.cpu_count() or 1)
        _check_range("seed", self.seed, 0, 2**31 - 1)

    @property
    def grid_tokens(self) -> Tuple[int, ...]:
        """Tokens per batch of the layer and of its parts."""
        return self.tokens or (QUICK_TOKENS if self.quick else TOKENS)

    @property
    def grid_n_keys(self) -> Tuple[int, ...]:
        """Sub-keys per half of the layer."""
        return self.n_keys or (QUICK_N_KEYS if self.quick else N_KEYS)

    @property
    def parts_n_keys(self) -> Tuple[int, ...]:
        """Sub-keys per half of the layer's parts."""
        return self.n_keys or (QUICK_N_KEYS[-1:] if self.quick else N_KEYS)

    @property
    def memory_tokens(self) -> Tuple[int, ...]:
        """Tokens per batch for peak memory."""
        return self.tokens or (QUICK_TOKENS[-1:] if self.quick else MEMORY_TOKENS)

    @property
    def memory_n_keys(self) -> Tuple[int, ...]:
        """Sub-keys per half for peak memory."""
        return self.n_keys or (QUICK_N_KEYS[-1:] if self.quick else MEMORY_N_KEYS)

    @property
    def rounds(self) -> int:
        """Pairs of each comparison."""
        return self.pairs or (QUICK_PAIRS if self.quick else PAIRS)


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, must be in {least}..{most}")
