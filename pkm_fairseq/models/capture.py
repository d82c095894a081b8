"""Capture the inputs of a trained model's memories on real text."""

import argparse
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from fairseq.data import Dictionary, data_utils
from torch import Tensor

from ..memory.hosts import observing
from ..memory.observe.capture import InputCapture
from .checkpoints import (
    compare_dictionary,
    data_folder,
    dictionary_beside_data,
    has_memory,
    load_dictionary,
    options_of,
    read_checkpoint,
    refuse_other_models,
)
from .roberta import PkmRobertaModel

SENTENCES = 16  # sequences per batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model and a text."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a trained model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DATA-BIN", help="folder made by fairseq-preprocess")
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, one passage per line")
    parser.add_argument("--split", help="split of --data (default: valid)")
    parser.add_argument(
        "--sentencepiece-model",
        "--spm",
        metavar="FILE",
        help="tokenizer of --text; without it, the text must consist of symbols of the dictionary, "
        "separated by blanks",
    )
    parser.add_argument(
        "--dict",
        metavar="FILE",
        help="dictionary of --text (default: dict.txt in the folder of the training data)",
    )
    parser.add_argument(
        "--queries",
        "-n",
        type=int,
        default=1000,
        metavar="N",
        help="tokens to look up in each memory; each head has its own query (default: 1000)",
    )


def capture(
    args: Namespace, layers: Optional[List[int]] = None
) -> Tuple[PkmRobertaModel, Dict[int, Tensor]]:
    """Load the model that the options of ``add_arguments`` name, and capture inputs on the text.

    Args:
        args: the parsed options.
        layers: memory layers; None for all.

    Returns:
        The model, in eval mode, and its memories' inputs by layer, (queries, width).

    Raises:
        ValueError: an option or a file is wrong; the message names it.
    """
    if args.queries < 1:
        raise ValueError(f"--queries is {args.queries}, must be at least 1")
    for option, value, other in (
        ("--split", args.split, args.data),
        ("--sentencepiece-model", args.sentencepiece_model, args.text),
        ("--dict", args.dict, args.text),
    ):
        if value is not None and not other:
            raise ValueError(f"{option} has no effect with {'--text' if args.text else '--data'}")
    args.split = args.split or "valid"
    checkpoint = read_checkpoint(args.checkpoint, "--checkpoint")
    if not has_memory(checkpoint):
        raise ValueError(f"--checkpoint {args.checkpoint}: the model has no memory")
    dictionary = dictionary_of(args, checkpoint)
    model = load_model(checkpoint, dictionary, args.checkpoint)
    lines = data_lines(args, dictionary) if args.data else text_lines(args, dictionary)
    sequences = pack(lines, model.max_positions(), dictionary.bos())
    return model, capture_inputs(model, sequences, dictionary.pad(), args.queries, layers)


def load_model(
    checkpoint: Dict[str, Any], dictionary: Dictionary, path: str = "checkpoint"
) -> PkmRobertaModel:
    """Build and load the model of a ``pkm_roberta`` checkpoint, in float32 and eval mode.

    Raises:
        ValueError: the checkpoint is damaged or holds another model, or the dictionary does not
            match.
    """
    refuse_other_models(checkpoint, path)
    options = options_of(checkpoint, "model")
    if "memory_layers" not in options:
        raise ValueError(f"{path} holds no options of a pkm_roberta model")
    compare_dictionary(checkpoint, dictionary, path)
    task = SimpleNamespace(source_dictionary=dictionary)
    # None is an option that was not given; fairseq takes None in a Namespace for a value
    given = {name: value for name, value in options.items() if value is not None}
    model = PkmRobertaModel.build_model(Namespace(**{**given, "init_from": None}), task)
    try:
        model.load_state_dict(checkpoint["model"], strict=True)
    except RuntimeError as error:  # lists all parameters that do not fit, one per line
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit its options: {problem}") from None
    return model.float().eval()


def pack(lines: Iterable[Tensor], length: int, bos: int) -> Iterator[Tensor]:
    """Pack lines of token ids into sequences of up to ``length``, each starting with ``bos``.

    It cuts a line only if the line is longer than a sequence.
    """
    room = length - 1
    packed: List[Tensor] = []
    for line in lines:
        for piece in torch.split(line, room):
            if sum(map(len, packed)) + len(piece) > room:
                yield torch.cat([torch.tensor([bos]), *packed])
                packed = []
            packed.append(piece.to(torch.int64, copy=True))
    if packed:
        yield torch.cat([torch.tensor([bos]), *packed])


