"""product_topk against the naive search over all slots."""

import pytest
import torch

from pkm_fairseq.memory import product_topk, search
from pkm_fairseq.memory.search import candidate_ranks, half_scores, slot_of
from tests.helpers import all_scores, assert_exact_topk, integers

CPU = torch.device("cpu")


def pairs(knn):
    """The candidates as a list of pairs of ranks."""
    rank1, rank2 = candidate_ranks(knn, CPU)
    return list(zip(rank1.tolist(), rank2.tolist(), strict=True))


def query_that_needs(i, j, n_keys):
    """One query, and keys, whose best slots are exactly the ranks (<= i, <= j).

    The sub-keys are the unit vectors, so that the query is its own half scores.
    """
    query = torch.full((1, 1, 2, n_keys), -1000.0)
    query[..., 0, : i + 1] = 0
    query[..., 1, : j + 1] = 0
    return query, torch.eye(n_keys).expand(1, 2, n_keys, n_keys)


@pytest.mark.parametrize("knn", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("n_keys", [11, 16])
def test_equals_the_naive_search_where_ties_are_many(knn, n_keys):
    assert_exact_topk(integers(40, 3, 2, 4), integers(3, 2, n_keys, 4), knn)


def test_equals_the_naive_search_at_the_default_knn():
    assert_exact_topk(integers(8, 2, 2, 8, high=9), integers(2, 2, 40, 8, high=9), knn=32)


def test_equals_the_naive_search_on_real_numbers():
    query, keys = torch.randn(50, 2, 2, 8).double(), torch.randn(2, 2, 13, 8).double()
    # the naive score is one sum of 16 products, ours the sum of two sums of 8
    assert_exact_topk(query, keys, knn=10, atol=1e-13)


def test_equals_the_naive_search_when_every_slot_ties():
    assert_exact_topk(torch.zeros(3, 2, 2, 4), integers(2, 2, 6, 4), knn=6)
    assert_exact_topk(integers(3, 2, 2, 4), torch.ones(2, 2, 6, 4), knn=6)


@pytest.mark.parametrize("knn", [1, 2, 5, 32, 100])
def test_candidates_are_the_pairs_of_ranks_whose_product_is_at_most_knn(knn):
    expected = {(i, j) for i in range(knn) for j in range(knn) if (i + 1) * (j + 1) <= knn}
    assert set(pairs(knn)) == expected
    assert len(pairs(knn)) == len(expected)


def test_knn_32_has_119_candidates():
    assert len(pairs(32)) == 119


def test_no_candidate_is_superfluous(monkeypatch):
    knn = n_keys = 12
    for dropped, (i, j) in enumerate(pairs(knn)):
        query, keys = query_that_needs(i, j, n_keys)
        assert_exact_topk(query, keys, knn)
        kept = [pair for index, pair in enumerate(pairs(knn)) if index != dropped]
        lacking = torch.tensor(kept).unbind(dim=1)
        with monkeypatch.context() as patch:
            patch.setattr(search, "candidate_ranks", lambda *_, ranks=lacking: ranks)
            with pytest.raises(AssertionError, match="not the best"):
                assert_exact_topk(query, keys, knn)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda i1, i2, n: i2 * n + i1, id="halves swapped"),
        pytest.param(lambda i1, i2, n: (i1 * n + i2 + 1) % n**2, id="off by one slot"),
        pytest.param(lambda i1, i2, n: i1 * (n - 1) + i2, id="wrong stride"),
    ],
)
def test_a_wrong_slot_number_is_noticed(monkeypatch, wrong):
    query, keys = integers(20, 2, 2, 4), integers(2, 2, 9, 4)
    assert_exact_topk(query, keys, 4)
    monkeypatch.setattr(search, "slot_of", wrong)
    with pytest.raises(AssertionError):
        assert_exact_topk(query, keys, 4)


