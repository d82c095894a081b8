"""MemoryUsage on cases that can be worked out by hand."""

import math

import pytest
import torch

from pkm_fairseq.memory import MemoryUsage
from pkm_fairseq.memory.observe.usage import COUNTERS, tokens_for_draws, uniform_ceiling


def summary_of(slots, weights, n_slots):
    """Usage of lists (N, H, K)."""
    slots, weights = torch.tensor(slots), torch.tensor(weights, dtype=torch.float64)
    usage = MemoryUsage(n_slots, slots.shape[1])
    usage.update(slots, weights)
    return usage.summary()


def entropy_of(share):
    """Entropy in nats of two weights."""
    return -sum(w * math.log(w) for w in (share, 1 - share) if w)


def random_lookup(n_tokens, heads=2, knn=3, n_slots=30):
    slots = torch.randint(n_slots, (n_tokens, heads, knn))
    return slots, torch.rand(n_tokens, heads, knn, dtype=torch.float64).softmax(-1)


def test_counters_count():
    usage = MemoryUsage(4, heads=2)
    slots = torch.tensor([[[0, 1], [1, 3]], [[1, 0], [1, 0]]])
    weights = torch.tensor([[[0.75, 0.25], [0.5, 0.5]], [[0.875, 0.125], [1.0, 0.0]]])
    usage.update(slots, weights)
    assert usage.tokens == 2
    assert usage.knn == 2
    assert usage.top1_count.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0]]
    assert usage.read_count.tolist() == [[2, 2, 0, 0], [1, 2, 0, 1]]
    assert usage.read_mass.tolist() == [[0.875, 1.125, 0.0, 0.0], [0.0, 1.5, 0.0, 0.5]]
    assert usage.top1_weight.tolist() == [1.625, 1.5]
    entropies = [[entropy_of(0.75) + entropy_of(0.875)], [entropy_of(0.5) + entropy_of(1.0)]]
    assert usage.entropy.tolist() == pytest.approx([x for (x,) in entropies])


def test_slots_read_equally_often_are_uniform():
    n_slots = 6  # each slot once first and once second, with the same weight
    slots = [[[s, (s + 1) % n_slots]] for s in range(n_slots)]
    summary = summary_of(slots, [[[0.5, 0.5]]] * n_slots, n_slots)
    assert summary["top1_usage"] == summary["topk_usage"] == 1
    assert summary["dead_slots"] == 0
    for name in ("kl_weighted", "kl_unweighted", "gini"):
        assert summary[name] == pytest.approx(0, abs=1e-12), name


def test_one_slot_that_holds_all():
    # the second neighbour gets no weight at all
    summary = summary_of([[[7, 3]]] * 5, [[[1.0, 0.0]]] * 5, n_slots=10)
    assert summary["kl_weighted"] == pytest.approx(math.log(10))
    assert summary["kl_unweighted"] == pytest.approx(math.log(10 / 2))  # counts two slots
    assert summary["top1_usage"] == 1 / 10
    assert summary["topk_usage"] == 1 / 10  # a read of weight 0 is none
    assert summary["dead_slots"] == 9
    assert summary["gini"] == pytest.approx(1 - 1 / 10)
    assert (summary["slots_50"], summary["slots_90"], summary["slots_99"]) == (1, 1, 1)


def test_weighted_and_unweighted_divergence_differ_by_the_weights():
    # slots 0 and 1 are read equally often, with weights 3 : 1
    summary = summary_of([[[0, 1]]] * 4, [[[0.75, 0.25]]] * 4, n_slots=4)
    expected = math.log(4) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert summary["kl_weighted"] == pytest.approx(expected)
    assert summary["kl_unweighted"] == pytest.approx(math.log(2))


def test_first_choices_are_told_from_other_reads():
    summary = summary_of([[[0, 1, 2]], [[0, 2, 3]]], [[[0.5, 0.3, 0.2]]] * 2, n_slots=8)
    assert summary["top1_usage"] == 1 / 8
    assert summary["topk_usage"] == 4 / 8
    assert summary["dead_slots"] == 4


