"""Checkpoints that cross over: the same logits, the same symbols, and what is refused."""

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List

import pytest
import torch
from fairseq.data import Dictionary
from torch import Tensor

pytest.importorskip(
    "transformers", reason="transformers is not installed (requirements/huggingface.txt)"
)

import transformers

from pkm_fairseq.experiments.convert import convert
from pkm_fairseq.experiments.convert.convert import convert_to_fairseq, convert_to_transformers
from pkm_fairseq.huggingface import add_memories, roberta, tokenizers
from pkm_fairseq.memory import MemoryConfig
from pkm_fairseq.models.checkpoints import read_checkpoint
from pkm_fairseq.models.roberta import PkmRobertaModel
from tests.helpers import batch, build, small_dictionary

DICTIONARY = small_dictionary()
KINDS: Dict[str, Dict[str, Any]] = {
    "plain": {"arch": "roberta"},
    "resm": {"arch": "resm_roberta_tiny"},
    "pkm": {"arch": "pkm_roberta_tiny"},
    "shared": {
        "arch": "resm_roberta_tiny",
        "memory_layers": [0, 2],
        "memory_share_values": True,
        "memory_query": "mlp",
        "memory_output": "swilu",
        "memory_learn_score_scale": True,
    },
    "untied": {"arch": "roberta", "untie_weights_roberta": True},
}


def save(model: Any, file: Path, dictionary: Dictionary = DICTIONARY) -> Path:
    """A checkpoint as fairseq's older versions write it, with the dictionary beside it."""
    args = model.args
    args.task, args.criterion, args.data = "masked_lm", "masked_lm", "no-such-folder"
    state = {"args": args, "model": model.state_dict(), "optimizer_history": [{"num_updates": 1}]}
    state["extra_state"] = {"epoch": 1, "val_loss": None, "train_iterator": {"epoch": 1}}
    for entry in state["optimizer_history"]:
        entry |= {"criterion_name": "x", "optimizer_name": "x", "lr_scheduler_state": {}}
    torch.save(state, file)
    convert.write_dictionary(dictionary, file.with_name("dict.txt"))
    return file


