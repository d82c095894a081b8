"""The few cures fairseq needs on current torch and numpy; importing this module applies them."""

import argparse
import atexit
import contextlib
import logging
import queue
import sys
import threading
import types
from functools import wraps
from typing import Any, Callable

import numpy
import torch
from fairseq.optim import (
    OPTIMIZER_REGISTRY,
    AMPOptimizer,
    FP16Optimizer,
    MemoryEfficientFP16Optimizer,
)

logger = logging.getLogger(__name__)

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, which is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

# numpy 2.0 removed np.compat; fairseq's TokenBlockDataset takes np.compat.long, which was int,
# for --sample-break-mode eos.
if not hasattr(numpy, "compat"):
    numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

JOIN_SECONDS = 10.0


@atexit.register
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
            thread._queue.put = _end_thread
            with contextlib.suppress(queue.Empty):
                thread._queue.get_nowait()  # wakes it up if it waits for room
            thread.join(JOIN_SECONDS)


def _end_thread(item: Any) -> None:
    raise SystemExit  # ends a thread quietly


def _ask_the_optimizer(stock: Callable[..., Any]) -> Any:
    """Let an optimizer say what is to be built around it for mixed precision.

    fairseq's trainer builds its own wrappers, whatever the optimizer.
    """

    @wraps(stock)
    def build_optimizer(cls: Any, cfg: Any, params: Any, **kwargs: Any) -> Any:
        optimizer = OPTIMIZER_REGISTRY.get(cfg.optimizer._name)
        wrapper = getattr(optimizer, "wrappers", {}).get(cls, cls)
        _check_device(wrapper, cfg)
        if wrapper is cls:
            return stock(cls, cfg, params, **kwargs)
        return wrapper.build_optimizer(cfg, params, **kwargs)

    return classmethod(build_optimizer)  # type: ignore[arg-type]


def _check_device(wrapper: Any, cfg: Any) -> None:
    """Say what fairseq does not, or not in one line, where there is no CUDA device."""
    common, on_cpu = cfg.common, cfg.common.cpu or not torch.cuda.is_available()
    if issubclass(wrapper, AMPOptimizer) and on_cpu:
        logger.warning("--amp does nothing on the CPU: this is training in full precision")
    is_flat = not (common.fp16_no_flatten_grads or common.bf16)
    if issubclass(wrapper, FP16Optimizer) and is_flat and on_cpu:
        raise SystemExit(
            "--fp16 needs CUDA: on the CPU use --fp16-no-flatten-grads too, or "
            "--memory-efficient-fp16"
        )


for _wrapper in (AMPOptimizer, FP16Optimizer, MemoryEfficientFP16Optimizer):
    _wrapper.build_optimizer = _ask_the_optimizer(_wrapper.build_optimizer.__func__)


def _amp_clip_grad_norm(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Skip a step whose norm is not finite, as fairseq says in the log that it does.

    torch's scaler skips it only if a ``.grad`` is not finite.
    """

    @wraps(stock)
    def clip_grad_norm(self: Any, max_norm: float, aggregate_norm_fn: Any = None) -> Any:
        norm = stock(self, max_norm, aggregate_norm_fn)
        if not torch.isfinite(norm).all():
            for found in self.scaler._found_inf_per_device(self.optimizer).values():
                found.fill_(1.0)
        return norm

    return clip_grad_norm


def _amp_step(self: Any) -> None:
    """Step with the gradients that ``clip_grad_norm`` has divided by the loss scale.

    fairseq gives torch's scaler one object there and another one here, so that it divides the same
    gradients by the scale a second time.
    """
    self.scaler.step(self.optimizer)
    self.scaler.update()


AMPOptimizer.clip_grad_norm = _amp_clip_grad_norm(AMPOptimizer.clip_grad_norm)
AMPOptimizer.step = _amp_step
