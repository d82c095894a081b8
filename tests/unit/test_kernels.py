"""Every operation of every backend against plain loops in float64.

``tests/gpu`` runs the same tests on CUDA, with a ``backend`` fixture of its own.
"""

import importlib
import logging
import math
import os
import struct
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from pkm_fairseq.memory import kernels
from pkm_fairseq.memory.kernels import (
    Entries,
    Float8Table,
    StochasticRounding,
    backends,
    torch_backend,
)
from pkm_fairseq.memory.search import candidate_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BAGS = [(4, 19, 1), (5, 1, 5), (1, 10, 768), (0, 3, 5)]  # tokens, reads of each, width
SEARCHES = [(1, 1), (2, 2), (11, 1), (11, 2), (11, 7), (11, 11), (16, 7), (16, 16), (64, 1)]
SEARCHES += [(64, 32), (64, 64), (130, 2), (130, 32), (512, 1), (512, 32), (512, 512)]
N_SLOTS = 7
INF = float("inf")
BETAS, EPS, STEP = (0.9, 0.95), 0.3, 0.5  # eps as large as the root: it must count


class Backend(NamedTuple):
    name: str
    device: str

    def can(self, dtype):
        """Skip what the backend says that it cannot do."""
        problem = backends._problem(self.name, self.device, dtype)
        if problem:
            pytest.skip(problem)


@pytest.fixture(autouse=True)
def _choose_anew():
    backends.choose_anew()
    yield
    backends.choose_anew()


@pytest.fixture(params=backends.BACKENDS)
def backend(request, monkeypatch):
    """Each backend on the CPU, forced; triton where its interpreter is switched on."""
    problem = backends._problem(request.param, "cpu", torch.float32)
    if problem:
        hint = "; `make test-triton` interprets it" if request.param == "triton" else ""
        pytest.skip(problem + hint)
    monkeypatch.setenv("PKM_BACKEND", request.param)
    return Backend(request.param, "cpu")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(got, exact, scale, terms, dtype):
    """Equal up to the rounding of a sum of so many products whose absolute values sum to scale."""
    assert got.dtype == dtype
    assert got.shape == exact.shape
    bound = (terms + 2) * torch.finfo(dtype).eps * scale
    worst = ((got.cpu().double() - exact).abs() - bound).amax() if got.numel() else 0
    assert worst <= 0, f"{worst} beyond rounding"


def assert_same(*pairs):
    """The same bits, NaN included."""
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# --- search ---------------------------------------------------------------------------------


def search(backend, half, knn):
    half = half.to(backend.device)
    found = kernels.topk_pairs(half, knn, *candidate_ranks(knn, half.device))
    assert [x.shape for x in found] == [(half.shape[2], half.shape[0], knn)] * 3
    assert [x.dtype for x in found] == [half.dtype, torch.int64, torch.int64]
    return [x.cpu() for x in found]


def assert_best_pairs(half, found):
    """The scores are the best of all sums, exactly: one sum of two floats rounds in one way."""
    heads, _, n, n_keys = half.shape
    knn = found[0].shape[2]
    for token in range(n):
        for h in range(heads):
            scores, index1, index2 = (x[token, h] for x in found)
            first, second = half[h, 0, token], half[h, 1, token]
            sums = (first[:, None] + second[None, :]).flatten().sort(descending=True).values
            assert torch.equal(scores, sums[:knn]), "scores are not the best ones"
            pairs = set(zip(index1.tolist(), index2.tolist(), strict=True))
            assert len(pairs) == knn, "a pair was returned twice"
            assert all(0 <= i < n_keys for pair in pairs for i in pair)
            assert torch.equal(first[index1] + second[index2], scores), "pairs have other scores"


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n_keys", "knn"), SEARCHES)
def test_best_pairs_are_found(backend, n_keys, knn, ties):
    tokens, heads = (1, 1) if n_keys > 64 else (3, 2)
    shape = heads, 2, tokens, n_keys
    half = torch.randint(-2, 3, shape).float() if ties else torch.randn(shape)
    assert_best_pairs(half, search(backend, half, knn))


@pytest.mark.parametrize("knn", [1, 7, 11])
def test_best_pairs_are_found_in_float64(backend, knn):
    half = torch.randn(2, 2, 3, 11, dtype=torch.float64)
    half += half.mul(1e-12).round(decimals=14)  # differences that float32 does not see
    assert_best_pairs(half, search(backend, half, knn))


def test_no_tokens_have_no_best_pairs(backend):
    assert search(backend, torch.empty(2, 2, 0, 11), 3)[0].numel() == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("n_keys", "knn"), [(11, 3), (11, 11), (64, 7)])
def test_best_pairs_are_found_among_infinities(backend, n_keys, knn, sign):
    half = torch.randn(2, 2, 2, n_keys)
    half[torch.rand(half.shape) < 0.5] = sign * float("inf")
    half[0, 0, 0], half[1, 1, 1, 1:] = sign * float("inf"), sign * float("inf")
    assert_best_pairs(half, search(backend, half, knn))


