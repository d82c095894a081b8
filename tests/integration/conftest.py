"""A small corpus, and runs on it that several tests look at."""

from pathlib import Path

import pytest

from .runs import MEMORY, Run, binarise, train, write_sentences


@pytest.fixture(scope="session")
def data_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarised corpus with train and valid."""
    folder = tmp_path_factory.mktemp("corpus")
    write_sentences(folder / "train.txt", 400, seed=0)
    write_sentences(folder / "valid.txt", 60, seed=1)
    return binarise(folder, folder / "bin")


@pytest.fixture(scope="session")
def plain_run(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stock fairseq RoBERTa trained for 6 updates with stock everything."""
    out = tmp_path_factory.mktemp("plain")
    train(
        *(data_bin, out, "--task", "masked_lm", "--criterion", "masked_lm"),
        *("--optimizer", "adam", "--arch", "roberta", "--max-update", "6"),
    )
    return out


@pytest.fixture(scope="session")
def resm_run(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Run]":
    """The folder and log of a ResM trained for 12 updates with the plugin's everything."""
    out = tmp_path_factory.mktemp("resm")
    return out, train(data_bin, out, "--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "12")
