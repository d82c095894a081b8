"""Files that are never seen half-written."""

import os

import pytest

from pkm_fairseq.memory.files import whole_file, write_file


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    file = tmp_path / "file"
    write_file(file, "one\n")
    with whole_file(file) as out:
        out.write("zwölf".encode())
        assert file.read_text() == "one\n"
    assert file.read_text(encoding="utf-8") == "zwölf"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_no_trace_and_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    file = tmp_path / "file"
    write_file(file, "one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{file}'"):
        write_file(file, "two")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "one"
    with pytest.raises(FileNotFoundError, match="missing/file"):
        write_file(tmp_path / "missing/file", "three")


def test_an_input_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'input'"), whole_file(tmp_path / "file"):
        open("input").close()
    assert not list(tmp_path.iterdir())
