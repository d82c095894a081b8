"""Open checkpoints for analysis, and the text for them to read."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from fairseq.data import Dictionary, ListDataset, MaskTokensDataset
from torch import Tensor

from ..models.capture import data_lines, dictionary_of, load_model, pack, text_lines
from ..models.checkpoints import has_memory, options_of, read_checkpoint, task_name
from ..models.roberta import PkmRobertaModel

ORIGIN = re.compile(r"\.layers\.(\d+)\.reads\.origin$")
MASKING = ("seed", "mask_prob", "leave_unmasked_prob", "random_token_prob")
MASKING += ("freq_weighted_replacement", "mask_multiple_length", "mask_stdev")


class Opened(NamedTuple):
    """A checkpoint, ready to read text.

    Attributes:
        name: its name in reports.
        file: the checkpoint.
        model: in eval mode.
        dictionary: the dictionary of its training.
        updates: finished updates; None if the checkpoint does not store them.
        has_read_times: whether it stores the update of each slot's last read.
        masking: the masking options of its training; None if the training masks nothing.
        origins: by layer, the training that created its memory; None if unknown.
    """

    name: str
    file: Path
    model: PkmRobertaModel
    dictionary: Dictionary
    updates: Optional[int]
    has_read_times: bool
    masking: Optional[Dict[str, Any]] = None
    origins: Optional[Dict[int, Tuple[int, ...]]] = None


def named_files(arguments: Sequence[str]) -> List[Tuple[str, Path]]:
    """Read ``[NAME=]FILE`` arguments; the default name is that of the file's folder.

    Returns:
        Names, each once, and files.

    Raises:
        ValueError: a name is empty or given twice.
    """
    given: List[Tuple[Optional[str], Path]] = []
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or Path(argument).exists():  # a path may contain =, too
            given.append((None, Path(argument)))
        elif not name or not file:
            raise ValueError(f"{argument!r} must be FILE or NAME=FILE")
        else:
            given.append((name, Path(file)))
    folders = [file.absolute().parent.name for name, file in given if name is None]
    names = []
    for name, file in given:
        folder = file.absolute().parent.name
        is_unique = folders.count(folder) == 1
        names.append(name or (folder if is_unique else f"{folder}/{file.stem}"))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two files are called {name}: give them names with NAME=FILE")
    return list(zip(names, (file for _, file in given), strict=True))


def open_checkpoint(name: str, file: Path, args: Namespace) -> Opened:
    """Load a checkpoint of a model with memory.

    Args:
        name: its name in reports.
        file: the checkpoint.
        args: ``data``, ``text`` and ``dict`` of the command line.

    Raises:
        ValueError: the file is missing, holds no memory, or the dictionary does not fit.
    """
    checkpoint = read_checkpoint(str(file), "--checkpoint")
    if not has_memory(checkpoint):
        raise ValueError(f"--checkpoint {file}: the model has no memory")
    dictionary = dictionary_of(args, checkpoint)
    # before loading, which fills in what older versions did not save
    has_read_times = any(name.endswith(".reads.last_read") for name in checkpoint["model"])
    origins = origins_of(checkpoint)
    model = load_model(checkpoint, dictionary, str(file))
    updates, masking = updates_of(checkpoint), masking_of(checkpoint)
    return Opened(name, file, model, dictionary, updates, has_read_times, masking, origins)


def origins_of(checkpoint: Dict[str, Any]) -> Optional[Dict[int, Tuple[int, ...]]]:
    """By layer, the training that created a memory; None if an older version saved it."""
    found = {
        int(match[1]): tuple(int(x) for x in tensor.float().round().tolist())
        for name, tensor in checkpoint["model"].items()
        if (match := ORIGIN.search(name)) and tensor.any()
    }
    return found or None


def why_not_one_training(before: Opened, after: Opened) -> Optional[str]:
    """Why two checkpoints do not belong to one training or to its continuation.

    Returns:
        The reason; None if they belong together.
    """
    if before.origins is not None and after.origins is not None:
        layers = before.origins.keys() & after.origins.keys()
        is_one = all(before.origins[layer] == after.origins[layer] for layer in layers)
        return None if is_one else "their memories come from different trainings"
    if before.file.absolute().parent == after.file.absolute().parent:
        return None
    return "an older version saved them, in different folders: they may come from two trainings"


def masking_of(checkpoint: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The masking options of a checkpoint's task; None if it masks nothing.

    They leave out whole-word masking; the analysis masks token by token.
    """
    options = options_of(checkpoint, "task")
    if "masked_lm" not in str(task_name(checkpoint)) or options.get("skip_masking"):
        return None
    return {name: options[name] for name in MASKING if name in options}


