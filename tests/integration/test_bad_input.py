"""Every mistake of a user ends in one clear line, without a traceback, with a status not 0."""

from pathlib import Path
from typing import List

import pytest

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    ROOT,
    TRAIN,
    USER_DIR,
    Run,
    binarise,
    run,
    run_alike,
    write_sentences,
)

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


def last_line(done: Run) -> str:
    """The last line of a command that failed cleanly."""
    assert done.status not in (0, None)
    assert "Traceback" not in done.output
    assert "HYDRA_FULL_ERROR" not in done.output
    return done.output.splitlines()[-1]


def failing(data: Path, save_dir: Path, options: List[object]) -> str:
    """The last line of a fairseq-train that must fail, cleanly."""
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", save_dir]
    done = run_alike(*command, "--arch", "pkm_roberta_tiny", *MEMORY, "--max-update", "1", *options)
    assert not list(save_dir.glob("*.pt"))
    return last_line(done)


@pytest.mark.parametrize("mistake", OPTIONS)
def test_a_wrong_option_is_named_in_one_line(data_bin: Path, tmp_path: Path, mistake: str) -> None:
    options, message = OPTIONS[mistake]
    assert message in failing(data_bin, tmp_path, options)


def test_a_file_that_is_no_checkpoint(data_bin: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.pt"
    file.write_text("no checkpoint")
    last = failing(data_bin, tmp_path / "out", ["--init-from", file])
    assert f"--init-from {file}: not a readable checkpoint" in last


def test_a_checkpoint_of_another_width(data_bin: Path, plain_run: Path, tmp_path: Path) -> None:
    wide = ["--init-from", plain_run / "checkpoint_last.pt", "--encoder-embed-dim", "64"]
    last = failing(data_bin, tmp_path, wide)
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
    last = failing(other, tmp_path / "out", ["--init-from", checkpoint])
    assert ("trained with another dictionary" if ours else "dict.txt, is another one of") in last


def test_data_without_a_dictionary(tmp_path: Path) -> None:
    last = failing(tmp_path, tmp_path / "out", [])
    assert f"no dictionary at {tmp_path / 'dict.txt'}" in last


def test_data_without_a_training_split(data_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text((data_bin / "dict.txt").read_text())
    last = failing(tmp_path, tmp_path / "out", [])
    assert f"Dataset not found: valid ({tmp_path / 'valid'})" in last


def test_an_empty_corpus(data_bin: Path, tmp_path: Path) -> None:
    write_sentences(tmp_path / "train.txt", 0, seed=0)
    write_sentences(tmp_path / "valid.txt", 5, seed=1)
    empty = binarise(tmp_path, tmp_path / "bin", "--srcdict", data_bin / "dict.txt")
    last = failing(empty, tmp_path / "out", [])
    assert f"split train in {empty} is empty" in last


# --- the other ways in ----------------------------------------------------------------------------

HYDRA = {
    "an option": (["model.memory_layers=[9]"], "pkm_roberta: memory-layers names layer 9"),
    "no data": (["task.data=/nowhere"], "no dictionary at /nowhere/dict.txt"),
    "another start": (["+model.init_from=missing.pt"], "--init-from missing.pt: no such file"),
    "a criterion": (["+criterion.memory_usage_tokens=-1"], "memory-usage-tokens is -1, must be"),
}


@pytest.mark.parametrize("mistake", HYDRA)
def test_hydra_ends_with_the_same_line(data_bin: Path, tmp_path: Path, mistake: str) -> None:
    overrides, message = HYDRA[mistake]
    command = [BIN / "fairseq-hydra-train", "--config-name", "resm_tiny"]
    command += ["--config-dir", ROOT / "user_dir_examples/pretraining/config"]
    command += [f"common.user_dir={USER_DIR}", f"task.data={data_bin}", "common.cpu=true"]
    command += [f"hydra.run.dir={tmp_path}", "optimization.max_update=1"]
    done = run_alike(*command, *overrides)
    assert message in last_line(done)


VALIDATE = {
    "no dictionary": ([], "no dictionary at "),
    "a layer to keep": (
        ["--model-overrides", "{'encoder_layers_to_keep': '7'}"],
        "encoder-layers-to-keep names layer 7, must be in 0..1",
    ),
}


@pytest.mark.parametrize("mistake", VALIDATE)
def test_fairseq_validate_ends_with_the_same_line(
    data_bin: Path, resm_run: "tuple[Path, Run]", tmp_path: Path, mistake: str
) -> None:
    options, message = VALIDATE[mistake]
    data = data_bin if options else tmp_path
    checkpoint = resm_run[0] / "checkpoint_last.pt"
    command = [BIN / "fairseq-validate", data, "--user-dir", USER_DIR, "--path", checkpoint]
    command += ["--cpu", "--task", "pkm_masked_lm", "--tokens-per-sample", "32"]
    done = run_alike(*command, "--batch-size", "8", *options)
    assert message in last_line(done)


def test_what_fairseq_hides_while_a_model_is_loaded_comes_through(
    data_bin: Path, resm_run: "tuple[Path, Run]", tmp_path: Path
) -> None:
    """It says "Cannot load model parameters from checkpoint" in place of any reason."""
    options = ["--encoder-layers", "6", "--memory-layers", "5", "--encoder-layers-to-keep", "5"]
    options += ["--finetune-from-model", str(resm_run[0] / "checkpoint_last.pt")]
    last = failing(data_bin, tmp_path, [*options])
    assert "encoder-layers-to-keep names layer 5, but the checkpoint has layers 0..1" in last


def test_workers_end_with_the_same_line(data_bin: Path, tmp_path: Path) -> None:
    """torch hands over the traceback of a worker, and terminates the others aloud."""
    workers = ["--distributed-world-size", "2", "--distributed-backend", "gloo"]
    last = failing(data_bin, tmp_path, [*workers, "--memory-layers", "2"])
    assert last.startswith("pkm_roberta: memory-layers names layer 2, must be in 0..1")


def test_a_user_dir_that_is_refused(data_bin: Path, tmp_path: Path) -> None:
    """fairseq loads it before any command of ours could begin."""
    (tmp_path / "a_link").symlink_to(USER_DIR)
    last = failing(data_bin, tmp_path, ["--user-dir", tmp_path / "a_link"])
    assert last.startswith("--user-dir: a_link is a link or copy of pkm_fairseq")


def test_the_real_command_ends_with_the_same_line(data_bin: Path, tmp_path: Path) -> None:
    """The tests above have one process import fairseq for all of them."""
    command = [BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, *MODEL, "--save-dir", tmp_path]
    done = run(*command, "--arch", "pkm_roberta_tiny", *MEMORY, "--memory-layers", "2")
    assert done.status == 1
    assert last_line(done).startswith("pkm_roberta: memory-layers names layer 2, must be in 0..1")