def test_extreme_scores_are_in_order(backend):
    half = torch.tensor([0.0, -0.0, 1e38, -1e38, 1e-38, -1e-38, 3e-3, -3e-3]).repeat(1, 2, 1, 1)
    half[:, 1] = half[:, 1].flip(-1) * 0.5
    assert_best_pairs(half, search(backend, half, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize(("n_keys", "knn"), [(11, 1), (16, 3), (64, 7)])
def test_nan_shows_in_the_scores_of_its_token_and_head(backend, n_keys, knn, p, sign, dtype):
    half = torch.randn(2, 2, 3, n_keys, dtype=dtype)
    nan = torch.tensor(float("nan"), dtype=dtype).copysign(torch.tensor(float(sign)))
    half[1, p, 2, n_keys // 2] = nan
    half[0, p, 0, :] = nan
    scores, *index = search(backend, half, knn)
    has_nan = torch.tensor([[True, False], [False, False], [False, True]])  # (N, H)
    assert torch.equal(scores.isnan().any(dim=-1), has_nan)
    assert torch.equal(scores[..., 0].isnan(), has_nan)  # where the search looks
    assert all(((i >= 0) & (i < n_keys)).all() for i in index)
    assert_best_pairs(half[:, :, 1:2], [x[1:2] for x in (scores, *index)])


def score_case(tokens, knn, width, dtype, device, hot=False):
    heads, n_keys = 2, 11
    query = torch.randn(tokens, heads, 2, width, dtype=dtype)
    keys = torch.randn(heads, 2, n_keys, width, dtype=dtype)
    index = torch.randint(n_keys, (2, tokens, heads, knn))
    if hot:
        index[:] = n_keys - 1
    grad = torch.randn(tokens, heads, knn, dtype=dtype)
    return [x.to(device) for x in (query, keys, *index, grad)]


def naive_score_gradients(query, keys, index1, index2, grad):
    query, keys, grad = query.cpu().double(), keys.cpu().double(), grad.cpu().double()
    grad_query, grad_keys = torch.zeros_like(query), torch.zeros_like(keys)
    for n, h, k in torch.cartesian_prod(*map(torch.arange, grad.shape)).tolist():
        for p, index in enumerate((index1, index2)):
            s = int(index[n, h, k])
            grad_query[n, h, p] += grad[n, h, k] * keys[h, p, s]
            grad_keys[h, p, s] += grad[n, h, k] * query[n, h, p]
    return grad_query, grad_keys


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "knn", "width"), [(3, 7, 5), (2, 9, 1), (1, 1, 384), (0, 3, 5)])
def test_score_gradients(backend, tokens, knn, width, dtype, hot):
    given = score_case(tokens, knn, width, dtype, backend.device, hot)
    exact = naive_score_gradients(*given)
    scale = naive_score_gradients(given[0].abs(), given[1].abs(), *given[2:4], given[4].abs())
    for got, right, size in zip(kernels.score_gradients(*given), exact, scale, strict=True):
        assert_close(got, right, size, max(tokens, 1) * knn, dtype)


def test_score_gradients_of_what_does_not_lie_together(backend):
    given = score_case(3, 4, 6, torch.float32, backend.device)
    spread = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    spread[-1] = given[-1][:1, :1, :1].expand_as(given[-1])
    assert not any(x.is_contiguous() for x in spread)
    together = [x.contiguous() for x in spread]
    got, right = kernels.score_gradients(*spread), kernels.score_gradients(*together)
    assert_same(*zip(got, right, strict=True))


# --- gather_sum, gather_dot ------------------------------------------------------------------


def bags(tokens, reads, width, dtype, device="cpu", hot=False):
    """A table, and slots, weights and output gradients of reads from it; slots come twice."""
    values = torch.randn(N_SLOTS, width).to(dtype)
    slots = torch.randint(N_SLOTS - 1, (tokens, reads))  # the last one is not read
    if hot:
        slots[:] = N_SLOTS - 2
    weights = torch.randn(tokens, reads, dtype=wide(dtype))
    grad_read = torch.randn(tokens, width, dtype=wide(dtype))
    return [x.to(device) for x in (values, slots, weights, grad_read)]


def naive_gather_sum(values, slots, weights):
    values, weights = values.cpu().double(), weights.cpu().double()
    out = torch.zeros(len(slots), values.shape[1], dtype=torch.float64)
    for n, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            out[n] += weights[n, t] * values[slot]
    return out


def naive_gather_dot(values, slots, grad_read):
    values, grad_read = values.cpu().double(), grad_read.cpu().double()
    out = torch.zeros(slots.shape, dtype=torch.float64)
    for n, row in enumerate(slots.tolist()):
        for t, slot in enumerate(row):
            out[n, t] = (values[slot] * grad_read[n]).sum()
    return out


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("tokens", "reads", "width"), BAGS)
def test_gather_sum_and_gather_dot(backend, tokens, reads, width, dtype, hot):
    backend.can(dtype)
    values, slots, weights, grad = bags(tokens, reads, width, dtype, backend.device, hot)
    got = kernels.gather_sum(values, slots, weights)
    scale = naive_gather_sum(values.abs(), slots, weights.abs())
    assert_close(got, naive_gather_sum(values, slots, weights), scale, reads, wide(dtype))
    got = kernels.gather_dot(values, slots, grad)
    scale = naive_gather_dot(values.abs(), slots, grad.abs())
    assert_close(got, naive_gather_dot(values, slots, grad), scale, width, wide(dtype))


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_dtype_are_taken(backend, given):
    values, slots, weights, grad = bags(2, 3, 5, torch.float32, backend.device)
    weights, grad = weights.to(given), grad.to(given)
    assert_same(
        (
            kernels.gather_sum(values, slots, weights),
            kernels.gather_sum(values, slots, weights.float()),
        )
    )
    got = kernels.gather_dot(values, slots, grad)
    assert_same((got, kernels.gather_dot(values, slots, grad.float())))


