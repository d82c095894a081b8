"""The validation passes a good memory and finds every planted fault."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pkm_fairseq.memory import Experts, ProductKeyMemory, ValueTable, experts, output, search
from pkm_fairseq.memory import memory as memory_module
from pkm_fairseq.validation import LayerResult, compare, random_like, report, validate_memory

from .conftest import WIDTH, small_memory

# --- a good memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"v_dim": WIDTH},
        {"query_norm": "layer"},
        {"query_norm": "none", "knn": 24},
        {"query": "mlp", "score_scale": 0.3},
        {"score_activation": "relu"},
        {"score_activation": "relu", "score_scale": 3.0, "learn_score_scale": True},
        {"values": "experts"},
        {"output": "swilu"},
        {"values": "experts", "output": "swilu", "v_dim": None, "score_activation": "relu"},
    ],
    ids=str,
)
def test_a_good_memory_is_exact(settings: Dict[str, Any], tokens: Tensor) -> None:
    result = validate_memory(small_memory(**settings), tokens, block_bytes=4000)
    assert result.exact
    assert result.read_difference < 1e-5 and result.output_difference < 1e-4
    assert result.read_tolerance < 1e-4 and result.output_tolerance < 1e-4
    for head in result.heads:
        assert head.exact
        assert head.recall_at_1 == head.recall_at_k == 1
        assert head.score_difference < head.score_tolerance < 1e-4
        assert head.rescored_difference < head.score_tolerance
        assert head.weight_difference < head.weight_tolerance < 1e-4
        assert head.invalid_slots == 0


def test_ties_are_counted_and_leave_the_verdict_exact(tokens: Tensor) -> None:
    memory = small_memory(knn=7)
    with torch.no_grad():
        memory.keys[:, :, 12:] = memory.keys[:, :, :12]  # every sub-key twice: scores in fours
    result = validate_memory(memory, tokens)
    assert result.exact
    for head in result.heads:
        assert head.ties_at_1 == head.ties_at_k == len(tokens)
        assert head.recall_at_1 == head.recall_at_k == 1
        assert head.same_at_k < 1
    summary = report.report([result], [result.layer])
    assert summary["tied"] == 1 and "CAUTION: up to 100% of a head's queries are tied" in (
        report.verdict(summary)
    )


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_a_memory_with_huge_scores_is_exact(activation: str, tokens: Tensor) -> None:
    memory = small_memory(score_activation=activation)
    with torch.no_grad():
        memory.keys *= 1e18
    result = validate_memory(memory, tokens)
    assert result.exact
    json.dumps(report.report([result], [result.layer]), allow_nan=False)


@given(
    n_keys=st.integers(2, 9),
    heads=st.integers(1, 3),
    half_dim=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e4]),
    whole=st.booleans(),
    data=st.data(),
)
def test_memories_of_any_size_are_exact(
    n_keys: int, heads: int, half_dim: int, scale: float, whole: bool, data: st.DataObject
) -> None:
    knn = data.draw(st.integers(2, n_keys))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    memory = small_memory(
        n_keys=n_keys, heads=heads, knn=knn, k_dim=2 * half_dim, query_norm="none"
    )
    with torch.no_grad():
        memory.keys.mul_(5 * scale)
        if whole:
            memory.keys.round_()
    assert validate_memory(memory, torch.randn(20, WIDTH)).exact


def test_random_tokens_resemble_the_given_ones(tokens: Tensor) -> None:
    drawn = random_like(tokens.repeat(10, 1))
    assert not torch.equal(drawn[:600], tokens)
    assert torch.allclose(drawn.mean(0), tokens.mean(0), atol=0.15)
    assert torch.allclose(drawn.std(0), tokens.std(0), atol=0.15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cost_of_reduced_precision_is_reported(
    memory: ProductKeyMemory, tokens: Tensor, dtype: torch.dtype
) -> None:
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    result = validate_memory(memory, tokens, dtypes=[dtype])
    (cost,) = result.reduced
    assert result.exact  # the verdict is that of float32
    assert 0.9 < cost.recall_at_k < 1
    assert 1e-4 < cost.score_difference < 0.1
    assert cost.weight_difference > 1e-5
    assert cost.read_difference > 1e-3
    assert all(torch.equal(state[name], tensor) for name, tensor in memory.state_dict().items())


def lose_the_second(scores: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
    kept = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    return scores[..., kept], slots[..., kept]


def repeat_a_tied_slot(scores: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    return scores[..., kept], slots[..., kept]


def keep_a_worse_slot(scores: Tensor, slots: Tensor) -> Tuple[Tensor, Tensor]:
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 8])
    return scores[..., kept], slots[..., kept]


@pytest.mark.parametrize(
    ("fault", "shows"),
    [
        (lose_the_second, lambda head: head.recall_at_k == pytest.approx(6 / 7)),
        (repeat_a_tied_slot, lambda head: head.invalid_slots == 600),
        (keep_a_worse_slot, lambda head: head.rescored_difference > head.score_tolerance),
    ],
)
def test_a_fault_beside_a_tie_is_found(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch, fault: Any, shows: Any
) -> None:
    memory = small_memory(knn=7)
    with torch.no_grad():  # scores in fours: the last three are tied with the next
        memory.keys[:, :, 12:] = memory.keys[:, :, :12]
    with_search(monkeypatch, lambda topk: lambda q, keys, knn: fault(*topk(q, keys, 9)))
    result = validate_memory(memory, tokens)
    assert not result.exact
    assert all(shows(head) and not head.exact for head in result.heads)


# --- planted faults ---------------------------------------------------------------------------

Search = Callable[..., Tuple[Tensor, Tensor]]


def with_search(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Search], Search]) -> None:
    """Let the layer search by a faulty version of product_topk."""
    monkeypatch.setattr(memory_module, "product_topk", fault(search.product_topk))


def off_by_one(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    def slot_of(index1: Tensor, index2: Tensor, n_keys: int) -> Tensor:
        return (index1 * n_keys + index2 + 1) % n_keys**2

    monkeypatch.setattr(search, "slot_of", slot_of)


def slot_halves_swapped(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    monkeypatch.setattr(search, "slot_of", lambda i1, i2, n_keys: i2 * n_keys + i1)


def key_halves_swapped(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    with_search(monkeypatch, lambda topk: lambda q, keys, knn: topk(q, keys.flip(1), knn))


def heads_exchanged(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    with_search(monkeypatch, lambda topk: lambda q, keys, knn: topk(q, keys.flip(0), knn))


def stale_keys(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    stale = memory.keys.detach().clone()
    with torch.no_grad():
        memory.keys += 1e-3 * torch.randn_like(memory.keys)
    with_search(monkeypatch, lambda topk: lambda q, keys, knn: topk(q, stale, knn))


def a_slot_twice(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    def twice(topk: Search) -> Search:
        def faulty(*args: Any) -> Tuple[Tensor, Tensor]:
            scores, slots = topk(*args)
            return scores, torch.cat([slots[..., :-1], slots[..., :1]], dim=-1)

        return faulty

    with_search(monkeypatch, twice)


def weights_beside_their_slots(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    def beside(topk: Search) -> Search:
        def faulty(*args: Any) -> Tuple[Tensor, Tensor]:
            scores, slots = topk(*args)
            return scores, slots.roll(1, dims=-1)

        return faulty

    with_search(monkeypatch, beside)


def slots_in_reverse(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    def reverse(topk: Search) -> Search:
        return lambda *args: tuple(part.flip(-1) for part in topk(*args))

    with_search(monkeypatch, reverse)


def weights_of_another_temperature(
    monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory
) -> None:
    def warmer(topk: Search) -> Search:
        return lambda *args: (topk(*args)[0] * 0.999, topk(*args)[1])

    with_search(monkeypatch, warmer)


def wrong_scores(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    def faulty(*args: Any) -> Tuple[Tensor, Tensor]:
        scores, slots = search.product_topk(*args)
        return scores + 1e-3, slots  # the softmax cannot tell

    monkeypatch.setattr(compare, "product_topk", faulty)


def values_of_the_next_slot(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    read = ValueTable.forward
    monkeypatch.setattr(
        ValueTable, "forward", lambda self, slots, w, x: read(self, (slots + 1) % 576, w)
    )


def a_head_unread(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    read = ValueTable.forward
    monkeypatch.setattr(
        ValueTable, "forward", lambda self, slots, w, x: read(self, slots[:, 1:], w[:, 1:])
    )


# the part of the report that must show each fault
FAULTS = {
    off_by_one: lambda head: head.rescored_difference > head.score_tolerance,
    slot_halves_swapped: lambda head: head.recall_at_k < 0.5,
    key_halves_swapped: lambda head: head.recall_at_k < 0.5,
    heads_exchanged: lambda head: head.recall_at_1 < 0.5,
    stale_keys: lambda head: head.rescored_difference > head.score_tolerance,
    a_slot_twice: lambda head: head.invalid_slots == 600 and head.recall_at_k < 0.876,
    weights_beside_their_slots: lambda head: head.weight_difference > 0.01,
    slots_in_reverse: lambda head: head.recall_at_1 == 0 and head.recall_at_k == 1,
    weights_of_another_temperature: lambda head: head.weight_difference > head.weight_tolerance,
    wrong_scores: lambda head: head.score_difference > head.score_tolerance,
    values_of_the_next_slot: None,  # shows in the read alone
    a_head_unread: None,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory, tokens: Tensor, fault: Any
) -> None:
    assert validate_memory(memory, tokens).exact
    fault(monkeypatch, memory)
    result = validate_memory(memory, tokens)
    assert not result.exact
    shows = FAULTS[fault]
    if shows is None:
        assert all(head.exact for head in result.heads)
        assert result.read_difference > result.read_tolerance
    else:
        assert all(shows(head) and not head.exact for head in result.heads)


def with_output(memory: ProductKeyMemory, change: Callable[..., Tensor]) -> None:
    forward = memory.output_proj.forward
    memory.output_proj.forward = lambda read, x: change(forward, read, x)


def wrong_activation(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    monkeypatch.setattr(experts, "F", SimpleNamespace(gelu=lambda x: F.gelu(x, approximate="tanh")))


def unweighted_experts(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    read = Experts.forward
    monkeypatch.setattr(
        Experts, "forward", lambda self, s, w, x: read(self, s, w.mean() + 0 * w, x)
    )


def experts_of_other_tokens(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    read = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda self, s, w, x: read(self, s, w, x.roll(1, 0)))


def gate_of_other_tokens(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    with_output(memory, lambda forward, read, x: forward(read, x.roll(1, 0)))


def gate_by_gelu(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    monkeypatch.setattr(output, "F", SimpleNamespace(silu=lambda x: F.gelu(x)))


def output_off_by_little(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    with_output(memory, lambda forward, read, x: 1.0001 * forward(read, x))


def scale_of_another_memory(monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory) -> None:
    weigh = memory.weigh
    monkeypatch.setattr(memory, "weigh", lambda scores: weigh(1.001 * scores))


EXPERTS, SWILU = {"values": "experts"}, {"output": "swilu"}
RELU = {"score_activation": "relu", "score_scale": 2.0}


@pytest.mark.parametrize(
    ("fault", "settings", "shows"),
    [
        (wrong_activation, EXPERTS, "read"),
        (unweighted_experts, EXPERTS, "read"),
        (experts_of_other_tokens, EXPERTS, "read"),
        (gate_of_other_tokens, SWILU, "output"),
        (gate_by_gelu, SWILU, "output"),
        (output_off_by_little, SWILU, "output"),
        (output_off_by_little, {}, "output"),
        (output_off_by_little, {"v_dim": None}, "output"),
        (scale_of_another_memory, RELU, "weight"),
    ],
)
def test_a_fault_of_one_part_shows_there(
    monkeypatch: pytest.MonkeyPatch, tokens: Tensor, fault: Any, settings: Any, shows: str
) -> None:
    memory, tokens = small_memory(**settings), tokens[:100]
    assert validate_memory(memory, tokens).exact
    fault(monkeypatch, memory)
    result = validate_memory(memory, tokens)
    assert not result.exact
    off = {
        "weight": any(head.weight_difference > head.weight_tolerance for head in result.heads),
        "read": result.read_difference > result.read_tolerance,
        "output": result.output_difference > result.output_tolerance,
    }
    assert off[shows]
    if shows != "weight":
        assert all(head.exact for head in result.heads)


def test_kinds_that_nobody_has_said_how_to_judge_are_refused_in_one_line(
    memory: ProductKeyMemory, tokens: Tensor
) -> None:
    class Mine(type(memory.values)):  # type: ignore[misc]
        pass

    memory.values.__class__ = Mine
    with pytest.raises(ValueError, match=r"^values of the kind Mine cannot be judged.*Experts$"):
        validate_memory(memory, tokens)


@pytest.mark.parametrize("dropped", range(len(search.candidate_ranks(8, "cpu")[0])))
def test_one_dropped_candidate_pair_is_found(
    monkeypatch: pytest.MonkeyPatch, memory: ProductKeyMemory, tokens: Tensor, dropped: int
) -> None:
    pairs = search.candidate_ranks(8, tokens.device)
    kept = torch.arange(len(pairs[0])) != dropped
    monkeypatch.setattr(search, "candidate_ranks", lambda *_: (pairs[0][kept], pairs[1][kept]))
    result = validate_memory(memory, tokens)
    assert not result.exact
    assert min(head.recall_at_k for head in result.heads) < 1


# --- wrong use --------------------------------------------------------------------------------


def with_bad_keys(memory: ProductKeyMemory) -> ProductKeyMemory:
    with torch.no_grad():
        memory.keys[0, 0, 0, 0] = math.nan
    return memory


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda memory: memory.bfloat16(), "is in bfloat16, must be in float32"),
        (lambda memory: memory.train(), "is in training mode, must be in eval mode"),
        (with_bad_keys, "keys are not all finite"),
    ],
    ids=["precision", "training", "nan"],
)
def test_a_memory_that_cannot_be_judged(
    memory: ProductKeyMemory, tokens: Tensor, spoil: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        validate_memory(spoil(memory), tokens)


@pytest.mark.parametrize("shape", [(0, WIDTH), (5, WIDTH + 1), (5, 2, WIDTH)])
def test_tokens_of_a_wrong_shape(memory: ProductKeyMemory, shape: Tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens have shape"):
        validate_memory(memory, torch.randn(shape))


def test_results_are_values(memory: ProductKeyMemory, tokens: Tensor) -> None:
    result = validate_memory(memory, tokens)
    assert isinstance(result, LayerResult)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.exact = True  # type: ignore[misc]
