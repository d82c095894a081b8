"""A small corpus, and runs on it that several tests look at."""

import fcntl
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest

from .runs import MEMORY, ROOT, Run, binarise, run_well, train, write_sentences

Shared = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """A folder by its name, filled once, by whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        out, finished = base / name, base / f"{name}.finished"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                fill(out)
                finished.touch()
        return out

    return folder


@pytest.fixture(scope="session")
def data_bin(shared: Shared) -> Path:
    """A binarised corpus with train and valid."""

    def fill(folder: Path) -> None:
        write_sentences(folder / "train.txt", 400, seed=0)
        write_sentences(folder / "valid.txt", 60, seed=1)
        binarise(folder, folder / "bin")

    return shared("corpus", fill) / "bin"


def _train(data: Path, out: Path, *options: Any) -> None:
    done = train(data, out, *options)
    (out / "output").write_text(done.output)


STOCK = ["--task", "masked_lm", "--criterion", "masked_lm", "--optimizer", "adam"]


@pytest.fixture(scope="session")
def plain_run(data_bin: Path, shared: Shared) -> Path:
    """The folder of a stock fairseq RoBERTa trained for 6 updates with stock everything."""
    options = [*STOCK, "--arch", "roberta", "--max-update", "6"]
    return shared("plain", lambda out: _train(data_bin, out, *options))


@pytest.fixture(scope="session")
def stock_pkm_run(data_bin: Path, shared: Shared) -> Path:
    """The folder of a PKM trained for 6 updates with fairseq's own task and optimizer."""
    options = [*STOCK, "--arch", "pkm_roberta_tiny", *MEMORY, "--max-update", "6"]
    return shared("stock_pkm", lambda out: _train(data_bin, out, *options))


@pytest.fixture(scope="session")
def resm_run(data_bin: Path, shared: Shared) -> "tuple[Path, Run]":
    """The folder and log of a ResM trained for 12 updates with the plugin's everything."""
    # draws that some batches hold and one does not
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "12"]
    options += ["--memory-usage-draws", "3"]
    out = shared("resm", lambda out: _train(data_bin, out, *options))
    return out, Run(0, (out / "output").read_text())


# --- the demo ---------------------------------------------------------------------------------


def demo(out: Path, corpus: Path, *options: Any) -> List[Any]:
    """The command of a quick demo."""
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--preset", "quick", "--out", out]
    return [*command, "--corpus", corpus, "--validate-faiss", *options]


@pytest.fixture(scope="session")
def corpus(shared: Shared) -> Path:
    """Sentences of made-up words, of very different frequencies."""

    def fill(folder: Path) -> None:
        rng = np.random.default_rng(0)
        syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
        words = ["".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(400)]
        with (folder / "own.txt").open("w") as text:
            for _ in range(3000):
                ranks = len(words) * rng.random(rng.integers(8, 14)) ** 3
                print(" ".join(words[int(rank)] for rank in ranks).capitalize() + ".", file=text)

    return shared("demo_corpus", fill) / "own.txt"


@pytest.fixture(scope="session")
def finished(corpus: Path, shared: Shared) -> "tuple[Path, Run]":
    """The folder and output of a quick demo that ran through: plain, ResM and PKM checkpoints."""

    def fill(folder: Path) -> None:
        done = run_well(*demo(folder / "out", corpus))
        (folder / "output").write_text(done.output)

    folder = shared("demo", fill)
    return folder / "out", Run(0, (folder / "output").read_text())