def test_slot_is_first_sub_key_times_n_keys_plus_second():
    n_keys = 6
    query, keys = integers(1, 1, 2, 3), integers(1, 2, n_keys, 3)
    by_pair = keys[0, 0] @ query[0, 0, 0]
    by_pair = by_pair[:, None] + (keys[0, 1] @ query[0, 0, 1])[None, :]
    assert torch.equal(by_pair.flatten(), all_scores(query, keys)[0, 0])
    assert slot_of(torch.tensor(2), torch.tensor(3), n_keys) == 2 * n_keys + 3


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions_are_those_of_the_query(leading):
    keys = integers(2, 2, 6, 4)
    query = integers(*leading, 2, 2, 4)
    scores, slots = product_topk(query, keys, 3)
    assert scores.shape == slots.shape == (*leading, 2, 3)
    flat_scores, flat_slots = product_topk(query.reshape(-1, 2, 2, 4), keys, 3)
    assert torch.equal(scores.reshape(-1, 2, 3), flat_scores)
    assert torch.equal(slots.reshape(-1, 2, 3), flat_slots)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(dtype):
    query, keys = torch.randn(30, 2, 2, 16).to(dtype), torch.randn(2, 2, 9, 16).to(dtype)
    scores, slots = product_topk(query, keys, 5)
    expected_scores, expected_slots = product_topk(query.float(), keys.float(), 5)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)
    # scores in the dtype itself would be other ones
    in_dtype = torch.einsum("nhpd,hpsd->nhps", query, keys)
    assert not torch.equal(half_scores(query, keys), in_dtype.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_and_double_precision_stay(dtype):
    query, keys = torch.randn(3, 2, 2, 4, dtype=dtype), torch.randn(2, 2, 6, 4, dtype=dtype)
    assert product_topk(query, keys, 3)[0].dtype == dtype


def test_autocast_does_not_lower_the_precision_of_the_search():
    query, keys = torch.randn(30, 2, 2, 16), torch.randn(2, 2, 9, 16)
    expected_scores, expected_slots = product_topk(query, keys, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, slots = product_topk(query, keys, 5)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


def test_scores_carry_gradient_to_query_and_keys():
    query = torch.randn(3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: product_topk(q, k, 4)[0], (query, keys))


def test_a_search_without_gradient_does_not_spoil_a_later_one_with_gradient():
    search._kept_ranks.cache_clear()
    keys = torch.randn(1, 2, 6, 4, requires_grad=True)
    with torch.inference_mode():
        product_topk(torch.randn(2, 1, 2, 4), keys, 5)
    product_topk(torch.randn(2, 1, 2, 4), keys, 5)[0].sum().backward()
    assert keys.grad is not None


# --- scores whose softmax is NaN --------------------------------------------------------------


def huge(n=3, value=1e30):
    """Queries and sub-keys, the products of some of which overflow float32."""
    query, keys = torch.randn(n, 2, 2, 4), torch.randn(2, 2, 6, 4)
    query[1, 0, 0] = value
    keys[0, 0, 3] = 1e20
    return query, keys


def search_of_all(query, keys):
    return search.product_topk(query, keys, 3)


def search_of_kept(query, keys):
    kept = torch.arange(5).expand(2, 2, 5)  # the sub-key that overflows among them
    return search.product_topk_of(query, keys, kept, 3)


@pytest.mark.parametrize("find", [search_of_all, search_of_kept])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_infinite_scores_are_an_error_that_counts_them_and_says_why(monkeypatch, backend, find):
    monkeypatch.setenv("PKM_BACKEND", backend)
    with pytest.raises(ValueError) as error:
        find(*huge())
    assert str(error.value) == (
        "of 6 best scores 1 are infinite: queries reach 1.0e+30 and sub-keys 1.0e+20, too large "
        "for float32"
    )
    find(*huge(value=1e10))


@pytest.mark.parametrize("find", [search_of_all, search_of_kept])
@pytest.mark.parametrize(
    ("number", "named"),
    [
        (float("nan"), "of 6 best scores 1 are NaN: 1 of 3 queries and 0 of"),
        (float("inf"), "1 of 3 queries and 0 of"),
        (float("-inf"), "1 of 3 queries and 0 of"),
    ],
)
def test_a_query_that_is_not_finite_is_an_error_that_counts_it(find, number, named):
    query, keys = torch.randn(3, 2, 2, 4), torch.randn(2, 2, 6, 4)
    query[1, 0, 0, 2] = number
    with pytest.raises(ValueError, match=named):
        find(query, keys)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_minus_infinity_is_a_score_like_others_unless_it_is_the_best(monkeypatch, backend):
    monkeypatch.setenv("PKM_BACKEND", backend)
    query, keys = torch.ones(2, 1, 2, 2), torch.zeros(1, 2, 4, 2)
    keys[0, 0, 1:] = float("-inf")
    scores, slots = product_topk(query, keys, 4)
    assert torch.equal(scores, torch.zeros(2, 1, 4)) and torch.equal(
        slots.sort().values[0, 0], torch.arange(4)
    )
    keys[0, 1, 1:] = float("-inf")  # one slot is left with a finite score
    scores, slots = product_topk(query, keys, 4)
    assert torch.equal(scores.softmax(-1), torch.tensor([1.0, 0, 0, 0]).expand(2, 1, 4))
    assert (slots[..., 0] == 0).all()
    keys[0, 1] = float("-inf")
    with pytest.raises(
        ValueError,
        match=r"of 2 best scores 2 are infinite: 0 of 2 queries and 7 of 8 sub-keys are not finite",
    ):
        product_topk(query, keys, 4)


@pytest.mark.parametrize(
    ("query", "keys", "knn", "named"),
    [
        ((3, 2, 2, 4), (2, 2, 6, 4), 7, ["knn is 7", "6"]),
        ((3, 2, 2, 4), (2, 2, 6, 4), 0, ["knn is 0", "6"]),
        ((3, 2, 2, 4), (2, 3, 6, 4), 3, ["keys", "(2, 3, 6, 4)"]),
        ((3, 2, 2, 4), (2, 6, 4), 3, ["keys", "(2, 6, 4)"]),
        ((3, 2, 2, 5), (2, 2, 6, 4), 3, ["query", "(3, 2, 2, 5)", "(2, 2, 4)"]),
        ((3, 1, 2, 4), (2, 2, 6, 4), 3, ["query", "(3, 1, 2, 4)", "(2, 2, 4)"]),
        ((2, 4), (2, 2, 6, 4), 3, ["query", "(2, 4)", "(2, 2, 4)"]),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_that_names_them(query, keys, knn, named):
    with pytest.raises(ValueError) as error:
        product_topk(torch.zeros(query), torch.zeros(keys), knn)
    for words in named:
        assert words in str(error.value)
