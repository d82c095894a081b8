"""Two processes of transformers' Trainer, over gloo: one training with the tokens of both."""

import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

pytest.importorskip(
    "transformers", reason="transformers is not installed (requirements/huggingface.txt)"
)

from pkm_fairseq.memory.observe.log import read_usage_log

from .runs import ROOT, free_port, start

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)
torch.manual_seed(0)
from pkm_fairseq.huggingface import MemoryUsageCallback
from pkm_fairseq.memory import MemoryAdam
from tests.hf_models import with_memories
from tests.unit.test_huggingface_training import MemoryTrainer, arguments, examples

norms = []  # of the gradients of tables, whenever they are to be exchanged
exchange = MemoryAdam.exchange_gradients


def noted(optimizer):
    norms.append([float(p.grad.norm()) for p in optimizer._tables()])
    exchange(optimizer)


MemoryAdam.exchange_gradients = noted
folder, n_workers = Path(sys.argv[1]), int(sys.argv[2])
model = with_memories("bert")
start = {name: x.clone() for name, x in model.state_dict().items()}
trainer = MemoryTrainer(
    model,
    arguments(
        folder,
        per_device_train_batch_size=4 // n_workers,
        max_steps=4,
        max_grad_norm=0.1,  # always clipped: the Trainer scales the loss by the number of workers
        adam_epsilon=1.0,  # gradients of noise make no steps
        learning_rate=1.0,
    ),
    train_dataset=examples()[::3],  # all of one length: each worker's mean weighs the same
    eval_dataset=examples()[:8],
    value_lr=100.0,
    callbacks=[MemoryUsageCallback(interval=2, tokens=36)],
)
trainer.train()
trained = {name: x.clone() for name, x in model.state_dict().items() if ".reads." in name}
trainer.evaluate()
state = {name: x.clone() for name, x in model.state_dict().items()}
for name in ("embeddings.word_embeddings", "encoder.layer.2.memory.values"):
    moved = (state[f"bert.{name}.weight"] - start[f"bert.{name}.weight"]).abs().max()
    assert moved > 1e-4, moved

torch.save(({**state, **trained}, norms), folder / f"{trainer.args.process_index}of{n_workers}.pt")
if n_workers > 1:
    dist.destroy_process_group()
"""


def started(folder: Path, n_workers: int) -> List[Any]:
    """The workers of a training, under way."""
    port, processes = str(free_port()), []
    for rank in range(n_workers):
        env: Dict[str, str] = {"PYTHONPATH": str(ROOT)}
        if n_workers > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n_workers)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(start(sys.executable, "-c", WORKER, folder, n_workers, env=env))
    return processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Dict[int, Any]:
    """What the workers of a training end with, and the folder, by their number."""
    folders = {n: tmp_path_factory.mktemp(f"workers{n}") for n in (1, 2)}
    processes = {n: started(folder, n) for n, folder in folders.items()}
    for each in processes.values():
        for process in each:
            printed = process.communicate(timeout=300)[0]
            assert process.returncode == 0, printed
    return {
        n: (
            [torch.load(folder / f"{rank}of{n}.pt", weights_only=True) for rank in range(n)],
            folder,
        )
        for n, folder in folders.items()
    }


def test_two_workers_are_one_with_the_tokens_of_both(trained: Dict[int, Any]) -> None:
    ((one, _),), _ = trained[1]
    ((first, _), (second, _)), _ = trained[2]
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        assert torch.allclose(one[name], tensor, rtol=0, atol=1e-6), name


def test_the_optimizer_exchanges_gradients_of_tables_and_does_so_before_they_are_clipped(
    trained: Dict[int, Any],
) -> None:
    """Each update comes here before clipping, with own gradients, and in the step, with common."""
    ((_, first), (_, second)), _ = trained[2]
    assert len(first) == len(second) == 2 * 4
    assert all(own != other for own, other in zip(first[::2], second[::2], strict=True))
    assert first[1::2] == second[1::2]


def test_usage_is_counted_over_both_workers(trained: Dict[int, Any]) -> None:
    counts = {}
    for n_workers, (_, folder) in trained.items():
        _, records = read_usage_log(folder / "memory_usage.jsonl")
        counts[n_workers] = [(x["update"], x["split"], x["layers"][0]["tokens"]) for x in records]
    assert counts[1] == counts[2] == [(1, "train", 36), (3, "train", 36), (4, "eval", 36)]
