"""The search is exact on whatever hypothesis thinks of."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pkm_fairseq.memory import MemoryConfig, ProductKeyMemory, product_topk
from pkm_fairseq.memory.reference import naive_read
from tests.helpers import assert_exact_topk


@st.composite
def searches(draw, kinds=("ties", "duplicates", "zeros", "reals", "huge", "tiny")):
    """A query, keys, knn and the tolerance with which they may be compared."""
    tokens, heads = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    n_keys, half_dim = draw(st.integers(1, 17)), draw(st.integers(1, 5))
    knn = draw(st.integers(1, n_keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(kinds))
    shapes = (tokens, heads, 2, half_dim), (heads, 2, n_keys, half_dim)
    if kind in ("ties", "duplicates", "zeros"):  # integers: every sum is exact
        high = draw(st.integers(1, 3))
        query, keys = (
            torch.randint(-high, high + 1, shape, generator=generator).float() for shape in shapes
        )
        if kind == "duplicates":
            keys = keys[:, :, torch.randint(n_keys, (n_keys,), generator=generator)]
        if kind == "zeros":
            query = query * torch.randint(2, (tokens, 1, 2, 1), generator=generator)
            keys = keys * torch.randint(2, (heads, 2, n_keys, 1), generator=generator)
        return query, keys, knn, 0.0
    query, keys = (torch.randn(shape, generator=generator).double() for shape in shapes)
    scale = {"reals": 1.0, "huge": 1e150, "tiny": 1e-150}[kind]
    query = query * scale
    largest = float((query.abs().max() if query.numel() else query.sum()) * keys.abs().max())
    # two sums of half_dim products against one sum of twice as many
    return query, keys, knn, 4 * half_dim * torch.finfo(torch.float64).eps * largest


@given(searches())
def test_equals_the_naive_search(search):
    query, keys, knn, atol = search
    assert_exact_topk(query, keys, knn, atol)


@given(searches(), st.sampled_from([(1,), (2, 1), (1, 2, 1)]))
def test_leading_dimensions_change_nothing(search, leading):
    query, keys, knn, _ = search
    copies = 1
    for size in leading:
        copies *= size
    many = query.expand(copies, *query.shape).reshape(*leading, *query.shape)
    scores, slots = product_topk(many, keys, knn)
    expected_scores, expected_slots = product_topk(query, keys, knn)
    assert torch.equal(scores, expected_scores.expand_as(scores))
    assert torch.equal(slots, expected_slots.expand_as(slots))


@given(searches(kinds=("ties", "zeros")), st.integers(0, 2**32))
def test_reordering_the_sub_keys_reorders_the_slots_and_keeps_the_scores(search, seed):
    query, keys, knn, _ = search
    n_keys = keys.shape[2]
    order = torch.randperm(n_keys, generator=torch.Generator().manual_seed(seed))
    scores, slots = product_topk(query, keys[:, :, order], knn)
    assert torch.equal(scores, product_topk(query, keys, knn)[0])
    original = order[slots // n_keys] * n_keys + order[slots % n_keys]
    half = torch.einsum("nhpd,hpsd->nhps", query, keys)
    all_scores = (half[:, :, 0, :, None] + half[:, :, 1, None, :]).flatten(2)
    assert torch.equal(all_scores.gather(-1, original), scores)


@given(searches(kinds=("reals",)), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_exact_for_what_it_holds(search, dtype):
    query, keys, knn, _ = search
    query, keys = query.to(dtype), keys.to(dtype)
    # products of two 11-bit numbers are exact in float32, their sums nearly
    atol = 4 * keys.shape[-1] * torch.finfo(torch.float32).eps * 25
    scores, slots = product_topk(query, keys, knn)
    assert scores.dtype == torch.float32
    assert_exact_topk(query.float(), keys.float(), knn, atol)
    assert torch.equal(slots, product_topk(query.float(), keys.float(), knn)[1])


@given(
    n_keys=st.integers(2, 9),
    heads=st.integers(1, 3),
    half_dim=st.integers(1, 3),
    width=st.integers(1, 5),
    tokens=st.integers(0, 6),
    query_norm=st.sampled_from(["batch", "layer", "none"]),
    data=st.data(),
)
def test_a_memory_of_any_size_reads_what_its_lookup_says(
    n_keys, heads, half_dim, width, tokens, query_norm, data
):
    knn = data.draw(st.integers(2, n_keys), label="knn")
    v_dim = data.draw(st.none() | st.integers(1, 6), label="v_dim")
    config = MemoryConfig(
        n_keys, heads, knn, k_dim=2 * half_dim, v_dim=v_dim, query_norm=query_norm
    )
    memory = ProductKeyMemory(width, config).double()
    x = torch.randn(tokens, width).double()
    read, lookup = memory(x, return_lookup=True)
    expected = naive_read(memory.values.weight, lookup.slots, lookup.weights)
    expected = memory.output_proj(expected, x)
    assert torch.allclose(read, expected, rtol=1e-10, atol=1e-10)
    assert torch.allclose(lookup.weights.sum(-1), torch.ones(tokens, heads).double())
