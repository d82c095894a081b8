"""--checkpoint-activations: each layer is run twice, and nothing but memory is different."""

import copy

import pytest
import torch

from pkm_fairseq.memory import ProductKeyMemory
from pkm_fairseq.memory.adam import MemoryAdam
from pkm_fairseq.memory.gradient import FactoredGradient
from pkm_fairseq.memory.run import is_repeated
from tests.helpers import batch, build, small_dictionary

DICTIONARY = small_dictionary()
TOKENS = batch(DICTIONARY, [7, 3, 6], extra=1)

OPTIONS = {
    "plain": {},
    "dropout": {"dropout": 0.3, "attention_dropout": 0.3, "memory_read_dropout": 0.3},
    "key dropout": {"memory_key_dropout": 0.3, "memory_query_dropout": 0.3},
    "two memories that share their values": {"memory_layers": [0, 2], "memory_share_values": True},
    "layers dropped": {"encoder_layerdrop": 0.4, "memory_layers": [0, 2]},
    "layer norm": {"memory_query_norm": "layer"},
}


def trained(arch, factored, batches=2, **options):
    """A model after some accumulated backward passes, and what there is to compare of it."""
    model = build(arch, **options).train()
    model.set_num_updates(4)
    values = [layer.memory.values for layer in model.memory_layers().values()]
    if factored:
        MemoryAdam([table.weight for table in set(values)])
    usage = model.new_memory_usage()
    torch.manual_seed(1)
    losses = []
    with model.record_memory_usage(usage):  # still open in backward
        for i in range(batches):
            out = model(TOKENS.roll(i, dims=0), features_only=True)[0]
            losses.append(out.square().sum())
            losses[-1].backward()
    state = {"rng": torch.get_rng_state(), **model.state_dict()}
    for name, p in model.named_parameters():
        is_factored = isinstance(p.grad, FactoredGradient)
        assert is_factored == (factored and name.endswith("values.weight") and p.grad is not None)
        state[f"{name}.grad"] = p.grad.dense() if is_factored else p.grad
    for layer, counted in usage.items():
        state.update({f"{layer}.usage{i}": x for i, x in enumerate(counted.counters())})
        state[f"{layer}.tokens"] = torch.tensor(counted.tokens)
    return torch.stack(losses).detach(), state


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_gradients_statistics_and_counts_are_those_without(name, arch, factored, offload):
    flag = "offload_activations" if offload else "checkpoint_activations"
    losses, state = trained(arch, factored, **OPTIONS[name])
    again_losses, again = trained(arch, factored, **OPTIONS[name], **{flag: True})
    assert torch.allclose(losses, again_losses, rtol=1e-6, atol=0)
    assert state.keys() == again.keys()
    for key, tensor in state.items():
        other = again[key]
        assert (tensor is None) == (other is None), key
        assert tensor is None or torch.allclose(tensor, other, rtol=1e-4, atol=1e-5), key


def test_each_layer_is_run_twice_and_a_memory_looks_up_twice(monkeypatch):
    calls = []
    original = ProductKeyMemory.search

    def counting(self, tokens):
        calls.append(is_repeated())
        return original(self, tokens)

    monkeypatch.setattr(ProductKeyMemory, "search", counting)
    model = build("resm_roberta_tiny", checkpoint_activations=True).train()
    model(TOKENS, features_only=True)[0].sum().backward()
    assert calls == [False, True]
    with torch.no_grad():
        model.eval()(TOKENS)
    assert calls == [False, True, False]
    calls.clear()
    build("resm_roberta_tiny")(TOKENS, features_only=True)[0].sum().backward()
    assert calls == [False]


def test_a_copy_runs_its_own_layers_again():
    """fairseq's moving average copies the model."""
    model = build("resm_roberta_tiny", checkpoint_activations=True).train()
    twin = copy.deepcopy(model)
    twin(TOKENS, features_only=True)[0].sum().backward()
    memories = [m.memory_layers()[1].memory for m in (model, twin)]
    assert [memory.keys.grad is None for memory in memories] == [True, False]
    assert not torch.equal(memories[0].query_norm.running_mean, memories[1].query_norm.running_mean)
