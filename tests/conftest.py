"""One core, one seed, and examples of hypothesis that are the same in every run."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("pkm", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("pkm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
