"""Convert RoBERTa checkpoints between fairseq and transformers, and compare both models."""

import shutil
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor

from ...huggingface import roberta, tokenizers
from ...memory.files import write_file
from ...models.checkpoints import (
    check_dictionary,
    data_folder,
    dictionary_beside_data,
    dictionary_sha256,
    is_roberta,
    load_dictionary,
    load_model_and_task,
    read_checkpoint,
)
from ...models.config import RunOptions

CHECKPOINT, DICTIONARY = "checkpoint.pt", "dict.txt"
TOLERANCE = 1e-5  # of logits, in float32
SEQUENCES, LENGTH = 8, 64  # random symbols for comparing models
LINES = 64  # most lines of text to compare


def convert_to_transformers(
    checkpoint: Path,
    out: Path,
    dictionary: Optional[Path] = None,
    sentencepiece_model: Optional[Path] = None,
    gpt2_bpe: Optional[Path] = None,
    text: Optional[Path] = None,
) -> List[str]:
    """Write the folder of a masked language model of transformers.

    Args:
        checkpoint: a checkpoint of a ``roberta`` or ``pkm_roberta`` of fairseq.
        out: the new folder, which must not exist.
        dictionary: dict.txt, or a data folder; None takes the one beside the training data, or
            beside the checkpoint.
        sentencepiece_model: the tokenizer of the training text.
        gpt2_bpe: the folder with GPT-2's ``encoder.json`` and ``vocab.bpe``, instead of
            ``sentencepiece_model``; with neither, blanks separate the symbols.
        text: UTF-8 text, to compare symbols and logits of both models, too.

    Returns:
        Lines of a report.

    Raises:
        ValueError: the checkpoint, the dictionary or the text does not fit; nothing is written.
    """
    stored = read_checkpoint(str(checkpoint), "IN", needs_tables=True)
    if not is_roberta(stored):
        raise ValueError(f"{checkpoint} is not a RoBERTa of fairseq")
    symbols = _dictionary_of(stored, checkpoint, dictionary)
    note = check_dictionary(stored, symbols, str(checkpoint))
    state = stored["model"]
    heads = sorted({".".join(n.split(".")[:2]) for n in state if n.startswith("classification_")})
    if heads:
        raise ValueError(f"{checkpoint} has heads, which cannot be converted: {', '.join(heads)}")
    theirs = _load_fairseq(checkpoint, stored, symbols)
    fairseq = _of_fairseq(theirs)
    model = roberta.to_transformers(fairseq)
    length = model.config.max_position_embeddings - 2
    tokenizer = _tokenizer(symbols.symbols, length, sentencepiece_model, gpt2_bpe)
    said = [f"{checkpoint}: {len(state)} tensors; {note}", *roberta.left_out(fairseq.options)]
    with _whole_folder(out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if sentencepiece_model is not None:
            shutil.copy(sentencepiece_model, part / tokenizers.PIECES[1])
        written = roberta.load_masked_lm(str(part))
        encode = _encoder(symbols, sentencepiece_model, gpt2_bpe)
        said += _compare(theirs, written, symbols, text, encode, tokenizer)
    return said


def convert_to_fairseq(folder: Path, out: Path, text: Optional[Path] = None) -> List[str]:
    """Write a folder with ``checkpoint.pt``, ``dict.txt`` and the files of the tokenizer.

    Args:
        folder: folder of a masked language model of transformers, RoBERTa or XLM-R.
        out: the new folder, which must not exist.
        text: as for :func:`convert_to_transformers`.

    Returns:
        Lines of a report.

    Raises:
        ValueError: the model or the tokenizer does not fit; nothing is written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    model = roberta.load_masked_lm(str(folder))
    options, state = roberta.to_fairseq(model)
    symbols = tokenizers.to_symbols(folder, model.config.vocab_size)
    with _whole_folder(out) as part:
        lines = symbols.symbols[len(tokenizers.SPECIAL) :]
        if lines[-1] == tokenizers.MASK:  # tasks add it at the end
            lines = lines[:-1]
        write_file(part / DICTIONARY, "".join(f"{symbol} 1\n" for symbol in lines))
        for name, content in symbols.files.items():
            (part / name).write_bytes(content)
        dictionary = load_dictionary(str(part / DICTIONARY))
        if dictionary.symbols != symbols.symbols:
            raise ValueError(
                f"{folder}: fairseq cannot store some tokens as symbols, such as blanks"
            )
        stored = _checkpoint(options, state, dictionary, out)
        torch.save(stored, part / CHECKPOINT)
        theirs = _load_fairseq(
            part / CHECKPOINT, read_checkpoint(str(part / CHECKPOINT)), dictionary
        )
        encode = _encoder(
            dictionary,
            part / tokenizers.PIECES[0] if symbols.bpe == "sentencepiece" else None,
            part if symbols.bpe == "gpt2" else None,
        )
        tokenizer = tokenizers.AutoTokenizer.from_pretrained(str(folder))
        said = [f"{folder}: {len(state)} tensors; {len(dictionary)} symbols, --bpe {symbols.bpe}"]
        said += _compare(theirs, model, dictionary, text, encode, tokenizer)
    return said


# --- fairseq ----------------------------------------------------------------------------------


def _of_fairseq(model: Any) -> roberta.Fairseq:
    """The options of a fairseq model, and its state with the names of the current version."""
    args = model.args
    options = dict(args) if OmegaConf.is_config(args) else vars(args)
    state = {name: x for name, x in model.state_dict().items() if not name.endswith(".version")}
    return roberta.Fairseq(options, state)


def _dictionary_of(stored: Dict[str, Any], checkpoint: Path, given: Optional[Path]) -> Dictionary:
    if given is not None:
        file = Path(data_folder(str(given))) / DICTIONARY if given.is_dir() else given
        return load_dictionary(str(file))
    found = dictionary_beside_data(stored)
    beside = checkpoint.parent / DICTIONARY
    if found is None and beside.is_file():
        found = load_dictionary(str(beside))
    if found is None:
        raise ValueError("the dictionary is not beside the training data: name it with --dict")
    return found


def _checkpoint(
    options: Dict[str, Any], state: Dict[str, Tensor], dictionary: Dictionary, out: Path
) -> Dict[str, Any]:
    run = {x.name: x.default for x in fields(RunOptions) if x.default is not None}
    args = {
        **run,
        **options,
        "task": "masked_lm",
        "criterion": "masked_lm",
        "optimizer": "adam",
        "lr_scheduler": "fixed",
        "data": str(out.absolute()),
        "tokens_per_sample": options["max_positions"],
    }
    return {
        "args": Namespace(**args),
        "model": state,
        "task_state": {"dictionary_sha256": dictionary_sha256(dictionary)},
        "optimizer_history": [
            {
                "criterion_name": "MaskedLmLoss",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "extra_state": {"epoch": 1, "val_loss": None, "train_iterator": {"epoch": 1}},
    }


def _load_fairseq(file: Path, stored: Dict[str, Any], dictionary: Dictionary) -> Any:
    """Load a checkpoint with fairseq, which needs a folder with the dictionary."""
    with tempfile.TemporaryDirectory() as data:
        write_dictionary(dictionary, Path(data) / DICTIONARY)
        model, _, task = load_model_and_task(str(file), stored, data=data)
    read = len(task.source_dictionary)
    if read != len(dictionary):
        raise ValueError(f"{file}: fairseq reads {read} symbols, must be {len(dictionary)}")
    return model.float().eval()


def write_dictionary(dictionary: Dictionary, file: Path) -> None:
    """Write the symbols of a dictionary that has ``<mask>``, in their order."""
    lines = dictionary.symbols[len(tokenizers.SPECIAL) :]
    write_file(file, "".join(f"{symbol} 1\n" for symbol in lines))


# --- tokenizers -------------------------------------------------------------------------------


def _tokenizer(
    symbols: List[str], length: int, sentencepiece_model: Optional[Path], gpt2_bpe: Optional[Path]
) -> Any:
    if tuple(symbols[:4]) != tokenizers.SPECIAL or tokenizers.MASK not in symbols:
        raise ValueError(f"the dictionary begins with {symbols[:4]}, not {tokenizers.SPECIAL}")
    if sentencepiece_model is not None:
        return tokenizers.pieces(symbols, sentencepiece_model, length)
    if gpt2_bpe is not None:
        return tokenizers.bytes_of_gpt2(symbols, gpt2_bpe, length)
    return tokenizers.words(symbols, length)


def _encoder(
    dictionary: Dictionary, sentencepiece_model: Optional[Path], gpt2_bpe: Optional[Path]
) -> Any:
    """A function from a line of text to ids, as in fairseq: ``<s> ... </s>``."""
    cut: Any = str.strip
    if sentencepiece_model is not None:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
        cut = lambda line: " ".join(processor.encode(line, out_type=str))  # noqa: E731
    elif gpt2_bpe is not None:
        from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

        paths = [str(gpt2_bpe / name) for name in (tokenizers.ENCODER, tokenizers.MERGES)]
        byte_pairs = get_encoder(*paths)
        cut = lambda line: " ".join(map(str, byte_pairs.encode(line)))  # noqa: E731

    def encode(line: str) -> List[int]:
        ids = dictionary.encode_line(cut(line), append_eos=True, add_if_not_exist=False)
        return [dictionary.bos(), *ids.tolist()]

    return encode


# --- comparison -------------------------------------------------------------------------------


def _compare(
    theirs: Any,
    ours: Any,
    dictionary: Dictionary,
    text: Optional[Path],
    encode: Any,
    tokenizer: Any,
) -> List[str]:
    """Compare logits of random symbols, and symbols and logits of a text.

    Raises:
        ValueError: the results differ.
    """
    pad, longest = dictionary.pad(), ours.config.max_position_embeddings - 2
    generator = torch.Generator().manual_seed(1)
    shape = (SEQUENCES, min(LENGTH, longest))
    ids = torch.randint(4, len(dictionary), shape, generator=generator)
    ids[:, 0] = dictionary.bos()
    ids[1::2, shape[1] // 2 :] = pad
    said = [f"logits of random symbols differ by at most {_difference(theirs, ours, ids, pad):.1e}"]
    if text is None:
        return [*said, "tokenizers were not compared: that needs --text"]
    lines = _lines(text)
    for number, line in lines:
        own = encode(line)
        given = tokenizer(line)["input_ids"]
        if own != given:
            where = next((i for i, (a, b) in enumerate(zip(own, given)) if a != b), "its end")  # noqa: B905
            raise ValueError(
                f"{text}: line {number} is tokenized differently from symbol {where} on"
            )
    worst, n_symbols = 0.0, 0
    for _, line in lines[:LINES]:
        one = torch.tensor([encode(line)[:longest]])
        worst, n_symbols = max(worst, _difference(theirs, ours, one, pad)), n_symbols + one.numel()
    said.append(f"{text}: {len(lines)} lines are tokenized alike")
    said.append(f"logits of {n_symbols} symbols of it differ by at most {worst:.1e}")
    return said


def _lines(text: Path) -> List[Tuple[int, str]]:
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text} is not UTF-8: {error}") from None
    return [(i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]


@torch.no_grad()
def _difference(theirs: Any, ours: Any, ids: Tensor, pad: int) -> float:
    mask = ids.ne(pad)
    one = theirs(ids)[0]  # (B, T, symbols)
    other = ours(input_ids=ids, attention_mask=mask.long()).logits
    worst = float((one - other)[mask].abs().max())
    if not worst <= TOLERANCE:
        raise ValueError(f"logits differ by {worst:.1e}, must differ by at most {TOLERANCE}")
    return worst


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Write a folder under a temporary name; rename it when complete, remove it after an error.

    Raises:
        ValueError: the name is taken, or its parent does not exist.
    """
    if out.exists():
        raise ValueError(f"{out} exists already")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} must be in a folder that exists")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
