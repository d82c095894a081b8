"""A process that trains ends well, and may train more than once."""

import atexit
import contextlib
import queue
import sys
import threading
import types
from typing import Any

JOIN_SECONDS = 10.0


def end_prefetching_at_exit() -> None:
    """Have ``end_prefetching`` called before Python ends."""
    atexit.register(end_prefetching)


def end_prefetching() -> None:
    """End the threads in which fairseq prepares batches that nobody will ask for.

    A training that stops within an epoch leaves such a thread running. If Python ends while it is
    inside torch, the process aborts ("terminate called without an active exception") with status
    134 after a training that went well.
    """
    iterators = sys.modules.get("fairseq.data.iterators")
    if iterators is None:
        return
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0  # ends it after the batch that it prepares
            thread._queue.put = _discard
            with contextlib.suppress(queue.Empty):
                thread._queue.get_nowait()  # wakes it up if it waits for room
            thread.join(JOIN_SECONDS)


def _discard(item: Any) -> None:
    """Nobody takes batches out of the queue any more."""


def forget_previous_training() -> None:
    """Forget the best score of another training in this process, as of a sweep's previous job.

    fairseq keeps it as attributes of functions. A second training would write checkpoint_best.pt
    only when it beats the first, and run out of the first one's --patience.
    """
    for module, function in (
        ("fairseq.checkpoint_utils", "save_checkpoint"),
        ("fairseq_cli.train", "should_stop_early"),
    ):
        kept = vars(getattr(sys.modules.get(module), function, types.SimpleNamespace()))
        for name in ("best", "num_runs"):
            kept.pop(name, None)
