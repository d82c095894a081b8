"""On CUDA: the parity tests of the kernels, and a training step of a memory against the CPU's."""

import pytest
import torch

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, kernels
from pkm_fairseq.memory.kernels import backends
from pkm_fairseq.memory.search import candidate_ranks

# collected here, they take the ``backend`` of this module
from ..unit.test_kernels import (  # noqa: F401
    BETAS,
    EPS,
    STEP,
    Backend,
    _choose_anew,
    bags,
    entries_of,
    score_case,
    tables,
    test_a_gradient_that_is_not_a_number_shows,
    test_a_row_moves_if_and_only_if_its_gradient_has_a_nonzero_element,
    test_a_slot_out_of_range_reads_as_nan_on_a_device,
    test_an_update_is_seen_by_autograd,
    test_best_pairs_are_found,
    test_best_pairs_are_found_among_infinities,
    test_best_pairs_are_found_in_float64,
    test_extreme_scores_are_in_order,
    test_gather_sum_and_gather_dot,
    test_gradients_of_registered_operations,
    test_nan_shows_in_the_scores_of_its_token_and_head,
    test_no_tokens_have_no_best_pairs,
    test_reads_of_what_does_not_lie_together,
    test_registered_operations_are_what_torch_is_told,
    test_score_gradients,
    test_score_gradients_of_what_does_not_lie_together,
    test_settings_keep_the_precision_of_the_table,
    test_the_norm_of_a_large_gradient_does_not_overflow,
    test_two_runs_give_the_same_bits,
    test_two_updates_follow_each_other,
    test_update_and_norm,
    test_values_are_rounded_to_nearest_even,
    test_values_that_are_not_finite_show_where_they_are_read,
    test_weights_of_any_dtype_are_taken,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Each backend on CUDA, forced; the test of one backend names it itself."""
    monkeypatch.setenv("PKM_BACKEND", request.param)
    return Backend(request.param, "cuda")


def training_step(device, values_dtype):
    """Read, gradients and table of a memory after one step, on the CPU in at least float32."""
    torch.manual_seed(0)
    config = MemoryConfig(n_keys=32, heads=2, knn=5, k_dim=16, value_dtype=values_dtype)
    memory = ProductKeyMemory(48, config).to(device)
    x = torch.randn(16, 48).to(device).requires_grad_()
    memory.values.factored, table = True, memory.values.weight
    read = memory(x)
    (read * torch.linspace(-1, 1, 48, device=device)).square().sum().backward()
    moments = [torch.zeros(table.shape, device=device) for _ in range(2)]
    entries = table.grad.entries()
    norm = kernels.squared_norm(table, entries)
    kernels.adam_rows(table, *moments, entries, STEP, BETAS, EPS)
    found = [read, x.grad, memory.keys.grad, memory.query_proj.weight.grad, norm, table, *moments]
    return [y.detach().cpu().to(torch.promote_types(y.dtype, torch.float32)) for y in found]


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
def test_a_training_step_is_that_of_the_cpu(monkeypatch, values_dtype):
    monkeypatch.delenv("PKM_BACKEND", raising=False)
    on_cpu, on_cuda = training_step("cpu", values_dtype), training_step("cuda", values_dtype)
    assert backends.backend_for(torch.empty(1, device="cuda")).__name__.endswith("triton_backend")
    for one, other in zip(on_cpu, on_cuda, strict=True):
        assert one.abs().sum() > 0
        rounding = 2**-7 if one is on_cpu[5] and values_dtype == "bfloat16" else 1e-4
        assert (one - other).abs().max() <= rounding * one.abs().max()


def test_the_host_never_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("PKM_BACKEND", "triton")

    def run():
        kernels.topk_pairs(half, 4, *ranks)
        kernels.score_gradients(*scores)
        kernels.gather_sum(values, slots, weights)
        kernels.gather_dot(values, slots, grads)
        kernels.squared_norm(values, entries)
        kernels.adam_rows(*updated, entries, STEP, BETAS, EPS)

    half, ranks = torch.randn(2, 2, 5, 16).cuda(), candidate_ranks(4, torch.device("cuda"))
    scores = score_case(9, 4, 6, torch.float32, "cuda")
    values, slots, weights, grads = bags(5, 11, 19, torch.float32, "cuda")
    entries, updated = entries_of(slots, weights, grads), tables(19, torch.float32, "cuda")
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
