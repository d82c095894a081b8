"""The cures for fairseq."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq.checkpoint_utils import save_checkpoint
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq_cli.train import should_stop_early

from pkm_fairseq.compat import end_prefetching, forget_previous_training


class Endless:
    """Batches without end; says how many were asked for."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 1_000_000

    def __iter__(self):
        while True:
            self.asked += 1
            yield torch.zeros(3)


def prefetching():
    return [t for t in threading.enumerate() if isinstance(t, BackgroundConsumer)]


@pytest.mark.parametrize("size", [1, 50_000])
def test_threads_that_prepare_batches_end(size):
    source = Endless()
    batches = BufferedIterator(size, source)
    next(batches)
    (thread,) = prefetching()
    if size == 1:
        while source.asked < 3:  # it waits for room with a batch in its hands
            time.sleep(0.001)
    end_prefetching()
    assert not thread.is_alive()
    assert not prefetching()
    asked = source.asked
    time.sleep(0.01)
    assert source.asked == asked


def test_without_such_threads_nothing_happens():
    threads = threading.enumerate()
    end_prefetching()
    assert threading.enumerate() == threads


def test_pytorch_ddp_wraps_a_model_on_the_cpu(tmp_path):
    """Two workers are in tests/integration/test_workers.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        model, places = torch.nn.Linear(2, 2), {"device_ids": [0], "output_device": 0}
        with pytest.raises(ValueError, match="device_ids"):
            torch.nn.parallel.DistributedDataParallel(model, **places)
        wrapped = distributed_fairseq_model.DistributedDataParallel(
            model, **places, broadcast_buffers=False
        )
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        assert wrapped.broadcast_buffers is False
        assert wrapped(torch.ones(1, 2)).shape == (1, 2)
    finally:
        dist.destroy_process_group()


def workers_config(**settings):
    training = dict(distributed_world_size=2, distributed_no_spawn=False, tpu=False)
    training.update(
        pipeline_model_parallel=False,
        distributed_backend="nccl",
        distributed_init_method="tcp://localhost:1",
    )
    training = SimpleNamespace(**{**training, **settings})
    common = SimpleNamespace(cpu=True, tpu=False)
    return SimpleNamespace(distributed_training=training, common=common)


def test_workers_on_the_cpu_need_gloo():
    with pytest.raises(SystemExit, match=r"--distributed-backend is nccl.* it must be gloo"):
        distributed_utils.call_main(workers_config(), main=None)


def test_a_single_worker_starts_as_ever():
    asked = []
    config = workers_config(distributed_world_size=1, distributed_init_method=None)
    distributed_utils.call_main(config, lambda cfg, x: asked.append((cfg, x)), x=3)
    assert asked == [(config, 3)]


def test_the_best_score_of_another_training_is_forgotten():
    kept = [(save_checkpoint, "best"), (should_stop_early, "best"), (should_stop_early, "num_runs")]
    for function, name in kept:
        setattr(function, name, 1.0)
    for _ in range(2):  # the second time there is nothing
        forget_previous_training()
        assert not [name for function, name in kept if hasattr(function, name)]