def model_of(kind: str, dictionary: Dictionary = DICTIONARY, **more: Any) -> Any:
    """A small model of fairseq with parameters that are not their initial ones."""
    model = build(**{**KINDS[kind], **more}, dictionary=dictionary).eval()
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a kind."""

    def write(kind: str = "plain", **more: Any) -> Path:
        return save(model_of(kind, **more), tmp_path / f"{kind}.pt")

    return write


def logits(model: Any, ids: Tensor, pad: int = 1) -> Tensor:
    mask = ids.ne(pad).long()
    found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


# --- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_crosses_over_and_comes_back(
    kind: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = checkpoint(kind)
    there, back = tmp_path / "there", tmp_path / "back"
    said = convert_to_transformers(file, there)
    assert "logits of random symbols differ by at most" in said[1]
    assert said[-1] == "tokenizers were not compared: that needs --text"
    ids = batch(DICTIONARY, [9, 5], extra=1)
    theirs = model_of(kind)  # the same seed, the same model
    theirs.load_state_dict(torch.load(file, weights_only=False)["model"])
    expected = theirs.eval()(ids)[0]
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(there).eval()
    real = ids.ne(1)
    assert torch.allclose(logits(loaded, ids)[real], expected[real], rtol=0, atol=1e-5)
    convert_to_fairseq(there, back)
    before, after = (read_checkpoint(str(x), "x")["model"] for x in (file, back / "checkpoint.pt"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    symbols = (back / "dict.txt").read_text().splitlines()
    assert symbols == [f"w{i} 1" for i in range(15)]


def test_the_comparison_finds_a_fault(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {**roberta.OF_A_BLOCK, "self_attn.q_proj": "attention.self.key"}
    swapped["self_attn.k_proj"] = "attention.self.query"
    monkeypatch.setattr(roberta, "OF_A_BLOCK", swapped)
    with pytest.raises(ValueError, match=r"logits differ by .*, must differ by at most 1e-05"):
        convert_to_transformers(checkpoint(), tmp_path / "out")
    assert {x.name for x in tmp_path.iterdir()} == {"plain.pt", "dict.txt"}


@torch.no_grad()
def test_token_types_are_added_to_positions(tmp_path: Path) -> None:
    model = their_model(tmp_path / "in")
    torch.nn.init.normal_(model.roberta.embeddings.token_type_embeddings.weight)
    model.save_pretrained(tmp_path / "in")
    said, compared, _ = convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    assert "differ by at most" in compared and "tensors" in said


@torch.no_grad()
def test_the_bias_of_an_untied_output_layer_is_its_own(tmp_path: Path) -> None:
    model = their_model(tmp_path / "in", tie_word_embeddings=False)
    assert model.lm_head.decoder.bias is not model.lm_head.bias
    torch.nn.init.normal_(model.lm_head.decoder.bias)
    model.save_pretrained(tmp_path / "in")
    convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    stored = read_checkpoint(str(tmp_path / "out/checkpoint.pt"), "x")["model"]
    assert torch.equal(stored["encoder.lm_head.bias"], model.lm_head.decoder.bias)


def test_what_transformers_has_no_option_for_is_said(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = checkpoint("resm", activation_dropout=0.25, encoder_layerdrop=0.5)
    said = "\n".join(convert_to_transformers(file, tmp_path / "out"))
    assert "activation_dropout is 0.25: transformers' RoBERTa has none" in said
    assert "encoder_layerdrop is 0.5: transformers' RoBERTa has none" in said


@torch.no_grad()
def test_a_converted_model_is_a_start_for_init(tmp_path: Path) -> None:
    their_model(tmp_path / "in")
    convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    start = str(tmp_path / "out" / "checkpoint.pt")
    dictionary = Dictionary.load(str(tmp_path / "out" / "dict.txt"))
    dictionary.add_symbol("<mask>")
    options = {"arch": "resm_roberta_tiny", "init_from": start, "memory_values_init": "zero"}
    model = build(**options, dictionary=dictionary).eval()
    ids = batch(dictionary, [8, 6])
    real = ids.ne(1)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "in").eval()
    assert torch.allclose(model(ids)[0][real], logits(theirs, ids)[real], rtol=0, atol=1e-5)


def test_a_model_with_memory_made_by_transformers_is_one_of_fairseq(tmp_path: Path) -> None:
    small = MemoryConfig(n_keys=5, heads=2, knn=3, k_dim=4, read_dropout=0.25)
    model = add_memories(their_model(tmp_path / "in"), small, [0, 1], "replace")
    model.save_pretrained(tmp_path / "in")
    convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    hub = PkmRobertaModel.from_pretrained(str(tmp_path / "out"), "checkpoint.pt", bpe=None)
    layers = hub.model.memory_layers()
    assert sorted(layers) == [0, 1] and layers[0].mode == "replace"
    assert layers[1].memory.config == small


# --- tokenizers -------------------------------------------------------------------------------

SENTENCES = [
    "the cat sat on the mat",
    "  two  blanks, and a cat ",
    "a tail of the cat: 47 \u00bd \ufb01ne",
    "nothing strange at all",
]


def their_model(
    folder: Path, dictionary: Dictionary = DICTIONARY, rows: int = 0, **more: Any
) -> Any:
    """A RoBERTa of transformers with a tokenizer of words, saved."""
    config = transformers.RobertaConfig(
        vocab_size=rows or len(dictionary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    model = transformers.RobertaForMaskedLM(config).eval()
    model.save_pretrained(folder)
    tokenizers.words(dictionary.symbols, 12).save_pretrained(folder)
    return model


def dictionary_of(lines: List[str]) -> Dictionary:
    dictionary = Dictionary()
    for line in lines:
        dictionary.encode_line(line, add_if_not_exist=True)
    dictionary.add_symbol("<mask>")
    return dictionary


def text_of(folder: Path, sentences: List[str] = SENTENCES) -> Path:
    file = folder / "text.txt"
    file.write_text("\n".join(sentences) + "\n")
    return file


def test_sentencepiece_and_its_dictionary_cross_over(tmp_path: Path) -> None:
    import sentencepiece

    with (tmp_path / "spm.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES[:1] * 5 + SENTENCES), model_writer=out, vocab_size=40,
            minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    lines = [" ".join(processor.encode(line, out_type=str)) for line in SENTENCES[::-1]]
    every = " ".join(processor.id_to_piece(i) for i in range(3, len(processor)))
    joined = next(  # in the dictionary alone, as what sentencepiece does not know is, at a cost
        one + other
        for one, other in pairwise(processor.encode(SENTENCES[0], out_type=str))
        if not other.startswith("\u2581") and one + other not in every.split()
    )
    dictionary = dictionary_of([*lines, every, joined])  # in another order than the pieces
    file = save(model_of("resm", dictionary, max_positions=64), tmp_path / "x.pt", dictionary)
    there, back, text = tmp_path / "there", tmp_path / "back", text_of(tmp_path)
    said = convert_to_transformers(
        file, there, sentencepiece_model=tmp_path / "spm.model", text=text
    )
    assert f"{text}: 4 lines are tokenized alike" in said
    again = convert_to_fairseq(there, back, text=text)
    assert f"{text}: 4 lines are tokenized alike" in again
    assert Dictionary.load(str(back / "dict.txt")).symbols == dictionary.symbols[:-1]
    assert (back / "sentencepiece.bpe.model").read_bytes() == (tmp_path / "spm.model").read_bytes()
    # at a mask text is not begun anew: "the <mask>." has no blank before its end
    tokenizer = transformers.AutoTokenizer.from_pretrained(there)
    tokens = tokenizer.tokenize("the <mask>at <mask> mat.")
    assert "".join(tokens).replace(" ", "") == "\u2581the<mask>at<mask>\u2581mat."
    filled = transformers.pipeline("fill-mask", str(there))("the <mask> sat")
    assert len(filled) == 5


def pieces_model(file: Path, **settings: Any) -> Path:
    """A unigram model of a few sentences."""
    import sentencepiece

    with file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 5), model_writer=out, vocab_size=40,
            minloglevel=2, hard_vocab_limit=False, **settings,
        )  # fmt: skip
    return file


def test_sentencepiece_without_a_normalization_crosses_over(tmp_path: Path) -> None:
    import sentencepiece

    spm = pieces_model(tmp_path / "spm.model", normalization_rule_name="identity")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    every = " ".join(processor.id_to_piece(i) for i in range(3, len(processor)))
    dictionary = dictionary_of([every])
    file = save(model_of("plain", dictionary, max_positions=64), tmp_path / "x.pt", dictionary)
    text = text_of(tmp_path)
    said = convert_to_transformers(file, tmp_path / "there", sentencepiece_model=spm, text=text)
    assert f"{text}: 4 lines are tokenized alike" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treat_whitespace_as_suffix": True}, "spm.model puts blanks behind words"),
        ({"user_defined_symbols": ["at", "ca"]}, "pieces of its user, which have no score: at, ca"),
    ],
)
def test_sentencepiece_of_another_form_is_refused(
    settings: Dict[str, Any], message: str, tmp_path: Path
) -> None:
    spm = pieces_model(tmp_path / "spm.model", **settings)
    with pytest.raises(ValueError, match=message):
        tokenizers.pieces(DICTIONARY.symbols, spm, 12)


def gpt2_files(folder: Path) -> Path:
    """Byte pairs of a few words, with numbers of their own."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    merges = [("t", "h"), ("th", "e"), ("a", "t"), ("\u0120", "c"), ("\u0120c", "at")]
    tokens = [*bytes_to_unicode().values(), *("".join(pair) for pair in merges)]
    numbers = {token: 7 * i % len(tokens) for i, token in enumerate(tokens)}
    assert len(set(numbers.values())) == len(tokens)
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(numbers))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines))
    return folder


