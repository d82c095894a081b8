"""The contestants: memory layers with their optimizers, all of the same sizes."""

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ...memory import MemoryConfig, ProductKeyMemory
from ...memory.adam import MemoryAdam
from . import textbook
from .machine import installed

WIDTH = 768  # of RoBERTa-base
LR = 1e-3  # of all parameters; time does not depend on it
PACKAGE_VALUE_LR = 1e-2  # as in the README of product-key-memory

OURS = "ours"
TEXTBOOK = "textbook"
ADAM = "textbook adam"
FUSED = "textbook fused adam"
SPARSE = "textbook sparse adam"
PACKAGE = "product-key-memory"
OTHERS = (ADAM, FUSED, SPARSE, PACKAGE)

# Number of value tables that a training step holds at once. torch's Adam without fusion needs two
# more, for its denominator.
TABLES = {OURS: 3, ADAM: 6, FUSED: 4, SPARSE: 3, PACKAGE: 6}
# Further copies of all values read, one row per read, that it holds at once.
GATHERED = {SPARSE: 5}
SLACK = 3 << 29  # bytes: scores of 4,096 tokens, torch itself


@dataclass
class Subject:
    """A memory layer that can be trained.

    Attributes:
        name: its name in results.
        module: the layer.
        read: maps tokens (N, width) to their reads, (N, width).
        optimizers: together they update all its parameters.
    """

    name: str
    module: nn.Module
    read: Callable[[Tensor], Tensor]
    optimizers: Sequence[torch.optim.Optimizer]

    def train_step(self, x: Tensor, grad: Tensor) -> None:
        """Forward, backward and update; x, (N, width), gets a gradient as in a model.

        Args:
            x: the tokens.
            grad: the gradient of the read, (N, width).
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.read(x.detach().requires_grad_()).backward(grad)
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Compute inference; the layer must be in eval mode."""
        return self.read(x)

    def look_up(self, x: Tensor) -> Tensor:
        """The slots that our layer reads for tokens x, (N, H, K)."""
        with torch.no_grad():
            return self.module.search(x)[0]  # type: ignore[operator]


def memory_config(n_keys: int, value_dtype: str = "float32") -> MemoryConfig:
    """The sizes of the comparison; all except n_keys are the defaults, Lample et al. (2019)."""
    return MemoryConfig(n_keys=n_keys, value_dtype=value_dtype)


def sizes() -> Dict[str, int]:
    """The common settings of a comparison of layers, for the report."""
    config = MemoryConfig()
    return {"width": WIDTH, "heads": config.heads, "knn": config.knn, "k_dim": config.k_dim}


def problem(name: str) -> Optional[str]:
    """Why a contestant cannot take part; None if it can."""
    return "not installed" if name == PACKAGE and installed(PACKAGE) is None else None


def table_bytes(n_keys: int) -> int:
    """The size of a value table."""
    return n_keys**2 * WIDTH * 4


def needed_bytes(name: str, tokens: int, n_keys: int) -> int:
    """The approximate peak memory of a contestant's training."""
    config = memory_config(n_keys)
    gathered = tokens * config.heads * config.knn * WIDTH * 4
    return TABLES[name] * table_bytes(n_keys) + GATHERED.get(name, 0) * gathered


def new_memory(n_keys: int, value_dtype: str = "float32") -> ProductKeyMemory:
    """A newly initialised memory of this plugin."""
    return ProductKeyMemory(WIDTH, memory_config(n_keys, value_dtype))


def other(name: str, memory: ProductKeyMemory) -> Subject:
    """A contestant of the same sizes; a textbook one also has the same weights."""
    if name == PACKAGE:
        return package(memory.config.n_keys)
    copy = textbook.TextbookMemory(memory, sparse=name == SPARSE)
    return Subject(name, copy, copy, textbook.optimizers(copy, lr=LR, fused=is_fused(name)))


def ours(
    memory: ProductKeyMemory, against: str, name: str = OURS, moment_dtype: str = "float32"
) -> Subject:
    """The memory of this plugin, updated by ``MemoryAdam``.

    Args:
        memory: the layer.
        against: the contestant whose Adam, fused or not, updates the other parameters here, too.
        name: its name in results.
        moment_dtype: of the moments of values.
    """
    settings = {"fused": is_fused(against), "moment_dtype": moment_dtype}
    adam = MemoryAdam(memory.parameters(), lr=LR, **settings)
    return Subject(name, memory, memory, (adam,))


def package(n_keys: int) -> Subject:
    """The package product-key-memory, set up as its README shows."""
    from product_key_memory import PKM, fetch_pkm_value_parameters

    config = memory_config(n_keys)
    sizes = {"heads": config.heads, "dim_head": config.half_dim, "topk": config.knn}
    module = PKM(dim=WIDTH, num_keys=n_keys, **sizes)
    values, rest = fetch_pkm_value_parameters(module)
    groups = [{"params": rest}, {"params": values, "lr": PACKAGE_VALUE_LR}]
    optimizer = torch.optim.Adam(groups, lr=LR)
    return Subject(PACKAGE, module, lambda x: module(x[None])[0], (optimizer,))


def batches(tokens: int, number: int = 8) -> Tuple[Tensor, Tensor]:
    """Random normal tokens and gradients of their reads, each (number, tokens, width)."""
    x, grad = torch.randn(2, number, tokens, WIDTH)
    return x, grad


def distinct_slots(subject: Subject, x: Tensor) -> int:
    """The number of slots that tokens x, (N, width), read: the rows that a step updates."""
    return len(subject.look_up(x).unique())


def is_fused(name: str) -> Optional[bool]:
    """Whether Adam is fused in this comparison; None leaves it to torch."""
    return True if name == FUSED else None
