"""fairseq-train, fairseq-validate and fairseq-hydra-train with memories, end to end."""

import os
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    ROOT,
    TRAIN,
    USER_DIR,
    Run,
    load,
    run,
    run_alike,
    run_well,
    train,
    train_on_two_workers,
)

USAGE_KEYS = {
    f"valid_memory1_{key}"
    for key in (
        "tokens",
        "top1_usage",
        "topk_usage",
        "top1_ceiling",
        "topk_ceiling",
        "kl_weighted",
        "kl_unweighted",
        "gini",
        "dead_slots",
    )
}


def losses(run: Run) -> Dict[str, str]:
    return {log["num_updates"]: log["loss"] for log in run.logged("train_inner")}


def assert_equal_state(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_state(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("arch", ["pkm_roberta_tiny", "resm_roberta_tiny"])
def test_the_loss_falls(data_bin: Path, tmp_path: Path, arch: str) -> None:
    run = train(data_bin, tmp_path, "--arch", arch, *MEMORY, "--max-update", "40", "--lr", "1e-2")
    history = [float(loss) for loss in losses(run).values()]
    assert len(history) == 40
    assert sum(history[-5:]) / 5 < history[0] - 0.5


def test_validation_logs_usage_of_each_memory_layer(resm_run: "tuple[Path, Run]") -> None:
    (valid,) = resm_run[1].logged("valid")
    assert valid.keys() >= USAGE_KEYS
    assert 0 < float(valid["valid_memory1_top1_usage"]) <= 1


def test_training_logs_the_last_count_of_usage(resm_run: "tuple[Path, Run]") -> None:
    keys = {key.removeprefix("valid_") for key in USAGE_KEYS}
    first, *_, last = resm_run[1].logged("train_inner")
    assert not keys & set(first)  # one batch has too few tokens
    assert keys <= set(last)
    assert None not in last.values()


def test_fairseq_validate_finds_the_loss_and_usage_of_training(
    data_bin: Path, resm_run: "tuple[Path, Run]"
) -> None:
    out, trained = resm_run
    (logged,) = trained.logged("valid")
    validated = run_well(
        *(BIN / "fairseq-validate", data_bin, "--path", out / "checkpoint_last.pt", "--cpu"),
        *("--user-dir", USER_DIR, "--task", "pkm_masked_lm", "--valid-subset", "valid"),
        *("--batch-size", "8", "--log-format", "json", "--num-workers", "0"),
    )
    (again,) = validated.logged("valid")
    assert again["valid_loss"] == logged["valid_loss"]
    assert {key: again[key] for key in USAGE_KEYS} == {key: logged[key] for key in USAGE_KEYS}


def test_stock_task_criterion_and_optimizer_train_a_memory(data_bin: Path, tmp_path: Path) -> None:
    stock = ["--task", "masked_lm", "--criterion", "masked_lm", "--optimizer", "adam"]
    options = ["--arch", "resm_roberta_tiny", *MEMORY, *stock, "--max-update", "6"]
    train(data_bin, tmp_path, *options, "--save-interval-updates", "3")
    values = "encoder.sentence_encoder.layers.1.memory.values.weight"
    early = load(tmp_path / "checkpoint_1_3.pt")["model"][values]
    assert not torch.equal(early, load(tmp_path / "checkpoint_last.pt")["model"][values])


@pytest.mark.parametrize(
    "options",
    [["--validate-interval-updates", "3"], ["--update-freq", "2", "--clip-norm", "0.5"]],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    data_bin: Path, tmp_path: Path, options: "list[str]"
) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, *options]
    whole = train(data_bin, tmp_path / "whole", *options, "--max-update", "12")
    first = train(data_bin, tmp_path / "parts", *options, "--max-update", "6")
    rest = train(data_bin, tmp_path / "parts", *options, "--max-update", "12")
    assert {**losses(first), **losses(rest)} == losses(whole)
    one, other = (load(tmp_path / part / "checkpoint_last.pt") for part in ("whole", "parts"))
    assert_equal_state(one["model"], other["model"])
    assert_equal_state(one["last_optimizer_state"], other["last_optimizer_state"])
    assert rest.logged("valid")[-1]["valid_loss"] == whole.logged("valid")[-1]["valid_loss"]


def test_sentences_can_be_kept_apart(data_bin: Path, tmp_path: Path) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--sample-break-mode", "eos"]
    run = train(data_bin, tmp_path, *options, "--max-update", "2")
    assert list(losses(run)) == ["1", "2"]


def test_a_changed_value_lr_takes_effect_on_resume(data_bin: Path, tmp_path: Path) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY]
    train(data_bin, tmp_path, *options, "--max-update", "3")
    before = load(tmp_path / "checkpoint_last.pt")
    train(data_bin, tmp_path, *options, "--max-update", "6", "--memory-value-lr", "0")
    after = load(tmp_path / "checkpoint_last.pt")
    values = "encoder.sentence_encoder.layers.1.memory.values.weight"
    keys = "encoder.sentence_encoder.layers.1.memory.keys"
    assert torch.equal(before["model"][values], after["model"][values])
    assert not torch.equal(before["model"][keys], after["model"][keys])


def test_values_keep_their_learning_rate_while_the_schedule_warms_up(
    data_bin: Path, tmp_path: Path
) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "2"]
    schedule = ["--lr-scheduler", "polynomial_decay", "--warmup-updates", "10"]
    train(data_bin, tmp_path, *options, *schedule, "--total-num-update", "20")
    groups = load(tmp_path / "checkpoint_last.pt")["last_optimizer_state"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 1e-3])


