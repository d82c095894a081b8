"""MemoryEncoderLayer against the table of formulas, and against fairseq's own layer."""

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import nn

from pkm_fairseq.memory import MemoryConfig, MemoryUsage, ProductKeyMemory
from pkm_fairseq.models.encoder_layer import MEMORY_MODES, MemoryEncoderLayer
from tests.helpers import WIDTH, model_args

T, B = 5, 3
MASK = torch.arange(T).expand(B, T) >= torch.tensor([5, 2, 4])[:, None]  # (B, T)
REAL = ~MASK.t()  # (T, B)


def layer_config(**options):
    args = model_args("roberta", encoder_ffn_embed_dim=24, **options)
    return TransformerConfig.from_namespace(args)


def build_layer(mode, pre_ln=False, query_norm="batch", **settings):
    """A layer in double precision whose norms are not the trivial ones."""
    config = MemoryConfig(n_keys=5, heads=2, knn=3, k_dim=4, query_norm=query_norm, **settings)
    # relu: fairseq's gelu computes in single precision
    cfg = layer_config(encoder_normalize_before=pre_ln, activation_fn="relu")
    layer = MemoryEncoderLayer(cfg, ProductKeyMemory(WIDTH, config), mode).double()
    for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return layer


def watch(layer):
    """Counters of what the layer's memory looks up from now on."""
    usage = MemoryUsage(25, 2)
    layer.memory.observers.append(usage)
    return usage


def plain_layer(pre_ln):
    """fairseq's own layer with the same options."""
    cfg = layer_config(encoder_normalize_before=pre_ln, activation_fn="relu")
    return TransformerEncoderLayerBase(cfg)


class Halve(nn.Module):
    """Stands for a dropout, to see where it is applied."""

    def forward(self, x):
        return x / 2


def inputs():
    return torch.randn(T, B, WIDTH).double()


def attend(layer, x):
    return layer.self_attn(x, x, x, key_padding_mask=MASK, need_weights=False)[0]


def read_memory(layer, x):
    return layer.memory(x, MASK.t())


def ffn(layer, x):
    return layer.fc2(layer.activation_dropout_module(layer.fc1(x).relu()))


def by_formula(layer, mode, pre_ln, x):
    """The table of the design, block by block."""
    drop = layer.dropout_module
    if not pre_ln:
        h = layer.self_attn_layer_norm(x + drop(attend(layer, x)))
        if mode == "replace":
            return layer.final_layer_norm(h + drop(read_memory(layer, h)))
        return layer.final_layer_norm(h + drop(ffn(layer, h)) + drop(read_memory(layer, h)))
    h = x + drop(attend(layer, layer.self_attn_layer_norm(x)))
    inner = layer.final_layer_norm(h)
    if mode == "replace":
        return h + drop(read_memory(layer, inner))
    return h + drop(ffn(layer, inner)) + drop(read_memory(layer, inner))


@pytest.mark.parametrize("pre_ln", [False, True])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_block_is_the_formula_of_its_mode(mode, pre_ln):
    layer = build_layer(mode, pre_ln)
    layer.dropout_module = layer.activation_dropout_module = Halve()
    x = inputs()
    expected = by_formula(layer, mode, pre_ln, x)
    assert torch.allclose(layer(x, MASK), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pre_ln", [False, True])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_what_is_read_reaches_the_output(mode, pre_ln):
    layer = build_layer(mode, pre_ln)
    x = inputs()
    before = layer(x, MASK)
    with torch.no_grad():
        layer.memory.values.weight.mul_(2)
    assert ((layer(x, MASK) - before)[REAL].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("pre_ln", [False, True])
@pytest.mark.parametrize("v_dim", [None, 7])
def test_residual_memory_of_zero_values_is_fairseqs_layer_bit_for_bit(
    pre_ln, training, with_mask, v_dim
):
    layer = build_layer("residual", pre_ln, values_init="zero", v_dim=v_dim).float()
    plain = plain_layer(pre_ln)
    plain.load_state_dict(
        {n: t for n, t in layer.state_dict().items() if not n.startswith(("memory.", "reads."))}
    )
    x = inputs().float()
    mask = MASK if with_mask else None
    ours, theirs = layer.train(training)(x, mask), plain.train(training)(x, mask)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(layer.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("pre_ln", [False, True])
def test_attention_mask_is_that_of_fairseqs_layer(pre_ln):
    layer = build_layer("residual", pre_ln, values_init="zero").float()
    plain = plain_layer(pre_ln)
    plain.load_state_dict(
        {n: t for n, t in layer.state_dict().items() if not n.startswith(("memory.", "reads."))}
    )
    x, causal = inputs().float(), torch.ones(T, T).triu(1)
    assert torch.equal(layer(x, MASK, causal), plain(x, MASK, causal))
    assert not torch.equal(layer(x, MASK, causal), layer(x, MASK))


def test_replacing_layer_has_no_feed_forward_network():
    names = build_layer("replace").state_dict()
    assert not [name for name in names if name.startswith("fc")]
    assert [name for name in build_layer("residual").state_dict() if name.startswith("fc1")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_padding_changes_nothing_for_tokens_statistics_and_usage(mode, query_norm, training):
    layer, twin = (build_layer(mode, query_norm=query_norm).train(training) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    usage, other = watch(layer), watch(twin)
    x = inputs()
    more = torch.cat([x, inputs()[:2]])  # longer, and
    mask = torch.cat([MASK, torch.ones(B, 2, dtype=torch.bool)], dim=1)
    more[mask.t()] = 100 * torch.randn(int(mask.sum()), WIDTH).double()  # other padding
    ours, theirs = layer(x, MASK), twin(more, mask)
    # attention sums over another length: equal but for rounding
    assert torch.allclose(ours[REAL], theirs[:T][REAL], rtol=1e-10, atol=1e-10)
    for name, tensor in layer.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], rtol=1e-12), name
    assert usage.tokens == other.tokens == int(REAL.sum())
    assert torch.equal(usage.read_count, other.read_count)
    assert torch.equal(usage.top1_count, other.top1_count)


def test_usage_is_that_of_the_lookup():
    layer = build_layer("replace").eval()
    seen = []
    original = layer.memory.forward

    def spy(x, padding_mask=None):
        read, lookup = original(x, padding_mask, return_lookup=True)
        seen.append(lookup)
        return read

    layer.memory.forward = spy
    usage = watch(layer)
    layer(inputs(), MASK)
    (lookup,) = seen
    for head, count in enumerate(usage.read_count):
        by_hand = torch.bincount(lookup.slots[REAL][:, head].flatten(), minlength=25)
        assert torch.equal(count, by_hand)
    assert float(usage.read_mass.sum()) == pytest.approx(int(REAL.sum()) * 2)


def test_counting_changes_no_output():
    layer = build_layer("residual").eval()
    x = inputs()
    without = layer(x, MASK)
    usage = watch(layer)
    assert torch.equal(layer(x, MASK), without)
    assert usage.tokens == int(REAL.sum())