@torch.no_grad()
def capture_inputs(
    model: PkmRobertaModel,
    sequences: Iterable[Tensor],
    pad: int,
    n_tokens: int,
    layers: Optional[List[int]] = None,
) -> Dict[int, Tensor]:
    """Run the model over sequences of token ids, and keep the inputs of its memories.

    Args:
        model: in eval mode.
        sequences: token ids, each (T,).
        pad: the padding id; padding is not captured.
        n_tokens: the number of tokens to capture.
        layers: memory layers; None for all.

    Returns:
        By layer, (n_tokens, width).

    Raises:
        ValueError: a layer has no memory, or the sequences are too few.
    """
    captures = {index: InputCapture() for index in _chosen(list(model.memory_layers()), layers)}
    n_seen = 0
    with observing(model, captures):
        for batch in batches(sequences, pad):
            model(batch, features_only=True)
            n_seen += int(batch.ne(pad).sum())
            if n_seen >= n_tokens:
                return {i: captured.inputs()[:n_tokens] for i, captured in captures.items()}
    raise ValueError(f"--queries is {n_tokens}, must be at most {n_seen}: the text has no more")


def _chosen(present: List[int], layers: Optional[List[int]]) -> List[int]:
    for index in layers or []:
        if index not in present:
            raise ValueError(
                f"--layers names layer {index}, which has no memory; "
                f"layers with one: {', '.join(map(str, present))}"
            )
    return present if layers is None else layers


def batches(sequences: Iterable[Tensor], pad: int, size: int = SENTENCES) -> Iterator[Tensor]:
    """Batches of ``size`` sequences of token ids, (B, T), padded on the right."""
    waiting: List[Tensor] = []
    for sequence in sequences:
        waiting.append(sequence.clone())
        if len(waiting) == size:
            yield data_utils.collate_tokens(waiting, pad)  # (B, T)
            waiting = []
    if waiting:
        yield data_utils.collate_tokens(waiting, pad)


def dictionary_of(args: Namespace, checkpoint: Dict[str, Any]) -> Dictionary:
    """The dictionary of the options, or the one beside the training data.

    Raises:
        ValueError: there is none.
    """
    if args.data:
        return load_dictionary(os.path.join(data_folder(args.data), "dict.txt"))
    if args.dict:
        return load_dictionary(args.dict)
    found = dictionary_beside_data(checkpoint)
    if found is None:
        raise ValueError("the dictionary is not beside the training data: name it with --dict")
    return found


def data_lines(args: Namespace, dictionary: Dictionary) -> Iterator[Tensor]:
    """The token ids of ``args.split`` of ``args.data``.

    Raises:
        ValueError: there is no such split.
    """
    path = os.path.join(data_folder(args.data), args.split)
    dataset = data_utils.load_indexed_dataset(path, dictionary)
    if dataset is None:
        raise ValueError(f"--data {args.data} has no split {args.split}")
    return (dataset[index] for index in range(len(dataset)))


def text_lines(args: Namespace, dictionary: Dictionary) -> Iterator[Tensor]:
    """The token ids of the lines of ``args.text``.

    Raises:
        ValueError: the text is not UTF-8, or more than half of its symbols are unknown.
    """
    encode = _encoder(args.sentencepiece_model)
    try:
        with open(args.text, encoding="utf-8") as text:
            lines = [line for line in map(encode, text) if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {args.text} is not UTF-8: {error}") from None
    ids = [dictionary.encode_line(line, add_if_not_exist=False) for line in lines]
    n_symbols = sum(len(line) for line in ids)
    n_unknown = sum(int(line.eq(dictionary.unk()).sum()) for line in ids)
    if 2 * n_unknown > n_symbols:
        raise ValueError(
            f"--text {args.text}: {n_unknown} of {n_symbols} symbols are not in the dictionary; "
            "tokenize it as the training data, with --sentencepiece-model"
        )
    return iter(ids)


def _encoder(file: Optional[str]) -> Any:
    if file is None:
        return str.strip
    import sentencepiece  # an extra

    if not os.path.isfile(file):
        raise ValueError(f"--sentencepiece-model {file}: no such file")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=file)
    except RuntimeError:
        raise ValueError(f"--sentencepiece-model {file}: not a sentencepiece model") from None
    return lambda line: " ".join(processor.encode(line, out_type=str))
