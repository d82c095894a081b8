"""Every kind of query, weights, values and output equals its plain reference, and is seen to."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from pkm_fairseq.memory import (
    OUTPUTS,
    QUERIES,
    VALUES,
    MemoryAdam,
    MemoryConfig,
    MemoryUsage,
    ProductKeyMemory,
    ValueTable,
    build_values,
    memory_param_groups,
)
from pkm_fairseq.memory.config import SCORE_ACTIVATIONS
from pkm_fairseq.memory.gradient import FactoredGradient
from pkm_fairseq.memory.reference import (
    naive_experts,
    naive_linear_output,
    naive_mlp_query,
    naive_read,
    naive_swilu_output,
    naive_topk,
    naive_weights,
)
from tests.helpers import SMALL

WIDTH, N = 6, 9
KINDS = {
    "mlp": {"query": "mlp"},
    "relu": {"score_activation": "relu", "score_scale": 1.5},
    "learned scale": {"learn_score_scale": True, "score_scale": 0.5},
    "experts": {"values": "experts"},
    "narrow experts": {"values": "experts", "v_dim": 4},
    "swilu": {"output": "swilu"},
    "narrow swilu": {"output": "swilu", "v_dim": 4},
    "all": {"query": "mlp", "score_activation": "relu", "values": "experts", "output": "swilu"},
}
each_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def memory_of(**settings):
    """A small memory in double precision, without statistics of the batch."""
    torch.manual_seed(0)
    return ProductKeyMemory(WIDTH, replace(SMALL, query_norm="none", **settings)).double()


def inputs(*leading, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, WIDTH, dtype=torch.float64, generator=generator)


def naive_memory(memory, x):
    """The whole memory in plain code, part by part; (N, input_dim)."""
    config, p = memory.config, dict(memory.named_parameters())
    if config.query == "mlp":
        names = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")
        query = naive_mlp_query(x, *(p[f"query_proj.{name}"] for name in names))
    else:
        query = x @ p["query_proj.weight"].T + p["query_proj.bias"]
    query = query.view(-1, config.heads, 2, config.half_dim)
    scores, slots = naive_topk(query, memory.keys, config.knn)
    scale = p["score_scale"] if config.learn_score_scale else config.score_scale
    weights = naive_weights(scores, config.score_activation, scale)
    if config.values == "experts":
        read = naive_experts(p["values.down.weight"], p["values.up.weight"], slots, weights, x)
    else:
        read = naive_read(p["values.weight"], slots, weights)
    if config.output == "swilu":
        gate, projection = p["output_proj.gate.weight"], p["output_proj.proj.weight"]
        return naive_swilu_output(read, x, gate, projection)
    return naive_linear_output(read, p["output_proj.weight"]) if config.v_dim else read


def test_kinds_are_those_of_the_design():
    assert (set(QUERIES), set(VALUES)) == ({"linear", "mlp"}, {"table", "experts"})
    assert set(OUTPUTS) == {"linear", "swilu"}
    tested = {name for settings in KINDS.values() for name in settings.values()}
    assert {*QUERIES, *VALUES, *OUTPUTS, *SCORE_ACTIVATIONS} - tested == {
        *("linear", "table", "softmax")  # of tests/unit/test_memory.py
    }


@each_kind
@pytest.mark.parametrize("factored", [False, True])
def test_output_and_all_gradients_equal_those_of_the_plain_reference(settings, factored):
    memory, x = memory_of(**settings), inputs(N).requires_grad_()
    for table in (m for m in memory.modules() if isinstance(m, ValueTable)):
        table.factored = factored
    weigh = inputs(N, seed=2)
    leaves = {"x": x, **dict(memory.named_parameters())}
    expected = naive_memory(memory, x)
    grads = torch.autograd.grad((expected * weigh).sum(), list(leaves.values()))
    wanted = dict(zip(leaves, grads, strict=True))
    read = memory(x)
    torch.testing.assert_close(read, expected, rtol=1e-10, atol=1e-12)
    (read * weigh).sum().backward()
    for name, leaf in leaves.items():
        assert wanted[name].abs().max() > 1e-6, f"{name} takes no part: nothing is compared"
        is_table = name.startswith("values.")
        assert isinstance(leaf.grad, FactoredGradient) == (is_table and factored), name
        dense = leaf.grad.dense() if isinstance(leaf.grad, FactoredGradient) else leaf.grad
        torch.testing.assert_close(dense, wanted[name], rtol=1e-8, atol=1e-12, msg=name)


@each_kind
def test_padding_changes_nothing_for_tokens_and_reads_zero(settings):
    memory, x = memory_of(**settings), inputs(2, 4)
    padding_mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    read = memory(x, padding_mask)
    other = torch.where(padding_mask[..., None], torch.full_like(x, 1e30), x)
    assert torch.equal(memory(other, padding_mask), read)
    assert not read[padding_mask].any() and read[~padding_mask].any(-1).all()
    torch.testing.assert_close(read[~padding_mask], memory(x[~padding_mask]))


@each_kind
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_reads_what_a_whole_one_reads(settings, dtype, value_dtype):
    config = replace(SMALL, query_norm="none", value_dtype=value_dtype, **settings)
    torch.manual_seed(0)
    half = ProductKeyMemory(WIDTH, config, keeps_dtype=True).to(dtype)
    whole = copy.deepcopy(half).float()
    x = inputs(N).to(dtype)
    read, expected = half(x), whole(x.float())
    assert read.dtype == dtype
    # a score that is rounded may choose another slot: then compare most of the tokens
    close = (read.float() - expected).abs().amax(1) < 0.05 * expected.abs().max()
    assert close.float().mean() > 0.6
    half(x).float().sum().backward()
    assert all(p.grad is not None for p in half.parameters())


@each_kind
def test_values_of_zero_start_as_the_plain_model_and_learn(settings):
    memory, x = memory_of(values_init="zero", **settings), inputs(N)
    optimizer = MemoryAdam(memory_param_groups(memory, 1e-2, 1e-2))
    assert not memory(x).any()
    losses = []
    for _ in range(20):
        loss = (memory(x) - inputs(N, seed=3)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in memory.parameters() if not hasattr(p, "value_table"))


@each_kind
def test_the_lazy_update_is_that_of_a_dense_gradient_on_the_rows_that_were_read(settings):
    lazy, x = memory_of(**settings), inputs(N)
    dense = copy.deepcopy(lazy)
    eps = 1e-30  # torch adds it elsewhere
    ours = MemoryAdam(memory_param_groups(lazy, 1e-2, 1e-2), eps=eps)
    theirs = torch.optim.Adam(dense.parameters(), lr=1e-2, eps=eps)
    for model, optimizer in ((lazy, ours), (dense, theirs)):
        model(x).square().sum().backward()
        optimizer.step()
    for (name, mine), other in zip(lazy.named_parameters(), dense.parameters(), strict=True):
        told = other.grad.abs() > 1e-12  # of a gradient that is noise Adam takes the sign
        assert told.any(), name
        torch.testing.assert_close(mine[told], other[told], rtol=1e-6, atol=1e-9, msg=name)
        if name.startswith("values."):
            unread = ~other.grad.any(-1)
            assert unread.any() and torch.equal(mine[unread], other[unread]), name


def test_experts_have_two_tables_and_values_of_zero_are_the_up_vectors():
    memory = memory_of(values="experts", v_dim=4, values_init="zero")
    tables = memory.values.tables()
    assert {name: tuple(t.weight.shape) for name, t in tables.items()} == {
        "down": (25, WIDTH),
        "up": (25, 4),
    }
    assert tables["down"].weight.any(-1).all() and not tables["up"].weight.any()
    groups = memory_param_groups(memory)
    assert {id(p) for p in groups[1]["params"]} == {id(t.weight) for t in tables.values()}
    memory.freeze("values")
    assert not any(t.weight.requires_grad for t in tables.values())


def test_memories_share_experts_and_refuse_values_of_another_kind():
    config = replace(SMALL, values="experts")
    values = build_values(WIDTH, config)
    first, second = (ProductKeyMemory(WIDTH, config, values) for _ in range(2))
    assert first.values is second.values
    with pytest.raises(ValueError, match=r"a ValueTable, must be a Experts.*'experts'"):
        ProductKeyMemory(WIDTH, config, ValueTable(25, WIDTH))
    with pytest.raises(ValueError, match=r"\(25, 6\), must be \(25, 4\)"):
        ProductKeyMemory(WIDTH, replace(config, v_dim=4), values)


def test_a_kind_of_ones_own_is_a_choice_from_then_on():
    class Doubled(nn.Module):
        @classmethod
        def from_config(cls, input_dim, config):
            return cls()

        def forward(self, read, tokens):
            return 2 * read

    with pytest.raises(ValueError, match=r"output is 'doubled', must be one of linear, swilu$"):
        MemoryConfig(output="doubled")
    try:
        OUTPUTS.register("doubled", "twice the read")(Doubled)
        with pytest.raises(ValueError, match=r"'doubled' is registered already, by .*Doubled"):
            OUTPUTS.register("doubled", "again")
        x, plain = inputs(N), memory_of()
        assert torch.equal(memory_of(output="doubled")(x), 2 * plain(x))
    finally:
        OUTPUTS.pop("doubled", None)


@pytest.mark.parametrize("weights", [[3.0, 1.0], [0.75, 0.25]])
def test_usage_of_weights_that_do_not_add_up_to_one_is_that_of_their_shares(weights):
    usage = MemoryUsage(4, 1)
    usage.update(torch.tensor([[[2, 1]]]), torch.tensor([[weights]]))
    summary = usage.summary()
    assert summary["top1_weight"] == pytest.approx(0.75)
    assert summary["entropy"] == pytest.approx(0.5623351446)  # of 3/4 and 1/4
    assert float(usage.read_mass.sum()) == sum(weights)


def test_usage_of_a_memory_that_gave_every_slot_no_weight_is_none():
    usage = MemoryUsage(4, 1)
    usage.update(torch.tensor([[[2, 1]]]), torch.zeros(1, 1, 2))
    summary = usage.summary()
    assert (summary["topk_usage"], summary["dead_slots"]) == (0, 4)
    assert (summary["top1_weight"], summary["entropy"]) == (0, 0)
    assert summary["kl_weighted"] == pytest.approx(1.3862943611)  # log 4: all in one place
    assert (summary["gini"], summary["slots_50"], summary["slots_99"]) == (1, 0, 0)
