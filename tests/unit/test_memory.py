"""ProductKeyMemory as a whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, ValueTable, build_values
from pkm_fairseq.memory import memory as memory_module
from pkm_fairseq.memory.config import QUERY_NORMS
from pkm_fairseq.memory.reference import naive_read, naive_topk
from tests.helpers import SMALL

WIDTH = 6
V_DIMS = [None, 3]


def memory_of(width=WIDTH, **settings):
    """A small memory in double precision; no parameter has a trivial value."""
    memory = ProductKeyMemory(width, replace(SMALL, **settings)).double()
    if memory.config.query_norm != "none":
        nn.init.uniform_(memory.query_norm.weight, 0.5, 2.0)
        nn.init.normal_(memory.query_norm.bias)
    return memory


def inputs(*leading, width=WIDTH):
    return torch.randn(*leading, width, dtype=torch.float64)


def naive_query(memory, tokens):
    """norm(W x + b) in plain code, (N, H, 2, D)."""
    query = tokens @ memory.query_proj.weight.T + memory.query_proj.bias
    norm, config = memory.query_norm, memory.config
    if config.query_norm == "batch":
        mean, var = norm.running_mean, norm.running_var
        if memory.training:
            mean, var = query.mean(0), query.var(0, unbiased=False)
        query = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    if config.query_norm == "layer":
        query = query.view(-1, config.heads, config.k_dim)
        mean, var = query.mean(-1, keepdim=True), query.var(-1, unbiased=False, keepdim=True)
        query = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    return query.view(-1, config.heads, 2, config.half_dim)


def naive_memory(memory, tokens):
    """The whole memory in plain code: (read, slots, weights)."""
    scores, slots = naive_topk(naive_query(memory, tokens), memory.keys, memory.config.knn)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    read = naive_read(memory.values.weight, slots, weights)
    if memory.config.v_dim is not None:
        read = read @ memory.output_proj.weight.T
    return read, slots, weights


def padding(batch, length, *lengths):
    """True behind each of the lengths, (batch, length)."""
    return torch.arange(length).expand(batch, length) >= torch.tensor(lengths)[:, None]


# --- what it computes -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("v_dim", V_DIMS)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_read_equals_the_naive_memory(query_norm, v_dim, training):
    memory = memory_of(query_norm=query_norm, v_dim=v_dim)
    if query_norm == "batch":  # statistics that are not the trivial ones
        memory(inputs(20))
    memory.train(training)
    x = inputs(9)
    expected, slots, weights = naive_memory(memory, x)
    read, lookup = memory(x, return_lookup=True)
    assert torch.allclose(read, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(lookup.slots, slots)  # real numbers: no ties
    assert torch.allclose(lookup.weights, weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_heads_are_a_sum_over_memories_of_one_head(query_norm):
    memory = memory_of(query_norm=query_norm, heads=3)
    x, k_dim = inputs(9), memory.config.k_dim
    total = torch.zeros_like(x)
    for head in range(3):
        one = memory_of(query_norm=query_norm, heads=1)
        mine = slice(head * k_dim, (head + 1) * k_dim)
        one.values = memory.values
        with torch.no_grad():
            one.query_proj.weight.copy_(memory.query_proj.weight[mine])
            one.query_proj.bias.copy_(memory.query_proj.bias[mine])
            one.keys.copy_(memory.keys[head : head + 1])
            if query_norm != "none":
                shared = query_norm == "layer"  # one LayerNorm for all heads
                rows = slice(None) if shared else mine
                one.query_norm.weight.copy_(memory.query_norm.weight[rows])
                one.query_norm.bias.copy_(memory.query_norm.bias[rows])
        total += one(x)
    assert torch.allclose(memory(x), total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_leading_dimensions_are_those_of_the_input(query_norm, leading):
    memory = memory_of(query_norm=query_norm).eval()
    x = inputs(*leading)
    read, lookup = memory(x, return_lookup=True)
    assert read.shape == x.shape
    assert lookup.slots.shape == lookup.weights.shape == (*leading, 2, 3)
    assert torch.allclose(read.reshape(-1, WIDTH), memory(x.reshape(-1, WIDTH)))


@pytest.mark.parametrize("padding_mask", [None, torch.tensor([False, True, False])])
def test_lookup_is_what_was_read(padding_mask):
    memory = memory_of()
    x = inputs(3)
    read, lookup = memory(x, padding_mask, return_lookup=True)
    assert lookup.slots.dtype == torch.int64
    assert not lookup.weights.requires_grad
    real = slice(None) if padding_mask is None else ~padding_mask
    again = naive_read(memory.values.weight, lookup.slots[real], lookup.weights[real])
    assert torch.allclose(read[real], again)
    assert torch.allclose(lookup.weights[real].sum(-1), torch.ones(()).double())
    ordered = lookup.weights[real].sort(dim=-1, descending=True).values
    assert torch.equal(ordered, lookup.weights[real]), "the highest score is not first"


def test_asking_for_the_lookup_changes_nothing():
    memory = memory_of(query_norm="layer")
    x, mask = inputs(2, 3), padding(2, 3, 3, 1)
    assert torch.equal(memory(x, mask), memory(x, mask, return_lookup=True)[0])


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("v_dim", V_DIMS)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_gradient_of_the_whole_layer_is_exact(query_norm, v_dim, training):
    memory = memory_of(width=4, query_norm=query_norm, v_dim=v_dim).train(training)
    names, parameters = zip(*memory.named_parameters(), strict=True)
    mask = torch.tensor([False, False, True, False, False])

    def read(x, *parameters):
        return torch.func.functional_call(
            memory, dict(zip(names, parameters, strict=True)), (x, mask)
        )

    given = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(read, (inputs(5, width=4).requires_grad_(), *given))


def test_gradcheck_notices_a_search_without_gradient(monkeypatch):
    monkeypatch.setattr(
        memory_module,
        "product_topk",
        lambda *args, original=memory_module.product_topk: (
            original(*args)[0].detach(),
            original(*args)[1],
        ),
    )
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_gradient_of_the_whole_layer_is_exact("layer", None, True)


@pytest.mark.parametrize("v_dim", V_DIMS)
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_every_parameter_gets_a_gradient(query_norm, v_dim):
    memory = memory_of(query_norm=query_norm, v_dim=v_dim)
    (memory(inputs(40)) * inputs(40)).sum().backward()
    gradients = {name: p.grad for name, p in memory.named_parameters()}
    biggest = max(float(grad.abs().max()) for grad in gradients.values())
    for name, grad in gradients.items():
        if name == "query_proj.bias" and query_norm == "batch":
            # batch normalisation subtracts it again
            assert grad.abs().max() < 1e-12 * biggest, name
        else:
            assert grad.abs().max() > 1e-6 * biggest, name
    assert (gradients["keys"] != 0).any(dim=-1).any(dim=-1).all(), "a half of a head has none"


def test_values_of_zero_pass_no_gradient_to_the_search_but_get_one():
    memory = memory_of(values_init="zero", v_dim=3)
    read = memory(inputs(9))
    assert not read.any()
    (read * inputs(9)).sum().backward()
    with_gradient = {name for name, p in memory.named_parameters() if p.grad.any()}
    assert with_gradient == {"values.weight"}


def test_gradient_is_exactly_zero_at_slots_and_keys_that_were_not_read():
    memory = memory_of(n_keys=20)
    read, lookup = memory(inputs(4), return_lookup=True)
    read.square().sum().backward()
    is_read = torch.zeros(memory.config.n_slots, dtype=torch.bool)
    is_read[lookup.slots.flatten()] = True
    assert 0 < is_read.sum() < len(is_read)
    assert torch.equal((memory.values.weight.grad != 0).any(-1), is_read)
    in_use = torch.zeros(2, 2, 20, dtype=torch.bool)
    for head in range(2):
        slots = lookup.slots[:, head].flatten()
        in_use[head, 0, slots // 20] = True
        in_use[head, 1, slots % 20] = True
    assert not memory.keys.grad[~in_use].any()
    assert not in_use.all()


# --- initialisation -------------------------------------------------------------------------


def test_keys_are_uniform_within_one_over_the_root_of_the_half_width():
    memory = ProductKeyMemory(WIDTH, MemoryConfig(n_keys=64, heads=2, knn=2, k_dim=32))
    bound = 16**-0.5
    keys = memory.keys.detach()
    assert keys.abs().max() <= bound
    assert keys.abs().max() > 0.99 * bound
    assert float(keys.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_parameters_have_the_names_and_shapes_of_the_design():
    shapes = {n: tuple(p.shape) for n, p in memory_of(v_dim=3).named_parameters()}
    assert shapes == {
        "query_proj.weight": (8, WIDTH),
        "query_proj.bias": (8,),
        "query_norm.weight": (8,),
        "query_norm.bias": (8,),
        "keys": (2, 2, 5, 2),
        "values.weight": (25, 3),
        "output_proj.weight": (WIDTH, 3),
    }


def test_a_value_width_equal_to_the_input_width_needs_no_projection():
    for v_dim in (None, WIDTH):
        memory, x = memory_of(v_dim=v_dim), inputs(3)
        assert not list(memory.output_proj.parameters())
        assert memory.output_proj(x, inputs(3)) is x


def test_default_settings_are_those_of_memory_config():
    memory = ProductKeyMemory.__new__(ProductKeyMemory)
    with torch.device("meta"):  # the default table is large
        memory.__init__(8)
    assert memory.config == MemoryConfig()
    assert memory.values.weight.shape == (512**2, 8)


def test_values_init_reaches_the_table():
    assert not memory_of(values_init="zero").values.weight.any()
    assert memory_of(values_init="normal").values.weight.all()


# --- dropout --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_dropout", "query_dropout", "read_dropout"])
def test_each_dropout_acts_in_training_only(name):
    with_dropout = memory_of(query_norm="layer", **{name: 0.5})
    without = memory_of(query_norm="layer")
    without.load_state_dict(with_dropout.state_dict())
    x = inputs(20)
    assert not torch.equal(with_dropout(x), without(x))
    assert torch.equal(with_dropout.eval()(x), without.eval()(x))


def test_dropouts_act_where_their_names_say():
    # a dropout of nearly 1 zeroes what it acts on
    nearly_one = 1 - 1e-12
    x = inputs(20)
    memory = memory_of(query_norm="none", input_dropout=nearly_one)
    assert torch.equal(memory(x), memory(torch.zeros_like(x)))  # only the bias is left
    assert memory(x).any()
    memory = memory_of(query_norm="none", query_dropout=nearly_one)
    weights = memory(x, return_lookup=True)[1].weights
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))  # all scores are zero
    memory = memory_of(query_norm="none", read_dropout=nearly_one)
    read, lookup = memory(x, return_lookup=True)
    assert not read.any()
    assert torch.equal(lookup.slots, memory.eval()(x, return_lookup=True)[1].slots)


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_reads_what_its_lookup_says(dtype, query_norm):
    memory = memory_of(query_norm=query_norm).to(dtype)
    x = inputs(7).to(dtype)
    read, lookup = memory(x, return_lookup=True)
    assert read.dtype == dtype
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    assert lookup.weights.dtype == at_least
    scores, _ = naive_topk(memory.query(x).to(at_least), memory.keys.to(at_least), 3)
    assert torch.allclose(lookup.weights, scores.softmax(-1), rtol=0, atol=1e-5)
    exact = naive_read(memory.values.weight.double(), lookup.slots, lookup.weights.double())
    assert torch.allclose(read.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)
    read.float().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_autocast_searches_and_weighs_in_float32(query_norm):
    memory = memory_of(query_norm=query_norm, v_dim=3).float()
    x = inputs(2, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read, lookup = memory(x, padding(2, 7, 7, 4), return_lookup=True)
        projected = memory.query_proj(x)
    assert projected.dtype == torch.bfloat16  # autocast was on
    assert read.dtype == x.dtype
    assert lookup.weights.dtype == torch.float32
    sums = lookup.weights.sum(-1)[~padding(2, 7, 7, 4)]
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)  # no bfloat16 on the way
    read.sum().backward()
    assert all(p.grad.isfinite().all() for p in memory.parameters())


# --- padding --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_padding_changes_nothing_for_tokens(query_norm, training):
    memory = memory_of(query_norm=query_norm).train(training)
    twin = memory_of(query_norm=query_norm).train(training)
    twin.load_state_dict(memory.state_dict())
    x, mask = inputs(3, 5), padding(3, 5, 5, 2, 3)
    longer = torch.cat([x, inputs(3, 4)], dim=1)  # more padding, and
    more = padding(3, 9, 5, 2, 3)
    longer[more] = float("nan")  # nothing may look at what it holds
    read, lookup = memory(x, mask, return_lookup=True)
    read_longer, lookup_longer = twin(longer, more, return_lookup=True)
    assert torch.equal(read[~mask], read_longer[~more])
    assert torch.equal(lookup.slots[~mask], lookup_longer.slots[~more])
    assert torch.equal(lookup.weights[~mask], lookup_longer.weights[~more])
    for name, tensor in memory.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name
    read.square().sum().backward()
    read_longer.square().sum().backward()
    for (name, ours), theirs in zip(memory.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_tokens_with_padding_are_read_as_without(query_norm):
    memory = memory_of(query_norm=query_norm)
    x, mask = inputs(3, 5), padding(3, 5, 5, 2, 3)
    assert torch.equal(memory(x, mask)[~mask], memory(x[~mask]))


def test_padding_reads_zero_and_looks_up_nothing():
    memory = memory_of()
    mask = padding(3, 5, 5, 2, 3)
    read, lookup = memory(inputs(3, 5), mask, return_lookup=True)
    assert not read[mask].any()
    assert (lookup.slots[mask] == -1).all()
    assert not lookup.weights[mask].any()
    assert (lookup.slots[~mask] >= 0).all()


def test_a_mask_of_no_padding_is_as_no_mask():
    memory = memory_of()
    x = inputs(3, 5)
    assert torch.equal(memory(x, torch.zeros(3, 5, dtype=torch.bool)), memory(x))


def test_a_mask_of_bytes_is_read_as_truth_values():
    memory = memory_of()
    x, mask = inputs(3, 5), padding(3, 5, 5, 2, 3)
    assert torch.equal(memory(x, mask.to(torch.uint8)), memory(x, mask))


@pytest.mark.parametrize("n_real", [0, 1])
@pytest.mark.parametrize("query_norm", QUERY_NORMS)
def test_batches_of_hardly_any_token_train(query_norm, n_real):
    memory = memory_of(query_norm=query_norm, v_dim=3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask.view(-1)[:n_real] = False
    x = inputs(2, 3).requires_grad_()
    before = {name: t.clone() for name, t in memory.named_buffers()}
    read, lookup = memory(x, mask, return_lookup=True)
    assert read.shape == x.shape
    assert lookup.slots.shape == (2, 3, 2, 3)
    read.sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (n_real > 0), name
    for name, buffer in memory.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert torch.equal(read, memory.eval()(x, mask))


def test_batch_statistics_are_those_of_tokens_only():
    memory = memory_of(query_norm="batch")
    x, mask = inputs(3, 5), padding(3, 5, 5, 2, 3)
    twin = nn.BatchNorm1d(8).double()
    twin(memory.query_proj(x[~mask]))
    memory(x, mask)
    assert torch.allclose(memory.query_norm.running_mean, twin.running_mean, rtol=1e-12)
    assert torch.allclose(memory.query_norm.running_var, twin.running_var, rtol=1e-12)


# --- shared values --------------------------------------------------------------------------


def test_memories_can_share_one_table():
    config = replace(SMALL, share_values=True)
    table = build_values(WIDTH, config)
    first, second = (ProductKeyMemory(WIDTH, config, table) for _ in range(2))
    assert first.values.weight is second.values.weight
    assert not torch.equal(first.keys, second.keys)


@pytest.mark.parametrize("shape", [(24, WIDTH), (25, WIDTH + 1)])
def test_a_shared_table_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError) as error:
        ProductKeyMemory(WIDTH, SMALL, ValueTable(*shape))
    assert str(shape) in str(error.value)
    assert str((25, WIDTH)) in str(error.value)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, WIDTH + 1), (WIDTH, 3), ()])
def test_input_of_another_width_is_an_error_that_names_both(shape):
    with pytest.raises(ValueError) as error:
        memory_of()(torch.zeros(shape).double())
    assert str(shape) in str(error.value)
    assert str(WIDTH) in str(error.value)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 1), (2, 3, WIDTH)])
def test_padding_mask_of_another_shape_is_an_error_that_names_both(shape):
    with pytest.raises(ValueError) as error:
        memory_of()(inputs(2, 3), torch.zeros(shape, dtype=torch.bool))
    assert str(shape) in str(error.value)
    assert "(2, 3)" in str(error.value)


@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_padding_that_stays_in_the_batch_changes_nothing_in_evaluation(monkeypatch, query_norm):
    """As on a GPU, where dropping it would make the host wait."""
    memory = memory_of(query_norm=query_norm).eval()
    x, mask = inputs(3, 5), padding(3, 5, 5, 2, 0)
    expected, lookup = memory(x, mask, return_lookup=True)
    monkeypatch.setattr(memory_module, "_drops_padding", lambda *_: False)
    x = x.masked_fill(mask[..., None], 7.0)
    read, found = memory(x, mask, return_lookup=True)
    assert torch.allclose(read, expected, atol=1e-12)
    assert torch.equal(found.slots, lookup.slots)
    assert torch.allclose(found.weights, lookup.weights, atol=1e-12)


def test_padding_leaves_the_batch_wherever_statistics_are_taken_or_waiting_is_free():
    cpu, gpu = torch.zeros(1), SimpleNamespace(device=torch.device("cuda"))
    drops = memory_module._drops_padding
    assert (drops(True, gpu), drops(False, gpu), drops(False, cpu)) == (True, False, True)


@pytest.mark.parametrize("key_dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_padding_holds_is_no_error(number, training, key_dropout):
    memory = memory_of(key_dropout=key_dropout, query_norm="layer").train(training)
    x, mask = inputs(4), torch.tensor([False, True, False, True])
    torch.manual_seed(3)
    right = memory(x, mask)
    x[mask] = number
    torch.manual_seed(3)
    assert torch.equal(memory(x, mask), right)
    with pytest.raises(ValueError, match="best scores"):
        memory(x)


def test_input_that_is_not_a_number_is_an_error_that_says_where_it_is_from():
    memory = memory_of(query_norm="layer")
    x = inputs(4)
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="are NaN: 1 of 4 queries and 0 of"):
        memory(x)
    x[2, 0] = 0
    memory(x)
    with torch.no_grad():
        memory.keys[1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="0 of 4 queries and 1 of"):
        memory(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_stored_in_the_dtype_asked_for_and_read_in_that_of_the_input(dtype):
    memory = ProductKeyMemory(WIDTH, replace(SMALL, value_dtype=dtype, v_dim=7))
    assert memory.values.weight.dtype == getattr(torch, dtype)
    assert memory.keys.dtype == torch.float32
    assert memory(torch.randn(3, WIDTH)).dtype == torch.float32
