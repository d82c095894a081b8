"""FAISS over blocks of full keys finds what the naive search over all full keys finds."""

import subprocess
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pkm_fairseq.memory.reference import full_keys, naive_topk
from pkm_fairseq.validation import exact_topk, key_blocks
from pkm_fairseq.validation.tolerance import gamma, score_tolerance


@pytest.mark.parametrize("block_bytes", [1, 3 * 7 * 8 * 4, 10**9])
def test_blocks_are_the_full_keys_in_the_order_of_their_slots(block_bytes: int) -> None:
    keys = torch.randn(1, 2, 7, 4)
    blocks = [block.copy() for block in key_blocks(keys[0], block_bytes)]
    assert len(blocks) == {1: 7, 3 * 7 * 8 * 4: 3, 10**9: 1}[block_bytes]
    assert np.array_equal(np.concatenate(blocks), full_keys(keys)[0].numpy())


@given(n_keys=st.integers(2, 9), half_dim=st.integers(1, 5), n=st.integers(1, 30), data=st.data())
def test_any_number_of_blocks_gives_the_exact_result(
    n_keys: int, half_dim: int, n: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n_keys**2))
    block_bytes = data.draw(st.integers(1, 2 * n_keys**2 * half_dim * 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(n, 1, 2, half_dim, generator=generator)
    keys = torch.randn(1, 2, n_keys, half_dim, generator=generator)
    scores, slots = exact_topk(query[:, 0].flatten(1), keys[0], k, block_bytes)
    expected, expected_slots = naive_topk(query, keys, k)
    assert np.allclose(scores, expected[:, 0], atol=1e-5)
    assert np.array_equal(slots, expected_slots[:, 0])


def test_progress_adds_up_to_one() -> None:
    shares: list[float] = []
    exact_topk(torch.randn(3, 8), torch.randn(2, 7, 4), 2, 500, shares.append)
    assert len(shares) > 2
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("k", [0, 50])
def test_more_neighbours_than_the_index_has(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, must be between 1 and .* 49"):
        exact_topk(torch.randn(3, 8), torch.randn(2, 7, 4), k)


def test_gpus_are_used_when_faiss_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def all_gpus(index: faiss.Index, co: object, ngpu: int) -> faiss.Index:
        asked.append(ngpu)
        return index

    class Options:
        pass

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", all_gpus)
    exact_topk(torch.randn(3, 8), torch.randn(2, 7, 4), 2)
    assert asked == [2]


@given(scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e6, 1e15]), half_dim=st.integers(1, 200))
def test_the_tolerance_bounds_rounding_and_is_not_wide(scale: float, half_dim: int) -> None:
    query = scale * torch.randn(20, 2, half_dim)
    keys = torch.randn(2, 6, half_dim)
    tolerance = score_tolerance(query, keys)
    flat, table = query.flatten(1), full_keys(keys[None])[0]
    rounding = ((flat @ table.t()).double() - flat.double() @ table.double().t()).abs()
    assert (rounding <= tolerance / 4).all()
    norms = flat.norm(dim=1).double() * table.norm(dim=1).max()
    assert (tolerance[:, 0] <= 4 * gamma(2 * half_dim) * norms * 1.001 + 1e-34).all()


PEAK = """
import re, torch
from pathlib import Path
from pkm_fairseq.validation import exact_topk

def peak():  # not getrusage's, which begins at that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

query, keys = torch.randn(8, 256), torch.randn(2, 400, 128)
exact_topk(query, keys[:, :20], 5)
full, before = 400**2 * 256 * 4, peak()
exact_topk(query, keys, 5, full // 20)
bounded = peak()
exact_topk(query, keys, 5, full)
print((bounded - before) / full, (peak() - before) / full)
"""


def test_memory_is_bounded_by_the_block() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    in_blocks, as_one = map(float, done.stdout.split())
    assert in_blocks < 0.3 < 1 < as_one
