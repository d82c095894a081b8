"""A small memory in the state that training leaves, and inputs for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory

from .models import write_folder

WIDTH = 16


def small_memory(**settings: object) -> ProductKeyMemory:
    """A memory in eval mode whose query normalisation has seen some batches."""
    sizes = {"n_keys": 24, "heads": 2, "knn": 8, "k_dim": 12, "v_dim": 20}
    memory = ProductKeyMemory(WIDTH, MemoryConfig(**{**sizes, **settings}))
    for _ in range(5):
        memory(3 + 2 * torch.randn(64, WIDTH))
    return memory.eval()


@pytest.fixture
def memory() -> ProductKeyMemory:
    return small_memory()


@pytest.fixture
def tokens() -> Tensor:
    return 3 + 2 * torch.randn(600, WIDTH)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-bin, the same as text, and a checkpoint with memories in layers 1 and 2."""
    folder = tmp_path_factory.mktemp("model")
    write_folder(folder)
    return folder
