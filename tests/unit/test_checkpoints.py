"""Checkpoints are compared with a dictionary before they are loaded; only what is known is said."""

import logging
from argparse import Namespace

import pytest
import torch

from pkm_fairseq.models.checkpoints import (
    check_dictionary,
    compare_dictionary,
    dictionary_sha256,
    is_roberta,
    known_names,
    load_dictionary,
    task_name,
)
from tests.helpers import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build, small_dictionary

DICTIONARY = small_dictionary()
EMBEDDING = "sentence_encoder.embed_tokens.weight"


def of_model(arch="roberta", **more):
    return {"model": build(arch).state_dict(), **more}


def write_dictionary(folder, dictionary=DICTIONARY):
    """As fairseq-preprocess: without the mask, which tasks add."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = dictionary.symbols[dictionary.nspecial : -1]
    (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    return str(folder)


def in_another_order():
    other = small_dictionary(0)
    fresh = type(other)()
    for symbol in (*reversed(DICTIONARY.symbols[DICTIONARY.nspecial : -1]), "<mask>"):
        fresh.add_symbol(symbol)
    assert len(fresh) == len(DICTIONARY)
    return fresh


# --- dictionaries -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["encoder", "decoder"])  # decoder: versions before 0.10
def test_the_size_is_compared_in_checkpoints_of_any_age(part):
    checkpoint = {"model": {f"{part}.{EMBEDDING}": torch.zeros(len(DICTIONARY), 4)}}
    assert "only its size" in check_dictionary(checkpoint, DICTIONARY, "x.pt")
    message = rf"x.pt was trained with another dictionary \({len(DICTIONARY)} symbols, this one has"
    with pytest.raises(ValueError, match=message):
        check_dictionary(checkpoint, small_dictionary(7), "x.pt")


def test_a_stored_hash_decides():
    state = {"dictionary_sha256": dictionary_sha256(DICTIONARY)}
    assert "stored hash" in check_dictionary(of_model(task_state=state), DICTIONARY, "x.pt")
    with pytest.raises(ValueError, match=r"x.pt was trained with another dictionary"):
        check_dictionary(of_model(task_state=state), in_another_order(), "x.pt")


@pytest.mark.parametrize("task_state", [None, {}])
def test_without_a_hash_a_dictionary_of_the_same_size_is_unknown_and_never_another(
    task_state, caplog
):
    checkpoint = of_model(task_state=task_state)
    for dictionary in (DICTIONARY, in_another_order()):
        caplog.clear()
        compare_dictionary(checkpoint, dictionary, "x.pt")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "x.pt stores no hash of its dictionary: only the size was compared" in record.message


@pytest.mark.parametrize("part", ["", "input0"])
def test_without_a_hash_the_dictionary_beside_the_training_data_is_compared(tmp_path, part, caplog):
    beside = tmp_path / "data" / part
    write_dictionary(beside)
    checkpoint = of_model(cfg={"task": {"data": str(tmp_path / "data")}})
    compare_dictionary(checkpoint, DICTIONARY, "x.pt")
    assert not caplog.records
    message = f"x.pt: the dictionary beside its training data, {beside / 'dict.txt'}, is another"
    with pytest.raises(ValueError, match=message):
        compare_dictionary(checkpoint, in_another_order(), "x.pt")


def test_a_dictionary_beside_the_data_that_has_changed_its_size_since_says_nothing(
    tmp_path, caplog
):
    write_dictionary(tmp_path, small_dictionary(7))
    compare_dictionary(of_model(cfg={"task": {"data": str(tmp_path)}}), DICTIONARY, "x.pt")
    assert "only the size was compared" in caplog.text


def test_what_has_no_embedding_of_a_roberta_is_said_to_be_none():
    with pytest.raises(ValueError, match=r"x.pt holds no .*embed_tokens.weight: it is no RoBERTa"):
        check_dictionary({"model": {"encoder.x": torch.zeros(2)}}, DICTIONARY, "x.pt")


@pytest.mark.parametrize(
    "content", [b"one two three\n", b"caf\xe9 1\n", b"a 1\na 1\n"], ids=["words", "latin", "twice"]
)
def test_a_damaged_dictionary_is_one_line(tmp_path, content):
    file = tmp_path / "dict.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"dict.txt is no dictionary: ") as caught:
        load_dictionary(str(file))
    assert "\n" not in str(caught.value)


# --- architectures and tasks ------------------------------------------------------------------

SIZES = {
    "encoder_layers": 3,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
}


@pytest.mark.parametrize("old", [False, True], ids=["cfg", "args"])
@pytest.mark.parametrize("arch", ["roberta", "resm_roberta_tiny"])
def test_an_unknown_architecture_is_known_by_parameters_and_sizes(arch, old, caplog):
    base = "roberta" if arch == "roberta" else "pkm_roberta"
    options = Namespace(arch="roberta_small", criterion="smooth", task="masked_lm", **SIZES)
    checkpoint = of_model(arch, **({"args": options} if old else {"cfg": {"model": options}}))
    assert is_roberta(checkpoint)
    with known_names(checkpoint, "x.pt") as names:
        assert names == ({"criterion": "masked_lm"} if old else {})
        assert ARCH_MODEL_REGISTRY["roberta_small"] is ARCH_MODEL_REGISTRY[base]
        assert ARCH_CONFIG_REGISTRY["roberta_small"] is ARCH_CONFIG_REGISTRY[base]
    assert "roberta_small" not in {*ARCH_MODEL_REGISTRY, *ARCH_CONFIG_REGISTRY}
    assert f"x.pt: 'roberta_small' is no known architecture; built as {base}" in caplog.text


@pytest.mark.parametrize("missing", SIZES)
def test_an_unknown_architecture_without_all_sizes_is_refused(missing):
    sizes = {name: size for name, size in SIZES.items() if name != missing}
    checkpoint = of_model(cfg={"model": {"_name": "roberta_small", **sizes}})
    assert not is_roberta(checkpoint)
    with (
        pytest.raises(ValueError, match=r"x.pt is a model 'roberta_small', which is not known"),
        known_names(checkpoint, "x.pt"),
    ):
        pass


def test_a_known_architecture_is_what_it_is_called():
    assert is_roberta(of_model(cfg={"model": {"_name": "roberta_large"}}))
    assert not is_roberta(of_model(cfg={"model": {"_name": "transformer"}}))


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"cfg": {"task": {"_name": "masked_lm"}}}, "masked_lm"),
        ({"cfg": {"task": Namespace(_name="pkm_masked_lm")}}, "pkm_masked_lm"),
        ({"args": Namespace(task="masked_lm")}, "masked_lm"),
        ({"cfg": {"task": None}}, None),
        ({}, None),
    ],
)
def test_the_task_of_checkpoints_of_any_age(more, name):
    assert task_name({"model": {}, **more}) == name
