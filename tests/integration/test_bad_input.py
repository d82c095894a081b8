"""Every mistake of a user ends in one clear line, without a traceback, with a status not 0."""

from pathlib import Path
from typing import List

import pytest

from .runs import BIN, MASKED_LM, MEMORY, MODEL, TRAIN, Run, binarise, run, write_sentences

# what is wrong, and what the line must say
OPTIONS = {
    "layer out of range": (["--memory-layers", "2"], "names layer 2, must be in 0..1"),
    "negative layer": (["--memory-layers", "[-1]"], "names layer -1, must be in 0..1"),
    "layer named twice": (["--memory-layers", "1,1"], "names layer 1 twice"),
    "knn above n_keys": (["--memory-knn", "17"], "knn is 17, must be at most n_keys, which is 16"),
    "knn of one": (["--memory-knn", "1"], "knn is 1, must be at least 2"),
    "odd k_dim": (["--memory-k-dim", "15"], "k_dim is 15, must be even"),
    "no keys": (["--memory-n-keys", "0"], "n_keys is 0, must be an integer of at least 2"),
    "no heads": (["--memory-heads", "0"], "heads is 0, must be an integer of at least 1"),
    "dropout of one": (["--memory-read-dropout", "1"], "read_dropout is 1.0, must be a number in"),
    "a table larger than memory": (
        ["--memory-n-keys", "1000000"],
        "takes 128,000,000,000,000 bytes (119,209.3 GiB), which could not be had",
    ),
    "negative norm": (
        ["--memory-value-clip-norm", "-1"],
        "memory-value-clip-norm is -1.0, must be at least 0",
    ),
    "unknown dtype": (["--memory-value-dtype", "float16"], "invalid choice: 'float16'"),
    "unknown mode": (["--memory-mode", "both"], "invalid choice: 'both'"),
    "unknown norm": (["--memory-query-norm", "group"], "invalid choice: 'group'"),
    "missing checkpoint": (["--init-from", "missing.pt"], "--init-from missing.pt: no such file"),
    "two starts": (
        ["--init-from", "a.pt", "--restore-file", "b.pt"],
        "--init-from a.pt and --restore-file b.pt exclude each other",
    ),
    "a sharded optimizer": (
        ["--zero-sharding", "os"],
        "--zero-sharding os does not work with --optimizer pkm_adam",
    ),
    "workers that train apart": (
        ["--ddp-backend", "slowmo"],
        "--ddp-backend slowmo does not work with --optimizer pkm_adam",
    ),
    "a layer to keep that is not there": (
        ["--encoder-layers-to-keep", "0,2"],
        "encoder-layers-to-keep names layer 2, must be in 0..1",
    ),
    "fp16 on the CPU": (["--fp16"], "on the CPU use --fp16-no-flatten-grads too, or --memory-ef"),
    "bf16 without a TPU": (["--bf16"], "use fairseq-hydra-train with common.bf16=true"),
    "another start": (
        ["--init-from", "a.pt", "--finetune-from-model", "b.pt"],
        "--init-from a.pt and --finetune-from-model b.pt exclude each other",
    ),
}


def failing(data: Path, save_dir: Path, options: List[object]) -> Run:
    """A fairseq-train that must fail, cleanly."""
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", save_dir]
    done = run(*command, "--arch", "pkm_roberta_tiny", *MEMORY, "--max-update", "1", *options)
    assert done.status != 0
    assert "Traceback" not in done.output
    assert not list(save_dir.glob("*.pt"))
    return done


@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_wrong_option_is_named_in_one_line(data_bin: Path, tmp_path: Path, mistake: str) -> None:
    options, message = OPTIONS[mistake]
    assert message in failing(data_bin, tmp_path, options).output.splitlines()[-1]


def test_a_file_that_is_no_checkpoint(data_bin: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.pt"
    file.write_text("no checkpoint")
    last = failing(data_bin, tmp_path / "out", ["--init-from", file]).output.splitlines()[-1]
    assert f"--init-from {file}: not a readable checkpoint" in last


def test_a_checkpoint_of_another_width(data_bin: Path, plain_run: Path, tmp_path: Path) -> None:
    wide = ["--init-from", plain_run / "checkpoint_last.pt", "--encoder-embed-dim", "64"]
    last = failing(data_bin, tmp_path, wide).output.splitlines()[-1]
    assert "does not fit the model: embed_tokens.weight is (" in last


@pytest.mark.parametrize("ours", [True, False])
def test_a_checkpoint_with_another_dictionary_of_the_same_size(
    data_bin: Path, plain_run: Path, resm_run: "tuple[Path, Run]", tmp_path: Path, ours: bool
) -> None:
    write_sentences(tmp_path / "train.txt", 30, seed=2)
    write_sentences(tmp_path / "valid.txt", 5, seed=3)
    symbols = (data_bin / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(reversed(symbols)) + "\n")
    other = binarise(tmp_path, tmp_path / "bin", "--srcdict", tmp_path / "dict.txt")
    checkpoint = (resm_run[0] if ours else plain_run) / "checkpoint_last.pt"
    last = failing(other, tmp_path / "out", ["--init-from", checkpoint]).output.splitlines()[-1]
    assert ("trained with another dictionary" if ours else "is not that of this run") in last


def test_data_without_a_dictionary(tmp_path: Path) -> None:
    last = failing(tmp_path, tmp_path / "out", []).output.splitlines()[-1]
    assert f"no dictionary at {tmp_path / 'dict.txt'}" in last


def test_data_without_a_training_split(data_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text((data_bin / "dict.txt").read_text())
    last = failing(tmp_path, tmp_path / "out", []).output.splitlines()[-1]
    assert f"Dataset not found: valid ({tmp_path / 'valid'})" in last


def test_an_empty_corpus(data_bin: Path, tmp_path: Path) -> None:
    write_sentences(tmp_path / "train.txt", 0, seed=0)
    write_sentences(tmp_path / "valid.txt", 5, seed=1)
    empty = binarise(tmp_path, tmp_path / "bin", "--srcdict", data_bin / "dict.txt")
    last = failing(empty, tmp_path / "out", []).output.splitlines()[-1]
    assert f"split train in {empty} is empty" in last
