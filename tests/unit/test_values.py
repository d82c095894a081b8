"""The value table and its weighted read."""

import copy

import pytest
import torch
from torch import nn

from pkm_fairseq.memory import ValueTable
from pkm_fairseq.memory.gradient import FactoredGradient, is_table
from pkm_fairseq.memory.reference import naive_read


def lookup(n_tokens=6, heads=2, knn=3, n_slots=10, dtype=torch.float32):
    """Random slots, repeated ones among them, and weights."""
    slots = torch.randint(n_slots, (n_tokens, heads, knn))
    return slots, torch.rand(n_tokens, heads, knn, dtype=dtype)


def test_read_equals_the_naive_read():
    table = ValueTable(10, 5).double()
    slots, weights = lookup(dtype=torch.float64)
    expected = naive_read(table.weight, slots, weights)
    assert torch.allclose(table(slots, weights), expected, rtol=1e-12, atol=1e-12)


def test_read_is_the_sum_written_as_loops():
    table = ValueTable(10, 5).double()
    slots, weights = lookup(n_tokens=2, dtype=torch.float64)
    for n in range(2):
        total = torch.zeros(5).double()
        for h in range(2):
            for k in range(3):
                total += weights[n, h, k] * table.weight[slots[n, h, k]]
        assert torch.allclose(table(slots, weights)[n], total)


def test_gradient_is_exact_for_values_and_weights():
    table = ValueTable(10, 5).double()
    slots, weights = lookup(dtype=torch.float64)
    slots[0, 0, :] = 4  # the same slot several times in one bag

    def read(values, weights):
        return torch.func.functional_call(table, {"weight": values}, (slots, weights))

    values = table.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(read, (values, weights.requires_grad_()))


def test_gradient_is_exactly_zero_at_slots_that_were_not_read():
    table = ValueTable(50, 5)
    slots, weights = lookup(n_slots=50)
    table(slots, weights).square().sum().backward()
    is_read = torch.zeros(50, dtype=torch.bool)
    is_read[slots.flatten()] = True
    assert 0 < is_read.sum() < 50
    assert torch.equal((table.weight.grad != 0).any(dim=1), is_read)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_read_is_in_at_least_float32(dtype):
    table = ValueTable(10, 5).to(dtype)
    slots, weights = lookup(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    read = table(slots, weights)
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = naive_read(table.weight.double(), slots, weights.double())
    # at most 6 products, each with a rounded weight, summed in the dtype
    assert torch.allclose(read.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)
    read.float().sum().backward()
    assert table.weight.grad.dtype == dtype


def test_no_tokens_read_nothing_and_give_no_gradient():
    table = ValueTable(10, 5)
    slots, weights = lookup(n_tokens=0)
    read = table(slots, weights)
    assert read.shape == (0, 5)
    read.sum().backward()
    assert not table.weight.grad.any()


def test_normal_init_has_variance_one_over_v_dim():
    values = ValueTable(2000, 64).weight.detach()
    assert abs(float(values.mean())) < 5 * 64**-0.5 / (2000 * 64) ** 0.5  # 5 standard errors
    assert float(values.std()) == pytest.approx(64**-0.5, rel=0.02)


def test_zero_init_is_zero_and_reset_keeps_the_init():
    table = ValueTable(10, 5, "zero")
    assert not table.weight.any()
    with torch.no_grad():
        table.weight.fill_(1)
    table.reset_parameters()
    assert not table.weight.any()


def test_reset_draws_anew():
    table = ValueTable(10, 5)
    before = table.weight.detach().clone()
    table.reset_parameters()
    assert not torch.equal(table.weight, before)


def test_a_table_that_keeps_half_precision_can_still_be_moved_and_shared():
    half = {"dtype": torch.bfloat16, "keeps_dtype": True}
    with torch.device("meta"):
        table = ValueTable(9, 4, **half)
    table.to_empty(device="cpu")
    assert table.weight.device.type == "cpu" and table.weight.dtype == torch.bfloat16
    table = ValueTable(9, 4, **half)
    table.share_memory()
    assert table.weight.is_shared()
    assert table.half().weight.dtype == torch.bfloat16


def test_parameter_is_marked_for_the_optimizer():
    for table in (ValueTable(10, 5), ValueTable(10, 5).double().bfloat16()):
        assert is_table(table.weight)
    twin = copy.deepcopy(table)
    assert is_table(twin.weight)
    assert twin.weight.value_table is not table.weight.value_table


def test_a_parameter_that_was_assigned_or_made_anew_keeps_its_gradient():
    table, slots_and_weights = ValueTable(10, 5), lookup()
    table.factored = True
    nn.Sequential(table).load_state_dict({"0.weight": torch.ones(10, 5)}, assign=True)
    assert is_table(table.weight)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        before, table = table.weight, table.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert table.weight is not before
    table.weight = nn.Parameter(torch.ones(10, 5, dtype=torch.float64))
    table(*slots_and_weights).sum().backward()
    assert isinstance(table.weight.grad, FactoredGradient)
