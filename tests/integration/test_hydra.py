"""fairseq-hydra-train with the examples' configurations: every arm, a sweep, a user's own parts."""

import re
import shlex
from pathlib import Path
from typing import Any, Dict, List

import pytest

from .runs import BIN, MASKED_LM, ROOT, TRAIN, USER_DIR, Run, load, run, run_well

EXAMPLES = ROOT / "user_dir_examples"
SHORT = ["optimization.max_update=3", "lr_scheduler.warmup_updates=1", "common.log_interval=1"]
SHORT += ["common.cpu=true"]
ROBERTA = ["--arch", "roberta", "--criterion", "masked_lm", "--optimizer", "adam"]
ROBERTA += ["--encoder-layers", "3", "--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"]
ROBERTA += ["--encoder-attention-heads", "4"]


def losses(run: Run) -> Dict[str, str]:
    return {log["num_updates"]: log["loss"] for log in run.logged("train_inner")}


def command_line(data: Path, save_dir: Path, *options: str) -> Dict[str, str]:
    """Losses of fairseq-train with the settings of the tiny configurations, shortened."""
    command = [BIN / "fairseq-train", data, *TRAIN, *MASKED_LM, "--save-dir", save_dir]
    command += ["--tokens-per-sample", "64", "--batch-size", "16", "--seed", "1"]
    command += ["--adam-betas", "(0.9,0.98)", "--adam-eps", "1e-6", "--clip-norm", "1"]
    command += ["--lr-scheduler", "polynomial_decay", "--warmup-updates", "1"]
    command += ["--total-num-update", "3", "--max-update", "3"]
    done = run_well(*command, *options)
    assert len(losses(done)) == 3
    return losses(done)


@pytest.mark.parametrize(
    ("config", "options"),
    [("plain_tiny", ROBERTA), ("pkm_tiny", ["--arch", "pkm_roberta_tiny"])],
)
def test_a_configuration_and_the_command_line_train_the_same_model(
    data_bin: Path, tmp_path: Path, config: str, options: List[str]
) -> None:
    done = run_well(EXAMPLES / "pretraining/run.sh", config, data_bin, tmp_path / "a b", *SHORT)
    assert losses(done) == command_line(data_bin, tmp_path / "cli", *options)
    assert (tmp_path / "a b" / "checkpoint_last.pt").is_file()


def readme_command(example: str, word: str) -> List[str]:
    """The command of an example's README that has this word."""
    text = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [b for b in blocks if word in shlex.split(b.replace("\\\n", " "), comments=True)]
    return shlex.split(block.replace("\\\n", " "))


def test_the_sweep_of_the_readme_trains_each_job_as_if_alone(
    data_bin: Path, tmp_path: Path
) -> None:
    command = readme_command("pretraining", "-m")
    assert command[:2] == ["OMP_NUM_THREADS=1", ".venv/bin/fairseq-hydra-train"]
    given = [word.replace("demo_out/data/bin", str(data_bin)) for word in command[2:]]
    done = run_well(
        BIN / "fairseq-hydra-train", *given, *SHORT, f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert "#1 : task.data=" in done.output
    for heads in (1, 4):
        folder = tmp_path / "sweep" / f"model.memory_heads-{heads}"
        # also of a job that is worse than the one before
        for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
            keys = load(folder / name)["model"]["encoder.sentence_encoder.layers.1.memory.keys"]
            assert len(keys) == heads
    second = Run(0, (folder / "hydra_train.log").read_text())
    options = ["--arch", "resm_roberta_tiny"]
    assert losses(second) == command_line(data_bin, tmp_path / "cli", *options)


def test_a_job_that_is_refused_ends_the_sweep(data_bin: Path, tmp_path: Path) -> None:
    sweep = ["-m", *SHORT, "model.memory_layers=[9],[1]"]
    done = run(EXAMPLES / "pretraining/run.sh", "resm_tiny", data_bin, tmp_path, *sweep)
    assert done.status != 0
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("pkm_roberta: memory-layers names layer 9")


def test_parts_of_ones_own_work_with_both_drivers(data_bin: Path, tmp_path: Path) -> None:
    module = EXAMPLES / "extend/__init__.py"
    assert len(module.read_text(encoding="utf-8").splitlines()) < 62
    done = run_well(EXAMPLES / "extend/run.sh", data_bin, tmp_path, "4")
    steps = done.logged("train_inner")
    assert [log["num_updates"] for log in steps] == ["1", "2", "3", "4"] * 2
    assert losses(Run(0, done.output)) and all(float(log["key_penalty"]) > 0 for log in steps)
    by_cli, by_hydra = steps[:4], steps[4:]
    for key in ("loss", "key_penalty", "gnorm"):
        assert [log[key] for log in by_cli] == [log[key] for log in by_hydra], key
    penalties = [float(log["key_penalty"]) for log in by_cli]
    assert penalties[-1] < penalties[0]
    trained, validated = done.logged("valid")[-2:]
    assert validated["valid_loss"] == trained["valid_loss"]
    assert {"valid_memory0_tokens", "valid_memory2_tokens"} <= validated.keys()
    for driver in ("cli", "hydra"):
        state = load(tmp_path / driver / "checkpoint_last.pt")["model"]
        gates = [tensor for name, tensor in state.items() if name.endswith("output_proj.gate")]
        assert len(gates) == 2 and all((gate != 1).any() for gate in gates)  # it learns


def test_a_user_dir_must_not_have_the_name_of_a_package(data_bin: Path, tmp_path: Path) -> None:
    """As the README of the example says."""
    (tmp_path / "json").mkdir()
    options: List[Any] = ["--user-dir", tmp_path / "json", "--arch", "roberta"]
    done = run(BIN / "fairseq-train", data_bin, *options, "--task", "masked_lm")
    assert done.status != 0
    assert "not globally unique" in done.output


def test_the_penalty_of_ones_own_can_be_switched_off(data_bin: Path, tmp_path: Path) -> None:
    """At weight 0 the own criterion trains what the plugin's trains."""
    options = ["--arch", "resm_roberta_tiny", "--memory-layers", "0,2"]
    own = ["--user-dir", str(EXAMPLES / "extend"), "--arch", "my_resm_tiny", "--key-penalty", "0"]
    own += ["--criterion", "my_masked_lm"]
    ours = command_line(data_bin, tmp_path / "ours", "--user-dir", str(USER_DIR), *options)
    assert command_line(data_bin, tmp_path / "own", *own) == ours
