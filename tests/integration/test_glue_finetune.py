"""scripts/finetune_glue.py with the real fairseq-train, on miniature tasks."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
import sentencepiece
import torch
from fairseq import checkpoint_utils
from scipy.stats import pearsonr

from pkm_fairseq.experiments.glue.predict import best_checkpoint
from pkm_fairseq.experiments.glue.tasks import TASKS
from tests import glue_data

from .runs import (
    BIN,
    MEMORY,
    MODEL,
    PATIENCE,
    ROOT,
    USER_DIR,
    Run,
    binarise,
    load,
    run,
    run_well,
    train,
    wait_for,
)

SCRIPT = ROOT / "scripts" / "finetune_glue.py"
N_TRAIN = 60
QUICK = ("--preset", "small", "--set", "max_epoch=1", "lr=1e-3", "batch_size=20")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Nine prepared tasks, and a plain and a ResM checkpoint."""
    folder = tmp_path_factory.mktemp("glue")
    texts = glue_data.texts(400)
    (folder / "raw.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "raw.txt"), model_prefix=str(folder / "spm"), vocab_size=60,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for split, part in (("train", texts[:300]), ("valid", texts[300:])):
        lines = (" ".join(pieces.encode(text, out_type=str)) for text in part)
        (folder / f"{split}.txt").write_text("\n".join(lines))
    data = binarise(folder, folder / "bin")
    plain = ("--arch", "roberta", "--optimizer", "adam", "--max-update", "10")
    train(data, folder / "plain", *plain)
    train(data, folder / "resm", "--arch", "resm_roberta_tiny", *MEMORY, "--max-update", "10")
    glue_data.write_glue(folder / "raw_glue", n_train=N_TRAIN)
    run_well(
        *(sys.executable, ROOT / "scripts" / "prepare_glue.py", "--bpe", "sentencepiece"),
        *("--glue-data", folder / "raw_glue", "--out", folder / "glue"),
        *("--dict", data / "dict.txt", "--sentencepiece-model", folder / "spm.model"),
    )
    checkpoints = {arm: folder / arm / "checkpoint_last.pt" for arm in ("plain", "resm")}
    return SimpleNamespace(data=folder / "glue", corpus=data, **checkpoints)


def finetune(ready: SimpleNamespace, *options: Any) -> Run:
    return run(sys.executable, SCRIPT, "--data", ready.data, *options)


def finetune_well(ready: SimpleNamespace, out: Path, *options: Any) -> Dict[str, Any]:
    done = finetune(ready, "--out", out, *options)
    assert done.status == 0, done.output[-4000:]
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def nine(ready: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """ResM finetuned on every task for one epoch."""
    out = tmp_path_factory.mktemp("nine")
    checkpoint = ("--checkpoint", f"resm={ready.resm}")
    results = finetune_well(ready, out, *checkpoint, *QUICK, "--seeds", "1", "--workers", "2")
    return SimpleNamespace(out=out, results=results)


def test_all_nine_tasks_have_their_official_metrics(nine: SimpleNamespace) -> None:
    (arm,) = nine.results["arms"]
    assert list(arm["tasks"]) == list(TASKS)
    for name, spec in TASKS.items():
        expected = list(spec.metrics)
        expected += ["valid1_accuracy"] if name == "MNLI" else []
        found = arm["tasks"][name]
        assert list(found["dev"]) == expected, name
        assert list(nine.results["tasks"][name]["baseline"]) == expected, name
        assert found["updates"] == [math.ceil(N_TRAIN / 20)]
        folder = nine.out / "resm" / name / "seed1"
        result = json.loads((folder / "result.json").read_text())
        assert result["dev"] == {key: one["median"] for key, one in found["dev"].items()}
        assert (folder / "checkpoint_best.pt").is_file()
        assert not (folder / "checkpoint_last.pt").exists()
        (drift,) = result["memory"]["drift"]
        assert drift["layer"] == 1
        assert 0 < drift["values_moved"] < 1
        assert result["memory"]["before"] != result["memory"]["after"]
    assert arm["average"] is not None
    assert "majority class" in (nine.out / "results.md").read_text()


def trained(folder: Path) -> "tuple[Any, Any]":
    """The best model of a finetuning, and its task."""
    file = str(folder / "checkpoint_best.pt")
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([file])
    return models[0].eval(), task


@torch.no_grad()
def answers(model: Any, task: Any) -> "tuple[List[List[float]], List[float]]":
    """The head's outputs for dev sentences one by one, and the labels."""
    dataset = task.load_dataset("valid")
    outputs, targets = [], []
    for index in range(len(dataset)):
        row = dataset[index]
        tokens = row["net_input.src_tokens"][None]
        logits = model(
            tokens, features_only=True, classification_head_name="sentence_classification_head"
        )[0]
        outputs.append(logits[0].tolist())
        targets.append(float(torch.as_tensor(row["target"]).flatten()[0]))
    return outputs, targets


def test_pearson_in_the_log_is_that_of_predictions_made_one_by_one(
    ready: SimpleNamespace, tmp_path: Path
) -> None:
    options = ("--preset", "small", "--set", "max_epoch=6", "lr=1e-2", "batch_size=7")
    options += ("--tasks", "STS-B", "--seeds", "1", "--keep-last")
    finetune_well(ready, tmp_path, "--checkpoint", f"plain={ready.plain}", *options)
    folder = tmp_path / "plain" / "STS-B" / "seed1"
    outputs, targets = answers(*trained(folder))
    scores = [5 * min(max(output[0], 0.0), 1.0) for output in outputs]  # of 0 to 5
    assert len(set(scores)) > 3
    expected = 100 * pearsonr(scores, [5 * target for target in targets])[0]
    found = json.loads((folder / "result.json").read_text())["dev"]["pearson"]
    assert found == pytest.approx(expected, abs=0.02)
    assert (folder / "checkpoint_last.pt").is_file()
    _two_workers_and_validate(ready, folder, tmp_path, found)


def on_two_workers(*command: Any) -> List[Run]:
    """Run fairseq-train in two processes that exchange gradients; both must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command += ("--distributed-world-size", "2", "--distributed-backend", "gloo")
    command += ("--distributed-init-method", address, "--distributed-no-spawn")
    command += ("--ddp-backend", "legacy_ddp", "--distributed-rank")
    workers = [
        subprocess.Popen(
            [str(part) for part in (BIN / "fairseq-train", *command, rank)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][-3000:]
    return [Run(0, output) for output in outputs]


def _two_workers_and_validate(
    ready: SimpleNamespace, folder: Path, tmp_path: Path, expected: float
) -> None:
    """The same checkpoint by two workers that do not learn, and by fairseq-validate."""
    task = ("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction")
    model = ("--arch", "roberta", *MODEL, "--optimizer", "adam", "--lr", "1e-30", "--cpu")
    workers = on_two_workers(
        *(ready.data / "STS-B", "--user-dir", USER_DIR, "--save-dir", tmp_path / "two"),
        *(*task, *model, "--regression-target", "--num-classes", "1"),
        *("--glue-metrics", "pearson", "--init-token", "0", "--separator-token", "2"),
        *("--best-checkpoint-metric", "pearson", "--maximize-best-checkpoint-metric"),
        *("--max-positions", "32", "--shorten-method", "truncate", "--num-workers", "0"),
        *("--finetune-from-model", folder / "checkpoint_best.pt", "--max-epoch", "1"),
        *("--batch-size", "7", "--required-batch-size-multiple", "1", "--log-format", "json"),
        "--load-checkpoint-on-all-dp-ranks",
    )  # 20 sentences are three batches: one worker runs out of them
    logged = [log for worker in workers for log in worker.logged("valid")]
    assert logged
    for log in logged:
        assert float(log["valid_pearson"]) == pytest.approx(expected, abs=0.02)
    done = run_well(
        *(BIN / "fairseq-validate", ready.data / "STS-B", "--user-dir", USER_DIR, "--cpu"),
        *(*task, "--path", folder / "checkpoint_best.pt", "--batch-size", "6"),
        *("--required-batch-size-multiple", "1"),  # with 8 fairseq drops two of the 20 sentences
        *("--log-format", "json", "--valid-subset", "valid", "--num-workers", "0"),
    )
    (log,) = done.logged("valid")
    assert float(log["valid_pearson"]) == pytest.approx(expected, abs=0.02)


def test_an_old_checkpoint_of_an_architecture_that_is_registered_nowhere(
    ready: SimpleNamespace, tmp_path: Path
) -> None:
    """As that of PyPI's sapiens: it is finetuned as the RoBERTa that it is."""
    old = load(ready.plain)
    args = {**vars(old["cfg"]["model"]), "arch": "roberta_small", "criterion": "smooth_masked_lm"}
    old.update(cfg=None, args=Namespace(**{**args, "data": "gone"}))
    names = {name: re.sub("^encoder", "decoder", name) for name in old["model"]}
    old["model"] = {names[name]: tensor for name, tensor in old["model"].items()}
    del old["task_state"]
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint.pt")
    arms = ("--checkpoint", f"plain={ready.plain}", tmp_path / "old" / "checkpoint.pt")
    out = tmp_path / "out"
    results = finetune_well(ready, out, *arms, *QUICK, "--tasks", "RTE", "--seeds", "1")
    plain, old_arm = (arm["tasks"]["RTE"]["dev"] for arm in results["arms"])
    assert old_arm == plain
    logs = [out / arm / "RTE" / "seed1" / "train.log" for arm in ("plain", "old")]
    losses = [[x["loss"] for x in Run(0, log.read_text()).logged("train_inner")] for log in logs]
    assert len(losses[0]) > 1
    assert losses[0] == losses[1]


def test_values_alone_are_finetuned_and_a_head(ready: SimpleNamespace, tmp_path: Path) -> None:
    rows = ("memory_finetune=slots", "memory_finetune_score=count", "memory_finetune_slots=20")
    task = ("--tasks", "RTE", "--seeds", "1", "--checkpoint", f"resm={ready.resm}")
    finetune_well(ready, tmp_path, *task, *QUICK, *rows, "memory_value_lr=0.01")
    folder = tmp_path / "resm" / "RTE" / "seed1"
    log = (folder / "train.log").read_text()
    assert "the head sentence_classification_head is trained, too" in log
    before, after = (load(x)["model"] for x in (ready.resm, folder / "checkpoint_best.pt"))
    moved = {
        name
        for name, tensor in after.items()
        if name in before and ".reads." not in name and not torch.equal(tensor, before[name])
    }
    assert moved == {"encoder.sentence_encoder.layers.1.memory.values.weight"}
    heads = {name for name in after if name not in before}
    assert len(heads) == 4 and all(name.startswith("classification_heads.") for name in heads)


OWN = """\
all: {lr: 1e-30, lr_scheduler: polynomial_decay, batch_size: 16, max_epoch: 9, patience: 1}
"""


def test_a_preset_of_ones_own_and_a_run_that_ends_early(
    ready: SimpleNamespace, tmp_path: Path
) -> None:
    """All 20 dev examples count, and the result tells what the run did; then new settings."""
    (tmp_path / "own.yaml").write_text(OWN)
    options = ("--preset", tmp_path / "own.yaml", "--tasks", "MRPC")
    options += ("--checkpoint", f"plain={ready.plain}")
    changed = ("--set", "update_freq=1,4", "warmup_updates=2")
    results = finetune_well(ready, tmp_path, *options, "--seeds", "2", *changed)
    found, folder = results["arms"][0]["tasks"]["MRPC"], tmp_path / "plain" / "MRPC"
    outputs, targets = answers(*trained(folder / "seed1"))
    right = [max(range(2), key=o.__getitem__) == t for o, t in zip(outputs, targets, strict=True)]
    assert len(right) == 20
    assert found["dev"]["accuracy"]["seeds"][0] == pytest.approx(100 * sum(right) / 20, abs=0.01)
    n_batches = math.ceil(N_TRAIN / 16)  # 4, then one update in each epoch
    assert found["updates"] == 2 * [n_batches + 1]  # the second epoch is no better: its last
    assert found["warmup_updates"] == 2
    result = json.loads((folder / "seed2" / "result.json").read_text())
    result["dev"]["accuracy"] = 100.0
    (folder / "seed2" / "result.json").write_text(json.dumps(result))
    assert best_checkpoint(folder, TASKS["MRPC"]).parent == folder / "seed2"
    finetune_well(ready, tmp_path, *options, "--seeds", "1", "--set", "max_epoch=1")
    assert best_checkpoint(folder, TASKS["MRPC"]).parent == folder / "seed1"


def alive(group_leader: int) -> bool:
    try:
        os.kill(group_leader, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> List[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def test_an_interrupted_finetuning_continues(ready: SimpleNamespace, tmp_path: Path) -> None:
    """Also as a background job of a shell without job control, for which SIGINT is ignored."""
    options = ["--preset", "small", "--set", "max_epoch=30", "lr=1e-3", "batch_size=4"]
    options += ["--tasks", "RTE", "--seeds", "1,2", "--workers", "1"]
    options += ["--checkpoint", f"plain={ready.plain}", "--out", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), "--data", str(ready.data), *options]
    first, second = (tmp_path / "plain" / "RTE" / f"seed{k}" for k in (1, 2))
    with (tmp_path / "output").open("w") as output:
        script = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip
        wait_for((second / "checkpoint_last.pt").exists, script)
        trainings = children(script.pid)
        script.send_signal(signal.SIGINT)
        assert script.wait(PATIENCE) == 130
    assert trainings
    assert not any(map(alive, trainings))
    assert "interrupted; run it again to continue" in (tmp_path / "output").read_text()
    assert not (second / "result.json").exists()
    done_at = (first / "result.json").stat().st_mtime_ns
    results = finetune_well(ready, tmp_path, *options)
    assert (first / "result.json").stat().st_mtime_ns == done_at
    log = (second / "train.log").read_text()
    assert log.count("loading pretrained model from") == 1  # then from its own last checkpoint
    assert "Loaded checkpoint " in log.split("loading pretrained model from")[1]
    found = results["arms"][0]["tasks"]["RTE"]
    assert found["seeds"] == [1, 2]
    assert json.loads((second / "result.json").read_text())["updates"] == 30 * N_TRAIN // 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "Cola"], "--tasks: Cola is no task"),
        (["--data", "nowhere"], "nowhere holds no prepared task"),
        (["--seeds", "0"], "--seeds is 0, must be a number above 0"),
        (["--seeds", "1,1"], "--seeds is 1,1"),
        (["--set", "lrr=1"], "unrecognized arguments: --lrr 1"),
        (["--preset", "big"], "preset big: no such file"),
        (["--workers", "0"], "--workers is 0, must be at least 1"),
        (["--", "--seed", "3"], "this script sets seed itself"),
        (["--checkpoint", "README.md"], "README.md: not a readable checkpoint"),
    ],
)
def test_bad_input_ends_with_one_line(
    ready: SimpleNamespace, tmp_path: Path, options: List[str], message: str
) -> None:
    out = tmp_path / "out"
    given = ["--data", ready.data, "--checkpoint", ready.plain, "--tasks", "RTE", "--out", out]
    done = run(sys.executable, SCRIPT, *given, *options)
    assert done.status == 1, done.output
    lines = [line for line in done.output.splitlines() if "tensorboardX" not in line]
    assert len(lines) == 1, done.output
    assert lines[0].startswith("finetune_glue.py: ")
    assert message in lines[0]
    assert not out.exists()


def test_the_hydra_example_trains_what_fairseq_train_does(
    ready: SimpleNamespace, tmp_path: Path
) -> None:
    """STS-B, a regression, of a ResM; and a memory-less checkpoint on CoLA, by two seeds."""
    size = ["encoder_layers=2", "encoder_embed_dim=32", "encoder_ffn_embed_dim=64"]
    size = [f"+model.{option}" for option in [*size, "encoder_attention_heads=2"]]
    common = ["model._name=resm_roberta_tiny", "task.max_positions=32", *size, "common.cpu=true"]
    common += ["optimization.max_update=3", "lr_scheduler.warmup_updates=1"]
    common += ["common.log_interval=1", "dataset.num_workers=0"]
    memory = ["n_keys=16", "heads=2", "knn=4", "k_dim=16"]
    script, out = ROOT / "user_dir_examples/glue/run.sh", tmp_path / "hydra"
    memory = [f"model.memory_{option}" for option in memory]
    hydra = run_well(script, "STS-B", ready.data, ready.resm, out, *common, *memory)
    cli = run_well(
        *(BIN / "fairseq-train", ready.data / "STS-B", "--user-dir", USER_DIR, "--cpu"),
        *("--save-dir", tmp_path / "cli", "--finetune-from-model", ready.resm),
        *("--task", "pkm_sentence_prediction", "--criterion", "pkm_sentence_prediction"),
        *("--regression-target", "--num-classes", "1", "--glue-metrics", "pearson,spearman"),
        *("--init-token", "0", "--separator-token", "2", "--max-positions", "32"),
        *("--best-checkpoint-metric", "pearson", "--maximize-best-checkpoint-metric"),
        *("--shorten-method", "truncate", "--arch", "resm_roberta_tiny", *MODEL, *MEMORY),
        *("--attention-dropout", "0.1", "--optimizer", "pkm_adam", "--adam-betas", "(0.9,0.98)"),
        *("--adam-eps", "1e-6", "--weight-decay", "0.1", "--lr", "2e-5", "--max-update", "3"),
        *("--lr-scheduler", "polynomial_decay", "--warmup-updates", "1"),
        *("--total-num-update", "3", "--batch-size", "16", "--max-tokens", "4400"),
        *("--required-batch-size-multiple", "1", "--no-epoch-checkpoints", "--num-workers", "0"),
        *("--log-format", "json", "--log-interval", "1"),
    )
    by_hydra, by_cli = hydra.logged("train_inner"), cli.logged("train_inner")
    assert [log["num_updates"] for log in by_cli] == ["1", "2", "3"]
    assert [log["loss"] for log in by_hydra] == [log["loss"] for log in by_cli]
    for key in ("valid_loss", "valid_pearson", "valid_spearman", "valid_memory1_top1_usage"):
        assert hydra.logged("valid")[-1][key] == cli.logged("valid")[-1][key], key
    assert (out / "checkpoint_best.pt").is_file()
    plain = ["model.memory_layers=[]", "optimizer._name=adam", "hydra.sweep.subdir=${common.seed}"]
    swept = run_well(script, "CoLA", ready.data, ready.plain, tmp_path, "-m", *common, *plain,
                     "common.seed=1,2")  # fmt: skip
    losses = [log["loss"] for log in swept.logged("train_inner")]
    assert len(losses) == 6 and losses[:3] != losses[3:]
    assert all("valid_mcc" in log for log in swept.logged("valid"))
    assert (tmp_path / "1/checkpoint_best.pt").is_file()
    assert (tmp_path / "2/checkpoint_best.pt").is_file()
