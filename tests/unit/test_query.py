"""Query normalisation."""

import pytest
import torch
from torch import nn

from pkm_fairseq.memory import MemoryConfig
from pkm_fairseq.memory.query import BatchQueryNorm, LayerQueryNorm, build_query_norm

HEADS, K_DIM = 3, 4
WIDTH = HEADS * K_DIM


def randomised(norm):
    """A norm whose scale and shift are not the trivial ones."""
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    return norm


def torch_twin(norm):
    """torch's own batch norm with the same parameters and statistics, in float32."""
    twin = nn.BatchNorm1d(WIDTH)
    state = {name: t.float() for name, t in norm.state_dict().items() if t.is_floating_point()}
    twin.load_state_dict(state, strict=False)
    return twin.train(norm.training)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("batch", BatchQueryNorm), ("layer", LayerQueryNorm), ("none", nn.Identity)],
)
def test_config_chooses_the_norm(name, kind):
    config = MemoryConfig(n_keys=4, knn=2, heads=HEADS, k_dim=K_DIM, query_norm=name)
    norm = build_query_norm(config)
    assert type(norm) is kind
    query = torch.randn(5, WIDTH)
    assert norm(query).shape == query.shape
    assert torch.equal(norm(query), query) == (name == "none")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_torchs(training):
    norm = randomised(BatchQueryNorm(WIDTH)).train(training)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    twin = torch_twin(norm)
    for _ in range(3):  # running statistics move
        query = 3 * torch.randn(7, WIDTH) + 1
        assert torch.equal(norm(query), twin(query))
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert torch.equal(norm.running_var, twin.running_var)


def test_batch_norm_in_training_is_the_formula():
    norm = randomised(BatchQueryNorm(WIDTH)).double()
    query = torch.randn(7, WIDTH).double()
    mean, var = query.mean(0), query.var(0, unbiased=False)
    expected = (query - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    assert torch.allclose(norm(query), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(norm.running_mean, norm.momentum * mean)
    expected_var = (1 - norm.momentum) + norm.momentum * query.var(0, unbiased=True)
    assert torch.allclose(norm.running_var, expected_var)


def test_batch_norm_has_no_integers_in_its_state():
    # fairseq's moving average of a model multiplies every entry in place
    state = BatchQueryNorm(WIDTH).state_dict()
    assert set(state) == {"weight", "bias", "running_mean", "running_var"}
    assert all(tensor.is_floating_point() for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_in_half_precision_is_computed_in_float32(dtype):
    norm = randomised(BatchQueryNorm(WIDTH)).to(dtype)
    twin = torch_twin(norm)
    query = torch.randn(7, WIDTH).to(dtype)
    normed = norm(query)
    assert normed.dtype == torch.float32
    assert torch.equal(normed, twin(query.float()))
    assert norm.running_mean.dtype == dtype
    assert torch.equal(norm.running_mean, twin.running_mean.to(dtype))
    assert torch.equal(norm.running_var, twin.running_var.to(dtype))
    assert (norm.running_mean != 0).any()


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_batch_norm_of_fewer_than_two_tokens_uses_and_keeps_the_running_statistics(n_tokens):
    norm = randomised(BatchQueryNorm(WIDTH))
    norm(torch.randn(9, WIDTH))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    query = torch.randn(n_tokens, WIDTH)
    in_training = norm.train()(query)
    assert torch.equal(in_training, norm.eval()(query))
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_layer_norm_normalises_each_head_on_its_own():
    norm = randomised(LayerQueryNorm(K_DIM))
    query = torch.randn(7, WIDTH)
    by_head = query.view(7, HEADS, K_DIM)
    mean, var = by_head.mean(-1, keepdim=True), by_head.var(-1, unbiased=False, keepdim=True)
    expected = (by_head - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    assert torch.allclose(norm(query), expected.view(7, WIDTH), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_in_half_precision_is_computed_in_float32(dtype):
    norm = randomised(LayerQueryNorm(K_DIM)).to(dtype)
    query = torch.randn(7, WIDTH).to(dtype)
    expected = nn.functional.layer_norm(
        query.float().view(7, HEADS, K_DIM), (K_DIM,), norm.weight.float(), norm.bias.float()
    )
    assert norm(query).dtype == torch.float32
    assert torch.equal(norm(query), expected.view(7, WIDTH))


@pytest.mark.parametrize("name", ["batch", "layer", "none"])
def test_no_tokens_give_no_queries(name):
    config = MemoryConfig(n_keys=4, knn=2, heads=HEADS, k_dim=K_DIM, query_norm=name)
    assert build_query_norm(config)(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
