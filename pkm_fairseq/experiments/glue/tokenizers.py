"""The tokenizers of pretrained models: sentencepiece, and the byte-level BPE of GPT-2."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

from ...memory.files import write_file
from ..data.prepare import load_sentencepiece
from ..runs.folders import key_of_files

# by bpe, the names of its files in a prepared folder
FILES: Dict[str, Tuple[str, ...]] = {
    "sentencepiece": ("spm.model",),
    "gpt2": ("encoder.json", "vocab.bpe"),
}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that can be sent to other processes.

    Attributes:
        bpe: sentencepiece or gpt2.
        files: its files, in the order of ``FILES[bpe]``.
    """

    bpe: str
    files: Tuple[Path, ...]

    @property
    def settings(self) -> Dict[str, str]:
        """The settings that identify it."""
        return {"bpe": self.bpe, "sha256": key_of_files(*self.files)}

    def load(self) -> Callable[[str], List[str]]:
        """A function from a sentence to symbols of the dictionary.

        Raises:
            ValueError: a file is missing or damaged. The function raises it, too, for a sentence
                that it cannot encode.
        """
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"tokenizer file {file}: no such file")
        try:
            return _gpt2(*self.files) if self.bpe == "gpt2" else _sentencepiece(*self.files)
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"no {self.bpe} tokenizer in {self.files[0]}: {reason}") from None

    def save(self, folder: Path) -> None:
        """Copy the files into a folder, for ``saved_tokenizer``.

        Raises:
            ValueError: the folder holds another tokenizer.
        """
        if (folder / "tokenizer.json").is_file():
            if saved_tokenizer(folder).settings != self.settings:
                raise ValueError(f"{folder} holds another tokenizer: choose another --out")
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file, name in zip(self.files, FILES[self.bpe], strict=True):
            shutil.copyfile(file, folder / name)
        write_file(folder / "tokenizer.json", json.dumps({"bpe": self.bpe}))


def saved_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises:
        ValueError: there is none, or its description is not one.
    """
    description = folder / "tokenizer.json"
    if not description.is_file():
        raise ValueError(f"{description}: no such file; --data must be what prepare_glue.py made")
    try:
        bpe = json.loads(description.read_text(encoding="utf-8"))["bpe"]
        names = FILES[bpe]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{description} is not a file of prepare_glue.py: prepare again") from None
    return Tokenizer(bpe, tuple(folder / name for name in names))


def load_dictionary(file: Path) -> Dictionary:
    """Load a dictionary, without the mask that fairseq's tasks add at the end.

    Raises:
        ValueError: the file is missing or not a dictionary.
    """
    if not file.is_file():
        raise ValueError(f"dictionary {file}: no such file")
    try:
        return Dictionary.load(str(file))
    except Exception as error:  # fairseq raises even plain Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"dictionary {file} is not one of fairseq's: {reason}") from None


def encode(symbols: List[str], dictionary: Dictionary) -> List[int]:
    """The ids of symbols, and the end of the sentence."""
    return [*map(dictionary.index, symbols), dictionary.eos()]


def _sentencepiece(model: Path) -> Callable[[str], List[str]]:
    processor: Any = load_sentencepiece(model)
    return lambda sentence: processor.encode(sentence, out_type=str)


def _gpt2(encoder_json: Path, vocab_bpe: Path) -> Callable[[str], List[str]]:
    encoder = get_encoder(str(encoder_json), str(vocab_bpe))

    def symbols(sentence: str) -> List[str]:
        try:
            return [str(token) for token in encoder.encode(sentence.strip())]
        except KeyError as error:
            raise ValueError(f"{encoder_json} has no {error} for {sentence!r}") from None

    return symbols
