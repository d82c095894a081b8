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
from pkm_fairseq.memory.gradient import ValueGradient
from pkm_fairseq.optim.pkm_adam import LazyAdam

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


def factors():
    """A gradient that keeps factors."""
    gradient = ValueGradient()
    gradient.keep_factors()
    return gradient


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


def test_entries_are_the_gradient():
    gradient = factors()
    assert not gradient
    gradient.add(*reads())
    assert gradient
    assert torch.allclose(total_of(gradient.entries()), dense(reads()))


def test_gradients_of_several_reads_add_up_even_with_other_numbers_of_reads():
    gradient, first, second = factors(), reads(), reads(n_tokens=3, reads=4, seed=1)
    gradient.add(*first)
    gradient.add(*second)
    assert torch.allclose(total_of(gradient.entries()), dense(first, second))


def test_a_factor_reaches_what_was_read_before_and_not_what_comes_after():
    gradient, first, second = factors(), reads(), reads(seed=1)
    gradient.add(*first)
    gradient.multiply(torch.tensor(0.25))
    gradient.add(*second)
    expected = 0.25 * dense(first) + dense(second)
    assert torch.allclose(total_of(gradient.entries()), expected)


def test_whatever_scales_and_resets_gradients_reaches_the_factors():
    """As fairseq's trainer, torch's loss scalers and optimizers' zero_grad do."""
    gradient = factors()
    gradient.add(*reads())
    gradient.scale.grad.mul_(3)
    assert torch.allclose(total_of(gradient.entries()), 3 * dense(reads()))
    gradient.scale.grad = None
    assert not gradient
    gradient.add(*reads(seed=1))
    assert torch.allclose(total_of(gradient.entries()), dense(reads(seed=1)))


def test_a_scale_that_is_not_finite_is_seen():
    gradient = factors()
    gradient.add(*reads())
    gradient.scale.grad.mul_(float("inf"))
    assert not gradient.is_finite()


def test_a_dense_gradient_can_be_added():
    gradient = factors()
    gradient.add(*reads())
    other = dense(reads(n_tokens=1, seed=3))
    assert torch.allclose(total_of(gradient.entries(other)), dense(reads()) + other)
    assert torch.allclose(total_of(factors().entries(other)), other)
    assert torch.allclose(total_of(gradient.entries()), dense(reads()))  # and is not kept


def test_what_was_cleared_is_gone():
    gradient = factors()
    gradient.add(*reads())
    gradient.clear()
    assert not gradient


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [1, 2])
def test_factors_that_are_not_finite_are_seen(wrong, where):
    gradient, parts = factors(), reads()
    gradient.add(*parts)
    assert gradient.is_finite()
    parts[where][2, 3] = wrong
    gradient.add(*parts)
    assert not gradient.is_finite()


def test_a_read_leaves_its_factors_and_no_dense_gradient():
    table = ValueTable(N_SLOTS, WIDTH).double()
    slots, weights, grads = reads()
    weights.requires_grad_()
    found = []
    for factored in (True, False):
        weights.grad = None
        table.gradient.scale = table.gradient.keep_factors(table.weight) if factored else None
        table(slots[:, None], weights[:, None]).backward(grads)
        found.append(weights.grad.clone())
        assert bool(table.gradient) == (table.weight.grad is None) == factored
        if factored:
            entries = table.gradient.entries()
    assert torch.allclose(*found)
    assert torch.allclose(total_of(entries), table.weight.grad)


def test_a_frozen_table_leaves_no_factors_and_passes_the_gradient_on():
    table = ValueTable(N_SLOTS, WIDTH).double()
    table.gradient.keep_factors()
    table.weight.requires_grad_(False)
    slots, weights, grads = reads()
    table(slots[:, None], weights.requires_grad_()[:, None]).backward(grads)
    assert not table.gradient
    assert weights.grad.any()


def test_frozen_keys_still_train_values():
    table = ValueTable(N_SLOTS, WIDTH).double()
    table.gradient.keep_factors()
    slots, weights, grads = reads()
    table(slots[:, None], weights[:, None]).backward(grads)
    assert torch.allclose(total_of(table.gradient.entries()), dense(reads()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_leaves_nothing_behind(context):
    table = ValueTable(N_SLOTS, WIDTH)
    table.gradient.keep_factors()
    slots, weights, _ = reads()
    with context():
        read = table(slots[:, None], weights[:, None])
    assert read.grad_fn is None and not table.gradient


def test_a_copy_of_a_table_has_a_gradient_of_its_own():
    table = ValueTable(N_SLOTS, WIDTH).double()
    table.gradient.keep_factors()
    slots, weights, grads = reads()
    table(slots[:, None], weights[:, None]).backward(grads)
    twin = copy.deepcopy(table)  # as fairseq's moving averages make one
    twin.gradient.clear()
    assert table.gradient
    assert twin.weight.value_gradient is twin.gradient
    assert not twin.gradient.factored  # nobody would use factors up


def test_a_whole_model_can_be_saved_and_loaded(tmp_path):
    table = ValueTable(N_SLOTS, WIDTH)
    table.gradient.keep_factors()
    torch.save(table, tmp_path / "table.pt")
    loaded = torch.load(tmp_path / "table.pt", weights_only=False)
    assert torch.equal(loaded.weight, table.weight)
    assert loaded.weight.value_gradient is loaded.gradient and not loaded.gradient.factored


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
    values = {"params": [memory.values.weight], "lazy": True}
    rest = [p for p in memory.parameters() if p is not memory.values.weight]
    optimizer = LazyAdam([{"params": rest}, values])
    if not factored:
        memory.values.gradient.scale = None
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
    table = ValueTable(N_SLOTS, WIDTH).double()
    gradient = factors()
    gradient.add(*reads())
    found = kernels.squared_norm(table.weight, gradient.entries())
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
    values = torch.empty(N_SLOTS, WIDTH, dtype=torch.float64)
    parts = [reads(), reads(n_tokens=2, reads=3, seed=1)]  # the third worker read nothing
    gradient = factors()
    if rank < 2:
        gradient.add(*parts[rank])
    gradient.gather(values)
    assert torch.allclose(total_of(gradient.entries()), dense(*parts) / WORLD)
    gradient.clear()
    extra = dense(parts[1])  # a dense gradient beside factors: rows have other numbers of entries
    if rank == 1:
        gradient.add(*parts[0])
    gradient.gather(values, extra if rank == 1 else None)
    assert torch.allclose(total_of(gradient.entries()), dense(*parts) / WORLD)
    gradient.clear()
    gradient.gather(values)  # nobody read anything
    assert not gradient
    check_bytes(rank)


def check_bytes(rank):
    """What is handed to collectives is as large as the documents say."""
    tokens, n_reads, sent = 5 - rank, 4, []
    all_gather = dist.all_gather
    dist.all_gather = lambda out, x, group: (sent.append(x.nbytes), all_gather(out, x, group))
    gradient = factors()
    slots, weights, grads = reads(n_tokens=tokens, reads=n_reads)
    gradient.add(slots, weights.float(), grads.float())
    gradient.gather(torch.empty(N_SLOTS, WIDTH))
    dist.all_gather = all_gather
    longest = 5
    assert sum(sent) == longest * (8 * n_reads + 4 * WIDTH + 4) + 16  # 16: how many there are


def test_workers_exchange_their_factors(tmp_path):
    on_workers(WORLD, tmp_path, exchange)
