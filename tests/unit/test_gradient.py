"""The factored gradient of a value table, and that nothing of the table's size is ever made."""

import copy
import gc
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, ValueTable, kernels
from pkm_fairseq.memory.adam import MemoryAdam, memory_param_groups
from pkm_fairseq.memory.exchange import average
from pkm_fairseq.memory.gradient import (
    FactoredGradient,
    entries_of,
    gradient_is_finite,
    is_exchanged,
    table_state,
)

from ..workers import on_workers

N_SLOTS, WIDTH = 40, 6


def reads(n_tokens=5, reads=7, seed=0):
    """Slots, several of them twice in a bag, weights, and a gradient of what was read."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(N_SLOTS, (n_tokens, reads), generator=generator)
    slots[:, 1] = slots[:, 0]
    weights = torch.randn(n_tokens, reads, generator=generator, dtype=torch.float64)
    grads = torch.randn(n_tokens, WIDTH, generator=generator, dtype=torch.float64)
    return slots, weights, grads


def a_table(dtype=torch.float64):
    """A table whose gradient is factored."""
    table = ValueTable(N_SLOTS, WIDTH).to(dtype)
    table.factored = True
    table_state(table.weight).exchange_as = "factors"
    return table


def add(table, slots, weights, grads):
    """Leave the gradient of a read, as a backward pass does."""
    table(slots[:, None], weights[:, None]).backward(grads)


def dense(*parts):
    """The gradient that these reads leave, written as a loop."""
    total = torch.zeros(N_SLOTS, WIDTH, dtype=torch.float64)
    for slots, weights, grads in parts:
        for n in range(len(slots)):
            for t in range(slots.shape[1]):
                total[slots[n, t]] += weights[n, t] * grads[n]
    return total


def total_of(entries):
    """The same from the entries."""
    total = torch.zeros(N_SLOTS, WIDTH, dtype=torch.float64)
    return total.index_add_(
        0, entries.slots, entries.weights[:, None] * entries.grads[entries.bags]
    )


def gradient_after(*parts):
    """A table and the entries that these reads leave."""
    table = a_table()
    for part in parts:
        add(table, *part)
    return table


def test_entries_are_the_gradient():
    table = gradient_after(reads())
    assert isinstance(table.weight.grad, FactoredGradient)
    assert torch.allclose(total_of(table.weight.grad.entries()), dense(reads()))
    assert torch.allclose(table.weight.grad.dense(), dense(reads()))


def test_gradients_of_several_reads_add_up_even_with_other_numbers_of_reads():
    first, second = reads(), reads(n_tokens=3, reads=4, seed=1)
    table = gradient_after(first, second)
    assert torch.allclose(total_of(table.weight.grad.entries()), dense(first, second))


def test_gradients_of_one_backward_pass_add_up():
    table, first, second = a_table(), reads(), reads(seed=1)
    outs = [table(slots[:, None], weights[:, None]) for slots, weights, _ in (first, second)]
    sum((out * part[2]).sum() for out, part in zip(outs, (first, second), strict=True)).backward()
    assert torch.allclose(total_of(table.weight.grad.entries()), dense(first, second))


def test_a_factor_reaches_what_was_read_before_and_not_what_comes_after():
    first, second = reads(), reads(seed=1)
    table = gradient_after(first)
    table.weight.grad.mul_(torch.tensor(0.25))
    add(table, *second)
    expected = 0.25 * dense(first) + dense(second)
    assert torch.allclose(total_of(table.weight.grad.entries()), expected)


def test_a_scale_that_is_not_finite_is_seen():
    table = gradient_after(reads())
    table.weight.grad.mul_(float("inf"))
    assert not gradient_is_finite(table.weight)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [1, 2])
def test_factors_that_are_not_finite_are_seen(wrong, where):
    parts = reads()
    table = gradient_after(parts)
    assert gradient_is_finite(table.weight)
    parts[where][2, 3] = wrong
    add(table, *parts)
    assert not gradient_is_finite(table.weight)


def test_a_gradient_that_is_copied_back_is_not_taken_for_the_mean_over_workers():
    table = gradient_after(reads())
    kept = table.weight.grad.clone()
    table.weight.grad.zero_()
    table.weight.grad.copy_(kept)
    assert torch.equal(table.weight.grad.dense(), kept.dense())
    assert not is_exchanged(table.weight)
    table.weight.grad.copy_(kept.dense())  # it may be a mean; to exchange it again keeps it
    assert not is_exchanged(table.weight)


def test_a_gradient_can_be_put_in_the_place_of_another_through_data():
    table = gradient_after(reads())
    before = table.weight.grad.dense()
    table.weight.grad.data = table.weight.grad.data * 0.5
    assert torch.equal(table.weight.grad.dense(), 0.5 * before)
    table.weight.grad.data.mul_(2)  # an alias
    assert torch.equal(table.weight.grad.dense(), before)
    with pytest.raises(
        RuntimeError, match=r"an assignment to \.data does not work on the factored"
    ):
        table.weight.grad.data = torch.zeros_like(before)
    assert torch.equal(table.weight.grad.dense(), before)


def test_norms_can_keep_dimensions():
    grad = gradient_after(reads()).weight.grad
    for keepdim in (False, True):
        norm = torch.linalg.vector_norm(grad, 2, keepdim=keepdim)
        expected = torch.linalg.vector_norm(grad.dense(), 2, keepdim=keepdim)
        assert norm.shape == expected.shape and torch.allclose(norm, expected)


@pytest.mark.parametrize("how", [(0,), (1,), (2, torch.float64)])
def test_norms_of_lists_are_those_of_dense_gradients(how):
    grad, other = gradient_after(reads()).weight.grad, torch.ones(3, dtype=torch.float64)
    norms = torch._foreach_norm([other, grad], *how)
    for norm, right in zip(norms, torch._foreach_norm([other, grad.dense()], *how), strict=True):
        assert norm.dtype == right.dtype and torch.allclose(norm, right)


def test_the_gradient_of_weights_is_the_same_with_and_without_factors():
    table = ValueTable(N_SLOTS, WIDTH).double()
    slots, weights, grads = reads()
    weights.requires_grad_()
    found, of_values = [], []
    for factored in (True, False):
        weights.grad = table.weight.grad = None
        table.factored = factored
        add(table, slots, weights, grads)
        found.append(weights.grad.clone())
        assert isinstance(table.weight.grad, FactoredGradient) == factored
        of_values.append(table.weight.grad.dense() if factored else table.weight.grad)
    assert torch.allclose(*found)
    assert torch.allclose(*of_values)


def test_a_frozen_table_gets_no_gradient_and_passes_that_of_weights_on():
    table = a_table()
    table.weight.requires_grad_(False)
    slots, weights, grads = reads()
    add(table, slots, weights.requires_grad_(), grads)
    assert table.weight.grad is None
    assert weights.grad.any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_leaves_nothing_behind(context):
    table = a_table()
    slots, weights, _ = reads()
    with context():
        read = table(slots[:, None], weights[:, None])
    assert read.grad_fn is None and table.weight.grad is None


def test_a_copy_of_a_table_is_dense_and_independent():
    table = gradient_after(reads())
    twin = copy.deepcopy(table)  # as fairseq's moving averages make one
    assert not twin.factored and table.factored  # no optimizer would use factors of the copy up
    assert twin.weight.value_table is not table.weight.value_table
    assert twin.weight.grad is None


def test_a_whole_model_can_be_saved_and_loaded(tmp_path):
    table = a_table(torch.float32)
    torch.save(table, tmp_path / "table.pt")
    loaded = torch.load(tmp_path / "table.pt", weights_only=False)
    assert torch.equal(loaded.weight, table.weight)
    assert not loaded.factored


def test_a_table_in_bfloat16_reads_the_same_in_training_and_evaluation():
    table = ValueTable(N_SLOTS, WIDTH, dtype=torch.bfloat16)
    slots, weights, grads = reads()
    weights = weights.float().requires_grad_()
    read = table(slots[:, None], weights[:, None])
    with torch.no_grad():
        assert torch.equal(read, table(slots[:, None], weights[:, None]))
    read.backward(grads.float())
    exact = dense((slots, weights.detach().double(), grads))
    assert table.weight.grad.dtype == torch.bfloat16
    assert torch.allclose(table.weight.grad.double(), exact, rtol=2**-8, atol=1e-5)
    expected = (table.weight.detach()[slots].double() * grads[:, None]).sum(-1)
    assert torch.allclose(weights.grad.double(), expected, atol=1e-5)


def trainer_of(factored, n_keys=64):
    """A step of training of a memory whose table is far larger than anything else."""
    config = MemoryConfig(n_keys=n_keys, heads=2, knn=4, k_dim=8, query_norm="layer")
    memory = ProductKeyMemory(64, config)
    optimizer = MemoryAdam(memory_param_groups(memory))
    memory.values.factored = factored
    x = torch.randn(8, 64)

    def step():
        optimizer.zero_grad()
        memory(x).square().sum().backward()
        optimizer.step()

    step()  # makes the moments
    return step, memory.values.weight.nbytes


def largest_allocation(step):
    """Of torch, by its profiler's memory events, and of numpy, by tracemalloc; in bytes."""
    gc.collect()
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [event.nbytes() for event in events_of(profiled) if event.name() == "[memory]"]
    assert sizes, "the profiler saw no allocation at all"
    return max(*sizes, peak)


