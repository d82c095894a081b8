#!/usr/bin/env python3
"""The new text of the study: Kant's Critique of Pure Reason, in the tokens of the demo's model.

Writes OUT/bin with the demo's dictionary; the last tenth of the book is for validation.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List

from pkm_fairseq.experiments.data.prepare import load_sentencepiece

NEW = "Immanuel Kant — Critique of Pure Reason"


def read_book(folder: Path, title: str) -> List[str]:
    """The lines of a book."""
    titles = (folder / "train.titles.txt").read_text(encoding="utf-8").splitlines()
    with lzma.open(folder / "train.txt.xz", "rt", encoding="utf-8") as file:
        books = file.read().strip("\n").split("\n\n")
    if len(books) != len(titles) or title not in titles:
        raise SystemExit(f"{folder}: {len(books)} books, {len(titles)} titles, or none is {title}")
    return books[titles.index(title)].splitlines()


def main() -> None:
    """Encode and binarise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="the folder that the demo wrote")
    parser.add_argument("books", type=Path, help="the folder with train.txt.xz and its titles")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    lines = read_book(args.books, NEW)
    tokenizer = load_sentencepiece(args.demo / "data" / "spm.model")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    border = len(lines) * 9 // 10
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "--only-source"]
    command += ["--srcdict", str(args.demo / "data" / "bin" / "dict.txt")]
    command += ["--destdir", str(args.out / "bin")]
    for split, part in (("train", lines[:border]), ("valid", lines[border:])):
        pieces = (" ".join(line) for line in tokenizer.encode(part, out_type=str))
        (args.out / f"{split}.pieces").write_text("".join(f"{line}\n" for line in pieces))
        command += [f"--{split}pref", str(args.out / f"{split}.pieces")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
