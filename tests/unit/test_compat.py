"""The cures for fairseq."""

import threading
import time

import pytest
import torch
from fairseq.checkpoint_utils import save_checkpoint
from fairseq.data.iterators import BackgroundConsumer, BufferedIterator
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


def test_the_best_score_of_another_training_is_forgotten():
    kept = [(save_checkpoint, "best"), (should_stop_early, "best"), (should_stop_early, "num_runs")]
    for function, name in kept:
        setattr(function, name, 1.0)
    for _ in range(2):  # the second time there is nothing
        forget_previous_training()
        assert not [name for function, name in kept if hasattr(function, name)]
