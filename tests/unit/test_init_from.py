"""INIT: what is loaded, what is dropped or new, and what is refused."""

import logging
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from pkm_fairseq.models.checkpoints import dictionary_sha256, read_checkpoint
from pkm_fairseq.models.init_from import complete_state
from tests.helpers import batch, build, model_args, small_dictionary

DICTIONARY = small_dictionary()
TOKENS = batch(DICTIONARY, [7, 3, 5])
LAYER = "encoder.sentence_encoder.layers.1."
FFN = {f"{LAYER}{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
ARCHS = ["pkm_roberta_tiny", "resm_roberta_tiny"]


@pytest.fixture
def plain():
    """fairseq's own roberta, "trained" so that no parameter is where an init puts it."""
    model = build("roberta", seed=11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def save(model, path, **more):
    """Write a checkpoint as fairseq does, as far as INIT looks at it."""
    torch.save({"args": None, "cfg": None, "model": model.state_dict(), **more}, path)
    return str(path)


@pytest.fixture
def checkpoint(plain, tmp_path):
    return save(plain, tmp_path / "plain.pt")


def init_line(caplog):
    """The one line that INIT logs."""
    (record,) = [r for r in caplog.records if r.name.endswith("init_from")]
    assert "\n" not in record.getMessage()
    return record.getMessage()


def refusal(arch="resm_roberta_tiny", **options):
    """The message with which building a model stops."""
    with pytest.raises(ValueError) as stop:
        build(arch, **options)
    message = str(stop.value)
    assert "\n" not in message
    return message


# --- the four arms ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_init_loads_every_parameter_that_both_models_have(arch, plain, checkpoint, caplog):
    caplog.set_level(logging.INFO)
    model, fresh = build(arch, init_from=checkpoint), build(arch)
    old, own = plain.state_dict(), model.state_dict()
    common = set(old) & set(own)
    for name in common:
        assert torch.equal(own[name], old[name]), name
    new = set(own) - common
    assert new
    assert all(name.startswith((f"{LAYER}memory.", f"{LAYER}reads.")) for name in new)
    for name in new:  # the memory is what it is without INIT
        assert torch.equal(own[name], fresh.state_dict()[name]), name
    dropped = set(old) - common
    assert dropped == (FFN if arch.startswith("pkm") else set())
    line = init_line(caplog)
    assert checkpoint in line
    assert f"loaded {len(common)} tensors" in line
    listed = "layers.1.fc1.*, layers.1.fc2.*" if dropped else "nothing"
    assert f"dropped {listed}; newly initialised layers.1.memory.*;" in line


@pytest.mark.parametrize("arch", ARCHS)
def test_without_init_nothing_is_loaded_and_nothing_is_said(arch, plain, caplog):
    caplog.set_level(logging.INFO)
    model = build(arch)
    assert not [r for r in caplog.records if r.name.endswith("init_from")]
    name = "encoder.sentence_encoder.embed_tokens.weight"
    assert not torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_resm_with_zero_values_starts_as_the_model_it_was_initialised_from(plain, checkpoint):
    model = build("resm_roberta_tiny", init_from=checkpoint, memory_values_init="zero")
    assert torch.equal(model.eval()(TOKENS)[0], plain.eval()(TOKENS)[0])


@pytest.mark.parametrize("arch", ARCHS)
def test_init_from_one_of_ours_loads_everything(arch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trained = build(arch, seed=11)
    trained(TOKENS)  # running statistics move
    model = build(arch, init_from=save(trained, tmp_path / "ours.pt"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert "dropped nothing; newly initialised nothing" in init_line(caplog)


def test_a_memory_less_model_of_ours_takes_a_plain_checkpoint(plain, checkpoint):
    model = build("pkm_roberta_tiny", memory_layers=[], init_from=checkpoint)
    assert torch.equal(model.eval()(TOKENS)[0], plain.eval()(TOKENS)[0])


def test_names_of_older_fairseq_versions_are_understood(plain, tmp_path):
    def old(name):
        name = name.replace("encoder.", "decoder.", 1)
        return name.replace(".layernorm_embedding.", ".emb_layer_norm.")

    state = {old(name): tensor for name, tensor in plain.state_dict().items()}
    assert set(state).isdisjoint(plain.state_dict())
    torch.save({"model": state}, tmp_path / "old.pt")
    model = build("resm_roberta_tiny", init_from=str(tmp_path / "old.pt"))
    name = "encoder.sentence_encoder.layernorm_embedding.weight"
    assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_classification_heads_of_a_finetuned_checkpoint_are_left_out(plain, tmp_path):
    plain.register_classification_head("old_head", num_classes=2)
    path = save(plain, tmp_path / "finetuned.pt")
    model = build("resm_roberta_tiny", init_from=path)
    assert not [name for name in model.state_dict() if "old_head" in name]
    name = f"{LAYER}fc1.weight"
    assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_the_option_is_cleared_so_that_no_checkpoint_of_the_run_asks_for_the_file(checkpoint):
    assert build("resm_roberta_tiny", init_from=checkpoint).args.init_from is None


# --- what does not fit ------------------------------------------------------------------------


def test_another_width_is_refused_with_a_list_of_what_differs(checkpoint):
    message = refusal(init_from=checkpoint, encoder_embed_dim=32)
    assert checkpoint in message
    assert f"embed_tokens.weight is {(len(DICTIONARY), 16)}, must be {(len(DICTIONARY), 32)}" in (
        message
    )
    assert " more" in message  # and not all of them


def test_another_vocabulary_size_is_refused(checkpoint):
    larger = small_dictionary(n_symbols=18)
    message = refusal(init_from=checkpoint, dictionary=larger)
    symbols = f"({len(DICTIONARY)} symbols, this one has {len(larger)})"
    assert f"was trained with another dictionary {symbols}" in message


@pytest.mark.parametrize(
    ("layers", "words"),
    [(4, "layers.3.self_attn.q_proj.weight is missing"), (2, "is not in the model")],
)
def test_another_depth_is_refused(checkpoint, layers, words):
    assert words in refusal(init_from=checkpoint, encoder_layers=layers)


def test_a_missing_parameter_is_refused(plain, tmp_path):
    state = plain.state_dict()
    del state[f"{LAYER}fc1.bias"]
    torch.save({"model": state}, tmp_path / "lacks.pt")
    message = refusal(init_from=str(tmp_path / "lacks.pt"))
    assert "layers.1.fc1.bias is missing" in message


def test_a_memory_that_has_no_place_is_refused(tmp_path):
    path = save(build("resm_roberta_tiny"), tmp_path / "resm.pt")
    message = refusal("resm_roberta_tiny", init_from=path, memory_layers=[])
    assert "layers.1.memory.keys is not in the model" in message


def test_a_replaced_ffn_that_the_model_needs_is_refused(tmp_path):
    path = save(build("pkm_roberta_tiny"), tmp_path / "pkm.pt")
    message = refusal("resm_roberta_tiny", init_from=path)
    assert "layers.1.fc1.weight is missing" in message


def test_another_memory_size_is_refused(tmp_path):
    path = save(build("resm_roberta_tiny", memory_n_keys=6), tmp_path / "other.pt")
    message = refusal("resm_roberta_tiny", init_from=path)
    assert "layers.1.memory.keys is (2, 2, 6, 2), must be (2, 2, 5, 2)" in message


# --- bad files --------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path):
    message = refusal(init_from=str(tmp_path / "none.pt"))
    assert str(tmp_path / "none.pt") in message
    assert "no such file" in message
    assert "no such file" in refusal(init_from=str(tmp_path))  # a folder


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99, 0.999])
def test_a_file_cut_short_is_refused(checkpoint, tmp_path, kept):
    content = Path(checkpoint).read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(content[: int(kept * len(content))])
    message = refusal(init_from=str(cut))
    assert str(cut) in message
    assert "not a readable checkpoint" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"hello world\n", b"model: none", b"\x80\x02.", b"\x80\x05}", bytes(range(256))],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "text.pt").write_bytes(content)
    assert "not a readable checkpoint" in refusal(init_from=str(tmp_path / "text.pt"))


def test_random_bytes_are_refused(tmp_path):
    path = tmp_path / "noise.pt"
    generator = torch.Generator().manual_seed(0)
    for first in (b"", b"\x80", b"\x80\x02", b"(", b"PK\x03\x04"):
        for _ in range(20):
            noise = bytes(torch.randint(256, (40,), generator=generator).tolist())
            path.write_bytes(first + noise)
            with pytest.raises(ValueError, match="not a readable checkpoint"):
                read_checkpoint(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"model": [1]}, 7, None])
