"""Who is compared: memory layers with their optimizers, all of the same sizes."""

from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ...memory import MemoryConfig, ProductKeyMemory
from ...memory.adam import MemoryAdam
from . import textbook
from .machine import installed

WIDTH = 768  # of RoBERTa-base
LR = 1e-3  # of everything; time does not depend on it
PACKAGE_VALUE_LR = 1e-2  # as the README of product-key-memory has it

OURS = "ours"
TEXTBOOK = "textbook"
ADAM = "textbook adam"
FUSED = "textbook fused adam"
SPARSE = "textbook sparse adam"
PACKAGE = "product-key-memory"
OTHERS = (ADAM, FUSED, SPARSE, PACKAGE)

# Tables of values that a training step holds at once. torch's Adam without fusion makes two more
# for what it divides by.
TABLES = {OURS: 3, ADAM: 6, FUSED: 4, SPARSE: 3, PACKAGE: 6}
# Copies of all values read, one row for each, that it holds at once besides.
GATHERED = {SPARSE: 5}
SLACK = 3 << 29  # bytes: scores of 4,096 tokens, torch itself


@dataclass
class Subject:
    """A memory layer that can be trained.

    Attributes:
        name: what it is called in results.
        module: the layer.
        read: maps tokens (N, width) to what it read for them, (N, width).
        optimizers: who together update all its parameters.
    """

    name: str
    module: nn.Module
    read: Callable[[Tensor], Tensor]
    optimizers: Sequence[torch.optim.Optimizer]

    def train_step(self, x: Tensor, grad: Tensor) -> None:
        """Forward, backward and update; x, (N, width), gets a gradient as in a model.

        Args:
            x: the tokens.
            grad: the gradient of what is read, (N, width).
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.read(x.detach().requires_grad_()).backward(grad)
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What inference computes; the layer must be in evaluation."""
        return self.read(x)

    def look_up(self, x: Tensor) -> Tensor:
        """The slots that ours reads for tokens x, (N, H, K)."""
        with torch.no_grad():
            return self.module.search(x)[0]  # type: ignore[operator]


def memory_config(n_keys: int) -> MemoryConfig:
    """The sizes of the comparison; all but n_keys are the defaults, Lample et al. (2019)."""
    return MemoryConfig(n_keys=n_keys)


def sizes() -> Dict[str, int]:
    """What all sides of a comparison of layers share, for the report."""
    config = MemoryConfig()
    return {"width": WIDTH, "heads": config.heads, "knn": config.knn, "k_dim": config.k_dim}


def problem(name: str) -> Optional[str]:
    """Why a contestant cannot take part; None if it can."""
    return "not installed" if name == PACKAGE and installed(PACKAGE) is None else None


def table_bytes(n_keys: int) -> int:
    """The size of a value table."""
    return n_keys**2 * WIDTH * 4


def needed_bytes(name: str, tokens: int, n_keys: int) -> int:
    """About the memory that training a contestant takes, at its peak."""
    config = memory_config(n_keys)
    gathered = tokens * config.heads * config.knn * WIDTH * 4
    return TABLES[name] * table_bytes(n_keys) + GATHERED.get(name, 0) * gathered


def new_memory(n_keys: int) -> ProductKeyMemory:
    """A memory of this plugin, just initialised."""
    return ProductKeyMemory(WIDTH, memory_config(n_keys))


def other(name: str, memory: ProductKeyMemory) -> Subject:
    """A contestant of the same sizes, and if it is a textbook one with the same weights."""
    if name == PACKAGE:
        return package(memory.config.n_keys)
    copy = textbook.TextbookMemory(memory, sparse=name == SPARSE)
    return Subject(name, copy, copy, textbook.optimizers(copy, lr=LR, fused=is_fused(name)))


def ours(memory: ProductKeyMemory, against: str) -> Subject:
    """The memory of this plugin, updated by ``MemoryAdam``.

    Args:
        memory: the layer.
        against: whose Adam, fused or not, updates everything else here, too.
    """
    adam = MemoryAdam(memory.parameters(), lr=LR, fused=is_fused(against))
    return Subject(OURS, memory, memory, (adam,))


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
    """How many of the slots are read for tokens x, (N, width): the rows that a step updates."""
    return len(subject.look_up(x).unique())


def is_fused(name: str) -> Optional[bool]:
    """Whether Adam is fused in this comparison; None leaves it to torch."""
    return True if name == FUSED else None
