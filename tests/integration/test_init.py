"""Starting a memory from a checkpoint without one: all arms, through the real commands."""

import shutil
from pathlib import Path

import pytest
import torch

from .runs import BIN, MEMORY, MODEL, TRAIN, USER_DIR, Run, load, run_well, train

LAYER = "encoder.sentence_encoder.layers.1"
TIMES = {f"{LAYER}.reads.{last}" for last in ("last_read", "last_top1", "origin")}


def first_state(data_bin: Path, save_dir: Path, *options: object) -> "tuple[Run, dict]":
    """The parameters a run starts from: those after one update with learning rates of next to 0."""
    still = ["--max-update", "1", "--lr", "1e-30", "--memory-value-lr", "0"]
    run = train(data_bin, save_dir, *MEMORY, *still, *options)
    return run, load(save_dir / "checkpoint_last.pt")["model"]


@pytest.mark.parametrize("mode", ["pkm", "resm"])
def test_init_from_loads_all_that_matches(
    data_bin: Path, plain_run: Path, tmp_path: Path, mode: str
) -> None:
    plain_file = plain_run / "checkpoint_last.pt"
    run, state = first_state(
        data_bin, tmp_path, "--arch", f"{mode}_roberta_tiny", "--init-from", plain_file
    )
    plain = load(plain_file)["model"]
    replaced = {f"{LAYER}.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    new = {name for name in state if ".memory." in name or ".reads." in name}
    assert {name for name in new if ".reads." in name} == TIMES
    assert state.keys() - new == plain.keys() - (replaced if mode == "pkm" else set())
    assert all(torch.equal(state[name], plain[name]) for name in state.keys() - new)
    (line,) = [
        line for line in run.output.splitlines() if "--init-from" in line and "loaded" in line
    ]
    assert "newly initialised layers.1.memory.*;" in line
    assert ("dropped layers.1.fc1.*, layers.1.fc2.*;" in line) == (mode == "pkm")
    assert "dictionary: equal to the one beside the checkpoint's training data" in line


def test_init_from_one_of_ours_loads_the_memory_too(
    data_bin: Path, resm_run: "tuple[Path, Run]", tmp_path: Path
) -> None:
    checkpoint = resm_run[0] / "checkpoint_last.pt"
    run, state = first_state(
        data_bin, tmp_path, "--arch", "resm_roberta_tiny", "--init-from", checkpoint
    )
    saved = load(checkpoint)["model"]
    statistics = {name for name in saved if "query_norm.running" in name or "tracked" in name}
    assert all(torch.equal(state[name], saved[name]) for name in saved.keys() - statistics - TIMES)
    origin = f"{LAYER}.reads.origin"
    assert torch.equal(state[origin], saved[origin])  # the memory goes on
    for name in TIMES - {origin}:  # a new training counts its own updates, of which it had one
        assert saved[name].max() > 1 and set(state[name].tolist()) == {0, 1}
    assert "dictionary: equal by its stored hash" in run.output


def test_a_resumed_run_ignores_init_from_and_does_not_need_the_file(
    data_bin: Path, plain_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "plain.pt"
    shutil.copy(plain_run / "checkpoint_last.pt", copy)
    options = ["--arch", "pkm_roberta", "--init-from", copy, *MEMORY]
    train(data_bin, tmp_path / "run", *options, "--max-update", "2")
    copy.unlink()
    resumed = train(data_bin, tmp_path / "run", *options, "--max-update", "4")
    assert f"--init-from {copy} ignored: the run resumes from" in resumed.output
    assert [log["num_updates"] for log in resumed.logged("train_inner")] == ["3", "4"]
    command = [BIN / "fairseq-validate", data_bin, "--path", tmp_path / "run/checkpoint_last.pt"]
    command += ["--user-dir", USER_DIR, "--task", "pkm_masked_lm", "--cpu", "--batch-size", "8"]
    run_well(*command, cwd=tmp_path)


@pytest.mark.parametrize("mode", ["pkm", "resm"])
def test_restore_file_and_finetune_from_model_take_a_plain_checkpoint(
    data_bin: Path, plain_run: Path, tmp_path: Path, mode: str
) -> None:
    plain_file = plain_run / "checkpoint_last.pt"
    reset = ["--reset-optimizer", "--reset-lr-scheduler", "--reset-meters", "--reset-dataloader"]
    arch = ["--arch", f"{mode}_roberta_tiny"]
    _, restored = first_state(
        data_bin, tmp_path / "restored", *arch, "--restore-file", plain_file, *reset
    )
    _, finetuned = first_state(
        data_bin, tmp_path / "finetuned", *arch, "--finetune-from-model", plain_file
    )
    plain = load(plain_file)["model"]
    for state in (restored, finetuned):
        assert all(torch.equal(state[name], plain[name]) for name in plain.keys() & state.keys())
        assert f"{LAYER}.memory.keys" in state


def test_without_memory_layers_the_run_equals_stock_roberta(
    data_bin: Path, plain_run: Path, tmp_path: Path
) -> None:
    stock = ["--task", "masked_lm", "--criterion", "masked_lm", "--optimizer", "adam"]
    none = ["--arch", "resm_roberta_base", "--memory-layers", "[]"]
    train(data_bin, tmp_path, *stock, *none, "--max-update", "6")
    ours, theirs = (load(out / "checkpoint_last.pt")["model"] for out in (tmp_path, plain_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pretrained_memory_finetunes_on_sentences(
    sentences_bin: Path, resm_run: "tuple[Path, Run]", tmp_path: Path
) -> None:
    command = [BIN / "fairseq-train", sentences_bin, *TRAIN, *MODEL, *MEMORY]
    command += ["--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"]
    command += ["--num-classes", "2", "--init-token", "0", "--max-positions", "32"]
    command += ["--finetune-from-model", resm_run[0] / "checkpoint_last.pt", "--lr", "3e-3"]
    command += ["--arch", "resm_roberta_tiny", "--max-epoch", "8", "--save-dir", tmp_path]
    run = run_well(*command)
    valid = run.logged("valid")[-1]
    assert float(valid["valid_accuracy"]) > 90  # the label is a word of the sentence
    assert float(valid["valid_memory1_tokens"]) > 0


@pytest.fixture(scope="module")
def sentences_bin(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences over the corpus's dictionary, labelled by their first word."""
    folder = tmp_path_factory.mktemp("sentences")
    for split, n_lines in (("train", 160), ("valid", 40)):
        lines = [f"w{i % 2} w{2 + i % 7} w{3 + i % 5}" for i in range(n_lines)]
        (folder / f"{split}.input0").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.label").write_text("".join(f"label{i % 2}\n" for i in range(n_lines)))
    for part, dictionary in (("input0", ["--srcdict", data_bin / "dict.txt"]), ("label", [])):
        command = [BIN / "fairseq-preprocess", "--only-source", "--destdir", folder / "bin" / part]
        command += ["--trainpref", folder / f"train.{part}"]
        command += ["--validpref", folder / f"valid.{part}"]
        run_well(*command, *dictionary)
    return folder / "bin"