def test_a_file_that_holds_no_model_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "it holds no 'model'" in refusal(init_from=str(tmp_path / "other.pt"))


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(plain, tmp_path, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"model": plain.state_dict(), "extra": Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "not a readable checkpoint" in refusal(init_from=str(path))
    assert not trace.exists()
    with open(path, "wb") as file:
        pickle.dump(content["extra"], file)
    assert "not a readable checkpoint" in refusal(init_from=str(path))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # the trap does work
    assert trace.exists()


def test_the_options_of_an_old_run_in_a_namespace_are_read(plain, tmp_path):
    path = save(plain, tmp_path / "legacy.pt", args=Namespace(data="nowhere", arch="roberta"))
    build("resm_roberta_tiny", init_from=path)


# --- the dictionary ---------------------------------------------------------------------------


def other_order():
    """A dictionary of the same size and symbols in another order."""
    dictionary = small_dictionary(0)
    mask = dictionary.symbols[-1]
    other = type(dictionary)()
    for index in reversed(range(15)):
        other.add_symbol(f"w{index}")
    other.add_symbol(mask)
    assert len(other) == len(DICTIONARY)
    return other


def test_an_equal_stored_hash_is_said(plain, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = {"dictionary_sha256": dictionary_sha256(DICTIONARY)}
    path = save(plain, tmp_path / "known.pt", task_state=state)
    build("resm_roberta_tiny", init_from=path)
    assert "equal by its stored hash" in init_line(caplog)


def test_another_stored_hash_is_refused(plain, tmp_path):
    ours, theirs = dictionary_sha256(DICTIONARY), dictionary_sha256(other_order())
    assert ours != theirs
    path = save(plain, tmp_path / "other.pt", task_state={"dictionary_sha256": theirs})
    message = refusal(init_from=path)
    assert "another dictionary" in message
    assert ours[:12] in message
    assert theirs[:12] in message


def write_dictionary(dictionary, folder):
    """As fairseq-preprocess: without the mask, which tasks add."""
    folder.mkdir(parents=True)
    lines = [f"{symbol} 1\n" for symbol in dictionary.symbols[dictionary.nspecial : -1]]
    (folder / "dict.txt").write_text("".join(lines))


def settings_of_a_run(kind, data):
    """Where fairseq versions and drivers store the path of the data."""
    return {
        "hydra": {"cfg": {"task": {"data": data}}},
        "cli": {"cfg": {"task": Namespace(data=data)}},
        "legacy": {"args": Namespace(data=data)},
        "several folders": {"cfg": {"task": {"data": f"{data}{os.pathsep}elsewhere"}}},
    }[kind]


@pytest.mark.parametrize("folder", ["", "input0"])
@pytest.mark.parametrize("kind", ["hydra", "cli", "legacy", "several folders"])
def test_the_dictionary_beside_the_data_of_a_foreign_checkpoint_is_compared(
    plain, tmp_path, caplog, kind, folder
):
    caplog.set_level(logging.INFO)
    for name, dictionary in (("same", DICTIONARY), ("other", other_order())):
        write_dictionary(dictionary, tmp_path / name / folder)
        settings = settings_of_a_run(kind, str(tmp_path / name))
        path = save(plain, tmp_path / f"{name}.pt", **settings)
        if name == "same":
            build("resm_roberta_tiny", init_from=path)
            assert "equal to the one beside the checkpoint's training data" in init_line(caplog)
        else:
            assert "beside its training data" in refusal(init_from=path)


@pytest.mark.parametrize(
    "settings", [{}, {"cfg": {"task": {"data": "no-such-folder"}}}, {"cfg": {"task": None}}]
)
def test_an_unknown_dictionary_is_said_to_be_checked_by_size_only(
    plain, tmp_path, caplog, settings
):
    caplog.set_level(logging.INFO)
    build("resm_roberta_tiny", init_from=save(plain, tmp_path / "foreign.pt", **settings))
    assert "only its size was checked" in init_line(caplog)


def test_the_hash_depends_on_symbols_and_their_order_only():
    again = small_dictionary()
    again.add_symbol("w3", n=100)  # a count
    assert dictionary_sha256(again) == dictionary_sha256(DICTIONARY)
    assert dictionary_sha256(other_order()) != dictionary_sha256(DICTIONARY)
    assert dictionary_sha256(small_dictionary(14)) != dictionary_sha256(DICTIONARY)


# --- fresh runs only --------------------------------------------------------------------------


def test_a_resumed_run_ignores_the_option_and_says_so(plain, checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "checkpoint_last.pt").write_bytes(b"")
    model = build("resm_roberta_tiny", init_from=checkpoint, save_dir=str(tmp_path))
    line = init_line(caplog)
    assert "ignored" in line
    assert checkpoint in line
    assert str(tmp_path / "checkpoint_last.pt") in line
    name = f"{LAYER}fc1.weight"
    assert not torch.equal(model.state_dict()[name], plain.state_dict()[name])
    assert model.args.init_from is None


def test_a_resumed_run_does_not_need_the_file(tmp_path):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"")
    build("resm_roberta_tiny", init_from="gone.pt", save_dir=str(tmp_path))


def test_the_last_checkpoint_is_that_of_this_shard(checkpoint, tmp_path, plain):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"")
    model = build(
        "resm_roberta_tiny",
        init_from=checkpoint,
        save_dir=str(tmp_path),
        checkpoint_suffix="-shard0",
    )
    name = f"{LAYER}fc1.weight"
    assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_two_files_to_start_from_are_refused(checkpoint):
    message = refusal(init_from=checkpoint, restore_file="other.pt")
    assert checkpoint in message
    assert "other.pt" in message
    assert "exclude each other" in message


