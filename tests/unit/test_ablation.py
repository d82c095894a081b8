"""Memories switched off in part."""

import pytest
import torch

from pkm_fairseq.experiments.demo.evaluate import ablations, evaluate
from pkm_fairseq.memory.ablation import ABLATIONS, ablated, measure_ablations
from tests.helpers import batch, build, mlm_sample, small_dictionary, small_task

DICTIONARY = small_dictionary()
TASK = small_task(DICTIONARY)
TOKENS = batch(DICTIONARY, [7, 4, 9])
LAYERS = [0, 2]


def model_of(**options):
    model = build("resm_roberta_tiny", DICTIONARY, **{"memory_layers": LAYERS, **options}).eval()
    with torch.no_grad():  # large enough to show
        for layer in model.memory_layers().values():
            layer.memory.values.weight.mul_(20)
    return model


@torch.no_grad()
def output(model):
    return model(TOKENS)[0]


@torch.no_grad()
def with_values(model, layers, change):
    """What a copy of the model says whose value tables were changed."""
    for index in layers:
        weight = model.memory_layers()[index].memory.values.weight
        weight.copy_(change(weight))
    return output(model)


@pytest.mark.parametrize("layers", [None, [2]])
def test_zero_is_a_table_of_zeros(layers):
    with ablated(model := model_of(), "zero", layers):
        found = output(model)
    assert torch.equal(found, with_values(model_of(), layers or LAYERS, torch.zeros_like))
    assert not torch.allclose(found, output(model_of()), atol=1e-3)


@pytest.mark.parametrize("layers", [None, [2]])
def test_permuted_is_a_permuted_table(layers):
    order = torch.randperm(25, generator=torch.Generator().manual_seed(7))
    with ablated(model := model_of(), "permuted", layers, seed=7):
        found = output(model)
    expected = with_values(model_of(), layers or LAYERS, lambda weight: weight[order])
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, output(model_of()), atol=1e-3)


def test_top1_reads_the_first_choice_alone():
    memory = model_of().memory_layers()[2].memory
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    model = model_of()
    with torch.no_grad():
        _, lookup = memory(x, return_lookup=True)
        expected = memory.values.weight[lookup.slots[..., 0]].sum(1)  # over heads
        with ablated(model, "top1", [2]):
            found = model.memory_layers()[2].memory(x)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_shared_table_is_ablated_in_one_layer_only():
    model, other = (model_of(memory_share_values=True) for _ in range(2))
    with ablated(model, "zero", [0]):
        found = output(model)
    with ablated(other, "zero"):
        assert not torch.allclose(found, output(other), atol=1e-3)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_afterwards_the_model_is_what_it_was(kind):
    model = model_of()
    before, state = output(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError), ablated(model, kind):
        raise RuntimeError
    assert torch.equal(output(model), before)
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


@torch.no_grad()
def test_an_ablation_within_another_ends_without_it():
    model = model_of()
    before, generator = output(model), torch.Generator().manual_seed(0)
    with ablated(model, "permuted", seed=3):
        permuted = output(model)
        with ablated(model, "zero", [0]):
            assert not torch.equal(output(model), permuted)
        assert torch.equal(output(model), permuted)
    assert torch.equal(output(model), before)
    with ablated(model, "zero"), ablated(model, "permuted", [0]):
        x = torch.randn(6, 16, generator=generator)
        assert not model.memory_layers()[0].memory(x).any()  # zeros, permuted


def test_an_unknown_kind_is_an_error():
    said = "'none', must be one of zero, permuted, top1"
    with pytest.raises(ValueError, match=said), ablated(model_of(), "none"):
        pass


def test_perplexities_of_all_memories_and_of_each():
    model, batches = model_of(), [mlm_sample(TOKENS, DICTIONARY)]
    found = ablations(model, batches, TASK)
    assert set(found) == {"all", "0", "2"}
    whole = evaluate(model, batches, TASK).ppl
    without = model_of()
    with_values(without, LAYERS, torch.zeros_like)
    assert found["all"]["zero"] == pytest.approx(evaluate(without, batches, TASK).ppl)
    for part in found.values():
        assert set(part) == {"zero", "permuted", "top1"}
        assert all(abs(ppl - whole) > 1e-3 for ppl in part.values())
    assert ablations(build("roberta", DICTIONARY).eval(), batches, TASK) == {}


def test_an_only_memory_is_measured_once():
    model, measured = model_of(memory_layers=[2]), []

    def measure():
        measured.append(output(model))
        return len(measured)

    found = measure_ablations(model, measure)
    assert found["all"] == found["2"] == {"zero": 1, "permuted": 2, "top1": 3}
    assert len(measured) == 3
