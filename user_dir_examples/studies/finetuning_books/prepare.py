#!/usr/bin/env python3
"""Data of the study: old text to pretrain on, and a book that the pretraining has not seen.

Old text: the first books of train.txt.xz, without the new one, up to 10 MB; of these, by whole
books, 5 % are for test and 3 % for validation. New text: Kant's Critique of Pure Reason; its last
tenth is for validation.
Writes OUT/old/bin and OUT/new/bin with one dictionary.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

from pkm_fairseq.experiments.data.prepare import load_sentencepiece, prepare_corpus

NEW = "Immanuel Kant — Critique of Pure Reason"
OLD_LETTERS = 10_000_000
VOCABULARY = 2000


def read_books(folder: Path) -> "List[Tuple[str, List[str]]]":
    """Titles, and the lines of each book."""
    titles = (folder / "train.titles.txt").read_text(encoding="utf-8").splitlines()
    with lzma.open(folder / "train.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read()
    books = [book.splitlines() for book in text.strip("\n").split("\n\n")]
    if len(books) != len(titles):
        raise SystemExit(f"{folder}: {len(titles)} titles but {len(books)} books")
    return list(zip(titles, books, strict=True))


def choose_old(books: "List[Tuple[str, List[str]]]") -> List[List[str]]:
    """The first books, without the new one."""
    chosen, letters = [], 0
    for title, lines in books:
        if title != NEW and letters < OLD_LETTERS:
            chosen.append(lines)
            letters += sum(map(len, lines))
    return chosen


def prepare_new(lines: List[str], old: Path, folder: Path) -> None:
    """Encode the new book with the tokenizer and the dictionary of the old text."""
    tokenizer = load_sentencepiece(old / "spm.model")
    border = len(lines) * 9 // 10
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "--only-source"]
    command += ["--srcdict", str(old / "bin" / "dict.txt"), "--destdir", str(folder / "bin")]
    for split, part in (("train", lines[:border]), ("valid", lines[border:])):
        pieces = (" ".join(line) for line in tokenizer.encode(part, out_type=str))
        (folder / f"{split}.pieces").write_text("".join(f"{line}\n" for line in pieces))
        command += [f"--{split}pref", str(folder / f"{split}.pieces")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Prepare both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path, help="the folder with train.txt.xz and its titles")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    books = read_books(args.books)
    for part in ("old", "new"):
        shutil.rmtree(args.out / part, ignore_errors=True)
        (args.out / part).mkdir(parents=True)
    prepare_corpus(choose_old(books), args.out / "old", VOCABULARY)
    prepare_new(dict(books)[NEW], args.out / "old", args.out / "new")


if __name__ == "__main__":
    main()