# --- fairseq's own --restore-file -------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_plain_state_is_completed_so_that_strict_loading_takes_it(arch, plain):
    model = build(arch)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(plain.state_dict(), strict=True)
    for name, tensor in model.state_dict().items():
        is_new = ".memory." in name or ".reads." in name
        expected = before[name] if is_new else plain.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_completing_adds_the_memory_and_drops_the_replaced_ffn_only(plain):
    for arch, dropped in (("pkm_roberta_tiny", FFN), ("resm_roberta_tiny", set())):
        model, state = build(arch), plain.state_dict()
        complete_state(model, state)
        assert set(state) == set(model.state_dict())
        assert set(plain.state_dict()) - set(state) == dropped


def test_a_state_with_memory_stays_subject_to_strict_checks():
    model = build("resm_roberta_tiny", memory_layers=[0, 2])
    state = model.state_dict()
    lacking = {n: t for n, t in state.items() if ".layers.2.memory." not in n}
    with pytest.raises(RuntimeError, match=r"layers\.2\.memory\.keys"):
        model.load_state_dict(lacking, strict=True)


def test_a_plain_state_that_lacks_something_else_is_refused(plain):
    state = plain.state_dict()
    del state[f"{LAYER}fc1.bias"]
    with pytest.raises(RuntimeError, match=r"fc1\.bias"):
        build("resm_roberta_tiny").load_state_dict(state, strict=True)


