"""scripts/prepare_glue.py as a user runs it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.glue_data import COLUMNS, write_glue, write_tokenizer

from .runs import ROOT, Run, run, run_well

EXAMPLE = ROOT / "user_dir_examples" / "glue" / "task_spec_example.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Miniature tasks, and a tokenizer with its dictionary."""
    folder = tmp_path_factory.mktemp("glue")
    write_glue(folder / "glue")
    return write_tokenizer(folder)


def command(made: Path, out: Path, *options: Any) -> "list[Any]":
    return [
        *(sys.executable, ROOT / "scripts" / "prepare_glue.py", "--glue-data", made / "glue"),
        *("--out", out, "--dict", made / "dict.txt", "--bpe", "sentencepiece"),
        *("--sentencepiece-model", made / "spm.model", *options),
    ]


def failing(made: Path, out: Path, *options: Any) -> str:
    """The one line with which a command fails."""
    done: Run = run(*command(made, out, *options))
    assert done.status != 0
    assert "Traceback" not in done.output
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("prepare_glue.py: ")
    return line


def test_all_tasks_and_again(made: Path, tmp_path: Path) -> None:
    done = run_well(*command(made, tmp_path, "--workers", "2"))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted([*COLUMNS, "tokenizer"])
    for name in COLUMNS:
        assert json.loads((tmp_path / name / "task.json").read_text())["name"] == name
    assert "warning: QNLI train: 60 rows, GLUE's has 104,743" in done.output
    again = run_well(*command(made, tmp_path))
    assert again.output.count(": already prepared") == len(COLUMNS)


def test_a_users_own_task(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "reviews"
    folder.mkdir(parents=True)
    rows = "review\tverdict\n" + 'a "good cat\tgood\nthe bad dog\tbad\n'
    for name in ("train", "dev", "test"):
        (folder / f"{name}.tsv").write_text(rows)
    options = ["--glue-data", tmp_path / "glue", "--task-spec", EXAMPLE]
    run_well(*command(made, tmp_path / "out", *options))
    told = json.loads((tmp_path / "out" / "reviews" / "task.json").read_text())
    assert (told["labels"], told["metrics"]) == (["bad", "good"], ["accuracy", "f1"])
    assert told["splits"] == {"train": 2, "valid": 2, "test": 2}


MISTAKES = {
    "no such task": (["--tasks", "RTE", "rte"], "no task 'rte': the tasks are CoLA"),
    "no data": (["--glue-data", "/nowhere"], "--glue-data /nowhere: no such folder"),
    "no dictionary": (["--dict", "/nowhere"], "dictionary /nowhere: no such file"),
    "no tokenizer": (["--sentencepiece-model", "/nowhere"], "/nowhere: no such file"),
    "files of the other": (["--vocab-bpe", "a"], "--bpe sentencepiece does not take --vocab-bpe"),
    "no files": (["--bpe", "gpt2"], "--bpe gpt2 does not take --sentencepiece-model"),
    "no workers": (["--workers", "0"], "--workers is 0, must be at least 1"),
    "no spec": (["--task-spec", "/nowhere"], "task spec /nowhere: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_named_in_one_line(mistake: str, made: Path, tmp_path: Path) -> None:
    options, message = MISTAKES[mistake]
    assert message in failing(made, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


BAD_FILES = {
    "missing dev": ("dev.tsv", None, "dev.tsv: no such file"),
    "another file": ("train.tsv", b"a\tb\n1\t2\n", "must have one column 'sentence1'"),
    "a malformed test row": (
        "test.tsv",
        b"index\tsentence1\tsentence2\n0\ta\n",
        "test.tsv:2: 2 columns, must be 3",
    ),
    "many unknown labels": (
        "dev.tsv",
        b"index\tsentence1\tsentence2\tlabel\n" + b"0\ta\tb\t1\n" * 6,
        "6 of 6 rows are malformed, the first: ",
    ),
    "no UTF-8": (
        "test.tsv",
        b"index\tsentence1\tsentence2\n0\t\xff\tb\n",
        "test.tsv:2: not UTF-8",
    ),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(mistake: str, made: Path, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[mistake]
    file = write_glue(tmp_path / "glue", ["RTE"]) / "RTE" / name
    file.unlink() if content is None else file.write_bytes(content)
    options = ["--glue-data", tmp_path / "glue", "--tasks", "RTE"]
    assert message in failing(made, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "RTE").exists()
