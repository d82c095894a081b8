"""The few cures fairseq needs on current torch and numpy; importing this module applies them."""

import argparse
import atexit
import contextlib
import logging
import os
import queue
import random
import sys
import threading
import types
from functools import wraps
from typing import Any, Callable

import numpy
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.optim import (
    OPTIMIZER_REGISTRY,
    AMPOptimizer,
    FP16Optimizer,
    MemoryEfficientFP16Optimizer,
)
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)


import shutil
from pathlib import Path
from typing import BinaryIO, Iterator

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from .files import whole_file

# torch >= 2.6 loads checkpoints with weights_only=True and refuses classes it does not know.
# fairseq stores the options of a run in an argparse.Namespace, which is plain data.
torch.serialization.add_safe_globals([argparse.Namespace])

# numpy 2.0 removed np.compat; fairseq's TokenBlockDataset takes np.compat.long, which was int,
# for --sample-break-mode eos.
if not hasattr(numpy, "compat"):
    numpy.compat = types.SimpleNamespace(long=int)  # type: ignore[attr-defined]

JOIN_SECONDS = 10.0
COPY_BYTES = 2**24


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


def wrap_in_ddp(
    module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **settings: Any
) -> DistributedDataParallel:
    """Wrap a model in torch's DDP.

    fairseq's ``pytorch_ddp`` names a GPU for every model, which torch refuses for one on the CPU.
    """
    if next(module.parameters()).device.type == "cpu":
        device_ids = output_device = None
    return DistributedDataParallel(
        module, device_ids=device_ids, output_device=output_device, **settings
    )


distributed_fairseq_model.DistributedDataParallel = wrap_in_ddp


def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
    """Start the workers of a fairseq command.

    fairseq starts one per GPU. With ``--cpu`` it would start none and end with status 0, or, under
    torchrun, divide by the number of GPUs. Under fairseq-hydra-train this comes too late:
    it loads the plugin in the workers.
    """
    training = cfg.distributed_training
    world = training.distributed_world_size
    if not cfg.common.cpu or world == 1 or training.distributed_no_spawn:
        return _fairseq_call_main(cfg, main, **kwargs)
    if training.distributed_backend == "nccl":
        raise SystemExit(
            "--distributed-backend is nccl, which needs GPUs: with --cpu it must be gloo"
        )
    if torch.distributed.is_torchelastic_launched():
        training.distributed_init_method = "env://"
        training.distributed_world_size = int(os.environ["WORLD_SIZE"])
        training.distributed_rank = int(os.environ["RANK"])
        training.distributed_no_spawn = True
        return _fairseq_call_main(cfg, main, **kwargs)
    if training.distributed_init_method is None:
        port = training.distributed_port
        port = port if port > 0 else random.randint(10000, 60000)  # as fairseq does with GPUs
        training.distributed_init_method = f"tcp://localhost:{port}"
    training.distributed_rank = None  # each worker takes its number
    worker = distributed_utils.distributed_main
    return spawn(worker, args=(main, cfg, kwargs), nprocs=world)  # type: ignore[no-untyped-call]


_fairseq_call_main = distributed_utils.call_main
distributed_utils.call_main = call_main


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


# --- checkpoints that are whole or absent ---------------------------------------------------------
#
# fairseq 0.12.3 writes the first name of a checkpoint under a temporary one, but copies the other
# names, checkpoint_last.pt among them, in place: a kill leaves half of the file that the training
# is to go on from. It does not wait for the disk, and when writing fails it tries twice more,
# behind what it has already written to the same file, ends with a page of traceback, and leaves
# the rest. Both functions are replaced for local files; elsewhere, and for
# --write-checkpoints-asynchronously, fairseq's own are called.

_save_elsewhere = checkpoint_utils.torch_persistent_save
_copy_elsewhere = PathManager.copy


def save_checkpoint_file(obj: Any, filename: str, async_write: bool = False) -> None:
    """Write a checkpoint; stops the training with one line if that fails."""
    if async_write or not PathManager.supports_rename(filename):
        _save_elsewhere(obj, filename, async_write)
        return
    with _checkpoint_file(filename) as out:
        torch.save(obj, out)


def copy_checkpoint_file(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
    """Give a checkpoint another name too; stops the training with one line if that fails."""
    if not all(map(PathManager.supports_rename, (src_path, dst_path))):
        return bool(_copy_elsewhere(src_path, dst_path, overwrite))
    with open(src_path, "rb") as source, _checkpoint_file(dst_path) as out:
        shutil.copyfileobj(source, out, COPY_BYTES)
    return True


@contextlib.contextmanager
def _checkpoint_file(filename: str) -> Iterator[BinaryIO]:
    """A file with one temporary name for each worker and folder.

    So that what a kill leaves is taken up by the next save, whatever that is of. No pattern for
    checkpoints matches it.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    file = Path(filename)
    try:
        with whole_file(file, file.with_name(f"saving{rank}.part")) as out:
            yield out
    except OSError as error:
        raise SystemExit(
            f"{file} was not saved: {error.strerror or error}; what was saved before is whole"
        ) from None


checkpoint_utils.torch_persistent_save = save_checkpoint_file
PathManager.copy = staticmethod(copy_checkpoint_file)