# --- what could load silently wrong --------------------------------------------------------------


def saved(model, tmp_path, change=lambda state: None, **more):
    """A checkpoint of a model's parameters, changed."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    file = tmp_path / "changed.pt"
    torch.save({"model": state, **more}, file)
    return str(file)


def test_a_memory_that_is_there_in_part_is_refused(tmp_path):
    def lose_keys(state):
        del state["encoder.sentence_encoder.layers.1.memory.keys"]

    file = saved(build("resm_roberta_tiny"), tmp_path, lose_keys)
    assert "layers.1.memory.keys is missing" in refusal(init_from=file)


def test_a_memory_with_another_query_norm_is_refused(tmp_path):
    file = saved(build("resm_roberta_tiny", memory_query_norm="none"), tmp_path)
    assert "query_norm.weight is missing" in refusal(init_from=file)


def test_two_tables_do_not_go_into_a_shared_one(tmp_path):
    file = saved(build("resm_roberta_tiny", memory_layers=[0, 1]), tmp_path)
    message = refusal(init_from=file, memory_layers=[0, 1], memory_share_values=True)
    assert "memory.values.weight differ, but are one tensor in the model" in message


def test_an_untied_head_does_not_go_into_a_tied_one(plain, tmp_path):
    def untie(state):
        state["encoder.lm_head.weight"] += 1

    assert "are one tensor in the model" in refusal(init_from=saved(plain, tmp_path, untie))


@pytest.mark.parametrize(
    ("name", "value"), [("encoder_attention_heads", 1), ("activation_fn", "relu")]
)
def test_an_option_that_no_shape_shows_is_compared(plain, tmp_path, name, value):
    file = saved(plain, tmp_path, args=Namespace(**{name: value}))
    message = refusal(init_from=file)
    assert f"trained with --{name.replace('_', '-')} {value}, not" in message


@pytest.mark.parametrize(
    ("option", "value"), [("memory_score_activation", "relu"), ("memory_score_scale", 4.0)]
)
def test_an_option_of_a_memory_that_no_shape_shows_is_compared(tmp_path, option, value):
    model, options = build("resm_roberta_tiny", **{option: value}), {option: value}
    args = model_args("resm_roberta_tiny", **options)
    file = save(model, tmp_path / "other.pt", args=args)
    message = refusal(init_from=file)
    assert f"trained with --{option.replace('_', '-')} {value}, not" in message
    build("resm_roberta_tiny", init_from=file, **options)
    plain_args = save(build("roberta"), tmp_path / "plain.pt", args=args)  # says nothing of memory
    build("resm_roberta_tiny", init_from=plain_args)


def test_a_scale_of_scores_that_is_learned_needs_no_option_to_agree(tmp_path):
    options = {"memory_learn_score_scale": True, "memory_score_scale": 4.0}
    args = model_args("resm_roberta_tiny", **options)
    file = save(build("resm_roberta_tiny", **options), tmp_path / "learned.pt", args=args)
    model = build("resm_roberta_tiny", init_from=file, memory_learn_score_scale=True)
    (scale,) = [x for name, x in model.state_dict().items() if name.endswith("score_scale")]
    assert scale == 4
    assert "trained with --memory-learn-score-scale, not without" in refusal(init_from=file)
    fixed = {"memory_score_scale": 4.0}
    args = model_args("resm_roberta_tiny", **fixed)
    file = save(build("resm_roberta_tiny", **fixed), tmp_path / "fixed.pt", args=args)
    message = refusal(init_from=file, memory_learn_score_scale=True)
    assert "trained without --memory-learn-score-scale, not with" in message


def test_a_memory_of_a_version_without_these_options_computed_with_their_defaults(tmp_path):
    args = model_args("resm_roberta_tiny")
    for option in ("memory_score_activation", "memory_score_scale", "memory_learn_score_scale"):
        delattr(args, option)
    file = save(build("resm_roberta_tiny"), tmp_path / "first.pt", args=args)
    build("resm_roberta_tiny", init_from=file)
    message = refusal(init_from=file, memory_score_activation="relu")
    assert "trained with --memory-score-activation softmax, not relu" in message
    message = refusal(init_from=file, memory_score_scale=4.0)
    assert "trained with --memory-score-scale 1.0, not 4.0" in message


def test_another_knn_is_taken_and_said(tmp_path, caplog):
    args = model_args("resm_roberta_tiny", memory_knn=5)
    file = save(build("resm_roberta_tiny", memory_knn=5), tmp_path / "five.pt", args=args)
    build("resm_roberta_tiny", init_from=file)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == f"--init-from {file}: trained with --memory-knn 5, now reads 3"


def test_an_ffn_that_was_trained_beside_its_memory_is_not_dropped(tmp_path):
    file = save(build("resm_roberta_tiny"), tmp_path / "resm.pt")
    message = refusal("pkm_roberta_tiny", init_from=file)
    assert "layers.1.fc1.weight is not in the model" in message


def test_a_classification_head_is_dropped_and_said_to_be(plain, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def add_head(state):
        state["classification_heads.x.dense.weight"] = torch.zeros(4, 4)
        state["classification_heads.x.out_proj.weight"] = torch.zeros(2, 4)

    build(
        "pkm_roberta_tiny", init_from=saved(plain, tmp_path, add_head), load_checkpoint_heads=True
    )
    assert "dropped classification_heads.x" in init_line(caplog)


# --- the training in which a memory came into being --------------------------------------------


def origin_in(model):
    return model.state_dict()[f"{LAYER}reads.origin"]


def test_a_memory_that_goes_on_keeps_its_origin_and_a_new_one_has_its_own(checkpoint, tmp_path):
    trained = build("resm_roberta_tiny", seed=3)
    file = save(trained, tmp_path / "trained.pt")
    with torch.no_grad():
        trained.memory_layers()[1].memory.keys.add_(1)  # training changes nothing of it
    fresh = origin_in(build("resm_roberta_tiny", seed=4))
    assert not torch.equal(fresh, origin_in(trained))
    assert torch.equal(
        origin_in(build("resm_roberta_tiny", seed=4, init_from=file)), origin_in(trained)
    )
    assert torch.equal(origin_in(build("resm_roberta_tiny", seed=4, init_from=checkpoint)), fresh)


def test_a_checkpoint_without_origin_is_loaded():
    model, state = build("resm_roberta_tiny"), build("resm_roberta_tiny", seed=2).state_dict()
    expected = origin_in(model).clone()
    del state[f"{LAYER}reads.origin"]
    model.load_state_dict(state, strict=True)
    assert torch.equal(origin_in(model), expected)
