"""Train a sentencepiece model, encode the splits, and make fairseq's binary data."""

import io
import shutil
import sys
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence

import sentencepiece

from ..runs.processes import run_to_end

SPLITS = ("train", "valid", "test")


def prepare_corpus(splits: Dict[str, List[str]], folder: Path, vocabulary: int) -> None:
    """Train sentencepiece on the training text of a corpus, encode and binarise the corpus.

    It writes ``spm.model``, ``{train,valid,test}.{txt,pieces}`` and ``bin/`` into the folder.

    Args:
        splits: the lines of each split, as ``split_documents`` returns them.
        folder: an existing folder.
        vocabulary: number of sentencepiece pieces.

    Raises:
        ValueError: the text is too small.
    """
    (folder / "spm.model").write_bytes(train_sentencepiece(splits["train"], vocabulary))
    tokenizer = load_sentencepiece(folder / "spm.model")
    for split, lines in splits.items():
        write_lines(folder / f"{split}.txt", lines)
        encoded = tokenizer.encode(lines, out_type=str)
        write_lines(folder / f"{split}.pieces", [" ".join(pieces) for pieces in encoded])
    binarise({split: folder / f"{split}.pieces" for split in SPLITS}, folder / "bin")


def train_sentencepiece(lines: Sequence[str], vocabulary: int) -> bytes:
    """Train a unigram sentencepiece model; return the contents of its file.

    Raises:
        ValueError: the text is too small for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocabulary,
            hard_vocab_limit=False,  # a small text gets fewer pieces
            character_coverage=0.9999,
            max_sentence_length=1 << 16,  # bytes; sentencepiece skips longer lines
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"sentencepiece cannot make {vocabulary} pieces of {len(lines)} lines: {reason}"
        ) from None
    return model.getvalue()


def load_sentencepiece(model: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a sentencepiece model.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not model.is_file():
        raise ValueError(f"sentencepiece model {model}: no such file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):
        raise ValueError(
            f"sentencepiece model {model}: not a readable sentencepiece model"
        ) from None


def binarise(
    pieces: Dict[str, Path], out: Path, dictionary: Optional[Path] = None, workers: int = 1
) -> None:
    """Run fairseq-preprocess over encoded splits.

    Args:
        pieces: by split, a file with pieces separated by spaces.
        out: folder for the data; its old content is deleted.
        dictionary: a dictionary file of fairseq; None makes one from train.
        workers: number of processes; the data are the same for any.

    Raises:
        ValueError: fairseq-preprocess failed.
    """
    shutil.rmtree(out, ignore_errors=True)  # fairseq-preprocess does not overwrite a dictionary
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "--only-source"]
    command += ["--destdir", str(out), "--workers", str(workers)]
    command += ["--srcdict", str(dictionary)] if dictionary else []
    for split, file in pieces.items():
        command += [f"--{split}pref", str(file)]
    done = run_to_end(command)
    missing = [split for split in pieces if not (out / f"{split}.bin").is_file()]
    if done.returncode or missing:
        lines = done.stderr.strip().splitlines() or [f"no data for {', '.join(missing)}"]
        raise ValueError(f"fairseq-preprocess failed: {lines[-1]}")


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Write a text of lines."""
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