def mask(opened: Opened, sequences: Sequence[Tensor]) -> List[Tensor]:
    """Mask the sequences as the training of a checkpoint does.

    Sequences that already contain ``<mask>`` do not change.
    """
    if opened.masking is None:
        return list(sequences)
    mask_idx = opened.dictionary.index("<mask>")
    masked = MaskTokensDataset(
        ListDataset(sequences), opened.dictionary, opened.dictionary.pad(), mask_idx,
        **opened.masking,
    )  # fmt: skip
    return [x if (x == mask_idx).any() else masked[i] for i, x in enumerate(sequences)]


def updates_of(checkpoint: Dict[str, Any]) -> Optional[int]:
    """Finished updates of a checkpoint, if stored."""
    history = checkpoint.get("optimizer_history") or [{}]
    return history[-1].get("num_updates")


def read_text(args: Namespace, dictionary: Dictionary, length: int) -> Iterator[Tensor]:
    """The sequences, each (T,) with T <= length, of ``data`` or ``text`` of the command line.

    Raises:
        ValueError: the text or split is missing, or too many of its symbols are unknown.
    """
    if args.text and not Path(args.text).is_file():
        raise ValueError(f"--text {args.text}: no such file")
    lines = data_lines(args, dictionary) if args.data else text_lines(args, dictionary)
    return pack(lines, length, dictionary.bos())


def first_tokens(sequences: Iterable[Tensor], n_tokens: int) -> List[Tensor]:
    """Sequences with the first ``n_tokens`` tokens, the last one cut; all if there are fewer."""
    taken: List[Tensor] = []
    room = n_tokens
    for sequence in sequences:
        if room <= 0:
            break
        taken.append(sequence[:room])
        room -= len(taken[-1])
    return taken


def count_tokens(sequences: Iterable[Tensor]) -> int:
    """Tokens of all sequences."""
    return sum(map(len, sequences))


def joined(pieces: Sequence[str], has_pieces: bool) -> str:
    """Symbols of a dictionary as readable text.

    Args:
        pieces: symbols.
        has_pieces: whether they are sentencepiece pieces, in which U+2581 begins a word.
    """
    if not has_pieces:
        return " ".join(pieces)
    marked = (f"\u2581{piece}" if _is_special(piece) else piece for piece in pieces)
    return "".join(marked).replace("\u2581", " ").strip()


def shown(symbol: str, has_pieces: bool) -> str:
    """One symbol, readable: the middle or the end of a word begins with an ellipsis."""
    if not has_pieces or _is_special(symbol):
        return symbol
    if symbol.startswith("\u2581"):
        return symbol[1:] or "\u2581"
    return f"\u2026{symbol}" if symbol[:1].isalnum() else symbol


def is_made_of_pieces(dictionary: Dictionary) -> bool:
    """Whether the symbols of a dictionary are sentencepiece's."""
    return any(symbol.startswith("\u2581") for symbol in dictionary.symbols)


def _is_special(symbol: str) -> bool:
    return symbol.startswith("<") and symbol.endswith(">") and len(symbol) > 2