def test_slots_that_hold_a_share_of_the_weight():
    # masses 0.5, 0.25, 0.125, 0.0625, 0.0625: cumulated 0.5, 0.75, 0.875, 0.9375, 1
    mass = [0.0625, 0.5, 0.125, 0.25, 0.0625]
    summary = summary_of([[[3, 1, 4, 0, 7]]], [[mass]], n_slots=8)
    assert (summary["slots_50"], summary["slots_90"], summary["slots_99"]) == (1, 4, 5)


def test_gini_of_a_hand_worked_case():
    # masses 0, 0, 1, 3: mean absolute difference over all pairs / (2 mean)
    summary = summary_of([[[0, 1]]], [[[0.75, 0.25]]], n_slots=4)
    masses = [0, 0, 0.25, 0.75]
    differences = sum(abs(a - b) for a in masses for b in masses)
    assert summary["gini"] == pytest.approx(differences / (2 * 4**2 * (sum(masses) / 4)))


def test_uniform_routing_reaches_the_ceiling():
    n_slots, n_tokens, heads = 4096, 1000, 2
    slots, weights = random_lookup(n_tokens, heads, knn=3, n_slots=n_slots)
    usage = MemoryUsage(n_slots, heads)
    usage.update(slots, weights)
    summary = usage.summary()
    for name, draws in (("top1", n_tokens * heads), ("topk", n_tokens * heads * 3)):
        ceiling = summary[f"{name}_ceiling"]
        assert ceiling == pytest.approx(1 - math.exp(-draws / n_slots))
        # standard error of the share of hit slots, at most that of independent slots
        error = (ceiling * (1 - ceiling) / n_slots) ** 0.5
        assert abs(summary[f"{name}_usage"] - ceiling) < 4 * error
        assert 0.2 < ceiling < 0.8  # far from where every formula agrees


def test_ceiling_of_few_tokens_in_a_large_memory_keeps_its_digits():
    assert uniform_ceiling(1, 10**13) == pytest.approx(1e-13, rel=1e-9, abs=0)


def test_updates_add_up():
    slots, weights = random_lookup(20)
    whole, parts = MemoryUsage(30, 2), MemoryUsage(30, 2)
    whole.update(slots, weights)
    for start in range(0, 20, 5):
        parts.update(slots[start : start + 5], weights[start : start + 5])
    assert parts.tokens == whole.tokens == 20
    assert torch.equal(parts.read_count, whole.read_count)
    assert torch.allclose(parts.read_mass, whole.read_mass)


def test_leading_dimensions_do_not_matter():
    slots, weights = random_lookup(24)
    flat, shaped = MemoryUsage(30, 2), MemoryUsage(30, 2)
    flat.update(slots, weights)
    shaped.update(slots.view(2, 3, 4, 2, 3), weights.view(2, 3, 4, 2, 3))
    assert flat.summary() == shaped.summary()
    one = MemoryUsage(30, 2)
    one.update(slots[0], weights[0])  # no leading dimension: one token
    assert one.tokens == 1


def test_padding_is_not_counted():
    slots, weights = random_lookup(6)
    mask = torch.tensor([False, True, False, False, True, True])
    padded, plain = MemoryUsage(30, 2), MemoryUsage(30, 2)
    plain.update(slots[~mask], weights[~mask])
    padded.update(slots.masked_fill(mask[:, None, None], -1), weights, mask)
    assert padded.tokens == 3
    assert padded.summary() == plain.summary()
    as_bytes = MemoryUsage(30, 2)
    as_bytes.update(slots, weights, mask.to(torch.uint8))
    assert as_bytes.summary() == plain.summary()


def test_nothing_but_padding_counts_nothing():
    slots, weights = random_lookup(2)
    usage = MemoryUsage(30, 2)
    usage.update(torch.full_like(slots, -1), weights, torch.ones(2, dtype=torch.bool))
    assert usage.tokens == 0
    assert not usage.read_count.any()


def test_counting_does_not_touch_what_it_counts():
    slots, weights = random_lookup(5)
    before = slots.clone(), weights.clone()
    MemoryUsage(30, 2).update(slots, weights, torch.zeros(5, dtype=torch.bool))
    assert torch.equal(slots, before[0])
    assert torch.equal(weights, before[1])


