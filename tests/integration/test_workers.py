"""Data-parallel workers train what one worker trains, through the real fairseq-train.

Covered are all combinations of a plain model, PKM and ResM; dense adam and factored pkm_adam
(plain: adam alone; one table for two layers: pkm_adam alone); legacy_ddp and pytorch_ddp; with and
without accumulation on top. pkm_adam exchanges factors and, without accumulation, dense gradients,
too. And finetuning of rows that the reads of all workers choose.

Not to the bit: two workers add their gradients in another order than one that accumulates.
"""

import json
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from .runs import (
    BIN,
    MASKED_LM,
    MEMORY,
    MODEL,
    TRAIN,
    load,
    run,
    run_well,
    start,
    train_on_two_workers,
)
from .test_factored import EPS, assert_close_checkpoints

ROUNDING = ["--dropout", "0", "--attention-dropout", "0", *EPS, "--max-update", "4"]
MODELS = {
    "plain": ["--arch", "pkm_roberta_tiny", "--memory-layers", "[]"],
    "pkm": ["--arch", "pkm_roberta_tiny", *MEMORY],
    "resm": ["--arch", "resm_roberta_tiny", *MEMORY],
    "shared": ["--arch", "resm_roberta_tiny", *MEMORY, "--memory-share-values"],
}
MODELS["shared"] += ["--memory-layers", "0,1"]
ARMS = [*product(["pkm", "resm"], ["adam", "pkm_adam"]), ("plain", "adam"), ("shared", "pkm_adam")]
DENSE = [model for model, optimizer in ARMS if optimizer == "pkm_adam"]
BACKENDS = ["legacy_ddp", "pytorch_ddp"]
FREQUENCIES = [1, 2]
FORMS = ["factors", "dense"]
LAYER_NORM = ["--memory-query-norm", "layer", "--batch-size", "4"]
# Batches in order, so that those of two workers are the halves of one worker's. Their number in an
# epoch is odd: one worker is idle in the last update.
HALF = 40
JOINT = ["--curriculum", "9", "--required-batch-size-multiple", "1", "--max-epoch", "2"]
JOINT = [*JOINT, "--max-update", "9", "--memory-query-norm", "batch", "--arch", "resm_roberta_tiny"]
JOINT = [*JOINT, *MEMORY, "--memory-layers", "0,1"]
FINETUNE = ["--memory-finetune", "slots", "--memory-finetune-slots", "20"]
FINETUNE = [*FINETUNE, "--memory-finetune-score", "count"]


def workers_of(backend: str) -> List[str]:
    """Options that tell each of two processes how to find the other; ``PORT`` and ``RANK``."""
    options = ["--distributed-world-size", "2", "--distributed-backend", "gloo"]
    options += ["--distributed-init-method", "tcp://127.0.0.1:PORT", "--distributed-no-spawn"]
    return [*options, "--distributed-rank", "RANK", "--ddp-backend", backend]


def arms(data: Path, out: Path) -> "tuple[List[List[Any]], List[List[Any]]]":
    """The trainings of one worker and those of two, as lists of arguments."""
    alone, together = [], []
    for (model, optimizer), freq in product(ARMS, FREQUENCIES):
        name = f"{model}-{optimizer}-{freq}"
        options = [data, *TRAIN, *MASKED_LM, *MODEL, *MODELS[model], *ROUNDING, *LAYER_NORM]
        options += ["--optimizer", optimizer]
        alone.append([*options, "--update-freq", 2 * freq, "--save-dir", out / f"{name}-one"])
        for backend in BACKENDS:
            ours = [*options, "--update-freq", freq, *workers_of(backend)]
            factors = exchange("factors") if optimizer == "pkm_adam" else []
            together.append([*ours, *factors, "--save-dir", out / f"{name}-{backend}"])
            if model in DENSE and optimizer == "pkm_adam" and freq == 1:
                save = ["--save-dir", out / f"{name}-{backend}-dense"]
                together.append([*ours, *exchange("dense"), *save])
    options = [data, *TRAIN, *MASKED_LM, *MODEL, *ROUNDING, *JOINT]
    alone.append([*options, "--batch-size", 2 * HALF, "--save-dir", out / "joint-one"])
    for backend in BACKENDS:
        ours = ["--batch-size", HALF, "--save-dir", out / f"joint-{backend}"]
        together.append([*options, *ours, *workers_of(backend)])
    options = [data, *TRAIN, *MASKED_LM, *MODEL, *MODELS["resm"], *ROUNDING, *LAYER_NORM, *FINETUNE]
    alone.append([*options, "--update-freq", 2, "--save-dir", out / "finetune-one"])
    for form in FORMS:
        ours = [*exchange(form), "--save-dir", out / f"finetune-{form}"]
        together.append([*options, *ours, *workers_of("legacy_ddp")])
    return alone, together


def exchange(form: str) -> List[str]:
    return ["--memory-exchange", form]


def start_all(trainings: List[List[Any]], file: Path, rank: int, port: int) -> subprocess.Popen:
    places = {"RANK": str(rank), "PORT": str(port)}
    lines = [[_fill(str(part), places) for part in training] for training in trainings]
    file.write_text(json.dumps(lines))
    return start(sys.executable, Path(__file__).with_name("several.py"), file)


