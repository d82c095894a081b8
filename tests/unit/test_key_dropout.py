"""Structured dropout on sub-keys, and parts of a memory that are not trained."""

import math

import pytest
import torch

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, product_topk
from pkm_fairseq.memory.memory import FREEZABLE
from pkm_fairseq.memory.search import draw_kept_keys, product_topk_of
from tests.helpers import all_scores, build

N_KEYS, HEADS, KNN = 10, 3, 4


def memory_of(key_dropout=0.5, **options):
    torch.manual_seed(0)
    settings = dict(n_keys=N_KEYS, heads=HEADS, knn=KNN, k_dim=6, query_norm="layer")
    memory = ProductKeyMemory(8, MemoryConfig(**{**settings, **options}, key_dropout=key_dropout))
    with torch.no_grad():
        memory.query_proj.weight.mul_(10)
    return memory


def sub_keys_read(lookup):
    """For each head and half the set of sub-keys read, ((H, 2) of sets)."""
    halves = lookup.slots // N_KEYS, lookup.slots % N_KEYS
    return [[set(half[:, head].flatten().tolist()) for half in halves] for head in range(HEADS)]


@pytest.mark.parametrize(("share", "kept"), [(0.5, 5), (0.29, 8), (0.6, 4)])
def test_a_training_step_reads_the_sub_keys_that_are_left_and_no_others(share, kept):
    memory = memory_of(share).train()
    _, lookup = memory(torch.randn(200, 8), return_lookup=True)
    for halves in sub_keys_read(lookup):
        for read in halves:
            assert len(read) <= kept
    assert max(len(read) for halves in sub_keys_read(lookup) for read in halves) == kept


@pytest.mark.parametrize(
    ("n_keys", "share", "dropped"), [(100, 0.29, 29), (50, 0.58, 29), (90, 0.7, 63), (99, 0.29, 28)]
)
def test_the_share_is_that_of_the_decimal_number(n_keys, share, dropped):
    config = MemoryConfig(n_keys=n_keys, knn=2, key_dropout=share)
    assert n_keys - config.n_kept_keys == dropped


def test_heads_halves_and_steps_leave_out_different_sub_keys():
    memory = memory_of().train()
    x = torch.randn(300, 8)
    first, second = (sub_keys_read(memory(x, return_lookup=True)[1]) for _ in range(2))
    assert first != second
    assert len({frozenset(read) for halves in first for read in halves}) > 1


def test_every_sub_key_gets_its_turn():
    kept = torch.stack([draw_kept_keys(2, 5, 3, torch.device("cpu")) for _ in range(400)])
    assert kept.shape == (400, 2, 2, 3)
    assert (kept.sort(dim=-1).values.diff(dim=-1) > 0).all()  # none twice
    share = torch.nn.functional.one_hot(kept, 5).sum(dim=3).double().mean(dim=0)  # (2, 2, 5)
    assert torch.allclose(share, torch.full_like(share, 3 / 5), atol=5 * math.sqrt(0.24 / 400))


def test_search_among_kept_sub_keys_is_the_naive_one_among_their_slots():
    query, keys = torch.randn(50, HEADS, 2, 3), torch.randn(HEADS, 2, N_KEYS, 3)
    kept = draw_kept_keys(HEADS, N_KEYS, 6, torch.device("cpu"))
    scores, slots = product_topk_of(query, keys, kept, KNN)
    every = all_scores(query, keys)  # (N, H, n_slots)
    for head in range(HEADS):
        allowed = torch.zeros(N_KEYS, N_KEYS, dtype=torch.bool)
        allowed[kept[head, 0][:, None], kept[head, 1]] = True
        expected = every[:, head].masked_fill(~allowed.flatten(), -math.inf).topk(KNN)
        assert torch.allclose(scores[:, head], expected.values, atol=1e-6)
        assert torch.equal(slots[:, head], expected.indices)


def test_keeping_all_sub_keys_is_the_search_itself():
    query, keys = torch.randn(50, HEADS, 2, 3), torch.randn(HEADS, 2, N_KEYS, 3)
    kept = draw_kept_keys(HEADS, N_KEYS, N_KEYS, torch.device("cpu"))  # in another order
    scores, slots = product_topk_of(query, keys, kept, KNN)
    expected = product_topk(query, keys, KNN)
    assert torch.equal(slots, expected[1])
    assert torch.allclose(scores, expected[0])


def test_sub_keys_left_out_get_no_gradient_and_the_others_do():
    query = torch.randn(200, HEADS, 2, 3)
    keys = torch.randn(HEADS, 2, N_KEYS, 3, requires_grad=True)
    kept = draw_kept_keys(HEADS, N_KEYS, 5, torch.device("cpu"))
    scores, _ = product_topk_of(query, keys, kept, KNN)
    scores.pow(2).sum().backward()
    has_gradient = (keys.grad != 0).any(dim=-1)
    expected = torch.zeros_like(has_gradient).scatter_(2, kept, True)
    assert torch.equal(has_gradient, expected)


def test_evaluation_searches_all_sub_keys():
    dropping, plain = memory_of(0.5).eval(), memory_of(0.0).eval()
    x = torch.randn(100, 8)
    assert torch.equal(dropping(x), plain(x))


def test_a_share_of_less_than_one_sub_key_leaves_out_none():
    memory = memory_of(0.09).train()
    x = torch.randn(20, 8)
    assert torch.equal(memory(x), memory_of(0.0).train()(x))


# --- freezing -------------------------------------------------------------------------------

TRAINED = {
    None: {"query_proj", "query_norm", "keys", "values", "output_proj"},
    "values": {"query_proj", "query_norm", "keys", "output_proj"},
    "keys": {"query_proj", "query_norm", "values", "output_proj"},
    "all": set(),
}


@pytest.mark.parametrize("part", [None, *FREEZABLE])
def test_frozen_parts_are_not_trained_and_all_others_are(part):
    model = build("resm_roberta_tiny", memory_layers=[0, 2], memory_v_dim=7, memory_freeze=part)
    for layer in model.memory_layers().values():
        named = layer.memory.named_parameters()
        trained = {name.split(".")[0] for name, parameter in named if parameter.requires_grad}
        assert trained == TRAINED[part]
    rest = [p for name, p in model.named_parameters() if ".memory." not in name]
    assert all(p.requires_grad for p in rest)


@pytest.mark.parametrize("part", [None, *FREEZABLE])
def test_a_training_step_moves_what_is_not_frozen(part):
    memory = memory_of(0.0, query_norm="batch").train()
    if part is not None:
        memory.freeze(part)
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    optimizer = torch.optim.SGD(memory.parameters(), lr=1.0)
    x = torch.randn(50, 8, requires_grad=True)
    memory(x).pow(2).sum().backward()
    assert x.grad.any()  # the layers below learn through a frozen memory
    optimizer.step()
    moved = {name for name, t in memory.state_dict().items() if not torch.equal(t, before[name])}
    frozen = {
        None: set(),
        "values": {"values.weight"},
        "keys": {"keys"},
        "all": set(before),  # running statistics, too
    }[part]
    assert moved == set(before) - frozen


def test_an_unknown_part_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError) as error:
        memory_of().freeze("query")
    for words in ("query", *FREEZABLE):
        assert words in str(error.value)