def test_weights_in_half_precision_are_summed_in_double():
    usage = MemoryUsage(2, 1)
    weights = torch.tensor([[[1.0, 0.0]]]).bfloat16().expand(1000, 1, 2)
    usage.update(torch.tensor([[[0, 1]]]).expand(1000, 1, 2), weights)
    assert usage.read_mass[0, 0] == 1000  # bfloat16 stops at 256


def test_merged_halves_are_the_whole():
    slots, weights = random_lookup(21)
    whole, left, right = (MemoryUsage(30, 2) for _ in range(3))
    whole.update(slots, weights)
    left.update(slots[:8], weights[:8])
    right.update(slots[8:], weights[8:])
    assert left.merge(right) is left
    assert left.tokens == whole.tokens
    for name in COUNTERS:
        assert torch.allclose(getattr(left, name).double(), getattr(whole, name).double()), name
    merged, expected = left.summary(), whole.summary()
    assert merged.pop("curve") == expected.pop("curve")
    assert merged.pop("extrapolation") == expected.pop("extrapolation")
    for ours, theirs in zip(merged.pop("heads"), expected.pop("heads"), strict=True):
        assert ours == pytest.approx(theirs)
    assert merged == pytest.approx(expected)


def test_merging_leaves_the_other_as_it_was():
    slots, weights = random_lookup(4)
    ours, theirs = MemoryUsage(30, 2), MemoryUsage(30, 2)
    theirs.update(slots, weights)
    before = {name: getattr(theirs, name).clone() for name in COUNTERS}
    ours.merge(theirs)
    ours.update(slots, weights)  # and does not share its counters
    assert theirs.tokens == 4
    for name in COUNTERS:
        assert torch.equal(getattr(theirs, name), before[name]), name


def test_merging_with_an_empty_one_keeps_the_counts():
    slots, weights = random_lookup(4)
    full = MemoryUsage(30, 2)
    full.update(slots, weights)
    expected = full.summary()
    assert MemoryUsage(30, 2).merge(full).summary() == expected
    assert full.merge(MemoryUsage(30, 2)).summary() == expected


@pytest.mark.parametrize("other", [(31, 2, 3), (30, 1, 3), (30, 2, 4)])
def test_merging_another_memory_is_an_error_that_names_both(other):
    n_slots, heads, knn = other
    ours, theirs = MemoryUsage(30, 2), MemoryUsage(n_slots, heads)
    ours.update(*random_lookup(2))
    theirs.update(*random_lookup(2, heads, knn, n_slots))
    with pytest.raises(ValueError) as error:
        ours.merge(theirs)
    assert str((30, 2, 3)) in str(error.value)
    assert str(other) in str(error.value)
    assert ours.tokens == 2


@pytest.mark.parametrize(("slot", "named"), [(-1, "padding_mask"), (30, "30"), (-7, "-7")])
def test_a_slot_out_of_range_is_an_error_and_counts_nothing(slot, named):
    slots, weights = random_lookup(3)
    slots[1, 0, 2] = slot
    usage = MemoryUsage(30, 2)
    with pytest.raises(ValueError) as error:
        usage.update(slots, weights)
    assert named in str(error.value)
    assert str(slot) in str(error.value)
    assert usage.tokens == 0
    assert not usage.read_count.any()


