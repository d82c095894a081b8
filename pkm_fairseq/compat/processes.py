"""Let a training process end cleanly, and train more than once."""

import atexit
import contextlib
import queue
import sys
import threading
import types
from typing import Any

JOIN_SECONDS = 10.0


def end_prefetching_at_exit() -> None:
    """Call ``end_prefetching`` before Python ends."""
    atexit.register(end_prefetching)


def end_prefetching() -> None:
    """End fairseq's threads that prepare batches for a training that has stopped.

    A training that stops within an epoch leaves such a thread running. If Python ends while the
    thread is inside torch, the process aborts ("terminate called without an active exception") with
    status 134, although the training succeeded.
    """
    iterators = sys.modules.get("fairseq.data.iterators")
    if iterators is None:
        return
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0  # ends the thread after its current batch
            thread._queue.put = _discard
            with contextlib.suppress(queue.Empty):
                thread._queue.get_nowait()  # wakes the thread if the queue is full
            thread.join(JOIN_SECONDS)


def _discard(item: Any) -> None:
    """Discard batches that nobody will read."""


def forget_previous_training() -> None:
    """Clear the best score of an earlier training in this process, such as a sweep's previous job.

    fairseq stores it in attributes of functions. Otherwise a second training would write
    checkpoint_best.pt only if it beats the first one, and continue the first one's --patience.
    """
    for module, function in (
        ("fairseq.checkpoint_utils", "save_checkpoint"),
        ("fairseq_cli.train", "should_stop_early"),
    ):
        kept = vars(getattr(sys.modules.get(module), function, types.SimpleNamespace()))
        for name in ("best", "num_runs"):
            kept.pop(name, None)
