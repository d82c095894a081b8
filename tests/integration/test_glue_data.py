"""fairseq-train on sentence data whose parts do not fit together: one line, before any training."""

import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from tests.helpers import write_split
from tests.unit.test_glue_sentence_data import LABELS, SENTENCES, WORDS, labels

from .runs import BIN, MODEL, TRAIN, run_alike

SENTENCE = [
    *("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"),
    *("--arch", "roberta", "--optimizer", "adam", "--max-update", "2", "--max-positions", "16"),
    *("--required-batch-size-multiple", "1"),
]
REGRESSION = ["--regression-target", "--num-classes", "1", "--best-checkpoint-metric", "loss"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in three classes, and the same as numbers."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "valid"):
        for part in ("input0", "input1"):
            write_split(folder / part, split, WORDS, SENTENCES)
        names = ("positive", "negative", "neutral", "neutral")
        write_split(folder / "label", split, LABELS, labels(*names))
        (folder / "label" / f"{split}.label").write_text("0\n1\n0.5\n0.25\n")
    return folder


def without(name: str) -> Callable[[Path], None]:
    """What removes the files of this name."""

    def remove(data: Path) -> None:
        found = list(data.glob(name))
        assert found
        for file in found:
            file.unlink()

    return remove


def nothing(data: Path) -> None:
    """Leave everything as it is."""


def write_nan(data: Path) -> None:
    """One number of the validation set is none."""
    (data / "label/valid.label").write_text("0\n1\nNaN\n0.25\n")


MISTAKES: Dict[str, Tuple[Callable[[Path], None], List[str], str]] = {
    "a class too many": (
        *(nothing, ["--num-classes", "2"]),
        "/label/valid, example 1: label 'positive' is number 3 of",
    ),
    "valid without labels": (
        *(without("label/valid.[bi]*"), ["--num-classes", "3"]),
        "no labels of split valid: ",
    ),
    "train without numbers": (
        without("label/train.label"),
        REGRESSION,
        "no numbers of split train",
    ),
    "valid without second sentences": (
        *(without("input1/valid.*"), ["--num-classes", "3"]),
        "no split valid in ",
    ),
    "a number that is none": (
        write_nan,
        REGRESSION,
        "/label/valid.label:3: 'NaN' is not a finite number",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parts_that_do_not_fit_end_with_one_line(data: Path, tmp_path: Path, mistake: str) -> None:
    spoil, options, message = MISTAKES[mistake]
    shutil.copytree(data, tmp_path / "data")
    spoil(tmp_path / "data")
    done = run_alike(*command(tmp_path), *options)
    assert done.status == 1
    assert message in done.output.strip().splitlines()[-1]
    assert "Traceback" not in done.output
    assert not done.logged("train_inner")
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize("options", [["--num-classes", "3"], REGRESSION])
def test_parts_that_fit_are_trained_on(data: Path, tmp_path: Path, options: List[str]) -> None:
    shutil.copytree(data, tmp_path / "data")
    done = run_alike(*command(tmp_path), *options)
    assert done.status == 0, done.output[-3000:]
    assert len(done.logged("train_inner")) == 2
    assert done.logged("valid")


def command(folder: Path) -> List[Any]:
    """A training of two updates."""
    fairseq_train = [BIN / "fairseq-train", folder / "data", *TRAIN, *MODEL, *SENTENCE]
    return [*fairseq_train, "--save-dir", folder / "out"]