@pytest.mark.parametrize(
    ("slots", "weights", "mask", "named"),
    [
        ((4, 3, 2), (4, 3, 2), None, ["(4, 3, 2)", "heads = 2"]),
        ((3,), (3,), None, ["(3,)", "heads = 2"]),
        ((4, 2, 3), (4, 2, 2), None, ["(4, 2, 2)", "(4, 2, 3)"]),
        ((4, 2, 3), (4, 2, 3), (3,), ["(3,)", "(4,)"]),
        ((4, 2, 3), (4, 2, 3), (4, 2), ["(4, 2)", "(4,)"]),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_that_names_them(slots, weights, mask, named):
    mask = None if mask is None else torch.zeros(mask, dtype=torch.bool)
    with pytest.raises(ValueError) as error:
        MemoryUsage(30, 2).update(torch.zeros(slots).long(), torch.ones(weights), mask)
    for words in named:
        assert words in str(error.value)


def test_another_knn_than_before_is_an_error_that_names_both():
    usage = MemoryUsage(30, 2)
    usage.update(*random_lookup(2, knn=3))
    with pytest.raises(ValueError, match=r"knn = 4.*3"):
        usage.update(*random_lookup(2, knn=4))


def test_a_summary_of_no_token_is_an_error():
    with pytest.raises(ValueError, match="0 tokens"):
        MemoryUsage(30, 2).summary()


# --- heads, halves, weights -----------------------------------------------------------------


def test_a_head_is_described_as_if_it_were_alone():
    slots, weights = random_lookup(40, heads=3, knn=4, n_slots=36)
    usage = MemoryUsage(36, 3)
    usage.update(slots, weights)
    for head, said in enumerate(usage.summary()["heads"]):
        alone = MemoryUsage(36, 1)
        alone.update(slots[:, head : head + 1], weights[:, head : head + 1])
        expected = alone.summary(per_head=False)
        assert said == pytest.approx({key: expected[key] for key in said})
        assert set(expected) - set(said) == {"n_slots", "tokens"}


def test_sub_keys_of_each_half_are_told_apart():
    # 4 x 4 slots, i1 * 4 + i2: head 0 reads (0, 1), (2, 1); head 1 reads (3, 3), (3, 0) at weight 0
    summary = summary_of([[[1, 9], [15, 12]]], [[[0.5, 0.5], [1.0, 0.0]]], n_slots=16)
    assert [head["subkey1_usage"] for head in summary["heads"]] == [2 / 4, 1 / 4]
    assert [head["subkey2_usage"] for head in summary["heads"]] == [1 / 4, 1 / 4]
    assert summary["subkey1_usage"] == 3 / 8  # each head has sub-keys of its own
    assert summary["subkey2_usage"] == 2 / 8


def test_slots_that_are_no_product_have_no_halves():
    assert "subkey1_usage" not in summary_of([[[0, 1]]], [[[0.5, 0.5]]], n_slots=10)


def test_first_weights_and_entropies_are_means_over_look_ups():
    summary = summary_of(
        [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
        [[[0.75, 0.25], [1.0, 0.0]], [[0.5, 0.5], [0.875, 0.125]]],
        n_slots=9,
    )
    assert summary["top1_weight"] == (0.75 + 1 + 0.5 + 0.875) / 4
    entropies = [entropy_of(share) for share in (0.75, 1, 0.5, 0.875)]
    assert summary["entropy"] == pytest.approx(sum(entropies) / 4)
    assert summary["heads"][1]["top1_weight"] == (1 + 0.875) / 2


def test_uniform_weights_have_the_entropy_of_their_number():
    summary = summary_of([[[0, 1, 2, 3]]] * 3, [[[0.25] * 4]] * 3, n_slots=9)
    assert summary["entropy"] == pytest.approx(math.log(4))


# --- budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[7, 7, 7], [10, 4], [3, 20], [25]])
def test_a_budget_counts_the_first_tokens_and_no_more(sizes):
    slots, weights = random_lookup(sum(sizes))
    usage, expected = MemoryUsage(30, 2, max_tokens=10), MemoryUsage(30, 2)
    for part, theirs in zip(slots.split(sizes), weights.split(sizes), strict=True):
        usage.update(part, theirs)
    expected.update(slots[:10], weights[:10])
    assert usage.is_full
    assert usage.tokens == 10
    for name in COUNTERS:
        assert torch.allclose(getattr(usage, name), getattr(expected, name)), name


def test_a_budget_is_of_tokens_and_not_of_padding():
    slots, weights = random_lookup(8)
    mask = torch.tensor([True, False] * 4)
    usage, expected = MemoryUsage(30, 2, max_tokens=3), MemoryUsage(30, 2)
    usage.update(slots, weights, mask)
    expected.update(slots[~mask][:3], weights[~mask][:3])
    assert usage.summary() == expected.summary()


def test_no_budget_is_never_full():
    usage = MemoryUsage(30, 2)
    usage.update(*random_lookup(100))
    assert not usage.is_full


@pytest.mark.parametrize(("n_slots", "heads"), [(262_144, 4), (4_096, 4), (25, 2), (25, 3)])
@pytest.mark.parametrize("draws", [1, 3, 100])
def test_tokens_for_draws_are_the_fewest_that_make_them(n_slots, heads, draws):
    tokens = tokens_for_draws(n_slots, heads, draws)
    assert tokens * heads >= draws * n_slots > (tokens - 1) * heads


def test_less_than_one_draw_is_an_error():
    with pytest.raises(ValueError, match="draws are 0"):
        tokens_for_draws(25, 2, 0)


# --- draws, thresholds, neighbours ------------------------------------------------------------


def test_draws_per_slot_of_a_memory_and_of_a_head():
    usage = MemoryUsage(30, 2)
    usage.update(*random_lookup(60))
    summary = usage.summary()
    assert summary["draws_per_slot"] == usage.draws_per_slot == 4
    assert [head["draws_per_slot"] for head in summary["heads"]] == [2, 2]


def test_the_curve_ends_in_what_was_counted_and_has_round_draws_before():
    usage = MemoryUsage(30, 2)
    usage.update(*random_lookup(160))
    summary = usage.summary()
    assert [point["draws_per_slot"] for point in summary["curve"]] == [1, 3, 10, 160 * 2 / 30]
    last = summary["curve"][-1]
    assert last["top1_usage"] == pytest.approx(summary["top1_usage"], abs=1e-12)
    assert last["topk_usage"] == pytest.approx(summary["topk_usage"], abs=1e-12)


def test_the_curve_of_merged_counts_is_that_of_the_whole():
    slots, weights = random_lookup(160)
    whole, parts = MemoryUsage(30, 2), MemoryUsage(30, 2)
    whole.update(slots, weights)
    for at in range(0, 160, 40):
        part = MemoryUsage(30, 2)
        part.update(slots[at : at + 40], weights[at : at + 40])
        parts.merge(part)
    assert parts.curve() == whole.curve()
    assert parts.extrapolation() == whole.extrapolation()


def test_a_slot_read_with_no_weight_is_in_no_top_k_usage_of_the_curve():
    usage = MemoryUsage(4, 1)
    usage.update(torch.tensor([[[0, 1]]] * 4), torch.tensor([[[1.0, 0.0]]] * 4))
    assert [point["topk_usage"] for point in usage.curve()] == [0.25]


def test_the_curve_leaves_out_reads_with_no_weight_of_slots_that_have_some():
    """As under relu; a slot that all look-ups read gets weight from one look-up in eight."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.stack([torch.randperm(64, generator=generator)[:8] for _ in range(6400)])
    weights = torch.zeros(6400, 1, 8)
    weights[..., 0] = 1
    usage = MemoryUsage(64, 1)
    usage.update(slots[:, None], weights)
    for point in usage.curve():
        assert point["topk_usage"] == point["top1_usage"]
    assert usage.extrapolation()["topk"] == usage.extrapolation()["top1"]
    assert usage.read_count.sum() == 8 * 6400  # the reads themselves are counted


def test_shares_of_slots_that_hold_a_share_of_the_uniform_weight():
    # 4 slots, weights 1.5, 0.49, 0.01, 0 of 2: uniform is 0.5
    summary = summary_of([[[0, 1]], [[0, 2]]], [[[0.51, 0.49]], [[0.99, 0.01]]], n_slots=4)
    assert (summary["holds_1"], summary["holds_10"], summary["holds_100"]) == (0.75, 0.5, 0.25)


def test_equal_slots_all_hold_the_uniform_share():
    slots = torch.arange(30).view(15, 1, 2)
    usage = MemoryUsage(30, 1)
    usage.update(slots, torch.full((15, 1, 2), 0.5))
    assert usage.summary()["holds_100"] == 1


def test_flat_look_ups_have_as_many_neighbours_as_knn_and_sharp_ones_have_one():
    flat = summary_of([[[0, 1, 2, 3]]], [[[0.25] * 4]], n_slots=9)
    sharp = summary_of([[[0, 1, 2, 3]]], [[[1.0, 0, 0, 0]]], n_slots=9)
    assert flat["effective_neighbours"] == pytest.approx(4)
    assert sharp["effective_neighbours"] == 1
