"""Convert between fairseq's dictionary and a tokenizer of transformers."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..memory.text import listed

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # at 0 to 3, in both
MASK = "<mask>"
ENCODER, MERGES = "encoder.json", "vocab.bpe"  # GPT-2's file names
PIECES = ("sentencepiece.bpe.model", "spm.model")  # file names of XLM-R and of our corpora
TOKENIZERS = (
    "tokenizer.json",
    "vocab.json",
    PIECES[0],
)  # without these files, transformers invents a tokenizer
USER_DEFINED = 4  # sentencepiece's type of pieces that are never split
# how fairseq splits text before it looks up words or merges pairs
SPLITS: Dict[str, Dict[str, Any]] = {
    "WordLevel": {"type": "WhitespaceSplit"},
    "BPE": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
}
UNKNOWN_PENALTY = 10.0  # sentencepiece's penalty for a symbol that its model lacks


class Symbols(NamedTuple):
    """The parts of a tokenizer that fairseq needs.

    Attributes:
        symbols: the dictionary's symbols, in order, including the special ones.
        files: the tokenizer's files by name; empty if blanks separate the symbols.
        bpe: the tokenizer's name for fairseq's ``--bpe``; None for blanks.
    """

    symbols: List[str]
    files: Dict[str, bytes]
    bpe: Optional[str]


# --- to transformers --------------------------------------------------------------------------


def words(symbols: Sequence[str], max_length: int) -> Any:
    """A tokenizer for text whose symbols are separated by blanks."""
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer, max_length)


def pieces(symbols: Sequence[str], model: Path, max_length: int) -> Any:
    """A tokenizer with the pieces of a sentencepiece model and the ids of the dictionary.

    Raises:
        ValueError: the model is not a unigram model, or has pieces that are not in the dictionary.
    """
    proto = _read_pieces(model)
    if proto.trainer_spec.model_type != 1 or proto.trainer_spec.byte_fallback:
        raise ValueError(f"{model} must be a sentencepiece unigram model without byte fallback")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"{model} puts blanks behind words: a tokenizer here has them in front")
    if own := [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]:
        raise ValueError(f"{model} has pieces of its user, which have no score: {listed(own, 3)}")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}  # NORMAL
    unknown = sorted(set(scores) - set(symbols))
    if unknown:
        raise ValueError(
            f"{model} has {len(unknown)} pieces that are not in the dictionary: {unknown[:3]}"
        )
    least = min(scores.values()) - UNKNOWN_PENALTY
    table = [(symbol, scores.get(symbol, least)) for symbol in symbols]
    tokenizer = Tokenizer(models.Unigram(table, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    spec = proto.normalizer_spec
    characters = spec.precompiled_charsmap  # empty for the rule "identity"
    steps: List[Any] = [normalizers.Precompiled(characters)] if characters else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=False)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "first" if spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace("\u2581", prepend_scheme=scheme)
    return _wrapped(tokenizer, max_length)


def bytes_of_gpt2(symbols: Sequence[str], folder: Path, max_length: int) -> Any:
    """A tokenizer of GPT-2's byte pairs; the dictionary's symbols are GPT-2's numbers.

    Args:
        symbols: the dictionary's symbols, in order.
        folder: folder with GPT-2's ``encoder.json`` and ``vocab.bpe``.
        max_length: the longest sequence.

    Raises:
        ValueError: the files are missing, or the dictionary belongs to another tokenizer.
    """
    numbers, merges = _read_bpe(folder)
    names = {str(number): token for token, number in numbers.items()}
    kept = {x for x in symbols if x in (*SPECIAL, MASK) or x.startswith("madeupword")}
    problems = [
        f"{x} is not one of its numbers" for x in symbols if x not in kept and x not in names
    ]
    problems += [f"{x} is not in the dictionary" for x in sorted(set(names) - set(symbols))]
    if problems:
        raise ValueError(
            f"{folder / ENCODER} belongs to another dictionary: {listed(problems, 3, '; ')}"
        )
    vocabulary = {x if x in kept else names[x]: i for i, x in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, max_length, byte_level=True)


def _wrapped(tokenizer: Any, max_length: int, byte_level: bool = False) -> Any:
    end, begin = ("</s>", 2), ("<s>", 0)
    if byte_level:
        tokenizer.post_processor = RobertaProcessing(end, begin, add_prefix_space=False)
    else:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[begin, end]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken(MASK, lstrip=True, special=True),
        model_max_length=max_length,
    )


# --- to fairseq -------------------------------------------------------------------------------


def to_symbols(folder: Path, n_rows: int) -> Symbols:
    """The dictionary of the tokenizer in a folder of transformers.

    Args:
        folder: folder of a model.
        n_rows: rows of its embedding; rows without a token get new symbols.

    Raises:
        ValueError: there is no tokenizer, its special tokens have other ids, or fairseq does not
            know its kind.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer file, such as {', '.join(TOKENIZERS)}")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if tuple(tokens[:4]) != SPECIAL or tokenizer.mask_token != MASK:
        raise ValueError(
            f"the special tokens of {folder} are {tokens[:4]} and {tokenizer.mask_token!r}, must "
            f"be {list(SPECIAL)} and {MASK!r}"
        )
    if len(tokens) > n_rows:
        raise ValueError(f"{folder} has {len(tokens)} tokens, more than {n_rows} embeddings")
    spare = [f"madeupword{i:04d}" for i in range(len(tokens), n_rows)]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, model = backend["model"]["type"], backend["model"]
    symbols, files, bpe = _symbols_of(kind, model, tokens, folder)
    found = backend["pre_tokenizer"] or {"type": None}
    if kind in SPLITS and {**found, **SPLITS[kind]} != found:
        raise ValueError(
            f"{folder} splits text by {found}, must be {SPLITS[kind]}, as fairseq does for a "
            f"{kind} tokenizer"
        )
    return Symbols([*symbols, *spare], files, bpe)


def _symbols_of(kind: str, model: Any, tokens: List[str], folder: Path) -> Symbols:
    if kind == "WordLevel":
        return Symbols(tokens, {}, None)
    if kind == "Unigram":
        found = [folder / name for name in PIECES if (folder / name).is_file()]
        if not found:
            raise ValueError(f"{folder} has no {' or '.join(PIECES)}, which fairseq needs")
        return Symbols(tokens, {PIECES[0]: found[0].read_bytes()}, "sentencepiece")
    if kind == "BPE":
        own = {*SPECIAL, MASK, *(x for x in tokens if x.startswith("madeupword"))}
        encoder = {token: i for i, token in enumerate(tokens) if token not in own}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        files = {
            ENCODER: json.dumps(encoder).encode(),
            MERGES: "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
        return Symbols([x if x in own else str(encoder[x]) for x in tokens], files, "gpt2")
    raise ValueError(f"fairseq does not know tokenizers of the kind {kind}")


# --- files ------------------------------------------------------------------------------------


def _read_bpe(folder: Path) -> Any:
    for name in (ENCODER, MERGES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
    numbers = json.loads((folder / ENCODER).read_text(encoding="utf-8"))
    lines = (folder / MERGES).read_text(encoding="utf-8").splitlines()
    return numbers, [tuple(line.split()) for line in lines if line and not line.startswith("#v")]


def _read_pieces(model: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("sentencepiece and protobuf are not installed") from None
    if not model.is_file():
        raise ValueError(f"{model}: no such file")
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model.read_bytes())
    except Exception:  # protobuf's exception class differs between versions
        raise ValueError(f"{model} is not a sentencepiece model") from None
    return proto