def events_of(profiled):
    return profiled.profiler.kineto_results.events()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_training_step_allocates_anything_of_the_size_of_the_table(monkeypatch, backend):
    monkeypatch.setenv("PKM_BACKEND", backend)
    step, table = trainer_of(factored=True)
    assert largest_allocation(step) < table / 10


def test_a_dense_gradient_would_be_noticed():
    step, table = trainer_of(factored=False)
    assert largest_allocation(step) >= table


def test_a_table_that_does_not_fit_is_an_error_that_says_how_large_it_is():
    with pytest.raises(
        MemoryError, match=r"takes 4,000,000,000,000,000 bytes \(3,725,290\.3 GiB\)"
    ):
        ValueTable(10**9, 10**6)
    with pytest.raises(MemoryError, match="2,000,000,000,000,000 bytes"):
        ValueTable(10**9, 10**6, dtype=torch.bfloat16)


def test_the_squared_norm_is_that_of_the_dense_gradient():
    table = gradient_after(reads())
    found = kernels.squared_norm(table.weight, table.weight.grad.entries())
    assert float(found) == pytest.approx(float(dense(reads()).square().sum()), rel=1e-12)


THREADS = """
import torch
import torch.distributed as dist
from pkm_fairseq.memory import ValueTable
before = torch.get_num_threads()
ValueTable(10, 4)(torch.zeros(2, 1, 3, dtype=torch.int64), torch.ones(2, 1, 3))
print(before, torch.get_num_threads())
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_kernels_leave_the_number_of_threads_of_torch_alone(threads):
    """numba sets OpenMP's when it starts, which changes torch's, and so its sums."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env={"OMP_NUM_THREADS": threads, "PKM_BACKEND": "numba"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [threads, threads]