def _fill(text: str, places: Dict[str, str]) -> str:
    for name, value in places.items():
        text = value if text == name else text.replace(f":{name}", f":{value}")
    return text


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, each named after its arm."""
    out = tmp_path_factory.mktemp("workers")
    alone, together = arms(data_bin, out)
    port = free_port()
    processes = [start_all(together, out / f"rank{rank}.json", rank, port) for rank in (0, 1)]
    processes.append(start_all(alone, out / "alone.json", 0, port))
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], [o[-2000:] for o in outputs]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("freq", FREQUENCIES)
@pytest.mark.parametrize(("model", "optimizer"), ARMS)
def test_two_workers_train_as_one_that_accumulates(
    trained: Path, model: str, optimizer: str, freq: int, backend: str
) -> None:
    name = f"{model}-{optimizer}-{freq}"
    assert_close_checkpoints(trained / f"{name}-one", trained / f"{name}-{backend}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", DENSE)
def test_two_workers_with_dense_gradients_train_as_one(
    trained: Path, model: str, backend: str
) -> None:
    name = f"{model}-pkm_adam-1"
    assert_close_checkpoints(trained / f"{name}-one", trained / f"{name}-{backend}-dense")


def test_the_exchange_is_chosen_by_its_bytes_and_belongs_to_a_run(
    data_bin: Path, tmp_path: Path
) -> None:
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    options = [*MODELS["resm"], *ROUNDING, *LAYER_NORM, "--update-freq", "2"]
    chosen = train_on_two_workers(data_bin, whole, *options)
    assert (
        "2 workers exchange the gradients of 1 value table(s) dense (by their" in chosen[0].output
    )
    assert "exchange the gradients" not in chosen[1].output
    told = train_on_two_workers(data_bin, parts, *options, *exchange("dense"), "--max-update", "2")
    assert "value table(s) dense (as told)" in told[0].output
    shutil.copytree(parts, other)
    train_on_two_workers(data_bin, parts, *options)
    assert_equal_models(whole, parts)
    told = train_on_two_workers(data_bin, other, *options, *exchange("factors"))
    assert "value table(s) as factors (as told)" in told[0].output
    assert_close_checkpoints(whole, other)
    assert "memory_exchange" not in load(whole / "checkpoint_last.pt")["cfg"]["model"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_workers_normalise_queries_as_one_with_both_batches(
    data_bin: Path, trained: Path, backend: str
) -> None:
    n_samples = -(-(data_bin / "train.bin").stat().st_size // (2 * 31))  # 31 words and <s>
    assert -(-n_samples // HALF) % 2 == 1  # an idle worker
    assert_close_checkpoints(trained / "joint-one", trained / f"joint-{backend}")


@pytest.mark.parametrize("form", FORMS)
def test_two_workers_choose_rows_as_one_that_accumulates(trained: Path, form: str) -> None:
    one, two = trained / "finetune-one", trained / f"finetune-{form}"
    assert_close_checkpoints(one, two)
    (moments,) = (
        x["exp_avg"]
        for x in load(one / "checkpoint_last.pt")["last_optimizer_state"]["state"].values()
    )
    assert 20 <= int((moments != 0).any(dim=1).sum()) <= 4 * 20 < len(moments)


def test_all_workers_have_the_same_model_from_the_start_to_the_end(trained: Path) -> None:
    states = [(trained / f"rank{rank}.json.states").read_text().split("\n") for rank in (0, 1)]
    starts = [line for line in states[0] if line.startswith("0 ")]
    factors, dense = len(ARMS) * len(FREQUENCIES), len(DENSE)
    assert len(starts) == (factors + dense + 1) * len(BACKENDS) + len(FORMS)
    assert len(set(states[0])) > 5 * len(ARMS)  # training changes it
    assert states[0] == states[1]


LAUNCHED = ["--distributed-world-size", "2", "--distributed-backend", "gloo"]


def launched(data: Path, out: Path) -> List[Any]:
    """An arm of above, without ranks."""
    options = [data, *TRAIN, *MASKED_LM, *MODEL, *MODELS["resm"], *ROUNDING, *LAYER_NORM]
    return [BIN / "fairseq-train", *options, "--save-dir", out, "--update-freq", "1"]


def test_fairseq_starts_workers_on_the_cpu(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    done = run_well(*launched(data_bin, tmp_path), *LAUNCHED, "--ddp-backend", "legacy_ddp")
    assert len(done.logged("train_inner")) == 4  # of the first worker alone
    assert_equal_models(trained / "resm-pkm_adam-1-legacy_ddp", tmp_path)


def test_torchrun_starts_workers_on_the_cpu(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    done = run_well(*torchrun, *launched(data_bin, tmp_path), *LAUNCHED)  # pytorch_ddp
    assert len(done.logged("train_inner")) == 4
    assert_equal_models(trained / "resm-pkm_adam-1-pytorch_ddp", tmp_path)


def test_torchrun_without_fairseqs_world_size_is_refused(data_bin: Path, tmp_path: Path) -> None:
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", free_port()]
    refused = run(*torchrun, *launched(data_bin, tmp_path))
    assert refused.status != 0
    assert "torchrun started 2 workers, but fairseq expects 1" in refused.output
    assert not list(tmp_path.glob("*.pt"))


def assert_equal_models(one: Path, other: Path) -> None:
    ours, theirs = (load(folder / "checkpoint_last.pt")["model"] for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
