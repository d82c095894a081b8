"""--encoder-layers-to-keep: which layers remain, and where their memories are."""

import pytest
import torch

from tests.helpers import batch, build, small_dictionary

TOKENS = batch(small_dictionary(), [5, 3])
LAYERS = "encoder.sentence_encoder.layers."


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run_layers(model, kept):
    """The features of a model that runs some of its layers only."""
    layers = model.encoder.sentence_encoder.layers
    model.encoder.sentence_encoder.layers = torch.nn.ModuleList(layers[i] for i in kept)
    with torch.no_grad():
        return model.eval()(TOKENS, features_only=True)[0]


@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
@pytest.mark.parametrize(
    ("kept", "memories", "remaining"),
    [
        ("0,2", [2], [1]),
        ("1,2", [0, 2], [1]),
        ("2, 0", [0, 1, 2], [0, 1]),
        ("0,1", [2], []),
        ("0,1,2", [1], [1]),
    ],
)
def test_layers_are_named_as_in_the_whole_encoder(arch, kept, memories, remaining):
    whole = build(arch, memory_layers=memories)
    whole(TOKENS)
    pruned = build(arch, seed=1, memory_layers=memories, encoder_layers_to_keep=kept)
    assert list(pruned.memory_layers()) == remaining
    pruned.check_checkpoint({"model": state_of(whole)}, "whole.pt")  # a training does it first
    pruned.load_state_dict(state_of(whole))
    with torch.no_grad():
        features = pruned.eval()(TOKENS, features_only=True)[0]
    assert torch.equal(features, run_layers(whole, sorted(map(int, kept.split(",")))))


def test_options_of_a_pruned_model_are_those_of_one_that_never_had_more_layers():
    options = {"memory_layers": [0, 2], "memory_mode": "residual"}
    pruned = build("pkm_roberta_tiny", encoder_layers_to_keep="1,2", **options)
    assert (pruned.args.encoder_layers, pruned.args.memory_layers) == (2, [1])
    assert pruned.args.encoder_layers_to_keep is None


def test_a_pruned_checkpoint_is_not_pruned_again():
    options = {"encoder_layers_to_keep": "1,2", "memory_layers": [2]}
    one, other = (build("pkm_roberta_tiny", seed=seed, **options) for seed in (0, 1))
    other.load_state_dict(state_of(one))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())


def test_a_plain_checkpoint_is_pruned_and_gets_a_new_memory():
    plain = state_of(build("roberta"))
    pruned = build("resm_roberta_tiny", encoder_layers_to_keep="0,2", memory_layers=[2])
    keys = pruned.memory_layers()[1].memory.keys.clone()
    pruned.load_state_dict(dict(plain))
    state = pruned.state_dict()
    assert torch.equal(state[f"{LAYERS}1.fc1.weight"], plain[f"{LAYERS}2.fc1.weight"])
    assert torch.equal(pruned.memory_layers()[1].memory.keys, keys)


def test_a_layer_that_the_checkpoint_does_not_have():
    pruned = build("pkm_roberta_tiny", encoder_layers=5, encoder_layers_to_keep="0,4")
    with pytest.raises(
        ValueError, match=r"to-keep names layer 4, but the checkpoint has .* 0\.\.2"
    ):
        pruned.load_state_dict(state_of(build("pkm_roberta_tiny")))