def test_byte_pairs_of_gpt2_and_their_dictionary_cross_over(tmp_path: Path) -> None:
    folder = gpt2_files(tmp_path / "gpt2")
    numbers = json.loads((folder / "encoder.json").read_text())
    dictionary = dictionary_of([" ".join(map(str, sorted(numbers.values(), reverse=True)))])
    file = save(model_of("plain", dictionary, max_positions=64), tmp_path / "x.pt", dictionary)
    there, back, text = tmp_path / "there", tmp_path / "back", text_of(tmp_path)
    said = convert_to_transformers(file, there, gpt2_bpe=folder, text=text)
    assert f"{text}: 4 lines are tokenized alike" in said
    again = convert_to_fairseq(there, back, text=text)
    assert f"{text}: 4 lines are tokenized alike" in again and "--bpe gpt2" in again[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(there)
    assert tokenizer.tokenize("the cat") == ["the", "\u0120cat"]


def test_text_that_is_cut_otherwise_is_found(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers.pre_tokenizers, "WhitespaceSplit", lambda: None)
    text = text_of(tmp_path, ["w1 w2 w3"])
    with pytest.raises(ValueError, match="line 1 is tokenized differently from symbol 1 on"):
        convert_to_transformers(checkpoint(), tmp_path / "out", text=text)


def test_rows_without_a_token_get_a_symbol(tmp_path: Path) -> None:
    their_model(tmp_path / "in", rows=24)
    convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    dictionary = Dictionary.load(str(tmp_path / "out" / "dict.txt"))
    assert dictionary.symbols[19:] == ["<mask>", *(f"madeupword{i:04d}" for i in range(20, 24))]


# --- what is refused --------------------------------------------------------------------------


def spoiled(file: Path, change: Callable[[Dict[str, Any]], Any]) -> Path:
    stored = torch.load(file, weights_only=False)
    change(stored)
    torch.save(stored, file)
    return file


Make = Callable[[Callable[..., Path], Path], Any]
TO_TRANSFORMERS: Dict[str, Make] = {
    "has heads, which cannot be converted: classification_heads.x": lambda new, _: spoiled(
        new(), lambda s: s["model"].update({"classification_heads.x.dense.weight": torch.zeros(1)})
    ),
    "transformers' RoBERTa is built differently: encoder_normalize_before is True": lambda new, _: (
        new(encoder_normalize_before=True)
    ),
    "transformers' RoBERTa is built differently: activation_fn is relu, must be gelu": (
        lambda new, _: new(activation_fn="relu")
    ),
    "cannot be loaded: .*odd.weight": lambda new, _: spoiled(
        new(), lambda s: s["model"].update({"encoder.odd.weight": torch.zeros(1)})
    ),
    "was trained with another dictionary": lambda new, folder: (
        new(),
        convert.write_dictionary(small_dictionary(12), folder / "dict.txt"),
    )[0],
    "the dictionary is not beside the training data: name it with --dict": lambda new, folder: (
        new(),
        (folder / "dict.txt").unlink(),
    )[0],
    "no such file": lambda new, folder: folder / "none.pt",
    "out exists already": lambda new, folder: (new(), (folder / "out").mkdir())[0],
}


@pytest.mark.parametrize("message", TO_TRANSFORMERS)
def test_what_cannot_cross_to_transformers_is_refused(
    message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = TO_TRANSFORMERS[message](checkpoint, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as refused:
        convert_to_transformers(file, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def changed(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def other_specials(folder: Path) -> None:
    symbols = ["<pad>", "<s>", *DICTIONARY.symbols[2:]]
    tokenizers.words(symbols, 12).save_pretrained(folder)


def splitting(folder: Path, how: Any) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pre_tokenizer": how}))


def without_head(folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder)
    model.save_pretrained(folder)


TO_FAIRSEQ: Dict[str, Callable[[Path], Any]] = {
    "the special tokens of .* are .'<pad>', '<s>'": other_specials,
    "has 20 tokens, more than 19 embeddings": lambda folder: their_model_of_rows(folder, 19),
    "fairseq's RoBERTa is built differently: layer_norm_eps is 1e-12, must be 1e-05": (
        lambda folder: changed(folder, layer_norm_eps=1e-12)
    ),
    "fairseq's RoBERTa is built differently: hidden_act is relu": (
        lambda folder: changed(folder, hidden_act="relu")
    ),
    "holds no complete masked language model: lm_head.bias is missing": without_head,
    "splits text by .*BertPreTokenizer.*, must be .*WhitespaceSplit": lambda folder: splitting(
        folder, {"type": "BertPreTokenizer"}
    ),
    "splits text by .*None": lambda folder: splitting(folder, None),
    "has no tokenizer": lambda folder: [
        (folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
    ],
    "no such folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


def their_model_of_rows(folder: Path, rows: int) -> None:
    their_model(folder, rows=rows)


@pytest.mark.parametrize("message", TO_FAIRSEQ)
def test_what_cannot_cross_to_fairseq_is_refused(message: str, tmp_path: Path) -> None:
    their_model(tmp_path / "in")
    TO_FAIRSEQ[message](tmp_path / "in")
    with pytest.raises(ValueError, match=message) as refused:
        convert_to_fairseq(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="the model is of type bert, must be one of"):
        roberta.to_fairseq(SimpleNamespace(config=transformers.BertConfig()))


def test_the_command_converts_and_refuses_in_one_line(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts/convert_checkpoint.py"
    monkeypatch.syspath_prepend(str(script.parent))
    given = [str(script), "--to", "transformers", str(checkpoint()), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", given)
    runpy.run_path(str(script), run_name="__main__")
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert str(end.value) == f"convert_checkpoint.py: {tmp_path / 'out'} exists already"
    monkeypatch.setattr(sys, "argv", [*given[:2], "fairseq", *given[3:], "--dict", "x"])
    with pytest.raises(SystemExit, match="--to fairseq takes the tokenizer that is in IN"):
        runpy.run_path(str(script), run_name="__main__")