def hydra_command(data: Path, save_dir: Path) -> List[Any]:
    """fairseq-hydra-train with the configuration of the pretraining example."""
    configs = ROOT / "user_dir_examples/pretraining/config"
    command = [BIN / "fairseq-hydra-train", "--config-dir", configs, "--config-name", "resm_tiny"]
    command += [f"common.user_dir={USER_DIR}", f"task.data={data}"]
    return [*command, f"checkpoint.save_dir={save_dir}", f"hydra.run.dir={save_dir}"]


def test_hydra_and_the_command_line_train_the_same_model(data_bin: Path, tmp_path: Path) -> None:
    hydra = run_well(
        *hydra_command(data_bin, tmp_path / "hydra"),
        *("optimization.max_update=4", "lr_scheduler.warmup_updates=2"),
        *("common.log_interval=1", "common.cpu=true"),
        cwd=tmp_path,
    )
    cli = run_well(
        *(BIN / "fairseq-train", data_bin, *TRAIN, *MASKED_LM, "--save-dir", tmp_path / "cli"),
        *("--arch", "resm_roberta_tiny", "--tokens-per-sample", "64", "--batch-size", "16"),
        *("--seed", "1", "--adam-betas", "(0.9,0.98)", "--adam-eps", "1e-6", "--clip-norm", "1"),
        *("--max-update", "4", "--lr-scheduler", "polynomial_decay", "--warmup-updates", "2"),
        *("--total-num-update", "4"),
    )
    assert len(losses(cli)) == 4 and losses(hydra) == losses(cli)
    one, other = (load(tmp_path / part / "checkpoint_last.pt") for part in ("hydra", "cli"))
    assert_equal_state(one["model"], other["model"])


def test_hydra_refuses_a_mistyped_option(data_bin: Path, tmp_path: Path) -> None:
    wrong = run(*hydra_command(data_bin, tmp_path), "+model.memory_n_kyes=8", cwd=tmp_path)
    assert wrong.status != 0 and "Key 'memory_n_kyes' not in" in wrong.output


def test_two_workers_report_the_usage_of_one(data_bin: Path, tmp_path: Path) -> None:
    """Three batches do not divide evenly: fairseq has one worker read the first one again."""
    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "1", "--lr", "1e-12"]
    # with rates of next to zero and no batch statistics all workers keep the same model
    options += ["--memory-value-lr", "0", "--memory-query-norm", "layer", "--batch-size-valid", "8"]
    options += ["--memory-usage-tokens", "100000"]  # all: of a smaller number each takes its own
    one = train(data_bin, tmp_path / "one", *options)
    workers = train_on_two_workers(data_bin, tmp_path / "two", *options)
    (alone,), (together,) = one.logged("valid"), workers[0].logged("valid")
    assert float(alone["valid_memory1_tokens"]) > 0
    assert {key: together[key] for key in USAGE_KEYS} == {key: alone[key] for key in USAGE_KEYS}


@pytest.mark.parametrize(
    "options",
    [["--memory-efficient-fp16", "--optimizer", "adam"], ["--store-ema", "--ema-decay", "0.9"]],
)
def test_fairseqs_other_ways_to_train_work_and_resume(
    data_bin: Path, tmp_path: Path, options: "list[str]"
) -> None:
    options = ["--arch", "resm_roberta_tiny", *MEMORY, *options]
    first = train(data_bin, tmp_path, *options, "--max-update", "2")
    rest = train(data_bin, tmp_path, *options, "--max-update", "4")
    assert list(losses(first)) + list(losses(rest)) == ["1", "2", "3", "4"]


def test_usage_reaches_tensorboard(data_bin: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "2"]
    run = train(data_bin, tmp_path, *options, "--tensorboard-logdir", tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board/valid")).Reload()
    shown = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    (logged,) = run.logged("valid")
    for key in USAGE_KEYS:
        assert shown[key.removeprefix("valid_")] == pytest.approx(float(logged[key]), abs=1e-4)


def test_the_pretraining_example_runs(data_bin: Path, tmp_path: Path) -> None:
    done = run_well(
        *(ROOT / "user_dir_examples/pretraining/run.sh", "resm_tiny", data_bin, tmp_path / "out"),
        *("optimization.max_update=2", "common.log_interval=1", "common.cpu=true"),
        *("lr_scheduler.warmup_updates=1", "+model.memory_heads=2"),
        env={"PATH": f"{BIN}:{os.environ['PATH']}"},
    )
    assert list(losses(done)) == ["1", "2"]
    keys = load(tmp_path / "out/checkpoint_last.pt")["model"][
        "encoder.sentence_encoder.layers.1.memory.keys"
    ]
    assert keys.shape[0] == 2


LEFT_OUT = re.compile(r"split valid: (\d+) of (\d+) examples \((\d+) of (\d+) tokens\) are left")


def test_what_fairseq_leaves_out_of_a_validation_is_told(
    data_bin: Path, resm_run: "tuple[Path, Run]", plain_run: Path
) -> None:
    """With this plugin's task and criterion and with fairseq's, once, and only where it happens."""
    validate = [BIN / "fairseq-validate", data_bin, "--path", plain_run / "checkpoint_last.pt"]
    validate += ["--user-dir", USER_DIR, "--task", "masked_lm", "--batch-size", "8", "--cpu"]
    validate += ["--valid-subset", "valid", "--num-workers", "0", "--log-format", "json"]
    for output in (resm_run[1].output, run_alike(*validate).output):
        (numbers,) = LEFT_OUT.findall(output)
        left_out, n_examples, tokens, n_tokens = map(int, numbers)
        assert left_out == n_examples % 8 > 0
        assert 0 < tokens <= 32 * left_out
        assert 0 < n_tokens - tokens <= 32 * (n_examples - left_out)
    whole = run_alike(*validate, "--required-batch-size-multiple", "1")
    assert whole.status == 0
    assert whole.logged("valid")
    assert not LEFT_OUT.findall(whole.output)
