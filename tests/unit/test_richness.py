"""Rarefaction and extrapolation against closed forms, with planted routers."""

import itertools
import math

import pytest
import torch

from pkm_fairseq.memory import MemoryUsage
from pkm_fairseq.memory.observe.richness import extrapolated, rarefied, round_draws

N_SLOTS, HEADS = 2500, 2


def counted(probabilities, draws_per_slot, seed=0):
    """A count of a planted router, which draws first choices with these probabilities."""
    tokens = draws_per_slot * N_SLOTS // HEADS
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(probabilities, tokens * HEADS, True, generator=generator)
    slots = torch.stack([first, (first + 1) % N_SLOTS], dim=-1).view(tokens, HEADS, 2)
    usage = MemoryUsage(N_SLOTS, HEADS)
    usage.update(slots, torch.tensor([0.75, 0.25]).expand(slots.shape))
    return usage


def zipf():
    weights = 1 / torch.arange(1, N_SLOTS + 1, dtype=torch.float64)
    order = torch.randperm(N_SLOTS, generator=torch.Generator().manual_seed(1))
    return (weights / weights.sum())[order]


def expected(probabilities, draws):
    """Closed form: the share of slots that so many independent draws are expected to hit."""
    return float((1 - (1 - probabilities) ** draws).mean())


def test_rarefaction_is_the_mean_over_all_subsets():
    hits = [(0,), (0, 1), (2,), (0, 2), (1, 3)]  # five draws, of four slots hit and one not
    counts = torch.tensor([sum(slot in hit for hit in hits) for slot in range(5)])
    for m in range(6):
        found = [len(set().union(*chosen)) / 5 for chosen in itertools.combinations(hits, m)]
        assert rarefied(counts, 5, [m]) == pytest.approx([sum(found) / len(found)])


@pytest.mark.parametrize("m", [-1, 6])
def test_more_draws_than_counted_cannot_be_chosen(m):
    with pytest.raises(ValueError, match=f"{m} draws"):
        rarefied(torch.tensor([5]), 5, [m])


@pytest.mark.parametrize("router", ["uniform", "zipf"])
def test_the_curve_of_a_planted_router_is_the_closed_form(router):
    uniform = torch.full((N_SLOTS,), 1 / N_SLOTS, dtype=torch.float64)
    probabilities = uniform if router == "uniform" else zipf()
    curve = counted(probabilities, 100).curve()
    assert [point["draws_per_slot"] for point in curve] == [1, 3, 10, 30, 100]
    reads = probabilities + probabilities.roll(1)  # a slot is read for its own draws and the next
    for point in curve:
        draws = round(point["draws_per_slot"] * N_SLOTS)
        for kind, chances in (("top1", probabilities), ("topk", reads)):
            truth = expected(chances, draws)
            error = math.sqrt(truth * (1 - truth) / N_SLOTS)  # at most
            assert abs(point[f"{kind}_usage"] - truth) <= 4 * error + 1e-9, (point, truth)
    if router == "zipf":
        assert curve[1]["top1_usage"] < 0.6 < 0.9 < curve[-1]["top1_usage"]


@pytest.mark.parametrize("router", ["uniform", "half"])
def test_the_extrapolation_of_few_draws_finds_the_slots_that_are_reached(router):
    reached = N_SLOTS if router == "uniform" else N_SLOTS // 2
    probabilities = (torch.arange(N_SLOTS) < reached).double() / reached
    few = counted(probabilities, 1)
    found = few.extrapolation()["top1"]
    truth = reached / N_SLOTS
    assert few.summary()["top1_usage"] < 0.9 * truth
    assert abs(found["usage"] - truth) < 4 * found["error"]
    assert 0.001 < found["error"] < 0.05
    assert found["coverage"] == pytest.approx(few.summary()["top1_usage"] / truth, abs=0.05)


def test_the_extrapolation_of_a_zipf_router_is_a_lower_bound_above_what_was_hit():
    few = counted(zipf(), 3)
    found = few.extrapolation()["top1"]["usage"]
    assert few.summary()["top1_usage"] + 0.1 < found <= 1


def test_hand_worked_chao1():
    # f1 = 4, f2 = 2, of 7 slots hit by 20 draws: 7 + 19/20 * 16 / 4
    found = extrapolated(torch.tensor([12, 2, 2, 1, 1, 1, 1] + [0] * 13), 20)
    assert found["usage"] == pytest.approx((7 + 0.95 * 4) / 20)
    variance = 2 * (0.95 / 2 * 4 + 0.95**2 * 8 + 0.95**2 / 4 * 16)
    assert found["error"] == pytest.approx(math.sqrt(variance) / 20)
    assert found["coverage"] == pytest.approx(1 - 4 / 20)


def test_without_slots_hit_twice_or_once_the_extrapolation_is_finite():
    once = extrapolated(torch.tensor([1, 1, 1] + [0] * 17), 3)
    assert once["usage"] == pytest.approx((3 + 2 / 3 * 3) / 20)
    assert once["coverage"] == 0
    assert math.isfinite(once["error"])
    done = extrapolated(torch.tensor([5, 9, 0]), 14)
    assert done == {"usage": 2 / 3, "error": 0, "coverage": 1}


def test_round_draws():
    assert round_draws(0.5) == []
    assert round_draws(3) == [1, 3]
    assert round_draws(299.9) == [1, 3, 10, 30, 100]