def test_reads_of_what_does_not_lie_together(backend):
    values, slots, weights, grad = bags(6, 6, 6, torch.float32, backend.device)
    slots, weights, grad = (
        slots.t(),
        weights[::2].repeat_interleave(2, 0).t(),
        grad[:1].expand(6, 6),
    )
    assert not any(x.is_contiguous() for x in (slots, weights, grad))
    right = naive_gather_sum(values, slots, weights)
    got = kernels.gather_sum(values, slots, weights)
    assert_close(got, right, naive_gather_sum(values.abs(), slots, weights.abs()), 6, torch.float32)
    right = naive_gather_dot(values, slots, grad)
    scale = naive_gather_dot(values.abs(), slots, grad.abs())
    assert_close(kernels.gather_dot(values, slots, grad), right, scale, 6, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_show_where_they_are_read(backend, bad):
    values, slots, weights, _ = bags(2, 9, 5, torch.float32, backend.device)
    slots[0], slots[1, 4] = 0, 3
    slots[1][slots[1] == 2] = 1
    values[2:, 1] = bad  # slot 3 is read by token 1
    assert torch.equal(
        kernels.gather_sum(values, slots, weights).isfinite().cpu(),
        torch.tensor([[True] * 5, [True, False, True, True, True]]),
    )


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("slot", [-1, N_SLOTS, 2**40])
@pytest.mark.parametrize("width", [5, 768])
def test_a_slot_out_of_range_reads_as_nan_on_a_device(backend, slot, width):
    values, slots, weights, grad = bags(3, 9, width, torch.float32, backend.device)
    slots[1, 8] = slot
    weights[1, 8] = 0
    module = backends.backend_for(values)  # past the check that is made on the CPU
    is_nan = module.gather_sum(values, slots, weights).isnan().cpu()
    assert torch.equal(is_nan, torch.tensor([False, True, False])[:, None].expand(3, width))
    is_nan = module.gather_dot(values, slots, grad).isnan().cpu()
    assert is_nan[1, 8] and is_nan.sum() == 1


# --- adam_rows -----------------------------------------------------------------------------


def entries_of(slots, weights, grads):
    rows = torch.arange(len(slots), device=slots.device).repeat_interleave(slots.shape[1])
    return Entries(slots.flatten(), weights.flatten(), rows, grads)


def tables(width, dtype, device="cpu", n_slots=N_SLOTS):
    values = torch.randn(n_slots, width).to(dtype)
    exp_avg = torch.randn(n_slots, width, dtype=wide(dtype))
    exp_avg_sq = torch.rand(n_slots, width, dtype=wide(dtype))
    return [x.to(device) for x in (values, exp_avg, exp_avg_sq)]


def naive_gradient(entries, n_slots=N_SLOTS):
    gradient = torch.zeros(n_slots, entries.grads.shape[1], dtype=torch.float64)
    weights, grads = entries.weights.cpu().double(), entries.grads.cpu().double()
    for e, (slot, bag) in enumerate(
        zip(entries.slots.tolist(), entries.bags.tolist(), strict=True)
    ):
        gradient[slot] += weights[e] * grads[bag]
    return gradient


def naive_update(before, gradient, step=STEP, betas=BETAS, eps=EPS):
    """Adam in float64, a row at a time; values are not rounded."""
    after = [x.cpu().double().clone() for x in before]
    for slot, g in enumerate(gradient):
        if (g != 0).any():
            value, avg, avg_sq = (x[slot] for x in after)
            avg[:] = betas[0] * avg + (1 - betas[0]) * g
            avg_sq[:] = betas[1] * avg_sq + (1 - betas[1]) * g * g
            value -= step * avg / (avg_sq.sqrt() + eps)
    return after


def assert_updated(got, exact, before, gradient, terms):
    """Rows without gradient keep their bits, the others are equal up to rounding."""
    still = ~(gradient != 0).any(dim=1)
    for name, x, right, old in zip(("values", "avg", "avg_sq"), got, exact, before, strict=True):
        assert x.dtype == old.dtype
        assert torch.equal(x.cpu()[still], old.cpu()[still]), f"{name}: a row moved"
        compute, stored = (torch.finfo(d).eps for d in (wide(x.dtype), x.dtype))
        bound = 8 * terms * compute * (1 + gradient.square().amax(1, keepdim=True))
        bound = bound + stored * right.abs() * 0.51 * (stored > compute)
        error = (x.cpu().double() - right).abs()
        assert (error <= bound).all(), f"{name}: off by {float((error - bound).max())} too much"


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "reads", "width"), BAGS)
def test_update_and_norm(backend, tokens, reads, width, dtype, hot):
    backend.can(dtype)
    _, slots, weights, grads = bags(tokens, reads, width, dtype, backend.device, hot)
    entries = entries_of(slots, weights, grads)
    gradient = naive_gradient(entries)
    assert not gradient[-1].any()
    got = tables(width, dtype, backend.device)
    before = [x.clone() for x in got]
    kernels.adam_rows(*got, entries, STEP, BETAS, EPS)
    assert_updated(got, naive_update(before, gradient), before, gradient, max(tokens, 1) * reads)
    norm = kernels.squared_norm(before[0], entries)
    assert (norm.shape, norm.dtype, norm.device) == ((), torch.float64, before[0].device)
    scale = naive_gradient(entries._replace(weights=weights.abs().flatten(), grads=grads.abs()))
    bound = 4 * (tokens * reads + 2) * torch.finfo(wide(dtype)).eps * scale.square().sum()
    assert abs(norm.cpu() - gradient.square().sum()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_settings_keep_the_precision_of_the_table(backend, dtype):
    """1 - 0.999 and 0.001 are other numbers when rounded to float32 first; so are their doubles."""
    entries = Entries(*(torch.tensor(x, device=backend.device) for x in ([1], [1.0], [0])), None)
    entries = entries._replace(grads=torch.full((1, 3), 3.0, dtype=dtype, device=backend.device))
    entries = entries._replace(weights=entries.weights.to(dtype))
    got = [torch.zeros(2, 3, dtype=dtype, device=backend.device) for _ in range(3)]
    before = [x.clone() for x in got]
    kernels.adam_rows(*got, entries, 0.1, (0.9, 0.999), 1e-8)
    exact = naive_update(before, naive_gradient(entries, 2), 0.1, (0.9, 0.999), 1e-8)
    for x, right in zip(got, exact, strict=True):
        assert torch.allclose(x.cpu().double(), right, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_two_updates_follow_each_other(backend):
    got = tables(5, torch.float32, backend.device)
    exact = [x.clone() for x in got]
    for _ in range(2):
        _, slots, weights, grads = bags(3, 4, 5, torch.float32, backend.device)
        entries = entries_of(slots, weights, grads)
        kernels.adam_rows(*got, entries, STEP, BETAS, EPS)
        exact = naive_update(exact, naive_gradient(entries))
    for x, right in zip(got, exact, strict=True):
        assert torch.allclose(x.cpu().double(), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_moves_if_and_only_if_its_gradient_has_a_nonzero_element(backend, dtype):
    backend.can(dtype)
    width = 37
    grads = torch.zeros(4, width, dtype=wide(dtype))
    grads[0], grads[1] = torch.arange(width) - 5, 5 - torch.arange(width)  # they cancel
    grads[2, width - 1] = 2**-20
    slots, rows = torch.tensor([0, 2, 0, 3, 4, 0, 0, 4]), torch.tensor([0, 2, 1, 3, 0, 0, 0, 1])
    weights = torch.tensor([0.5, 1, 0.5, 1, 0, 2, -2, 0], dtype=wide(dtype))
    entries = Entries(*(x.to(backend.device) for x in (slots, weights, rows, grads)))
    got = tables(width, dtype, backend.device)
    before = [x.clone() for x in got]
    kernels.adam_rows(*got, entries, STEP, BETAS, EPS)
    gradient = naive_gradient(entries)
    assert (gradient != 0).sum() == 1
    assert_updated(got, naive_update(before, gradient), before, gradient, 1)
    assert (got[1][2] != before[1][2]).all()  # the whole row decays
    assert kernels.squared_norm(got[0], entries) == 2.0**-40


def test_a_gradient_that_is_not_a_number_shows(backend):
    grads = torch.zeros(1, 5)
    grads[0, 3] = float("nan")
    entries = entries_of(torch.tensor([[2, 4]]), torch.tensor([[1.0, 0.0]]), grads)
    entries = Entries(*(x.to(backend.device) for x in entries))
    got = tables(5, torch.float32, backend.device)
    kernels.adam_rows(*got, entries, STEP, BETAS, EPS)
    is_nan = torch.zeros(N_SLOTS, 5, dtype=torch.bool)
    is_nan[[2, 4], 3] = True  # 0 * NaN is NaN
    assert all(torch.equal(x.isnan().cpu(), is_nan) for x in got)
    assert kernels.squared_norm(got[0], entries).isnan()


def test_the_norm_of_a_large_gradient_does_not_overflow(backend):
    entries = entries_of(torch.tensor([[0, 1]]), torch.ones(1, 2), torch.full((1, 3), 1e30))
    entries = Entries(*(x.to(backend.device) for x in entries))
    norm = kernels.squared_norm(tables(3, torch.float32, backend.device)[0], entries)
    assert float(norm) == pytest.approx(6e60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_to_nearest_even(backend, dtype):
    """The update is ``values - g`` here, exact in float32, and g is eighths of the last place."""
    backend.can(dtype)
    last_place = torch.finfo(dtype).eps
    exact = 1 + torch.arange(128, device=backend.device)[:, None] * last_place
    values = (exact * torch.tensor([1, -1, 1, -4] * 17, device=backend.device)[:65]).to(dtype)
    g = torch.arange(-32, 33, device=backend.device) * last_place / 8  # (65,)
    g = g.repeat(128, 1)
    right = (values.float() - g).to(dtype)
    slots = torch.arange(128, device=backend.device)
    entries = entries_of(slots[:, None], torch.ones(128, 1, device=backend.device), g)
    moments = torch.zeros_like(g), torch.ones_like(g)
    kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 1.0), 0.0)
    assert torch.equal(values, right)


def hashed(x):
    """MurmurHash3's finaliser, written out."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def random_bits(slot, column, table, rounding):
    """The 32 random bits of a number, by their definition."""
    key = hashed((hashed(rounding.seed) + rounding.step) % 2**32)
    bits = hashed((hashed(slot ^ key) + rounding.first_column + column) % 2**32)
    return bits * (1, 0x9E3779B1, 0x85EBCA77)[table] % 2**32


def rounded_by_chance(x, slot, column, table, rounding):
    """A float32 number as stochastic rounding stores it, by its definition."""
    chance = random_bits(slot, column, table, rounding) >> 16
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    (stored,) = struct.unpack("<f", struct.pack("<I", (bits + chance) >> 16 << 16))
    return stored


@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
def test_stochastic_rounding_is_that_of_its_definition(backend, moment_dtype):
    """All is exact in float32 here: moments are g and g * g, values move by a power of two."""
    backend.can(torch.bfloat16)
    rounding = StochasticRounding(seed=3, step=70_000, first_column=40)
    step = 2.0**-9
    torch.manual_seed(0)
    values = torch.tensor([[1.0, -1.0, 3.0, 0.25, 1e30]] * 20).bfloat16()
    g = (torch.arange(100).view(20, 5) - 50) * 2.0**-4 + 2.0**-7  # 10 bits, which bfloat16 has not
    slots = torch.randperm(300)[:20]
    table = torch.zeros(300, 5, dtype=torch.bfloat16)
    table[slots] = values
    moments = [torch.ones(300, 5, dtype=moment_dtype) for _ in range(2)]
    entries = entries_of(slots[:, None], torch.ones(20, 1), g)
    given = [x.to(backend.device) for x in (table, *moments)]
    entries = Entries(*(x.to(backend.device) for x in entries))
    kernels.adam_rows(*given, entries, step, (0.0, 0.0), 0.0, rounding)
    exact = values.float() - step * g.sign(), g, g * g
    changed = 0
    for number, (right, of) in enumerate(zip(exact, given, strict=True)):
        for row, slot in enumerate(slots.tolist()):
            for column in range(5):
                x = float(right[row, column])
                if of.dtype == torch.bfloat16:
                    x = rounded_by_chance(x, slot, column, number, rounding)
                    changed += x != float(right[row, column].bfloat16())
                assert float(of[slot, column]) == x, (number, slot, column)
    assert changed > 4  # else it might be rounding to nearest


def test_the_mean_of_stochastic_rounding_is_the_number(backend):
    """A twentieth of the last place, which rounding to nearest would lose."""
    backend.can(torch.bfloat16)
    steps, n_slots, width = 25, 32, 128
    share = 0.05
    up = torch.zeros(steps, n_slots, width)
    g = torch.full((n_slots, width), -share * 2.0**-7, device=backend.device)
    slots = torch.arange(n_slots, device=backend.device)
    entries = entries_of(slots[:, None], torch.ones(n_slots, 1, device=backend.device), g)
    for step in range(steps):
        values = torch.ones(n_slots, width, dtype=torch.bfloat16, device=backend.device)
        moments = torch.zeros_like(g), torch.ones_like(g)
        rounding = StochasticRounding(0, step)
        kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 1.0), 0.0, rounding)
        up[step] = (values.float().cpu() - 1) * 2**7
    assert set(up.unique().tolist()) == {0.0, 1.0}
    deviation = (share * (1 - share)) ** 0.5
    for over in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):  # no step, slot or column is favoured
        means = up.mean(over)
        bound = 5 * deviation * (means.numel() / up.numel()) ** 0.5
        assert ((means - share).abs() < bound).all()


def test_stochastic_rounding_keeps_what_is_no_number(backend):
    backend.can(torch.bfloat16)
    grads = torch.tensor([[float("nan"), INF, -INF, 0.0, 1.0]], device=backend.device)
    slots = torch.tensor([[1]], device=backend.device)
    entries = entries_of(slots, torch.ones(1, 1, device=backend.device), grads)
    given = [torch.ones(2, 5, device=backend.device).bfloat16() for _ in range(3)]
    kernels.adam_rows(*given, entries, 1.0, (0.0, 0.5), 1.0, StochasticRounding(0, 1))
    values, avg, avg_sq = (x[1].float().cpu() for x in given)
    assert avg[:3].tolist()[1:] == [INF, -INF] and avg_sq[1:3].tolist() == [INF, INF]
    assert values[:3].isnan().all() and avg[0].isnan() and avg_sq[0].isnan()
    assert values[3:].isfinite().all()


def test_another_rounding_of_rows_that_are_kept_apart(backend):
    """What a worker with half of the columns rounds is what one with all of them rounds."""
    backend.can(torch.bfloat16)
    torch.manual_seed(1)
    whole = [x.bfloat16() for x in tables(8, torch.bfloat16, backend.device)]
    _, slots, weights, grads = bags(3, 4, 8, torch.bfloat16, backend.device)
    halves = [[x[:, at : at + 4].contiguous() for x in whole] for at in (0, 4)]
    rounding = StochasticRounding(1, 2)
    kernels.adam_rows(*whole, entries_of(slots, weights, grads), STEP, BETAS, EPS, rounding)
    for at, half in zip((0, 4), halves, strict=True):
        entries = entries_of(slots, weights, grads[:, at : at + 4].contiguous())
        kernels.adam_rows(*half, entries, STEP, BETAS, EPS, rounding._replace(first_column=at))
    for x, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(x, torch.cat(parts, dim=1))


# --- moments in 8 bits ---------------------------------------------------------------------


def naive_float8(block, slot, first_column, table, rounding, signed):
    """A block of numbers as a ``Float8Table`` stores them, by its definition; None: to nearest."""
    top = 15 if signed else 31
    exponent = max(-63, *(math.frexp(x)[1] - 1 for x in block))
    exponent += max(map(abs, block)) > 1.875 * 2.0**exponent
    stored = []
    for column, x in enumerate(block):
        y = abs(x) / 2.0**exponent
        last_place = 2.0 ** (max(math.frexp(y)[1] - 1, 1 - top) - 3)
        below, part = divmod(y / last_place, 1)
        if rounding is None:
            up = part > 0.5 or (part == 0.5 and below % 2 == 1)
        else:
            chance = random_bits(slot, first_column + column, table, rounding) >> 12
            up = part + chance / 2**20 >= 1
        y = (below + up) * last_place
        if not signed and x > 0:
            y = max(y, 2.0 ** (1 - top - 3))
        stored.append(math.copysign(y * 2.0**exponent, x))
    return stored


def moments_in_8_bits(n_slots, width, device="cpu"):
    return [Float8Table(n_slots, width, signed, torch.device(device)) for signed in (True, False)]


@pytest.mark.parametrize("has_chance", [True, False])
def test_moments_in_8_bits_are_those_of_their_definition(backend, has_chance):
    """Moments are g and g * g here, exact in float32; g has 11 bits and many magnitudes."""
    n, width = 20, 70  # a block of 64 and one of 6
    torch.manual_seed(0)
    g = torch.randint(-2047, 2048, (n, width)) * 2.0 ** -torch.randint(11, 25, (n, width))
    g[3], g[4, :64], g[5, 0] = 0, 0, 1.9375  # a row that stays, a block of zeros, a rounded top
    g[6, 1:64], g[6, 0] = 2.0**-9, 1.0
    slots = torch.randperm(300)[:n]
    rounding = StochasticRounding(seed=3, step=70_000, first_column=64) if has_chance else None
    entries = entries_of(slots[:, None], torch.ones(n, 1), g)
    entries = Entries(*(x.to(backend.device) for x in entries))
    moments = moments_in_8_bits(300, width, backend.device)
    values = torch.zeros(300, width, device=backend.device)
    if has_chance:
        kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 0.0), 1.0, rounding)
    else:
        for moment, x in zip(moments, (g, g * g), strict=True):
            moment.copy_(torch.zeros(300, width).index_copy(0, slots, x))
    for table, (moment, x) in enumerate(zip(moments, (g, g * g), strict=True), 1):
        exact = torch.zeros(300, width)
        for row, slot in enumerate(slots.tolist()):
            for start, end in ((0, 64), (64, 70)):
                block = x[row, start:end].tolist()
                if any(block):
                    given = slot, start, table, rounding, table == 1
                    exact[slot, start:end] = torch.tensor(naive_float8(block, *given))
        assert torch.equal(moment.decoded().float(), exact)
        rounded = moment.decoded()[slots]
        assert ((rounded - x).abs() > 2.0**-6 * x.abs()).any()  # some were rounded far


def test_the_mean_of_moments_in_8_bits_is_the_number(backend):
    steps, n_slots, width = 200, 64, 64
    g = torch.linspace(0.01, 1, width, device=backend.device).repeat(n_slots, 1)
    slots = torch.arange(n_slots, device=backend.device)
    entries = entries_of(slots[:, None], torch.ones(n_slots, 1, device=backend.device), g)
    total = torch.zeros(2, n_slots, width, dtype=torch.float64)
    for step in range(steps):
        moments = moments_in_8_bits(n_slots, width, backend.device)
        values = torch.zeros_like(g)
        rounding = StochasticRounding(0, step)
        kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 0.0), 1.0, rounding)
        total += torch.stack([x.decoded() for x in moments])
    exact = torch.stack((g, g * g)).cpu().double()
    last_place = 2.0 ** (exact.log2().floor() - 3)
    means = (total / steps - exact) / last_place  # each has a deviation below 1 / 2
    for over in ((1,), (2,)):  # no slot or column is favoured
        bound = 5 * 0.5 / (steps * means.shape[over[0]]) ** 0.5
        assert (means.mean(over).abs() < bound).all()


def test_a_block_of_8_bits_with_no_number_is_none(backend):
    grads = torch.ones(2, 130, device=backend.device)
    grads[0, 3], grads[0, 70], grads[1, 0] = float("nan"), INF, 2.0**127
    slots = torch.tensor([[1], [2]], device=backend.device)
    entries = entries_of(slots, torch.ones(2, 1, device=backend.device), grads)
    values = torch.ones(3, 130, device=backend.device)
    moments = moments_in_8_bits(3, 130, backend.device)
    kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 0.0), 1.0, StochasticRounding(0, 1))
    avg = moments[0].decoded()
    assert not avg[1, :128].isfinite().any() and avg[1, 128:].tolist() == [1, 1]
    assert not avg[2, :64].isfinite().any() and (avg[2, 64:] == 1).all()
    assert (avg[0] == 0).all()


def test_a_second_moment_in_8_bits_stays_above_zero(backend):
    """Otherwise a step would be divided by eps alone."""
    g = torch.tensor([[1.0, 2.0**-60]], device=backend.device)
    slots = torch.tensor([[0]], device=backend.device)
    entries = entries_of(slots, torch.ones(1, 1, device=backend.device), g)
    for step in range(20):
        moments = moments_in_8_bits(1, 2, backend.device)
        values, rounding = torch.zeros(1, 2, device=backend.device), StochasticRounding(0, step)
        kernels.adam_rows(values, *moments, entries, 1.0, (0.0, 0.0), 0.0, rounding)
        assert moments[1].decoded()[0].tolist() == [1, 2.0**-33]


def test_moments_in_8_bits_of_columns_that_are_kept_apart(backend):
    torch.manual_seed(1)
    _, slots, weights, grads = bags(3, 4, 128, torch.float32, backend.device)
    whole = torch.zeros(N_SLOTS, 128, device=backend.device)
    moments, rounding = moments_in_8_bits(N_SLOTS, 128, backend.device), StochasticRounding(1, 2)
    entries = entries_of(slots, weights, grads)
    kernels.adam_rows(whole, *moments, entries, STEP, BETAS, EPS, rounding)
    for at in (0, 64):
        half, parts = whole.new_zeros(N_SLOTS, 64), moments_in_8_bits(N_SLOTS, 64, backend.device)
        entries = entries_of(slots, weights, grads[:, at : at + 64].contiguous())
        place = rounding._replace(first_column=at)
        kernels.adam_rows(half, *parts, entries, STEP, BETAS, EPS, place)
        assert torch.equal(half, whole[:, at : at + 64])
        for part, moment in zip(parts, moments, strict=True):
            assert torch.equal(part.decoded(), moment.decoded()[:, at : at + 64])


@pytest.mark.parametrize("exact", [True, False])
def test_moments_in_8_bits_are_refused_where_they_cannot_be(backend, exact):
    values, *wide = tables(5, torch.float64 if exact else torch.float32, backend.device)
    _, slots, weights, grads = bags(1, 2, 5, values.dtype, backend.device)
    given = entries_of(slots, weights, grads), STEP, BETAS, EPS
    moments, rounding = moments_in_8_bits(N_SLOTS, 5, backend.device), StochasticRounding(0, 1)
    wrong = [(moments, None), ((moments[1], moments[0]), rounding)]
    wrong.append(((wide[0], moments[1]), rounding))
    for pair, how in [*wrong, *([(moments, rounding)] if exact else [])]:
        with pytest.raises(ValueError, match=r"moments have dtypes .*float8.*, must both be"):
            kernels.adam_rows(values, *pair, *given, how)


def test_an_update_is_seen_by_autograd(backend):
    values, *moments = tables(5, torch.float32, backend.device)
    _, slots, weights, grads = bags(1, 2, 5, torch.float32, backend.device)
    version = values._version
    kernels.adam_rows(values, *moments, entries_of(slots, weights, grads), STEP, BETAS, EPS)
    assert values._version > version


# --- the same bits --------------------------------------------------------------------------


def everything(device, dtype=torch.float32):
    """What all operations give on one seed."""
    torch.manual_seed(5)
    values, slots, weights, grads = bags(23, 11, 19, dtype, device)
    slots[3:9] = 4
    entries = entries_of(slots, weights, grads)
    updated = tables(19, dtype, device)
    kernels.adam_rows(*updated, entries, STEP, BETAS, EPS)
    half = torch.randint(-3, 4, (2, 2, 5, 16), device=device).float()
    return [
        *kernels.topk_pairs(half, 4, *candidate_ranks(4, half.device)),
        *kernels.score_gradients(*score_case(9, 4, 6, torch.float32, device)),
        kernels.gather_sum(values, slots, weights),
        kernels.gather_dot(values, slots, grads),
        kernels.squared_norm(values, entries),
        *updated,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(backend, dtype):
    backend.can(dtype)
    if backend == Backend("torch", "cuda"):
        pytest.skip("torch scatters with atomics on CUDA")
    runs = everything(backend.device, dtype), everything(backend.device, dtype)
    assert_same(*zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["numba"], indirect=True)
def test_threads_do_not_change_the_bits(backend):
    import numba

    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread here")
    one = everything(backend.device)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = everything(backend.device)
    finally:
        torch.set_num_threads(before)
    assert_same(*zip(one, two, strict=True))


# --- bad input ------------------------------------------------------------------------------

TABLE = torch.zeros(7, 4)
SLOTS, WEIGHTS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("values", "slots", "weights", "message"),
    [
        (TABLE, SLOTS + 7, WEIGHTS, r"slot 7 is out of range, must be in 0\.\.6"),
        (TABLE, SLOTS - 1, WEIGHTS, r"slot -1 is out of range, must be in 0\.\.6"),
        (TABLE, SLOTS.int(), WEIGHTS, r"slots have dtype torch\.int32"),
        (TABLE, SLOTS, WEIGHTS.int(), r"weights have dtype torch\.int32"),
        (TABLE, SLOTS, WEIGHTS[:, :2], r"slots have shape \(2, 3\) and weights \(2, 2\)"),
        (TABLE, SLOTS[0], WEIGHTS[0], r"slots have shape \(3,\), must be"),
        (TABLE.t(), SLOTS, WEIGHTS, r"shape \(4, 7\) has strides \(1, 4\), must be contiguous"),
        (TABLE[0], SLOTS, WEIGHTS, r"a table has shape \(4,\)"),
        (TABLE.int(), SLOTS, WEIGHTS, r"dtype torch\.int32, must be \(n_slots, v_dim\)"),
    ],
)
def test_bad_reads_are_refused(backend, values, slots, weights, message):
    if backend.device != "cpu":
        pytest.skip("slots are checked on the CPU alone: the host would wait for the device")
    with pytest.raises(ValueError, match=message):
        kernels.gather_sum(values, slots, weights)


@pytest.mark.parametrize(
    ("place", "table", "message"),
    [
        (0, TABLE.t(), r"strides \(1, 4\), must be contiguous"),
        (1, torch.zeros(4, 7).t(), r"strides \(1, 7\), must be contiguous"),
        (1, TABLE[:6], r"moments have shapes \(6, 4\) and \(7, 4\), .* values, \(7, 4\)"),
        (2, torch.zeros(7, 5), r"moments have shapes \(7, 4\) and \(7, 5\), .* values, \(7, 4\)"),
        (2, TABLE.long(), r"dtype torch\.int64"),
        (1, TABLE.bfloat16(), r"dtypes torch\.bfloat16 and .*, must both be torch\.float32 for"),
    ],
)
def test_bad_tables_are_not_updated(place, table, message):
    given = [TABLE, TABLE, TABLE]
    given[place] = table
    entries = entries_of(SLOTS, WEIGHTS, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=message):
        kernels.adam_rows(*given, entries, STEP, BETAS, EPS)


@pytest.mark.parametrize("dtypes", [(32, 16, 32), (32, 32, 16), (64, 16, 16)])
def test_moments_in_bfloat16_are_two_and_of_no_wider_values(dtypes):
    named = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    given = [TABLE.to(named[bits]) for bits in dtypes]
    grads = torch.zeros(2, 4, dtype=given[0].dtype)
    entries = entries_of(SLOTS, WEIGHTS.to(grads.dtype), grads)
    with pytest.raises(ValueError, match=r"moments have dtypes .*, must both be torch\.float"):
        kernels.adam_rows(*given, entries, STEP, BETAS, EPS, StochasticRounding(0, 1))


@pytest.mark.parametrize(
    ("half1", "half2"),
    [([INF, INF], [-INF, -INF]), ([INF, 0.0], [0.0, -INF]), ([-INF, 1.0], [INF, INF])],
)
def test_opposite_infinities_are_not_a_number(backend, half1, half2):
    half = torch.tensor([[[half1], [half2]]]).to(backend.device)  # (1, 2, 1, 2)
    ranks = (rank.to(backend.device) for rank in candidate_ranks(2, torch.device("cpu")))
    scores, index1, index2 = kernels.topk_pairs(half, 2, *ranks)
    assert scores[..., 0].isnan().all()
    assert min(int(index1.min()), int(index2.min())) >= 0
    assert max(int(index1.max()), int(index2.max())) < 2


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("slots", torch.tensor([0, 7, 1, 2]), r"slot 7 is out of range, must be in 0\.\.6"),
        ("slots", torch.tensor([0, -1, 1, 2]), r"slot -1 is out of range"),
        ("slots", torch.zeros(4, dtype=torch.int32), r"slots have dtype torch\.int32"),
        ("bags", torch.tensor([0, 2, 1, 0]), r"bag 2 is out of range, must be in 0\.\.1"),
        ("weights", torch.ones(3), r"shapes \(4,\), \(3,\) and \(4,\)"),
        ("weights", torch.ones(4).double(), r"dtypes torch\.float64 and torch\.float32"),
        ("grads", torch.zeros(2, 5), r"gradients of entries have shape \(2, 5\)"),
    ],
)
def test_bad_entries_are_refused(field, wrong, message):
    index = torch.zeros(4, dtype=torch.int64)
    entries = Entries(index, torch.ones(4), index, torch.zeros(2, 4))._replace(**{field: wrong})
    with pytest.raises(ValueError, match=message):
        kernels.squared_norm(TABLE, entries)
    with pytest.raises(ValueError, match=message):
        kernels.adam_rows(TABLE.clone(), TABLE, TABLE, entries, STEP, BETAS, EPS)


@pytest.mark.parametrize(
    ("slots", "grad_read", "message"),
    [
        (SLOTS, torch.zeros(3, 4), r"has shape \(3, 4\), must be \(2, 4\)"),
        (SLOTS, torch.zeros(2, 5), r"has shape \(2, 5\), must be \(2, 4\)"),
        (SLOTS.int(), torch.zeros(2, 4), r"slots have dtype torch\.int32"),
        (SLOTS + 7, torch.zeros(2, 4), r"is out of range"),
    ],
)
def test_bad_gradients_of_reads_are_refused(slots, grad_read, message):
    with pytest.raises(ValueError, match=message):
        kernels.gather_dot(TABLE, slots, grad_read)


def test_products_that_cancel_leave_nothing_to_move_a_row(monkeypatch):
    """As in a dense gradient, where each product is rounded before it is added."""
    monkeypatch.setenv("PKM_BACKEND", "numba")
    grads = torch.randn(1, 300)
    index = torch.zeros(2, dtype=torch.int64)
    entries = Entries(index, torch.tensor([0.3, -0.3]), index, grads)
    got = tables(300, torch.float32, "cpu")
    before = [x.clone() for x in got]
    kernels.adam_rows(*got, entries, STEP, BETAS, EPS)
    assert all(map(torch.equal, got, before))


def test_autocast_does_not_lower_the_precision(backend):
    table, slots = torch.randn(9, 40).to(backend.device), torch.randint(9, (6, 5))
    slots, weights = slots.to(backend.device), torch.rand(6, 5).to(backend.device)
    grads = torch.randn(6, 40).to(backend.device)
    query, keys = torch.randn(6, 2, 2, 8), torch.randn(2, 2, 9, 8)
    index, grad_scores = torch.randint(9, (2, 6, 2, 3)), torch.randn(6, 2, 3)
    search = [x.to(backend.device) for x in (query, keys, *index, grad_scores)]

    def everything():
        found = [kernels.gather_sum(table, slots, weights), kernels.gather_dot(table, slots, grads)]
        found.append(kernels.gather_sum(table.bfloat16(), slots, weights))
        return [*found, *kernels.score_gradients(*search)]

    expected = everything()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        for got, exact in zip(everything(), expected, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, exact)


# --- in graphs of torch.compile -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operations_are_what_torch_is_told(backend, dtype):
    """Shapes, strides and dtypes; the gradients of compiled code are those of the operations."""
    values, slots, weights, grads = bags(5, 11, 19, dtype, backend.device)
    query, keys, *rest = score_case(9, 4, 6, torch.float32, backend.device)
    values, weights, grads, query, keys = (
        x.requires_grad_() for x in (values, weights, grads, query, keys)
    )
    operations = torch.ops.pkm_fairseq
    for operation, given in [
        (operations.gather_sum, (values, slots, weights)),
        (operations.gather_dot, (values, slots, grads)),
        (operations.search, (query.transpose(-1, -2).contiguous().transpose(-1, -2), keys, 4)),
        (operations.score_gradients, (query.detach(), keys.detach(), *rest)),
        (operations.table_gradient, tuple(x.detach() for x in (values, slots, weights, grads))),
    ]:
        torch.library.opcheck(operation.default, given)


def test_gradients_of_registered_operations(backend):
    """In float64, where differences of values are exact enough to compare with."""
    values, slots, weights, grads = bags(4, 3, 5, torch.float64, backend.device)
    query, keys = score_case(3, 2, 4, torch.float64, backend.device)[:2]
    values, weights, grads, query, keys = (
        x.requires_grad_() for x in (values, weights, grads, query, keys)
    )
    operations = torch.ops.pkm_fairseq

    def scores(query, keys):
        return operations.search(query, keys, 2)[0]

    gradcheck = torch.autograd.gradcheck
    assert gradcheck(operations.gather_sum, (values, slots, weights), fast_mode=True)
    assert gradcheck(operations.gather_dot, (values, slots, grads), fast_mode=True)
    assert gradcheck(scores, (query, keys), fast_mode=True)


# --- the choice -----------------------------------------------------------------------------


@pytest.fixture
def log(caplog, monkeypatch):
    """What the choice logs, and no backend forced."""
    monkeypatch.delenv("PKM_BACKEND", raising=False)
    caplog.set_level(logging.INFO, logger=backends.logger.name)
    return caplog


def not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}_backend", raising=False)


def backend_module(name):
    return importlib.import_module(f"{kernels.__name__}.{name}_backend")


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("PKM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="PKM_BACKEND is cuda, must be one of torch, numba, tri"):
        kernels.gather_sum(TABLE, SLOTS, WEIGHTS)


def test_a_forced_backend_that_does_not_know_the_dtype_is_named(monkeypatch):
    monkeypatch.setenv("PKM_BACKEND", "numba")
    with pytest.raises(ValueError, match="PKM_BACKEND is numba, but numba does not know float16"):
        kernels.gather_sum(TABLE.half(), SLOTS, WEIGHTS)


@pytest.mark.parametrize("name", ["numba", "triton"])
def test_a_forced_backend_that_is_not_installed_is_named(monkeypatch, name):
    not_installed(monkeypatch, name)
    monkeypatch.setenv("PKM_BACKEND", name)
    with pytest.raises(ValueError, match=f"PKM_BACKEND is {name}, but {name} cannot run here"):
        kernels.gather_sum(TABLE, SLOTS, WEIGHTS)


def test_a_forced_backend_of_another_device_is_named(monkeypatch):
    module = SimpleNamespace(DEVICES=("cuda",), DTYPES=(torch.float32,))
    monkeypatch.setattr(backends, "_load", {"triton": module}.get)
    monkeypatch.setenv("PKM_BACKEND", "triton")
    with pytest.raises(ValueError, match="PKM_BACKEND is triton, but triton does not run on cpu"):
        kernels.gather_sum(TABLE, SLOTS, WEIGHTS)


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_the_forced_backend_is_the_one_that_runs(monkeypatch, name):
    ran = []
    for other in ("torch", "numba"):
        module = backend_module(other)
        monkeypatch.setattr(module, "gather_sum", lambda *_, other=other: ran.append(other))
    monkeypatch.setenv("PKM_BACKEND", name)
    kernels.gather_sum(TABLE, SLOTS, WEIGHTS)
    assert ran == [name]


def test_the_choice_is_logged_once_per_dtype(log):
    for dtype in (torch.float32, torch.float32, torch.float64):
        kernels.gather_sum(TABLE.to(dtype), SLOTS, WEIGHTS)
        kernels.gather_dot(TABLE.to(dtype), SLOTS, torch.zeros(2, 4))
    assert [(r.levelname, r.getMessage()) for r in log.records] == [
        ("INFO", "memory kernels: numba on cpu in float32"),
        ("INFO", "memory kernels: numba on cpu in float64"),
    ]


def test_a_fallback_is_a_warning_with_its_reason(log, monkeypatch):
    assert backends.backend_for(TABLE.half()) is backend_module("torch")
    not_installed(monkeypatch, "numba")
    for _ in range(2):
        assert kernels.gather_sum(TABLE, SLOTS, WEIGHTS).shape == (2, 4)
    half, missing = log.records
    assert half.levelname == missing.levelname == "WARNING"
    assert "torch on cpu in float16, which is slower: numba does not know" in half.getMessage()
    assert "torch on cpu in float32, which is slower: numba cannot run" in missing.getMessage()


def test_a_backend_that_fails_to_start_is_not_taken(log, monkeypatch):
    """numba raises RuntimeError where it may write its cache nowhere."""

    def fail(name):
        if name == "numba":
            raise RuntimeError("no locator available")
        return torch_backend

    monkeypatch.setattr(backends, "_load", fail)
    assert backends.backend_for(torch.zeros(1)) is torch_backend
    assert "no locator available" in log.text


@pytest.mark.parametrize("backend", ["numba"], indirect=True)
def test_kernels_are_compiled_by_one_process_at_a_time(backend, monkeypatch):
    """Two that compile at once can leave numba's cache with one's code under the other's name."""
    fcntl = pytest.importorskip("fcntl")
    from pkm_fairseq.memory.kernels import numba_backend, numba_kernels

    numba_backend._group(torch.tensor([1]), 3)  # the rest takes no time, but for the lock
    monkeypatch.setattr(numba_backend, "_compiled", set())
    folder = numba_kernels.group.stats.cache_path
    started, finished = threading.Event(), threading.Event()

    def group():
        started.set()
        numba_backend._group(torch.tensor([2, 0, 2]), 3)
        finished.set()

    with open(os.path.join(folder, "pkm_fairseq.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        thread = threading.Thread(target=group)
        thread.start()
        started.wait()
        assert not finished.wait(0.3)
    thread.join(60)
    assert finished.is_set()
    with numba_backend._cache_locked(folder):  # what is compiled needs no lock
        numba_backend._group(torch.tensor([1]), 3)
