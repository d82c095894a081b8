"""Usage of parts merges into usage of the whole, and every number stays in its range."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pkm_fairseq.memory import MemoryUsage
from pkm_fairseq.memory.observe.usage import slots_that_hold


@st.composite
def lookups(draw, least_tokens=1):
    """(n_slots, slots, weights, padding_mask); weights in eighths, so that sums are exact."""
    tokens, heads = draw(st.integers(least_tokens, 12)), draw(st.integers(1, 3))
    knn, n_slots = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    slots = torch.randint(n_slots, (tokens, heads, knn), generator=generator)
    weights = torch.randint(1, 9, (tokens, heads, knn), generator=generator) / 8
    mask = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    if tokens:
        mask[0] = False
    return n_slots, slots, weights, mask


def usage_of(n_slots, slots, weights, mask):
    usage = MemoryUsage(n_slots, slots.shape[1])
    usage.update(slots, weights, mask)
    return usage


def same(ours, theirs):
    return (
        ours.tokens == theirs.tokens
        and torch.equal(ours.top1_count, theirs.top1_count)
        and torch.equal(ours.read_count, theirs.read_count)
        and torch.equal(ours.read_mass, theirs.read_mass)
        # shares of a look-up's weight, as entropies, are no sums of eighths: the order counts
        and torch.allclose(ours.top1_weight, theirs.top1_weight, rtol=1e-12)
        and torch.allclose(ours.entropy, theirs.entropy, rtol=1e-12)
    )


@given(lookups(), st.lists(st.integers(0, 12), max_size=4))
def test_merged_parts_are_the_whole(lookup, cuts):
    n_slots, slots, weights, mask = lookup
    edges = [0, *sorted(min(cut, len(slots)) for cut in cuts), len(slots)]
    merged = MemoryUsage(n_slots, slots.shape[1])
    for start, end in pairwise(edges):  # some parts are empty
        part = slice(start, end)
        merged.merge(usage_of(n_slots, slots[part], weights[part], mask[part]))
    whole = usage_of(*lookup)
    assert same(merged, whole)
    ours, theirs = merged.summary(per_head=False), whole.summary(per_head=False)
    assert ours == pytest.approx(theirs, rel=1e-12)  # entropies are summed in another order


@given(lookups())
def test_merging_in_another_order_changes_nothing(lookup):
    n_slots, slots, weights, mask = lookup
    middle = len(slots) // 2
    halves = [slice(0, middle), slice(middle, None)]
    parts = [usage_of(n_slots, slots[h], weights[h], mask[h]) for h in halves]
    again = [usage_of(n_slots, slots[h], weights[h], mask[h]) for h in halves]
    assert same(parts[0].merge(parts[1]), again[1].merge(again[0]))


@given(lookups())
def test_what_padding_holds_is_not_counted(lookup):
    n_slots, slots, weights, mask = lookup
    at_padding = mask[:, None, None]
    other = slots.masked_fill(at_padding, -1), weights.masked_fill(at_padding, 9)
    assert same(usage_of(*lookup), usage_of(n_slots, *other, mask))


@given(lookups())
def test_counters_hold_every_read_once(lookup):
    _, slots, weights, mask = lookup
    usage = usage_of(*lookup)
    real = int((~mask).sum())
    assert usage.tokens == real
    assert int(usage.top1_count.sum()) == real * slots.shape[1]
    assert int(usage.read_count.sum()) == real * slots.shape[1] * slots.shape[2]
    assert float(usage.read_mass.sum()) == float(weights[~mask].double().sum())


@given(lookups())
def test_summary_stays_in_range_and_agrees_with_itself(lookup):
    n_slots = lookup[0]
    summary = usage_of(*lookup).summary()
    assert 0 < summary["top1_usage"] <= summary["topk_usage"] <= 1
    assert 0 < summary["top1_ceiling"] <= summary["topk_ceiling"] <= 1
    assert summary["dead_slots"] == n_slots - round(summary["topk_usage"] * n_slots)
    for name in ("kl_weighted", "kl_unweighted"):
        assert -1e-9 <= summary[name] <= math.log(n_slots) + 1e-9
    assert -1e-9 <= summary["gini"] < 1
    used = n_slots - summary["dead_slots"]
    assert 1 <= summary["slots_50"] <= summary["slots_90"] <= summary["slots_99"] <= used


@given(lookups())
def test_summary_equals_its_definitions_in_plain_python(lookup):
    usage = usage_of(*lookup)
    summary = usage.summary()
    mass, counts = usage.read_mass.sum(0).tolist(), usage.read_count.sum(0).tolist()
    for name, list_ in (("kl_weighted", mass), ("kl_unweighted", counts)):
        total, n = sum(list_), len(list_)
        kl = sum(m / total * math.log(m / total * n) for m in list_ if m)
        assert summary[name] == pytest.approx(kl, abs=1e-12)
    differences = sum(abs(a - b) for a in mass for b in mass)
    assert summary["gini"] == pytest.approx(differences / (2 * len(mass) * sum(mass)), abs=1e-12)
    for percent in (50, 90, 99):
        held, slots = 0.0, 0
        for m in sorted(mass, reverse=True):  # of eighths: sums are exact
            if 100 * held >= percent * sum(mass):
                break
            held, slots = held + m, slots + 1
        assert summary[f"slots_{percent}"] == slots


@given(st.integers(1, 3000), st.floats(1e-6, 1e6), st.integers(0, 50))
def test_of_equal_slots_as_many_hold_a_share_as_it_takes(n, weight, unread):
    ascending = torch.cat([torch.zeros(unread), torch.full((n,), weight)]).double()
    said = slots_that_hold(ascending)
    assert said == {f"slots_{p}": -(-p * n // 100) for p in (50, 90, 99)}


@pytest.mark.parametrize("n", [10**6, 2**20, 2 * 10**7])
def test_of_very_many_equal_slots_as_many_hold_a_share_as_it_takes(n):
    said = slots_that_hold(torch.full((n,), 0.1, dtype=torch.float64))
    assert said == {f"slots_{p}": -(-p * n // 100) for p in (50, 90, 99)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.floats(0.01, 100))
def test_a_share_that_is_held_but_for_rounding_is_held(sizes, unit):
    """The right answer is that of whole numbers."""
    said = slots_that_hold(torch.tensor(sorted(sizes)).double() * unit)
    held = list(accumulate(sorted(sizes, reverse=True)))
    for percent in (50, 90, 99):
        fewest = next(k for k, h in enumerate(held, 1) if 100 * h >= percent * held[-1])
        assert said[f"slots_{percent}"] == fewest