WORLD = 3


def exchange(rank):
    parts = [reads(), reads(n_tokens=2, reads=3, seed=1)]  # the third worker read nothing
    table = gradient_after(*parts[rank : rank + 1])
    average(table.weight)
    assert torch.allclose(total_of(entries_of(table.weight)), dense(*parts) / WORLD)
    # a dense gradient beside factors: rows have other numbers of entries
    table = gradient_after(*(parts[:1] if rank == 1 else []))
    extra = dense(parts[1])
    if rank == 1:
        table.weight.grad = table.weight.grad + extra
    average(table.weight)
    assert torch.allclose(total_of(entries_of(table.weight)), dense(*parts) / WORLD)
    table.weight.grad = None
    average(table.weight)  # nobody read anything
    assert table.weight.grad is None
    check_bytes(rank)


def check_bytes(rank):
    """What is handed to collectives is as large as the documents say."""
    tokens, n_reads, sent = 5 - rank, 4, []
    all_gather = dist.all_gather
    slots, weights, grads = reads(n_tokens=tokens, reads=n_reads)
    table = a_table(torch.float32)
    add(table, slots, weights.float(), grads.float())
    dist.all_gather = lambda out, x, group: (sent.append(x.nbytes), all_gather(out, x, group))
    average(table.weight)
    dist.all_gather = all_gather
    longest = 5
    assert sum(sent) == longest * (8 * n_reads + 4 * WIDTH + 4) + 24  # 24: how many, and which form


def test_workers_exchange_their_factors(tmp_path):
    on_workers(WORLD, tmp_path, exchange)
